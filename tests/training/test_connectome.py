"""The connectivity stream from the command line: a simulated cohort to codes and scores."""

import json

import numpy as np
import pytest
import torch
import yaml

from cortexicon import cli
from cortexicon.cohorts import (
    Split,
    build_cohort,
    load_cohort,
    load_split,
    make_split,
    save_cohort,
    simulate_cohort,
)
from cortexicon.evaluation import read_predictions
from cortexicon.evaluation.connectivity import correlation_by_scan
from cortexicon.inference import cohort_matrices, decode_matrices, load_connectome, read_codes
from cortexicon.training.arguments import TrainingError
from cortexicon.training.connectome_sources import (
    Matrices,
    further_scans,
    matrices_of,
    mirrored,
    other_atlases,
    sub_windows,
)

MODEL = {
    "num_tokens": 6,
    "num_codes": 64,
    "code_dim": 5,
    "num_maps": 28,
    "num_coordinates": 300,
    "position_features": 64,
    "text_width": 16,
    "projection_hidden_size": 8,
    "classifier_hidden_size": 8,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Cohort, its split in two folds, and a codec of fold 0."""
    folder = tmp_path_factory.mktemp("connectome")
    cohort = simulate_cohort(70, num_regions=28, duration=200.0, progress=False)
    save_cohort(cohort, folder / "cohort")
    make_split(cohort, "site_stratified", num_folds=2).save(folder / "split.json")
    config = {
        "stream": "connectivity",
        "output": str(folder / "codec"),
        "cohort": str(folder / "cohort"),
        "split": str(folder / "split.json"),
        "model": MODEL,
        "targets": ["age", "sex"],
        "kmeans_iterations": 5,
        "kmeans_draws": 2000,
        "cpu": True,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert cli.main(["train", "avq", str(folder / "config.yaml")]) == 0
    return folder


def run(*argv):
    assert cli.main([str(word) for word in argv]) == 0


def test_the_run_leaves_a_checkpoint_and_its_facts(folder):
    facts = json.loads((folder / "codec" / "run.json").read_text())
    assert facts["training_scans"] == 35  # training and validation people of fold 0
    assert facts["patterns"][0] == "age"
    assert facts["eval_correlation"] > facts["eval_deviation"] > 0.3
    model = load_connectome(folder / "codec")
    assert model.config.num_tokens == 6
    assert not model.training


def test_codes_and_matrices_go_through_files(folder, tmp_path):
    split = folder / "split.json"
    run("encode", folder / "codec", folder / "cohort", "--out", tmp_path / "codes.parquet",
        "--split", split)  # fmt: skip
    scans, info = read_codes(tmp_path / "codes.parquet")
    assert {scan.codes.shape for scan in scans} == {(1, 6)}
    assert info.token_layout == "connectivity"
    run("decode", folder / "codec", tmp_path / "codes.parquet", "--out", tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz", allow_pickle=False) as found:
        matrices, subjects = found["matrices"], found["subject_id"].tolist()
    cohort = load_cohort(folder / "cohort")
    raw = cohort_matrices(cohort, subjects).matrices.numpy()
    upper = np.triu_indices(28, 1)
    kept = correlation_by_scan(raw[:, *upper], matrices[:, *upper])
    mixed = correlation_by_scan(raw[:, *upper], np.roll(matrices, 1, axis=0)[:, *upper])
    assert np.median(kept) > np.median(mixed) + 0.02  # its own person's, not just anybody's
    # Codes of one codebook are not read by another.
    run("train", "avq", folder / "config.yaml", "--set", f"output={tmp_path / 'other'}", "seed=1")
    argv = ["decode", tmp_path / "other", tmp_path / "codes.parquet", "--out", tmp_path / "n.npz"]
    assert cli.main([str(word) for word in argv]) == 2


def test_steps_are_kept_only_where_validation_is_better(folder, tmp_path, capsys):
    given = ["--set", "steps=4", "eval_steps=2", "log_steps=2", "fit_validation=false"]
    # A learning rate that can only destroy: the start is what is saved.
    output = [f"output={tmp_path / 'bad'}", "learning_rate=1.0"]
    run("train", "avq", folder / "config.yaml", *given, *output)
    lines = (tmp_path / "bad" / "training_log.jsonl").read_text().splitlines()
    scores = [json.loads(line) for line in lines if "eval_deviation" in line]
    facts = json.loads((tmp_path / "bad" / "run.json").read_text())
    assert scores[-1]["eval_deviation"] < scores[0]["eval_deviation"]
    assert facts["eval_deviation"] == scores[0]["eval_deviation"]
    argv = ["train", "avq", str(folder / "config.yaml"), "--set", "steps=4"]
    assert cli.main([*argv, f"output={tmp_path / 'x'}"]) == 2
    assert "fit_validation" in capsys.readouterr().err
    argv = ["train", "avq", str(folder / "config.yaml"), "--set", f"output={tmp_path / 'y'}"]
    assert cli.main([*argv, "targets=[age, sex]", "model.num_directions=1"]) == 2
    assert "at most num_directions = 1" in capsys.readouterr().err


def test_other_commands_refuse_what_they_cannot_read(folder, tmp_path, capsys):
    argv = ["train", "avq", folder / "config.yaml", "--stream", "dynamics"]
    assert cli.main([str(word) for word in argv]) == 2  # a config of the other stream
    argv = ["evaluate", folder / "codec", folder / "cohort", "--json", tmp_path / "s.json"]
    assert cli.main([str(word) for word in argv]) == 2
    assert "--split" in capsys.readouterr().err


def test_the_table_scores_folds_once(folder, tmp_path, capsys):
    split = folder / "split.json"
    run("train", "avq", folder / "config.yaml", "--set", "fold=1", f"output={tmp_path / 'one'}")
    argv = ["connectome-table", folder / "cohort", folder / "codec", tmp_path / "one",
            "--json", tmp_path / "t.json", "--markdown", tmp_path / "t.md",
            "--other", folder / "cohort"]  # fmt: skip
    run(*argv)
    table = json.loads((tmp_path / "t.json").read_text())["schemes"]["site_stratified"]
    rows = {row["system"]: row for row in table["rows"]}
    ours, raw = rows["AVQ connectome, 6 tokens"], rows["raw connectivity"]
    assert ours["scans"] == raw["scans"] == 70
    assert raw["full"] == pytest.approx(1.0)
    assert rows["group mean"]["deviation"] is None
    assert 0.2 < ours["deviation"] < 1
    assert {"age_mae", "sex_auc"} <= set(raw)
    # Decoded at the regions it was encoded from, with their mean: the same as without a detour.
    assert table["cross_atlas"]["deviation"] == pytest.approx(ours["deviation"], abs=0.03)
    cells = sorted((tmp_path / "connectome_cells").iterdir())
    before = [path.stat().st_mtime_ns for path in cells]
    run(*argv)
    assert [path.stat().st_mtime_ns for path in cells] == before
    assert (tmp_path / "t.png").stat().st_size > 10_000
    assert "AVQ connectome" in (tmp_path / "t.md").read_text()
    gaps = table["differences"]["raw connectivity"]
    assert gaps["deviation"][0] < 0
    # The predictions are files like any other system's, and say the same.
    files = sorted((tmp_path / "predictions").glob("site_stratified_age_avq-connectome*"))
    ages = read_predictions(files)[["y", "y_hat"]].astype(float)
    assert (ages["y"] - ages["y_hat"]).abs().mean() == pytest.approx(ours["age_mae"])
    run("evaluate", folder / "codec", folder / "cohort", "--split", split,
        "--json", tmp_path / "s.json")  # fmt: skip
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["scans"] == scores["encoded_scans"] == 35
    assert 0 < scores["code_usage"]["usage"] <= 1
    assert scores["encode_seconds"] < 60


def test_the_report_shows_matrices_and_what_codes_mean(folder, tmp_path):
    run("evaluate", folder / "codec", folder / "cohort", "--split", folder / "split.json",
        "--json", tmp_path / "evaluation" / "connectome.json")  # fmt: skip
    with np.load(tmp_path / "evaluation" / "connectome_examples.npz") as found:
        effects, tokens, pairs = (
            found[name] for name in ("effects", "effect_tokens", "effect_codes")
        )
        assert found["raw"].shape == found["decoded"].shape == (2, 28, 28)
    assert len(set(tokens)) == 4
    # The loudest first; each is what one token alone makes of two codes.
    sizes = np.square(effects).sum((1, 2))
    assert (np.diff(sizes) <= 0).all()
    model = load_connectome(folder / "codec")
    codes = np.zeros((2, 6), np.int64)
    codes[:, tokens[0]] = pairs[0]
    both = decode_matrices(model, codes)
    np.testing.assert_allclose(both[0] - both[1], effects[0], atol=1e-4)
    assert len(list((tmp_path / "evaluation" / "predictions").glob("*_fold0.csv"))) >= 2
    run("report", tmp_path)
    for name in ("connectome_matrices", "connectome_meaning"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 10_000
    assert "What a code of connectivity means" in (tmp_path / "report.html").read_text()


def test_scans_of_held_out_people_and_sites_serve_nothing(folder):
    cohort = load_cohort(folder / "cohort")
    subjects = list(cohort.subject_ids)
    sites = cohort.participants["site"]
    fitted = [s for s in subjects if sites[s] == sites[subjects[0]]][:3]
    parts = {"train": fitted, "test": subjects[-5:]}
    found = further_scans(cohort, parts, fitted)
    assert found
    assert set(sites[found]) == {sites[subjects[0]]}
    assert not set(found) & {*fitted, *subjects[-5:]}


def test_variables_of_scans_kept_out_of_the_split_serve_the_patterns(folder, tmp_path):
    # Ten people of whom the split knows nothing, and what became of their age.
    cohort = load_cohort(folder / "cohort")
    split = load_split(folder / "split.json", cohort)
    out = split[0]["train"][:10]
    kept = {
        part: [s for s in people if s not in out or part == "test"]
        for part, people in split[0].items()
    }
    weights = {}
    for name, people in (("as it is", []), ("further", out), ("held out", split[0]["test"])):
        table = cohort.participants.copy()
        table.loc[people, "age"] = table.loc[people[::-1], "age"].to_numpy()
        values = np.concatenate([cohort.series(s).values for s in cohort.subject_ids])
        other = build_cohort(values, table.reset_index(), cohort.regions, cohort.atlas)
        save_cohort(other, tmp_path / name / "cohort")
        here = tmp_path / name
        Split("site_stratified", [kept], other.content_hash).save(here / "split.json")
        run("train", "avq", folder / "config.yaml", "--set", f"cohort={here / 'cohort'}",
            f"split={here / 'split.json'}", f"output={here / 'codec'}")  # fmt: skip
        weights[name] = load_connectome(here / "codec").components.state_dict()
    facts = json.loads((tmp_path / "further" / "codec" / "run.json").read_text())
    assert facts["training_scans"] == 25
    assert facts["more_matrices"] == 10

    def same(first, second):
        return all(
            torch.equal(tensor, weights[second][key]) for key, tensor in weights[first].items()
        )

    assert not same("as it is", "further")
    assert same("as it is", "held out")


def test_mirrored_twice_is_the_same_brain():
    places = np.array([[-30, 0, 0], [30, 0, 0], [-20, 40, 9], [20, 40, 9]], np.float32)
    rows = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0))
    rows = (rows + rows.transpose(1, 2)) * (1 - torch.eye(4))
    mask = torch.ones(5, 4, dtype=torch.bool)
    mask[0, 3] = False
    scans = Matrices(rows * mask[:, :, None] * mask[:, None, :], mask)
    turned = mirrored(scans, places)
    swapped = [1, 0, 3, 2]
    assert torch.equal(turned.region_mask, mask[:, swapped])
    # Of the same pair in the other hemisphere, but for the mean, which stays where it was.
    whole = Matrices(scans.matrices[1:], mask[1:])
    turned = mirrored(whole, places)
    away = whole.matrices - whole.matrices.mean(0)
    expected = whole.matrices.mean(0) + away[:, swapped][:, :, swapped]
    torch.testing.assert_close(turned.matrices, expected, atol=1e-4, rtol=0)
    twice = mirrored(Matrices(turned.matrices, turned.region_mask), places)
    torch.testing.assert_close(twice.matrices, whole.matrices, atol=1e-4, rtol=0)


def test_sources_of_the_covariance_are_training_people(folder):
    cohort = load_cohort(folder / "cohort")
    subjects = list(cohort.subject_ids)[:6]
    scans = matrices_of(cohort, subjects)
    first, second = sub_windows(cohort, subjects, 2)
    upper = np.triu_indices(28, 1)
    for half in (first, second):
        kept = correlation_by_scan(
            half.matrices[:, *upper].numpy(), scans.matrices[:, *upper].numpy()
        )
        assert np.median(kept) > 0.5
    assert not torch.equal(first.matrices, second.matrices)
    assert sub_windows(cohort, subjects, 0) == []
    # The same parcellation read at its own regions is the same but for neighbours within a few mm.
    (same,) = other_atlases([str(folder / "cohort")], subjects, scans, cohort.coordinates)
    assert len(same.matrices) == 6
    kept = correlation_by_scan(same.matrices[:, *upper].numpy(), scans.matrices[:, *upper].numpy())
    assert np.median(kept) > 0.8
    with pytest.raises(TrainingError, match="another parcellation"):
        other_atlases([str(folder / "cohort")], ["nobody"], scans, cohort.coordinates)


def test_the_run_says_how_many_matrices_made_its_covariance(folder, tmp_path):
    more = ["sub_windows=2", "mirrored=true", f"more_cohorts=[{folder / 'cohort'}]"]
    run("train", "avq", folder / "config.yaml", "--set", f"output={tmp_path / 'more'}", *more)
    facts = json.loads((tmp_path / "more" / "run.json").read_text())
    assert facts["training_scans"] == 35
    assert facts["more_matrices"] == 4 * 35  # the split names everybody, so no scan was left


def test_residual_codes_stand_beside_in_the_table(folder, tmp_path, capsys):
    argv = ["connectome-table", folder / "cohort", folder / "codec", "--json", tmp_path / "t.json",
            "--plain", "none", "--residual"]  # fmt: skip
    run(*argv, "1", "2")
    rows = json.loads((tmp_path / "t.json").read_text())["schemes"]["site_stratified"]["rows"]
    ours, again, pairs = rows
    assert [row["tokens"] for row in rows] == [6, 6, 6]
    assert pairs["system"].endswith("3 groups of 2 residual codes")
    # Groups of one are the quantiser that the checkpoint has, fitted anew.
    assert again["deviation"] == pytest.approx(ours["deviation"], abs=0.05)
    assert 0.2 < pairs["deviation"] < 1
    assert cli.main([str(word) for word in (*argv, "4")]) == 2
    assert "a divisor of 6 tokens" in capsys.readouterr().err
