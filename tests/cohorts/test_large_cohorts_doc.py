"""The Python in docs/large_cohorts.md runs as it stands."""

import re

import pytest

from cortexicon.cohorts import save_cohort, simulate_cohort


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("doc")
    save_cohort(simulate_cohort(num_subjects=24, num_regions=28, seed=0), path / "COHORT", 6)
    return path


@pytest.mark.parametrize("number", [0, 1])
def test_each_block_runs(repository, folder, monkeypatch, number):
    text = (repository / "docs" / "large_cohorts.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(compile(blocks[number], f"large_cohorts.md, block {number}", "exec"), names)
    if number == 0:
        assert names["batch"].shape == (8, 80, 28)
    else:
        assert names["inputs"]["input_values"].shape[1:] == (80, 28)
