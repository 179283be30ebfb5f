"""Cells of an ablation: each is run once, goes on after a kill, and fails in public."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml

from cortexicon.cli import main
from cortexicon.cohorts import Split
from cortexicon.evaluation import EvaluationError
from cortexicon.training import TrainingError, ablation_cell, ablations
from cortexicon.training.ablation_tables import render, write_tables

from .conftest import avq_values, write_yaml

PERSONS = ("r2_per_subject", "r2_per_region", "subject_ids")


def cells_file(folder, cells, **values):
    """A file of cells on the tiny codec, without the adversary."""
    write_yaml(folder / "base.yaml", {**avq_values(folder), "adversary": False})
    content = {"title": "Tiny", "base": "base.yaml", "cells": cells, **values}
    return folder / "tiny.yaml", write_yaml(folder / "tiny.yaml", content)


@pytest.fixture(scope="module")
def ablation(run, tmp_path_factory):
    """Arguments of the command after one call: a base, a cell that ends, and one that fails."""
    folder = tmp_path_factory.mktemp("ablation")
    cells = [
        {"name": "codes-16", "factor": "codes", "set": {"model.num_codes": 16}},
        {"name": "probed", "factor": "adversary", "set": {"adversary": True}},
        {"name": "diverges", "factor": "rate", "set": {"learning_rate": 1.0e30}},
    ]
    path, name = cells_file(folder, cells, common={"max_steps": 10})
    options = ["--cohort", str(run / "cohort"), "--text-model", str(run / "text")]
    options += ["--runs", str(folder / "runs"), "--results", str(folder / "results")]
    assert main(["ablate", name, *options]) == 0
    return folder, path, options


def results_of(folder):
    found = [json.loads(path.read_text()) for path in (folder / "results").glob("*.json")]
    return {result["cell"]: result for result in found}


@pytest.mark.slow
def test_results_choose_by_validation_show_test_and_name_no_person_and_no_machine(ablation, run):
    folder, _, _ = ablation
    results = results_of(folder)
    assert set(results) == {"base", "codes-16", "probed", "diverges"}
    for name in ("base", "codes-16", "probed"):
        result = results[name]
        assert result["status"] == "finished"
        for part in ("validation", "test"):
            low, high = result[part]["r2_interval"]
            assert low is None or low <= result[part]["r2"] <= high  # None: one scan only
            assert 0 < result[part]["codebook"]["usage"] <= 1
            assert set(result[part]["connectivity"]) >= {"full", "deviation"}
            assert not set(PERSONS) & set(result[part])
        assert result["training"]["steps"] == 10
        assert result["training"]["seconds_per_step"] > 0
        assert 50 < result["training"]["peak_memory_mb"] < 20_000
    split = json.loads(next((folder / "runs").glob("split-*.json")).read_text())
    assert results["base"]["data"]["split"] == split["hash"]
    assert results["codes-16"]["arguments"]["model"]["num_codes"] == 16
    assert results["codes-16"]["test"]["codebook"]["num_codes"] == 16
    text = "".join(path.read_text() for path in (folder / "results").glob("*.json"))
    for private in (str(folder), str(run), "participant", *split["folds"][0]["test"]):
        assert private not in text


@pytest.mark.slow
def test_only_the_cell_with_a_text_side_is_probed(ablation):
    results = results_of(ablation[0])
    assert "alignment" not in results["base"]
    # Thirty-two codes may be too few to probe; that, too, is said.
    assert results["probed"]["alignment"].keys() in ({"error"}, {"probes", "geometry"})


@pytest.mark.slow
def test_a_failure_is_a_result_with_the_last_lines_of_its_log(ablation):
    failed = results_of(ablation[0])["diverges"]
    assert failed["status"] == "failed"
    assert "finite" in failed["error"]
    assert "test" not in failed


@pytest.mark.slow
def test_finished_and_failed_cells_are_skipped_and_a_changed_key_is_not(ablation, capsys):
    folder, path, options = ablation
    before = {p: p.stat().st_mtime_ns for p in (folder / "results").iterdir()}
    assert main(["ablate", str(path), *options]) == 0
    assert {p: p.stat().st_mtime_ns for p in (folder / "results").iterdir()} == before
    assert "failed before" in capsys.readouterr().out
    content = yaml.safe_load(path.read_text())
    content["cells"][0]["set"]["model.code_dim"] = 4
    changed = folder / "changed.yaml"
    write_yaml(changed, content)
    assert main(["ablate", str(changed), *options, "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["finished", "to", "finished", "failed"]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_and_scores_as_one_that_was_not(ablation, tmp_path):
    folder, path, options = ablation
    cell = ablations.choose([ablations.read_cells(path)], ["codes-16"])[0]
    place = dict(zip(options[::2], options[1::2], strict=True))
    data = ablations.prepare_data(
        ablations.Path(place["--cohort"]), folder / "runs", ablations.Path(place["--text-model"])
    )
    name = ablations.cell_hash(cell, data)
    values = yaml.safe_load((folder / "runs" / f"{name}.yaml").read_text())
    values["output"] = str(tmp_path / name)
    config = write_yaml(tmp_path / f"{name}.yaml", values)
    arguments = ablations.load_arguments(ablations.AVQArguments, [config])
    # Dies as by kill -9 after step 7, with a state of step 4 (save_steps) on the disk.
    script = (
        "import os, sys\n"
        "from cortexicon.training import ablation_cell, avq\n"
        "real = avq.learning_rate_at\n"
        "avq.learning_rate_at = lambda now, *rest: os._exit(9) if now == 7 else real(now, *rest)\n"
        "ablation_cell.main(sys.argv[1:])\n"
    )
    scores = str(tmp_path / "scores.json")
    killed = subprocess.run([sys.executable, "-c", script, config, scores], check=False)
    assert killed.returncode == 9
    assert (tmp_path / name / "state").is_dir()
    assert ablation_cell.can_resume(tmp_path / name, arguments)
    assert ablation_cell.main([config, scores]) == 0
    resumed = json.loads((tmp_path / "scores.json").read_text())
    whole = results_of(folder)["codes-16"]
    for part in ("validation", "test"):
        assert resumed[part]["r2"] == pytest.approx(whole[part]["r2"], abs=1e-6)
    steps = [line["step"] for line in ablation_cell.log_lines(tmp_path / name) if "loss" in line]
    assert steps == [2, 4, 6, 8, 10]


@pytest.mark.slow
def test_a_run_begun_under_other_arguments_of_the_stage_starts_anew(ablation, tmp_path):
    folder = ablation[0]
    config = next((folder / "runs").glob("*.yaml"))
    arguments = ablations.load_arguments(ablations.AVQArguments, [str(config)])
    (tmp_path / "state").mkdir()
    shutil.copy(next((folder / "runs").glob("*/run.json")), tmp_path / "run.json")
    record = json.loads((tmp_path / "run.json").read_text())
    record["arguments"]["batch_size"] = 3
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert not ablation_cell.can_resume(tmp_path, arguments)


def test_the_hash_covers_what_changes_a_codec_and_nothing_else(tmp_path):
    data = ablations.Data(tmp_path, tmp_path, tmp_path, {"cohort": "a", "split": "b"})

    def hash_of(data=data, **values):
        path, _ = cells_file(tmp_path, [], common=values)
        return ablations.cell_hash(ablations.read_cells(path).cells[0], data)

    usual = hash_of()
    assert hash_of() == usual
    assert hash_of(log_steps=7, save_steps=3, output="elsewhere") == usual
    assert hash_of(**{"model.ema_decay": 0.99}) == usual  # the default, spelled out
    for key, value in (("learning_rate", 3.0e-3), ("model.ema_decay", 0.9), ("batch_size", 9)):
        assert hash_of(**{key: value}) != usual
    assert hash_of(data=data._replace(hashes={"cohort": "c", "split": "b"})) != usual


def result_of(cell, validation=0.5, test=0.4):
    """What a finished run of `cell` would leave."""
    part = {
        "codebook": {"usage": 0.9, "perplexity": 20.0},
        "connectivity": {"full": 0.7, "deviation": 0.5},
    }
    return {
        "cell": cell.name,
        "seed": cell.seed,
        "status": "finished",
        "arguments": ablations.essence(cell.arguments),
        "resolved": ablations.resolved(cell.arguments),
        "data": {"cohort": "a" * 64},
        "validation": {**part, "r2": validation},
        "test": {**part, "r2": test, "r2_interval": [test - 0.01, test + 0.01]},
        "training": {"seconds": 60.0, "seconds_per_step": 0.1, "peak_memory_mb": 900.0},
        "training_r2": 0.6,
        "training_codebook": {"perplexity": 30.0},
    }


def failure_of(cell):
    """What a run of `cell` that diverged would leave."""
    finished = result_of(cell)
    kept = {key: finished[key] for key in ("cell", "seed", "arguments", "resolved", "data")}
    lines = [{"step": 40, "loss": 1.0}]
    return {**kept, "status": "failed", "error": "E: a | b\nc", "last_log_lines": lines}


TWO_CELLS = [
    {"name": "codes-16", "factor": "codes", "set": {"model.num_codes": 16}},
    {"name": "fast", "factor": "rate", "set": {"learning_rate": 1.0}},
]


def test_a_default_that_has_changed_since_makes_a_result_stale(tmp_path):
    cell = ablations.read_cells(cells_file(tmp_path, [])[0]).cells[0]
    assert ablations.state_of(cell, None) == "to do"
    result = result_of(cell)
    assert ablations.state_of(cell, result) == "finished"
    assert ablations.state_of(cell._replace(probe=True), result) == "unprobed"
    del result["resolved"]["weight_decay"]  # an argument that did not exist then
    assert ablations.state_of(cell, result) == "finished"
    result["resolved"]["model"]["ema_decay"] = 0.5
    assert ablations.state_of(cell, result) == "stale"
    assert ablations.state_of(cell, failure_of(cell)) == "failed"


def test_tables_go_between_the_markers_and_the_prose_stays(tmp_path):
    file = ablations.read_cells(cells_file(tmp_path, TWO_CELLS)[0])
    results, document = tmp_path / "results", tmp_path / "RESULTS.md"
    results.mkdir()
    base, codes, fast = file.cells
    for number, result in enumerate((result_of(base), result_of(codes, 0.6), failure_of(fast))):
        (results / f"{number}.json").write_text(json.dumps(result))
    prose = (
        "# Results\n\nBefore.\n\n<!-- ablations: tiny -->\nold\n<!-- end of ablations: tiny -->\n"
    )
    document.write_text(prose + "\nAfter.\n")
    assert write_tables([file], results, document) == 0
    text = document.read_text()
    assert text.startswith("# Results\n\nBefore.\n\n<!-- ablations: tiny -->\n| cell ")
    assert text.endswith("<!-- end of ablations: tiny -->\n\nAfter.\n")
    assert "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert "`model.num_codes=16` | 0.6000 | +0.1000 | 0.4000 [0.390, 0.410] | 0.90" in rows[2]
    assert rows[3].startswith("| **base** | ")
    assert "failed after step 40: E: a / b c" in rows[4]
    assert write_tables([file], results, document) == 0
    assert document.read_text() == text
    document.write_text("# Results\n")
    write_tables([file], results, document)
    assert "\n### Tiny\n\n<!-- ablations: tiny -->\n| cell " in document.read_text()
    document.write_text("# Results\n\n<!-- ablations: tiny -->\n")
    with pytest.raises(EvaluationError, match="end of ablations: tiny"):
        write_tables([file], results, document)


def test_rows_are_sorted_by_validation_and_seeds_are_averaged(tmp_path):
    file = ablations.read_cells(cells_file(tmp_path, TWO_CELLS[:1], seeds=[0, 1])[0])
    known = [
        result_of(cell, validation=0.5 + 0.02 * cell.seed + higher, test=0.3 - higher)
        for cell in file.cells
        for higher in [0.1 if cell.name != "base" else 0.0]
    ]
    table, missing = render(file, known)
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert missing == 0
    assert rows[0].startswith("| codes-16 (2 seeds) |")
    assert "0.6100 ± 0.0141 | +0.1000 | 0.2000" in rows[0]
    assert rows[1].startswith("| **base** (2 seeds) |")
    assert render(file, known[:-1])[1] == 1
    assert render(file, [])[0] == "No cell has been run yet."


def test_cells_of_other_data_stand_apart_beside_their_own_base(tmp_path):
    file = ablations.read_cells(cells_file(tmp_path, TWO_CELLS)[0])
    base, codes, fast = file.cells
    known = [result_of(base, 0.5), result_of(codes, 0.6)]
    other = {"data": {"cohort": "b" * 64}}
    known += [result_of(base, 0.2) | other, result_of(fast, 0.3) | other]
    known += [result_of(codes, 0.9) | {"data": {"cohort": "c" * 64}}]  # known from data of more
    table, missing = render(file, known)
    assert missing == 0
    first, second = table.split("\n\nOn other data:\n\n")
    assert "2 of 3 runs have a result. Data: cohort `aaaaaaaaaaaa`." in first
    assert "| `model.num_codes=16` | 0.6000 | +0.1000 |" in first
    assert "fast" not in first
    assert "| `learning_rate=1.0` | 0.3000 | +0.1000 |" in second
    assert "| **base** |  |  | 0.2000 |" in second
    assert second.endswith("\n\nData: cohort `bbbbbbbbbbbb`.")


def test_probes_have_columns_where_a_cell_was_probed(tmp_path):
    file = ablations.read_cells(cells_file(tmp_path, TWO_CELLS[:1])[0])
    known = [result_of(cell) for cell in file.cells]
    assert "probes" not in render(file, known)[0]
    accuracies = {"logistic": 0.5, "quadratic": 0.6, "mlp": 0.7}
    known[1]["alignment"] = {
        "probes": {name: {"accuracy": value} for name, value in accuracies.items()},
        "geometry": {"neighbour_overlap": 0.55},
    }
    table, _ = render(file, known)
    assert "| 0.50 / 0.60 / 0.70 | 0.55 |" in table
    assert "| - / - / - | - |" in table


def test_what_is_wrong_in_a_file_of_cells_is_said(tmp_path, capsys):
    cell = {"name": "a", "factor": "b", "set": {}}
    for cells, message in (
        ([{**cell, "sets": {}}], "unknown: sets"),
        ([{"name": "a", "set": {}}], "missing: factor"),
        ([cell, cell], "two cells are named 'a'"),
        ([{**cell, "set": {"batchsize": 3}}], "cell 'a': .*Did you mean 'batch_size'"),
        ([{**cell, "set": {"model.code_dims": 3}}], "cell 'a': .*code_dim"),
    ):
        path, _ = cells_file(tmp_path, cells)
        with pytest.raises(TrainingError, match=message):
            ablations.read_cells(path)
    path, name = cells_file(tmp_path, [cell])
    with pytest.raises(TrainingError, match=r"found c\. The files have base, a"):
        ablations.choose([ablations.read_cells(path)], ["c"])
    assert main(["ablate", name, "--cohort", str(tmp_path / "none")]) == 2
    assert "No cohort in" in capsys.readouterr().err


def test_the_cells_of_the_repository_can_be_read(repository):
    for path in sorted((repository / "training/configs/ablations").glob("*.yaml")):
        file = ablations.read_cells(path)
        distinct = {json.dumps([ablations.essence(c.arguments), c.seed]) for c in file.cells}
        assert len(distinct) == len(file.cells), f"{path.name}: two cells are the same run"


def test_an_error_is_published_without_folders_and_without_people(tmp_path):
    fold = {"train": ["sub-1", "sub-12"], "validation": ["7"], "test": ["sub-2"]}
    split = Split("hash", [fold], "a").save(tmp_path / "split.json")
    told = f"no file {tmp_path}/a b, ({tmp_path}/x/y.json) in runs/ablations/z"
    text = f"sub-12, sub-2: {told}, step 70 or 7."
    assert ablation_cell.publishable(text, str(split)) == (
        "SUBJECT, SUBJECT: no file a b, (y.json) in runs/ablations/z, step 70 or SUBJECT."
    )
