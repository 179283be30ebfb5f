"""AVQConfig and AVQLMConfig: bad values get a message, good ones survive a file."""

import json
import math

import pytest
from transformers import GPT2Config

from cortexicon.modeling import AVQConfig, AVQLMConfig, ConfigurationError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_codes": 0}, "num_codes must be an integer >= 1, found 0"),
        ({"hidden_size": -16}, "hidden_size must be an integer >= 1, found -16"),
        ({"patch_length": 0}, "patch_length must be an integer >= 1, found 0"),
        ({"num_latents": 2.5}, "num_latents must be an integer >= 1, found 2.5"),
        ({"num_latents": True}, "num_latents must be an integer >= 1, found True"),
        ({"text_width": "24"}, "text_width must be an integer >= 1, found '24'"),
        ({"num_connectivity_codes": -1}, "num_connectivity_codes must be an integer >= 0"),
        ({"encoder_layers": -1}, "encoder_layers must be an integer >= 0"),
        ({"revival_interval": 0}, "revival_interval must be an integer >= 1"),
        ({"code_dim": 1}, "code_dim must be an integer >= 2, found 1"),
        ({"window_length": 25}, "multiple of patch_length, found 25 and 10. Use 20"),
        ({"window_length": 5}, "multiple of patch_length, found 5 and 10. Use 10"),
        ({"num_attention_heads": 3}, r"hidden_size \(16\) must be divisible .* \(3\)"),
        ({"ema_decay": 1.0}, "ema_decay must be a number from 0.0 to 0.999999, found 1.0"),
        ({"dropout": -0.1}, "dropout must be a number"),
        ({"domain_weight": math.nan}, "domain_weight must be a number"),
        ({"commitment_weight": -1}, "commitment_weight must be a number"),
        ({"sampling_interval": 0}, "sampling_interval must be a number from 0.001 to 60"),
        ({"sampling_interval": 2000}, "sampling_interval must be a number from 0.001 to 60"),
        ({"sampling_interval": None}, "sampling_interval must be a number"),
        ({"token_layout": "latents"}, "'latent' or 'grid', found 'latents'"),
        ({"num_code": 64}, "no field 'num_code'. Did you mean 'num_codes'"),
        ({"patch_lenght": 10}, "no field 'patch_lenght'. Did you mean 'patch_length'"),
        ({"learning_rate": 1}, "AVQConfig has no field 'learning_rate'"),
        ({"region_labels": ["A", "B"]}, "2 region_labels but 10 region_coordinates"),
        ({"region_coordinates": [[0.0, 1.0]]}, r"finite \[x, y, z\] rows"),
        ({"region_coordinates": [[0.0, 1.0, math.nan]]}, r"finite \[x, y, z\] rows"),
        ({"region_coordinates": [[0.0, 1.0, "2"]]}, r"finite \[x, y, z\] rows"),
        ({"region_coordinates": [1.0, 2.0, 3.0]}, r"finite \[x, y, z\] rows"),
        ({"region_coordinates": []}, r"finite \[x, y, z\] rows"),
    ],
)
def test_a_bad_codec_configuration_is_refused(sizes, fields, message):
    with pytest.raises(ConfigurationError, match=message):
        AVQConfig(**{**sizes, **fields})


def test_a_bad_value_in_a_file_is_refused(sizes, tmp_path):
    AVQConfig(**sizes).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"patch_length": 0}))
    with pytest.raises(ConfigurationError, match="patch_length"):
        AVQConfig.from_pretrained(tmp_path)


def test_a_codec_configuration_survives_a_file(sizes, tmp_path):
    config = AVQConfig(**sizes, token_layout="grid", text_model_id="a/b", sampling_interval=1.5)
    config.save_pretrained(tmp_path)
    loaded = AVQConfig.from_pretrained(tmp_path)
    for name in [*sizes, "token_layout", "text_model_id", "sampling_interval"]:
        assert getattr(loaded, name) == getattr(config, name), name
    assert loaded.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [({}, 6), ({"token_layout": "grid"}, 20), ({"num_latents": 5, "window_length": 40}, 20)],
)
def test_tokens_per_window(sizes, fields, tokens):
    assert AVQConfig(**{**sizes, **fields}).tokens_per_window == tokens


def test_tokens_of_the_grid_need_an_atlas(sizes):
    sizes |= {"token_layout": "grid", "region_coordinates": None, "region_labels": None}
    with pytest.raises(ConfigurationError, match="set region_coordinates"):
        _ = AVQConfig(**sizes).tokens_per_window


@pytest.fixture
def parts(sizes):
    """Fields of a valid AVQLMConfig: 100 text tokens, six markers, 32 and 8 codes."""
    return {
        "avq_config": AVQConfig(**sizes),
        "text_config": GPT2Config(vocab_size=146, n_embd=24, n_layer=1, n_head=2),
        "fmri_offset": 106,
        "connectivity_offset": 138,
        "fmri_token_id": 102,
        "bof_token_id": 100,
        "eof_token_id": 101,
        "sep_token_id": 103,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fmri_input": "code"}, "'codes' or 'features', found 'code'"),
        ({"windows_per_prompt": 0}, "windows_per_prompt must be at least 1 without a connectome"),
        ({"windows_per_prompt": 1.5}, "windows_per_prompt must be an integer >= 0, found 1.5"),
        ({"prompts_per_scan": -2}, "prompts_per_scan must be an integer >= 1, found -2"),
        ({"fmri_offset": -1}, "fmri_offset must be an integer >= 0, found -1"),
        ({"bof_token_id": None}, "bof_token_id must be an integer >= 0, found None"),
        ({"connectivity_offset": 137}, r"overlap: 106\.\.137 and 137\.\.144"),
        ({"fmri_offset": 140}, r"overlap: 140\.\.171 and 138\.\.145"),
        ({"fmri_offsets": 140}, "no field 'fmri_offsets'. Did you mean 'fmri_offset'"),
    ],
)
def test_a_bad_composite_configuration_is_refused(parts, fields, message):
    with pytest.raises(ConfigurationError, match=message):
        AVQLMConfig(**{**parts, **fields})


def test_a_composite_configuration_survives_a_file(parts, sizes, tmp_path):
    target = {"name": "age", "question": "How old?", "kind": "number", "minimum": 5, "maximum": 80}
    config = AVQLMConfig(**parts, targets=[target], fmri_input="features", windows_per_prompt=2)
    config.save_pretrained(tmp_path)
    loaded = AVQLMConfig.from_pretrained(tmp_path)
    assert type(loaded.avq_config).__name__ == "AVQConfig"
    assert loaded.avq_config.region_coordinates == sizes["region_coordinates"]
    assert loaded.avq_config.tokens_per_window == 6
    assert loaded.text_config.model_type == "gpt2"
    assert (loaded.vocab_size, loaded.hidden_size) == (146, 24)
    assert loaded.targets == [target]
    names = ["fmri_offset", "connectivity_offset", "fmri_token_id", "bof_token_id"]
    for name in [*names, "eof_token_id", "sep_token_id", "fmri_input", "windows_per_prompt"]:
        assert getattr(loaded, name) == getattr(config, name), name
    assert loaded.tie_word_embeddings is bool(config.text_config.tie_word_embeddings)


def test_a_bad_nested_value_is_refused(parts, sizes):
    with pytest.raises(ConfigurationError, match=r"AVQConfig\.patch_length"):
        AVQLMConfig(**{**parts, "avq_config": {**sizes, "patch_length": 0}})
