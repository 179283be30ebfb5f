"""results.json and report.html of a small synthetic run folder, whole and with pieces missing."""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cortexicon.evaluation import (
    EvaluationError,
    collect_results,
    evaluate_reconstruction,
    run_baselines,
    tokenizer_baseline,
    write_json,
    write_predictions,
    write_report,
)

PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects images and every address, and checks that tags close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.addresses, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "img":
            self.images.append(attributes)
        self.addresses += [attributes[key] for key in ("src", "href") if key in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(path):
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


@pytest.fixture
def run(tmp_path, cohort, fold, regions, make_scan):
    folder = tmp_path / "demo"
    scans = [make_scan(f"s{i}", i) for i in range(8)]
    write_json(
        folder / "evaluation" / "reconstruction.json",
        evaluate_reconstruction(
            scans[:3],
            scans[3:6],
            16,
            40.0,
            4,
            regions,
            scans[6:],
            examples_path=folder / "evaluation" / "reconstruction_examples.npz",
        ),
    )
    windows = [(s.subject_id, s.raw.reshape(2, 20, 12)) for s in scans]
    write_json(
        folder / "evaluation" / "tokenizer_baseline.json",
        tokenizer_baseline(windows[:3], windows[3:6], 16, 10, 4, 40.0, iterations=2),
    )
    run_baselines(cohort, fold, ["age", "sex"], folder / "predictions")
    tested = fold["test"] + fold["test_sites"]
    age = cohort.participants.loc[tested, "age"].to_numpy()
    write_predictions(
        folder / "predictions" / "lm_age.csv",
        tested,
        age,
        np.round(age + np.random.default_rng(0).normal(0, 3, len(age))),
        system="AVQ + LLM <script>alert(1)</script>",
        target="age",
        fold=0,
        part=["test"] * len(fold["test"]) + ["test_sites"] * len(fold["test_sites"]),
    )
    for stage in ("text", "avq", "lm"):
        facts = {"command": f"cortexicon train {stage} demo.yaml", "seconds": 61.4, "seed": 0}
        facts |= {} if stage == "text" else {"cohort_hash": "c" * 64, "split_hash": "d" * 64}
        write_json(folder / stage / "run.json", facts)
        lines = [{"step": s, "seconds": s, "loss": 2.0 / (s + 1)} for s in range(80)]
        lines += [{"step": 79, "eval_loss": 0.5, "eval_r2": 0.4, "eval_mae_age": 3.0}]
        (folder / stage / "training_log.jsonl").write_text(
            "\n".join(json.dumps(line) for line in lines) + "\n"
        )
    write_json(folder / "split.json", {"hash": "d" * 64, "cohort_hash": "c" * 64})
    return folder


def test_results_hold_every_number_and_their_origin(run):
    results = collect_results(run, num_resamples=50)
    saved = json.loads((run / "results.json").read_text())
    assert set(saved) == set(results)
    assert saved["reconstruction"] == results["reconstruction"]
    assert results["missing"] == []
    assert results["cohort_hash"] == "c" * 64
    assert results["split_hash"] == "d" * 64
    assert results["seconds"] == {"text": 61.4, "avq": 61.4, "lm": 61.4}
    assert results["commands"]["avq"] == "cortexicon train avq demo.yaml"
    assert results["stages"]["lm"]["last_logged"]["eval_mae_age"] == 3.0
    assert results["environment"]["packages"]["numpy"] == np.__version__
    assert set(results["clinical"]) == {"age", "sex"}
    assert "NaN" not in (run / "results.json").read_text()


def test_report_is_one_file_with_all_pictures_inside(run):
    results = collect_results(run, num_resamples=50)
    page = parse(write_report(run))
    drawn = sorted(path.name for path in (run / "figures").glob("*.png"))
    assert drawn == [
        "brain.png",
        "carpet.png",
        "codebook.png",
        "codes.png",
        "connectivity.png",
        "domain.png",
        "predictions_age.png",
        "systems_age.png",
        "systems_sex.png",
        "training_codec.png",
        "training_language.png",
    ]
    assert len(page.images) == len(drawn)
    for image in page.images:
        head, data = image["src"].split(",", 1)
        assert head == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(PNG)
        assert image["alt"]
    # Nothing is loaded from anywhere: only inlined pictures and anchors in the page.
    assert all(a.startswith(("data:image/png", "#")) for a in page.addresses)
    style = re.search(r"<style>.*?</style>", (run / "report.html").read_text(), re.S).group()
    assert "url(" not in style
    assert "@import" not in style
    text = " ".join(page.text)
    assert "AVQ + LLM <script>alert(1)</script>" in text  # shown as text, not run
    assert "<script" not in (run / "report.html").read_text()
    for phrase in ("kernel ridge on connectivity", "cortexicon train lm demo.yaml", "c" * 64):
        assert phrase in text
    assert "Not in this run" not in text
    # The numbers are those of results.json.
    assert f"{results['reconstruction']['r2']:.3f}" in text
    for scores in results["clinical"]["age"]["parts"]["test"]["systems"].values():
        assert f"{scores['mae']:.2f}" in text


def test_missing_pieces_are_named_and_do_not_crash(tmp_path):
    page = parse(write_report(tmp_path))
    text = " ".join(page.text)
    assert page.images == []
    for piece in (
        "evaluation/reconstruction.json",
        "predictions/*.csv",
        "avq/training_log.jsonl",
        "evaluation/reconstruction_examples.npz is not there",
    ):
        assert piece in text


@pytest.mark.parametrize(
    "lost",
    [
        ["evaluation/reconstruction_examples.npz", "lm/run.json"],
        ["evaluation/reconstruction.json", "avq/training_log.jsonl", "text/training_log.jsonl"],
    ],
)
def test_lost_pieces_cost_only_what_depends_on_it(run, lost):
    for piece in lost:
        (run / piece).unlink()
    collect_results(run, num_resamples=20)
    page = parse(write_report(run))
    for piece in lost:
        assert piece in " ".join(page.text)
    assert len(page.images) >= 6


def test_a_log_cut_off_by_a_killed_process_is_read_up_to_there(run):
    log = run / "avq" / "training_log.jsonl"
    log.write_text(log.read_text() + '{"step": 80, "lo')
    assert collect_results(run, num_resamples=10)["stages"]["avq"]["last_logged"]["step"] == 79
    log.write_text('{"step"\n' + log.read_text())
    with pytest.raises(EvaluationError, match="line 1"):
        collect_results(run, num_resamples=10)


def test_stages_on_different_data_are_refused(run):
    write_json(run / "lm" / "run.json", {"cohort_hash": "e" * 64})
    with pytest.raises(EvaluationError, match="cohort_hash is avq: cccccccccccc, lm: eeeeeeeeeeee"):
        collect_results(run, num_resamples=10)


def test_broken_json_and_no_folder_are_named(run, tmp_path):
    (run / "split.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"split\.json"):
        collect_results(run, num_resamples=10)
    for function in (collect_results, write_report):
        with pytest.raises(EvaluationError, match="nowhere"):
            function(tmp_path / "nowhere")


def test_importing_the_room_loads_neither_matplotlib_nor_scikit_learn():
    code = (
        "import sys, cortexicon.evaluation as e; from cortexicon.evaluation import score_clinical;"
        "sys.exit(any(n in sys.modules for n in ('matplotlib', 'sklearn', 'torch')))"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
