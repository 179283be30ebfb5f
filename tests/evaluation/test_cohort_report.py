"""`cortexicon prepare` from the command line, and the quality report that it writes."""

import re

import numpy as np
import pandas as pd
import pytest

from cortexicon import cli
from cortexicon.cohorts import load_cohort
from cortexicon.evaluation import EvaluationError, cohort_report, write_cohort_report

REGIONS, TIMES, PEOPLE = 15, 40, 24


@pytest.fixture(autouse=True)
def few_carpets(monkeypatch):
    """Drawing takes most of the time here; four scans show what sixteen do."""
    monkeypatch.setattr(cohort_report, "NUM_STRIKING", 3)
    monkeypatch.setattr(cohort_report, "NUM_TYPICAL", 1)


@pytest.fixture
def source(tmp_path):
    """A folder of 24 tables with the regions' coordinates beside them; one scan jumps."""
    folder = tmp_path / "scans"
    folder.mkdir()
    rng = np.random.default_rng(0)
    labels = [f"area{i}" for i in range(REGIONS)]
    regions = pd.DataFrame(rng.uniform(-60, 60, (REGIONS, 3)).round(1), columns=["x", "y", "z"])
    regions.insert(0, "label", labels)
    regions.to_csv(folder / "regions.tsv", sep="\t", index=False)
    names = [f"p{i:02d}" for i in range(PEOPLE)]
    for place, name in enumerate(names):
        values = 100 + rng.standard_normal((TIMES, REGIONS))
        if place == 5:
            values[20:] += 40
        if place == 7:
            values[:, 3] = 0
        table = pd.DataFrame(values, columns=labels)
        table.to_csv(folder / f"{name}.tsv", sep="\t", index=False)
    people = pd.DataFrame({"participant_id": names, "age": 30, "sex": ["1", "2"] * (PEOPLE // 2)})
    people.to_csv(tmp_path / "participants.tsv", sep="\t", index=False)
    return folder


def command(source, *extra: str) -> list[str]:
    return [
        *("prepare", str(source), "--participants", str(source.parent / "participants.tsv")),
        *("--out", str(source.parent / "out"), "--tr", "2", "--site", "A"),
        *("--sex-codes", "1=M", "2=F", *extra),
    ]


def test_the_command_writes_cohort_table_and_report(source, capsys):
    assert cli.main(command(source)) == 0
    out, err = capsys.readouterr()
    folder = source.parent / "out"
    assert "24 of 24 scans, 0 left out" in out
    for name in ("", "/quality.tsv", "/quality.html"):
        assert f"-> {folder}{name}\n" in out
    assert "100%" in err
    cohort = load_cohort(folder)
    assert set(cohort.participants["sex"]) == {"M", "F"}
    assert set(cohort.participants["site"]) == {"A"}
    assert set(cohort.participants["tr"]) == {2.0}
    assert cli.main(command(source)) == 0
    assert "24 were finished before" in capsys.readouterr().out


def test_scans_that_were_left_out_are_named_and_exit_with_1(source, capsys):
    (source / "p03.tsv").write_text("damaged")
    (source / "p04.tsv").unlink()
    assert cli.main(command(source)) == 1
    out, err = capsys.readouterr()
    assert "left out p03 (p03.tsv): p03.tsv" in err
    assert "2 participants without a scan: p03, p04" in err
    assert "22 of 23 scans, 1 left out" in out
    page = (source.parent / "out" / "quality.html").read_text(encoding="utf-8")
    assert "Left out: 1" in page
    assert "p03.tsv" in page


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--sex-codes", "1=male"], "--sex-codes: expected CODE=F or CODE=M"),
        (["--num-proc", "0"], "at least one process"),
        (["--task", "rest"], "expected scans of task rest"),
        (["--atlas", "no-such-atlas"], "no-such-atlas"),
    ],
)
def test_a_wrong_option_is_one_line_and_exits_with_2(source, capsys, extra, message):
    assert cli.main(command(source, *extra)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (source.parent / "out").exists()


def test_the_report_stands_alone_and_its_bytes_repeat(source):
    cli.main(command(source))
    folder = source.parent / "out"
    page = (folder / "quality.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page), "loads something from elsewhere"
    assert page.count("Carpet plot: ") == 4
    assert "area3 (4.2%)" in page  # of 24 scans one lacks it
    assert str(source.parent) not in page
    assert write_cohort_report(folder).read_text(encoding="utf-8") == page


def test_the_scan_that_jumps_and_the_one_that_lacks_a_region_are_striking(source):
    cli.main(command(source))
    table = pd.read_csv(source.parent / "out" / "quality.tsv", sep="\t", na_values=["n/a"])
    table["masked"] = table["n_missing"] + table["n_constant"]
    striking, typical = cohort_report.choose_scans(table)
    assert {"p05", "p07"} <= set(striking)
    assert len(striking) == 3
    assert len(typical) == 1
    assert not set(striking) & set(typical)


def test_a_folder_that_prepare_did_not_write_has_no_report(tmp_path):
    with pytest.raises(EvaluationError, match="expected a folder that `cortexicon prepare` wrote"):
        write_cohort_report(tmp_path)
