"""What `publish` looks for in an adapter: codecs, and rows of codes that are one person's."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cortexicon._publish_adapter import privacy_of
from cortexicon.inference import exposure, load_checkpoint
from cortexicon.model_cards import PublishError


@pytest.fixture
def adapter(run_folder, tmp_path):
    """A folder with an adapter of the small run's language model; more tensors can be given."""

    def write(indices=None, **tensors):
        saved = load_file(run_folder / "adapter" / "adapter_model.safetensors")
        start = "base_model.model."
        saved |= {f"{start}{name.replace('__', '.')}": values for name, values in tensors.items()}
        save_file(saved, tmp_path / "adapter_model.safetensors")
        config = json.loads((run_folder / "adapter" / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(run_folder / "two")
        config["trainable_token_indices"] = indices
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.fixture
def base(run_folder):
    return load_checkpoint(run_folder / "two")


DELTA = "language_model__transformer__wte__token_adapter__trainable_tokens_delta"


def test_factors_of_layers_hold_no_code(adapter, run_folder):
    assert "no row of a code" in privacy_of(adapter(), run_folder / "cohort")


def test_rows_of_markers_are_no_codes(adapter, base, run_folder):
    markers = [base.model.config.bof_token_id, base.model.config.eof_token_id]
    folder = adapter({"language_model.transformer.wte": markers}, **{DELTA: torch.ones(2, 16)})
    assert "no row of a code" in privacy_of(folder, run_folder / "cohort")


def test_a_changed_codec_is_no_adapter(adapter, run_folder):
    folder = adapter(avq__quantizer__codebook=torch.zeros(8, 4))
    with pytest.raises(PublishError, match=r"avq\.quantizer\.codebook, which changes the codec"):
        privacy_of(folder, run_folder / "cohort")


@pytest.mark.parametrize("stream", ["avq", "connectome"])
def test_a_row_that_is_one_persons_latent_is_refused(
    adapter, base, run_folder, monkeypatch, stream
):
    from cortexicon import _publish_facts as gather
    from cortexicon._publish_checkpoint import streams_of

    run = gather.read_run(run_folder / "two", run_folder / "cohort")
    codec, latents, _ = streams_of(base, run)[stream]
    config = base.model.config
    offset = config.fmri_offset if stream == "avq" else config.connectivity_offset
    rows = codec.projection(latents.vectors[5:6]).detach()
    indices = {"language_model.transformer.wte": [offset + 3]}
    folder = adapter(indices, **{DELTA: rows})
    # With so few codes five people map to any of them; here nothing short of everybody will do.
    monkeypatch.setattr(exposure, "SUBJECTS", 10**6)
    with pytest.raises(PublishError, match="lie within cosine"):
        privacy_of(folder, run_folder / "cohort")
    moved = codec.project_codebook().detach().clone()
    moved[3] = rows
    found = exposure.find_exposed_rows(codec, moved, latents)
    assert 3 in found.exposed
    assert found.highest_cosine == pytest.approx(1.0, abs=1e-5)

    # Far from everybody it passes, and the card says that it was compared.
    folder = adapter(indices, **{DELTA: rows * 0 + torch.linspace(-9, 9, 16)})
    monkeypatch.setattr(exposure, "SUBJECTS", 1)
    assert "rows of codes were compared" in privacy_of(folder, run_folder / "cohort")


def test_a_whole_table_is_compared_too(adapter, base, run_folder, monkeypatch):
    table = base.model.get_input_embeddings().weight.detach()
    folder = adapter(language_model__transformer__wte__weight=table + 0.1)
    monkeypatch.setattr(exposure, "SUBJECTS", 1)
    assert "rows of codes were compared" in privacy_of(folder, run_folder / "cohort")
    folder = adapter(language_model__transformer__wte__lora_embedding_A=torch.zeros(2, 275))
    with pytest.raises(PublishError, match="which nobody can compare"):
        privacy_of(folder, run_folder / "cohort")


def test_without_its_base_nothing_can_be_compared(adapter, run_folder):
    folder = adapter({"language_model.transformer.wte": [257]}, **{DELTA: torch.ones(1, 16)})
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "user/reader"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PublishError, match="the folder of the base with its run"):
        privacy_of(folder, run_folder / "cohort")
