"""The checkpoints that come with the repository: small, whole, and under their own terms."""

import re

import pytest
import torch
from transformers import AutoModel, AutoProcessor

import cortexicon  # noqa: F401  registers the Auto classes
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


def test_the_codec_encodes_and_decodes(box):
    folder = box / "avq_abide_cc200"
    model = AutoModel.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    noise = torch.randn(170, 200, generator=torch.Generator().manual_seed(0)).numpy() + 100
    scan = processor.feature_extractor(noise, tr=2.0)
    codes = model.encode(**{name: scan[name] for name in scan if name != "num_windows"}).codes
    assert codes.shape[1] == 128
    assert model.decode(codes).reconstruction.shape[1:] == (80, 200)
