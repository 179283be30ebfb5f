"""The checkpoints that come with the repository: small, whole, and under their own terms."""

import re

import pytest
import torch
from transformers import AutoModel, AutoProcessor

import cortexicon  # noqa: F401  registers the Auto classes
from cortexicon.cli import main
from cortexicon.model_cards.checks import card_complaints, code_complaints, secret_complaints


@pytest.fixture(scope="module")
def box(repository):
    folder = repository / "checkpoints"
    if not list(folder.glob("*/config.json")):
        pytest.skip("the box is empty: make checkpoints COHORT=../shared/data/abide1_cc200")
    return folder


def folders(box):
    found = sorted(path.parent for path in box.glob("*/config.json"))
    assert found
    return found


def test_the_box_is_small(box):
    assert sum(path.stat().st_size for path in box.rglob("*") if path.is_file()) <= 15e6


def test_each_has_its_terms_card_and_results(box):
    for folder in folders(box):
        assert "cc-by-nc-sa" in (folder / "LICENSE").read_text()
        assert "license: cc-by-nc-sa" in (folder / "README.md").read_text()
        for name in ("results.json", "run.json", "model.safetensors"):
            assert (folder / name).is_file(), name
        assert card_complaints(folder) == []
        assert secret_complaints(folder) == []


def test_code_is_the_repository_s_and_whole(box):
    for folder in folders(box):
        assert code_complaints(folder) == []
        for path in folder.glob("*.py"):
            for name in re.findall(r"^from \.(\w+) import", path.read_text(), re.MULTILINE):
                assert (folder / f"{name}.py").is_file(), (
                    f"{path} needs {name}.py: make checkpoints"
                )


def test_the_readme_s_twelve_lines_run(box, repository, monkeypatch):
    monkeypatch.chdir(repository)
    text = (repository / "README.md").read_text(encoding="utf-8")
    scope = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], scope)
    assert scope["box"] == "checkpoints/avq_abide_cc200"
    assert scope["codes"].shape == (3, 128)
    assert scope["own"].shape == (1, 64)
    assert scope["series"].shape == (3, 80, 200)
    assert scope["matrix"].shape == (1, 200, 200)


def test_both_streams_stand_in_one_vocabulary(box):
    folder = box / "avq_abide_cc200"
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    connectome = AutoModel.from_pretrained(folder, subfolder="connectome")
    assert model.config.text_table_sha256 == connectome.config.text_table_sha256 is not None
    noise = torch.randn(170, 200, generator=torch.Generator().manual_seed(0)).numpy() + 100
    scan = processor(fmri=noise, tr=2.0)
    ids = processor(
        text="Age?",
        codes=model.encode(scan["input_values"]).codes,
        connectivity_codes=connectome.encode(scan["connectivity"]).codes,
    )["input_ids"][0]
    tokens = processor.tokenizer
    for offset, codes, wanted in (
        (tokens.fmri_offset, model.config.num_codes, len(scan["input_values"]) * 128),
        (tokens.connectivity_offset, connectome.config.num_codes, 64),
    ):
        assert int(((ids >= offset) & (ids < offset + codes)).sum()) == wanted


def test_its_card_runs(box, monkeypatch):
    text = (box / "avq_abide_cc200" / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    code = re.sub(r'checkpoint = "[^"]*"', f'checkpoint = "{box / "avq_abide_cc200"}"', code)
    series = torch.randn(170, 200, generator=torch.Generator().manual_seed(0)).numpy() + 100
    scope = {"series": series}
    exec(code, scope)
    assert scope["decoded"].shape[1:] == (80, 200)
    assert scope["matrix"].shape == (1, 200, 200)


def test_info_names_both_streams(box, capsys):
    assert main(["info", str(box / "avq_abide_cc200")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"tokens +128 per window", printed)
    stream = re.search(r"connectivity +64 per scan, 8192 codes, fingerprint (\w{12})", printed)
    assert main(["info", str(box / "avq_abide_cc200" / "connectome")]) == 0
    assert f"fingerprint {stream[1]}" in capsys.readouterr().out
