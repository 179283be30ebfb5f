"""Loading checkpoint folders, whole and damaged, and the commands that use them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cortexicon.cli import main
from cortexicon.cohorts import load_cohort, save_cohort
from cortexicon.inference import InferenceError, load_checkpoint


def test_a_saved_checkpoint_loads_exactly(codec, feature_extractor, checkpoint_folder):
    found = load_checkpoint(checkpoint_folder)
    assert found.model_type == "avq"
    assert found.model is found.codec
    assert not found.model.training
    assert found.codec.codebook_fingerprint() == codec.codebook_fingerprint()
    assert found.processor.feature_extractor.window_length == feature_extractor.window_length
    assert found.processor.tokenizer.num_codes == 32


def truncate_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["encoder_out.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def poison_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights["encoder_out.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def remove_config(folder):
    (folder / "config.json").unlink()


def break_config(folder):
    (folder / "config.json").write_text("{")


def other_model(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))


def remove_processor(folder):
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_weights, "truncated or corrupted"),
        (drop_a_weight, "1 missing, such as encoder_out.weight"),
        (poison_a_weight, "encoder_out.weight holds NaN"),
        (remove_config, "expected config.json"),
        (break_config, "not valid JSON"),
        (other_model, "'avq' or 'avq_lm', found 'gpt2'"),
        (remove_processor, "processor"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(checkpoint_folder, damage, message):
    damage(checkpoint_folder)
    with pytest.raises(InferenceError, match=message) as caught:
        load_checkpoint(checkpoint_folder)
    assert str(checkpoint_folder) in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InferenceError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere")


def test_encode_decode_and_info_commands(checkpoint_folder, cohort, tmp_path, capsys):
    save_cohort(cohort, tmp_path / "cohort")
    codes, decoded = tmp_path / "codes.parquet", tmp_path / "decoded"
    arguments = [str(checkpoint_folder), str(tmp_path / "cohort"), "--out", str(codes)]
    assert main(["encode", *arguments]) == 0
    captured = capsys.readouterr()
    assert f"codes of 6 scans -> {codes}" in captured.out
    assert "left out short" in captured.err
    assert main(["decode", str(checkpoint_folder), str(codes), "--out", str(decoded)]) == 0
    assert str(decoded) in capsys.readouterr().out
    assert len(load_cohort(decoded)) == 6
    assert main(["info", str(checkpoint_folder)]) == 0
    assert "8 per window (latent layout)" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_one_message_on_the_command_line(checkpoint_folder, capsys):
    truncate_weights(checkpoint_folder)
    assert main(["info", str(checkpoint_folder)]) == 2
    captured = capsys.readouterr()
    assert "truncated or corrupted" in captured.err
    assert "Traceback" not in captured.err
