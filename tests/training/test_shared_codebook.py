"""What the streams are compared by: one codebook for both, alignment of the connectivity stream."""

import json

import pytest

from cortexicon import cli
from cortexicon._alignment import read_text_side
from cortexicon.evaluation import probes
from cortexicon.inference import load_connectome
from cortexicon.modeling.alignment_avq import tensor_sha256
from cortexicon.training import TrainingError, connectome, shared_codebook

from .conftest import connectome_values, write_yaml


@pytest.fixture(scope="module")
def stream(run, tmp_path_factory):
    """A connectivity stream with codes as wide and as many as the tiny codec's."""
    folder = tmp_path_factory.mktemp("stream")
    values = connectome_values(run) | {"output": str(folder / "connectome")}
    values["model"] |= {"num_codes": 32, "code_dim": 8, "num_directions": 2}
    assert connectome.main([write_yaml(folder / "stream.yaml", values)]) == 0
    return folder


def test_one_codebook_is_measured_beside_two(run, stream, tmp_path, capsys):
    argv = [str(run / "avq"), str(stream / "connectome"), str(run / "cohort")]
    argv += ["--split", str(run / "split.json"), "--json", str(tmp_path / "shared.json")]
    assert shared_codebook.main(argv) == 0
    rows = json.loads((tmp_path / "shared.json").read_text())["rows"]
    trained, own, half, both = rows.values()
    assert list(rows)[3] == "k-means, 32 codes for both"
    # Half as many codes keep less of a matrix; a shared book uses its codes for two kinds.
    assert half["correlation"] < own["correlation"] + 0.02
    assert both["usage"] < 1
    assert both["connectivity_usage"] < 1
    assert trained["correlation"] == pytest.approx(own["correlation"], abs=0.1)
    assert "| k-means, 32 codes for both | " in capsys.readouterr().out
    # Checkpoints stay as they were.
    assert shared_codebook.main(argv) == 0
    assert json.loads((tmp_path / "shared.json").read_text())["rows"] == rows


def test_codes_of_two_widths_cannot_share(run, two_stream_run, tmp_path):
    argv = [str(run / "avq"), str(two_stream_run / "connectome"), str(run / "cohort")]
    argv += ["--split", str(run / "split.json"), "--json", str(tmp_path / "shared.json")]
    with pytest.raises(TrainingError, match=r"model\.code_dim=8 model\.num_codes=32"):
        shared_codebook.main(argv)


def test_without_the_adversary_p_knows_nothing_of_the_text_but_its_scale(
    run, tmp_path, monkeypatch
):
    """`alignment` reads this stream too; only with the adversary do P's codes lie where text is."""
    monkeypatch.setattr(probes, "STEPS", 20)
    monkeypatch.setattr(probes, "ITERATIONS", 2)
    values = connectome_values(run) | {"fit_validation": False, "steps": 2}
    values["model"] |= {"num_codes": 256, "domain_weight": 0.01, "energy_weight": 1.0}
    write_yaml(tmp_path / "c.yaml", values)
    for name, adversary in (("on", "true"), ("off", "false")):
        argv = ["train", "avq", str(tmp_path / "c.yaml"), "--set", f"output={tmp_path / name}"]
        assert cli.main([*argv, f"adversary={adversary}"]) == 0
    config = json.loads((tmp_path / "off" / "config.json").read_text())
    assert config["domain_weight"] == config["energy_weight"] == 0
    table, _ = read_text_side(str(run / "text"), tmp_path / "on")
    away = {}
    for name in ("on", "off"):
        model = load_connectome(tmp_path / name)
        assert model.config.text_table_sha256 == tensor_sha256(table)
        rows = model.project_codebook().detach()
        away[name] = float((rows.var(0) / table.var(0)).log().abs().mean())
    assert away["on"] < away["off"]
    argv = ["alignment", str(tmp_path / "on"), str(run / "text"), str(run / "cohort")]
    argv += ["--split", str(run / "split.json"), "--json", str(tmp_path / "a.json")]
    assert cli.main([*argv, "--off", str(tmp_path / "off")]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert rows["adversary_off"]["classifier_accuracy"] is None
    assert 0 <= rows["codes"]["classifier_accuracy"] <= 1
    assert rows["codes"]["codes"] <= 48  # twelve training scans of four codes
