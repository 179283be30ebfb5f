"""`cortexicon benchmark` through the command line, with systems that are scripts of this file."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import yaml

from cortexicon import cli
from cortexicon.cohorts import build_cohort, load_cohort, make_split, save_cohort
from cortexicon.evaluation import EvaluationError
from cortexicon.evaluation.baselines import PERMUTATIONS
from cortexicon.training.arguments import TrainingError
from cortexicon.training.benchmark_cell import filled
from cortexicon.training.benchmark_controls import control_cohort
from cortexicon.training.benchmark_scores import cell_rows
from cortexicon.training.benchmark_suite import read_suite

# A system that reads a prompt of so many tokens: with `fixed` everybody has as many, with `leaky`
# a longer scan has more. It knows no brain: what it predicts, it has from the number alone.
SYSTEM = """
import csv, json, sys
cohort, split, fold, out, cost, kind = sys.argv[1:7]
with open(cohort + "/participants.tsv") as file:
    people = {row["subject_id"]: row for row in csv.DictReader(file, delimiter="\\t")}
fold_number, fold = int(fold), json.load(open(split))["folds"][int(fold)]
def tokens(name):
    return 8 if kind == "fixed" else int(people[name]["n_timepoints"]) // 10
ages = {}
for name in fold["train"] + fold["validation"]:
    ages.setdefault(tokens(name), []).append(float(people[name]["age"]))
everybody = [age for some in ages.values() for age in some]
with open(out, "w") as file:
    print("subject_id,y,y_hat,system,target,fold,part", file=file)
    for name in fold["test"]:
        mine = sorted(ages.get(tokens(name), everybody))
        print(name, people[name]["age"], mine[len(mine) // 2], "x", "age", fold_number, "test",
              sep=",", file=file)
json.dump({"parameters": 3, "tokens_per_scan": 8}, open(cost, "w"))
"""
ARGUMENTS = ["{cohort}", "{split}", "{fold}", "{out}", "{cost}"]


def make_cohort(folder, effect=1.0):
    """Sixty people of two sites: children with short scans, adults with long ones."""
    generator = np.random.default_rng(0)
    site = np.array(["A", "B"])[np.arange(60) % 2]
    age = np.where(site == "A", 10.0, 30.0) + generator.normal(0, 2, 60)
    lengths = np.where(site == "A", 60, 90)
    participants = pd.DataFrame(
        {
            "subject_id": [f"s{i:02d}" for i in range(60)],
            "session": "1",
            "site": site,
            "tr": 2.0,
            "n_timepoints": lengths,
            "age": age,
            "sex": np.where(generator.random(60) < 0.5, "F", "M"),
            "func_mean_fd": generator.gamma(2.0, 0.05, 60),
        }
    )
    scans = []
    for years, length in zip(age, lengths, strict=True):
        values = generator.normal(size=(length, 6))
        values[:, 1] += effect * values[:, 0] * years / 20
        scans.append(values.astype(np.float32))
    regions = pd.DataFrame({"label": list("abcdef"), "x": 0.0, "y": range(6), "z": 1.0})
    return save_cohort(build_cohort(np.concatenate(scans), participants, regions, "six"), folder)


@pytest.fixture(scope="module")
def cohort_folder(tmp_path_factory):
    return make_cohort(tmp_path_factory.mktemp("benchmark") / "cohort")


def write_suite(path, cohort_folder, systems, **changes):
    suite = {
        "title": "Six regions",
        "cohort": str(cohort_folder),
        "targets": ["age", "sex"],
        "num_resamples": 20,
        "splits": {"held-out subjects": {"scheme": "site_stratified", "folds": [0]}},
        "systems": systems,
        **changes,
    }
    path.write_text(yaml.safe_dump(suite))
    return path


def run(suite, out, *options):
    return cli.main(["benchmark", str(suite), "--out", str(out), *options])


class Benchmark(NamedTuple):
    """One run of everything, which several tests look at."""

    suite: Path
    out: Path
    outside: Path
    fold: dict
    code: int

    @property
    def results(self):
        return json.loads((self.out / "results.json").read_text())

    @property
    def age(self):
        return self.results["scores"]["held-out subjects"]["age"]


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory, cohort_folder):
    folder = tmp_path_factory.mktemp("suite")
    scripts = {
        "system": SYSTEM,
        "cheat": SYSTEM.replace('fold["test"]', 'fold["test"] + fold["train"][:1]'),
        "broken": "raise SystemExit('no such weights')",
    }
    for name, text in scripts.items():
        (folder / f"{name}.py").write_text(text)

    def entry(name, script, kind="fixed", **more):
        steps = [["python", str(folder / f"{script}.py"), *ARGUMENTS, kind]]
        return {"name": name, "kind": "command", "steps": steps, **more}

    outside, noise = folder / "outside.csv", ["noise scan"]
    systems = [
        entry("fixed tokens", "system", controls=noise),
        entry("leaky tokens", "system", "leaky", controls=noise, what="as long as the scan"),
        entry("toy", "system", ranked=False, reason="it is a toy"),
        entry("cheat", "cheat"),
        entry("broken", "broken"),
        {"name": "other lab", "kind": "file", "files": [str(outside)]},
    ]
    cohort = load_cohort(cohort_folder)
    fold = make_split(cohort, "site_stratified")[0]
    suite = write_suite(folder / "suite.yaml", cohort_folder, systems)
    write_outside(outside, cohort, fold["test"])
    code = run(suite, folder / "results", "--jobs", "2")
    return Benchmark(suite, folder / "results", outside, fold, code)


def write_outside(path, cohort, subjects, **changes):
    rows = pd.DataFrame({"subject_id": subjects})
    rows["y"] = cohort.participants.loc[subjects, "age"].to_numpy()
    rows = rows.assign(y_hat=rows["y"] + 1, system="x", target="age", fold=0, part="test")
    rows.assign(**changes).to_csv(path, index=False)


def test_a_prompt_whose_number_of_tokens_tells_the_length_of_the_scan_fails_its_control(benchmark):
    age = benchmark.age
    verdicts = {name: verdict["passes"] for name, verdict in age["controls"].items()}
    assert verdicts["fixed tokens: noise scan"] is True
    assert verdicts["leaky tokens: noise scan"] is False
    assert age["systems"]["leaky tokens: noise scan"]["mae"] < 4
    assert age["systems"]["cohort median"]["mae"] > 8
    assert age["controls"]["permuted labels (control)"]["passes"] is True
    assert age["systems"]["permuted labels (control)"]["num_seeds"] == PERMUTATIONS
    page = (benchmark.out / "report.html").read_text()
    assert "Controls that fail; do not believe" in page
    assert "leaky tokens: noise scan (age, held-out subjects)" in page


def test_the_plain_rows_stand_in_every_table_with_their_cost(benchmark):
    results = benchmark.results
    scores = results["scores"]["held-out subjects"]
    for name in ("site mean", "scan length + TR + site", "motion", "kernel ridge on connectivity"):
        assert name in scores["age"]["ranking"], name
    assert "SVM on connectivity" in scores["sex"]["ranking"]
    table = pd.read_csv(benchmark.out / "scores.csv").set_index(["target", "system"])
    for target in ("age", "sex"):
        score = "mae" if target == "age" else "auc"
        for name, mine in scores[target]["systems"].items():
            assert table.loc[(target, name), "value"] == pytest.approx(mine[score], rel=1e-3)
    assert not table.loc[("age", "toy"), "ranked"]
    assert not table.loc[("age", "leaky tokens: noise scan"), "control_passes"]
    cost = results["systems"]["leaky tokens"]["cost"]
    assert cost["parameters"] == 3
    assert cost["tokens_per_scan"] == 8
    assert cost["seconds"] > 0
    assert cost["peak_memory_mb"] > 1
    assert results["command"].startswith("cortexicon")
    assert "commit" in results["environment"]
    assert not any(name in (benchmark.out / "results.json").read_text() for name in ("s00", "s59"))
    page = (benchmark.out / "report.html").read_text()
    assert "as long as the scan" in page
    figures = ("systems", "controls", "distribution", "scatter", "sites", "cost", "calibration")
    for figure in figures:
        assert (benchmark.out / "figures" / f"{figure}_held_out_subjects_age.png").is_file()
        assert f'id="{figure}_held_out_subjects_age"' in page


def test_what_fails_is_a_result_and_what_is_not_ranked_says_why(benchmark):
    errors = {cell["system"]: cell.get("error", "") for cell in benchmark.results["cells"]}
    assert benchmark.code == 1
    assert "no such weights" in errors["broken"]
    assert "found 1 others" in errors["cheat"]
    assert benchmark.age["unranked"] == ["toy"]
    assert "toy" not in benchmark.age["ranking"]
    page = (benchmark.out / "report.html").read_text()
    assert page.count("toy (not ranked)") >= 3
    assert "Not ranked: it is a toy" in page
    assert "2 cells have no result" in page


def test_predictions_from_elsewhere_are_checked_against_the_folds(benchmark, cohort, capsys):
    age = benchmark.age
    assert age["ranking"][0] == "other lab"
    assert age["systems"]["other lab"]["mae"] == pytest.approx(1.0)
    assert benchmark.results["systems"]["other lab"]["seen"] == "unknown"
    assert age["systems"]["other lab"]["p_reference"] < 0.05
    before = (benchmark.out / "results.json").read_bytes()
    for subjects, changes, message in (
        (benchmark.fold["train"][:3], {}, "found 3 others"),
        (benchmark.fold["test"], {"y": 3.0}, "the predictions say 3.0"),
        (benchmark.fold["test"], {"fold": 1}, "in fold 1"),
    ):
        write_outside(benchmark.outside, cohort, subjects, **changes)
        assert run(benchmark.suite, benchmark.out, "--report") == 2
        assert message in capsys.readouterr().err
    write_outside(benchmark.outside, cohort, benchmark.fold["test"])
    assert (benchmark.out / "results.json").read_bytes() == before


def test_answers_about_validation_people_are_left_out_and_training_people_refused(
    cohort_folder, tmp_path
):
    """`train encoder-lm` and `train vlm` write both: readouts are chosen by validation people."""
    cohort = load_cohort(cohort_folder)
    split = make_split(cohort, "site_stratified")
    system = SimpleNamespace(kind="command", name="reader")
    cell = SimpleNamespace(split=split, fold=0, control="", seed=0, system=system)

    def file(name, **subjects):
        parts = []
        for part, people in subjects.items():
            write_outside(tmp_path / "part.csv", cohort, people, part=part)
            parts.append(pd.read_csv(tmp_path / "part.csv"))
        pd.concat(parts).to_csv(tmp_path / name, index=False)
        return [tmp_path / name]

    fold = split[0]
    both = file("both.csv", validation=fold["validation"], test=fold["test"])
    found = cell_rows(both, cell, cohort, ["age"])
    assert sorted(found["subject_id"]) == sorted(fold["test"])
    alone = file("alone.csv", validation=fold["validation"])
    with pytest.raises(EvaluationError, match="no prediction of a test subject"):
        cell_rows(alone, cell, cohort, ["age"])
    stranger = file("stranger.csv", validation=fold["train"][:2], test=fold["test"])
    with pytest.raises(EvaluationError, match=r"part 'validation'.*found 2 others"):
        cell_rows(stranger, cell, cohort, ["age"])


def test_cells_that_have_an_outcome_are_not_run_again(benchmark, capsys):
    assert run(benchmark.suite, benchmark.out, "--list") == 0
    states = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert sorted(states) == ["failed"] * 2 + ["finished"] * 6
    assert run(benchmark.suite, benchmark.out, "--only", "nobody") == 2
    assert "the suite runs standard, fixed tokens" in capsys.readouterr().err


def test_a_killed_benchmark_goes_on(cohort_folder, tmp_path, repository):
    """The first step is not repeated, the second learns that it was under way."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time, pathlib\n"
        "run, name, resume = sys.argv[1:]\n"
        "folder = pathlib.Path(run); folder.mkdir(exist_ok=True)\n"
        "with (folder / 'calls.txt').open('a') as file: print(name, resume, file=file)\n"
        "if name == 'second' and resume == 'false': time.sleep(60)\n"
        "if name == 'second': sys.exit('ended as planned')\n"
    )
    steps = [["python", str(script), "{run}", name, "{resume}"] for name in ("first", "second")]
    systems = [{"name": "slow", "kind": "command", "steps": steps}]
    suite = write_suite(tmp_path / "suite.yaml", cohort_folder, systems)
    out = tmp_path / "results"
    command = [sys.executable, "-m", "cortexicon.cli", "benchmark", str(suite), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    with subprocess.Popen([*command, "--only", "slow"], env=environment) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            calls = [path.read_text() for path in out.glob("cells/*/run/calls.txt")]
            if any("second" in text for text in calls):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    assert not list(out.glob("cells/*/outcome.json"))
    assert run(suite, out, "--only", "slow") == 1
    (calls,) = out.glob("cells/*/run/calls.txt")
    assert calls.read_text().splitlines() == ["first false", "second false", "second true"]
    (outcome,) = out.glob("cells/*/outcome.json")
    assert "ended as planned" in outcome.read_text()


def test_shared_steps_run_once_on_the_true_cohort_and_every_cell_pays_for_them(
    cohort_folder, tmp_path
):
    """A system and its permuted labels share a codec; noise in place of scans needs its own."""
    script = tmp_path / "codec.py"
    script.write_text(
        "import sys, time, pathlib\n"
        "shared, cohort = map(pathlib.Path, sys.argv[1:])\n"
        "shared.mkdir(); time.sleep(0.4)\n"
        "(shared / 'cohort.txt').write_text(str(cohort.resolve()))\n"
    )
    reader = tmp_path / "reader.py"
    reader.write_text(f"import sys; open(sys.argv.pop(1) + '/cohort.txt')\n{SYSTEM}")
    entry = {
        **{"kind": "command", "shared": [["python", str(script), "{shared}", "{cohort}"]]},
        **{"steps": [["python", str(reader), "{shared}", *ARGUMENTS, "fixed"]]},
    }
    systems = [
        {"name": "one", **entry, "controls": ["permuted labels", "noise scan"]},
        {"name": "two", **entry},
    ]
    suite = write_suite(tmp_path / "suite.yaml", cohort_folder, systems)
    out = tmp_path / "results"
    assert run(suite, out, "--only", "one", "two", "--jobs", "2") == 0
    cells = [json.loads(path.read_text()) for path in out.glob("cells/*/cell.json")]
    folders = {(cell["name"], cell["control"]): cell["shared"]["folder"] for cell in cells}
    assert folders["one", ""] == folders["one", "permuted labels"] == folders["two", ""]
    assert folders["one", "noise scan"] != folders["one", ""]
    read = {Path(path, "run/cohort.txt").read_text() for path in folders.values()}
    assert read == {
        str(Path(cohort_folder).resolve()),
        *(str(path.resolve()) for path in out.glob("cohorts/noise_scan-*")),
    }
    outcomes = [json.loads(path.read_text()) for path in out.glob("cells/*/outcome.json")]
    assert len(outcomes) == 4
    assert all(outcome["seconds"] > 0.4 for outcome in outcomes)


@pytest.fixture(scope="module")
def cohort(cohort_folder):
    return load_cohort(cohort_folder)


def test_control_cohorts_break_what_they_should_and_nothing_else(cohort):
    people = cohort.participants
    permuted = control_cohort(cohort, "permuted labels", ["age"], 0)
    assert sorted(permuted.participants["age"]) == sorted(people["age"])
    assert (permuted.participants["age"] != people["age"]).mean() > 0.9
    assert (permuted.participants["sex"] == people["sex"]).all()
    np.testing.assert_array_equal(permuted.series("s03").values, cohort.series("s03").values)
    # Held-out people's labels stay among them: training people must not even have their mean.
    table = people.assign(recommended=np.arange(len(people)) > 5)
    some = build_cohort(
        np.concatenate([cohort.series(name).values for name in people.index]),
        table.reset_index(),
        cohort.regions,
        cohort.atlas,
    )
    held_out = people.index[people["site"] == "B"][:20]
    train = people.index[people["site"] == "A"]
    parts = {"train": list(train[3:]), "test": list(held_out)}  # three of no part
    mixed = control_cohort(some, "permuted labels", ["age"], 0, parts).participants["age"]
    for group in (held_out, train):
        assert sorted(mixed[group]) == sorted(people.loc[group, "age"])
    assert (mixed[train[:3]] != people.loc[train[:3], "age"]).any()
    rest = people.index.difference([*held_out, *train])
    assert (mixed[rest] == people.loc[rest, "age"]).all()  # of sites that nobody is trained on
    noisy = control_cohort(some, "noise scan", ["age"], 0)
    assert not np.array_equal(noisy.series("s00").values, cohort.series("s00").values)
    other = control_cohort(cohort, "another scan", ["age"], 0)
    assert (other.participants["age"] == people["age"]).all()
    for name in people.index:
        scan = other.series(name)
        assert len(scan.values) == other.participants.loc[name, "n_timepoints"]
        mine = cohort.series(name).values
        assert mine.shape != scan.values.shape or not np.array_equal(mine, scan.values)
    noise = control_cohort(cohort, "noise scan", ["age"], 0)
    assert (noise.participants["n_timepoints"] == people["n_timepoints"]).all()
    values = np.concatenate([noise.series(name).values for name in people.index])
    assert np.abs(np.corrcoef(values.T)[~np.eye(6, dtype=bool)]).max() < 0.05
    with pytest.raises(TrainingError, match="found 'sleep'"):
        control_cohort(cohort, "sleep", ["age"], 0)


GOOD = {"name": "a", "kind": "command", "steps": [["python", "{out}"]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": [["python", "{outt}"]]}, "unknown placeholder 'outt'"),
        ({"steps": ["python {out}"]}, "each a list of arguments"),
        ({"shared": [["python", "{out}"]]}, "shared: unknown placeholder 'out'"),
        ({"steps": [["python", "{out"]]}, "for a brace"),
        ({"kind": "magic"}, "kind of baseline, command, file"),
        ({"files": []}, "unknown: files"),
        ({"ranked": False}, "needs a `reason`"),
        ({"reason": "none"}, "needs a `reason`"),
        ({"seen": "perhaps"}, "seen must be one of"),
        ({"controls": ["sleep"]}, "expected controls of permuted labels"),
        ({"controls": [{"blank image": ["--blank"]}]}, "no step holds the argument"),
        ({"name": "standard"}, "two systems are named 'standard'"),
        ({"kind": "baseline", "steps": None, "features": "x"}, "unknown: steps"),
        ({"more_scans": True}, "unknown: more_scans"),
    ],
)
def test_a_wrong_suite_is_refused(tmp_path, change, message):
    with pytest.raises(TrainingError, match=message):
        read_suite(write_suite(tmp_path / "s.yaml", "cohort", [{**GOOD, **change}]))


def test_controls_can_be_run_in_some_of_the_folds(cohort_folder, tmp_path, capsys):
    entry = {"scheme": "site_stratified", "num_folds": 2, "control_folds": [1]}
    system = {**GOOD, "controls": ["noise scan"]}
    suite = tmp_path / "s.yaml"
    write_suite(suite, cohort_folder, [system], splits={"people": entry})
    assert run(suite, tmp_path / "out", "--list", "--only", GOOD["name"]) == 0
    lines = [line.split("to do")[1] for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3
    (controlled,) = [line for line in lines if "noise scan" in line]
    assert "fold 1" in controlled
    own = {**system, "control_folds": {"people": [0, 1]}}
    write_suite(suite, cohort_folder, [own], splits={"people": entry})
    assert run(suite, tmp_path / "out", "--list", "--only", GOOD["name"]) == 0
    assert capsys.readouterr().out.count("noise scan") == 2
    write_suite(suite, cohort_folder, [system], splits={"people": {**entry, "folds": [0]}})
    assert run(suite, tmp_path / "out", "--list") == 2
    assert "control_folds: expected some of the folds [0], found [1]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"scheme": "none"}, "expected a scheme of"),
        ({}, "either `scheme` or `file`"),
        ({"scheme": "hash", "part": "train"}, "expected part test or test_sites"),
    ],
)
def test_a_wrong_split_is_refused(tmp_path, entry, message):
    with pytest.raises(TrainingError, match=message):
        read_suite(write_suite(tmp_path / "s.yaml", "cohort", [GOOD], splits={"x": entry}))


def test_placeholders_and_the_arguments_of_a_control(tmp_path):
    cell = {
        **{"cohort": "c", "split": "s", "fold": 3, "seed": 1, "target": None},
        **{"targets": ["age", "sex"], "arguments": ["--blank", "yes"]},
    }
    step = ["cortexicon", "train", "{control}", "fold={fold}", "{targets}", "{{x}}"]
    argv = filled(step, cell, tmp_path)
    assert argv[0] == sys.executable
    assert argv[3:] == ["train", "--blank", "yes", "fold=3", "age,sex", "{x}"]
    assert filled(["a", "{resume}"], cell, tmp_path, resume=True) == ["a", "false"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state").touch()
    assert filled(["a", "{resume}"], cell, tmp_path, resume=True) == ["a", "true"]


@pytest.mark.parametrize("name", ["abide", "abide_lm", "demo"])
def test_the_suites_of_the_repository_are_valid(repository, name):
    suite = read_suite(repository / "evaluation" / "suites" / f"{name}.yaml")
    assert suite.targets == ["age", "sex", "diagnosis"]
