"""`prepare_cohort`: what it writes, what it leaves out; an interruption changes nothing."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest

from cortexicon.cohorts import (
    AtlasChoice,
    CohortError,
    People,
    Reading,
    load_cohort,
    prepare,
    prepare_cohort,
    scan_results,
    work,
)

REGIONS, TIMES = 12, 30
LABELS = [f"area{i:02d}_{'LR'[i % 2]}" for i in range(REGIONS)]


class Source:
    """A folder of tables and one volume, a label volume, and a participants table."""

    def __init__(self, folder: Path, subjects: int = 6):
        self.folder = folder
        self.scans = folder / "scans"
        self.scans.mkdir(parents=True)
        self.names = [f"s{number:03d}" for number in range(1, subjects + 1)]
        rng = np.random.default_rng(0)
        self.values = {
            name: (100 + 5 * rng.standard_normal((TIMES + place, REGIONS))).astype(np.float32)
            for place, name in enumerate(self.names)
        }
        for name, values in self.values.items():
            self.write(name, values)
        grid = np.zeros((6, 4, 3), np.int16)
        grid.reshape(-1)[: 2 * REGIONS] = np.repeat(np.arange(1, REGIONS + 1), 2)
        affine = nibabel.affines.from_matvec(np.diag([10.0, 10, 10]), [-25, -15, 0])
        nibabel.save(nibabel.Nifti1Image(grid, affine), folder / "toy.nii.gz")
        table = pd.DataFrame({"index": range(1, REGIONS + 1), "name": LABELS})
        table.to_csv(folder / "toy_dseg.tsv", sep="\t", index=False)
        self.participants = pd.DataFrame(
            {
                "participant_id": self.names,
                "age": [f"{20 + i}.5" for i in range(subjects)],
                "sex": ["F", "M"] * (subjects // 2),
                "site": "A",
                "tr": "2.0",
            }
        )
        self.save_participants()

    def write(self, stem: str, values: np.ndarray) -> Path:
        """One table of region series."""
        path = self.scans / f"{stem}.tsv"
        pd.DataFrame(values, columns=LABELS).to_csv(path, sep="\t", index=False)
        return path

    def save_participants(self) -> None:
        """Write the participants table as it is now."""
        path = self.folder / "participants.tsv"
        self.participants.to_csv(path, sep="\t", index=False, na_rep="n/a")

    @property
    def people(self) -> People:
        """Where the phenotypes are."""
        return People(self.folder / "participants.tsv")

    @property
    def reading(self) -> Reading:
        """The label volume, and nothing else."""
        labels = str(self.folder / "toy_dseg.tsv")
        return Reading(AtlasChoice(str(self.folder / "toy.nii.gz"), labels))

    def prepare(self, out: Path, **kwargs):
        """`prepare_cohort` with this source's table and label volume."""
        kwargs = {"people": self.people, "reading": self.reading} | kwargs
        return prepare_cohort(self.scans, out, **kwargs)


@pytest.fixture
def source(tmp_path) -> Source:
    """Six people, one table of series each."""
    return Source(tmp_path / "source")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def reasons(prepared) -> dict[str, str]:
    """Scans that were left out, with the reason."""
    table = prepared.quality
    return dict(table[table["status"] == "refused"][["source", "reason"]].to_numpy().tolist())


# ------------------------------------------------------------------ what is written


def test_a_cohort_holds_the_numbers_of_its_files_and_all_of_the_atlas(source, tmp_path):
    prepared = source.prepare(tmp_path / "out")
    cohort = load_cohort(tmp_path / "out")
    assert cohort.subject_ids == source.names
    for name, values in source.values.items():
        np.testing.assert_array_equal(cohort.series(name).values, values)
    assert cohort.labels == LABELS
    assert cohort.regions["size"].tolist() == [2] * REGIONS
    assert cohort.regions["hemisphere"].tolist() == ["L", "R"] * (REGIONS // 2)
    assert cohort.participants["age"].tolist() == [20.5 + i for i in range(6)]
    manifest = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert len(manifest["atlas"]["sha256"]) == 64
    assert manifest["atlas"]["name"] == cohort.atlas == "toy"
    assert prepared.quality["status"].tolist() == ["used"] * 6
    assert prepared.num_finished_before == 0
    assert prepared.without_scan == []
    assert not list(tmp_path.glob(".out*")), "the work folder stays behind"


def test_quality_table_on_disk_is_the_one_returned(source, tmp_path):
    prepared = source.prepare(tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "quality.tsv", sep="\t", na_values=["n/a"])
    assert list(table) == list(prepared.quality)
    assert table["n_timepoints"].tolist() == [TIMES + i for i in range(6)]
    assert set(table["tr_source"]) == {"participants table"}
    assert table["median_sd"].between(4, 6).all()


def test_volumes_and_tables_go_into_one_cohort(source, tmp_path):
    (source.scans / "s002.tsv").unlink()
    grid = np.asarray(nibabel.load(source.folder / "toy.nii.gz").dataobj)
    affine = nibabel.load(source.folder / "toy.nii.gz").affine
    voxels = np.zeros((*grid.shape, TIMES), np.float32)
    for region in range(REGIONS):
        voxels[grid == region + 1] = source.values["s002"][:TIMES, region]
    image = nibabel.Nifti1Image(voxels, affine)
    image.header.set_zooms((10, 10, 10, 2.0))
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, source.scans / "s002.nii.gz")
    source.prepare(tmp_path / "out")
    found = load_cohort(tmp_path / "out").series("s002").values
    np.testing.assert_allclose(found, source.values["s002"][:TIMES], rtol=1e-6)


def test_nothing_names_a_folder_of_this_machine(source, tmp_path):
    (source.scans / "s003.tsv").write_text("damaged")
    source.prepare(tmp_path / "out")
    for name, data in contents(tmp_path / "out").items():
        assert str(tmp_path).encode() not in data, name


# ------------------------------------------------------------------ what is left out


def test_a_bad_scan_is_listed_and_stops_no_other(source, tmp_path):
    (source.scans / "s002.tsv").write_text("<html>not found</html>")
    (source.scans / "s004.tsv").rename(source.scans / "s004.npy")
    source.write("visitor", source.values["s001"] + 1)
    prepared = source.prepare(tmp_path / "out")
    found = reasons(prepared)
    assert set(found) == {"s002.tsv", "s004.npy", "visitor.tsv"}
    assert "no row in the participants table" in found["visitor.tsv"]
    assert prepared.without_scan == ["s002", "s004"]
    assert load_cohort(tmp_path / "out").subject_ids == ["s001", "s003", "s005", "s006"]


def test_a_fault_of_a_reader_is_one_more_bad_scan(source, tmp_path, monkeypatch):
    real = scan_results.read_scan

    def faulty(scan, **kwargs):
        if scan.subject_id == "s003":
            raise ZeroDivisionError("of a library")
        return real(scan, **kwargs)

    monkeypatch.setattr(scan_results, "read_scan", faulty)
    found = reasons(source.prepare(tmp_path / "out"))
    assert found == {"s003.tsv": "could not be read: ZeroDivisionError: of a library"}


def test_no_usable_scan_at_all_is_an_error_and_writes_nothing(source, tmp_path):
    for path in source.scans.iterdir():
        path.write_text("x")
    with pytest.raises(CohortError, match=r"expected at least one scan that can be used, found 6"):
        source.prepare(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_numbers_under_two_names_are_refused(source, tmp_path):
    source.write("s004", source.values["s002"])
    found = reasons(source.prepare(tmp_path / "out"))
    assert set(found) == {"s002.tsv", "s004.tsv"}
    assert "the same scan in s002.tsv (s002), s004.tsv (s004)" in found["s002.tsv"]


def test_two_spellings_of_one_person_are_refused(source, tmp_path):
    for spelling in ("sub-7", "sub-07"):
        source.write(f"{spelling}_bold", source.values["s001"] + len(spelling))
    source.participants.loc[0, "participant_id"] = "7"
    source.save_participants()
    (source.scans / "s001.tsv").unlink()
    for path in list(source.scans.glob("sub-*")):
        path.rename(path.with_name(path.name.replace("_bold", "_timeseries")))
    found = reasons(source.prepare(tmp_path / "out"))
    assert all("one spelling per person, found 07, 7" in reason for reason in found.values())
    assert len(found) == 2


def test_the_first_run_that_can_be_read_stands_for_a_person(source, tmp_path):
    (source.scans / "s001.tsv").unlink()
    (source.scans / "sub-s001_run-1_timeseries.tsv").write_text("damaged")
    source.write("sub-s001_run-2_timeseries", source.values["s001"])
    source.write("sub-s001_run-3_timeseries", source.values["s001"] + 1)
    prepared = source.prepare(tmp_path / "out")
    table = prepared.quality.set_index("source")
    runs = [table["status"][f"sub-s001_run-{run}_timeseries.tsv"] for run in (1, 2, 3)]
    assert runs == ["refused", "used", "not used"]
    assert table["reason"]["sub-s001_run-3_timeseries.tsv"] == (
        "sub-s001_run-2_timeseries.tsv of the same person is used"
    )
    found = load_cohort(tmp_path / "out").series("s001").values
    np.testing.assert_array_equal(found, source.values["s001"])


def test_several_tasks_are_never_chosen_between(source, tmp_path):
    for task in ("rest", "nback"):
        source.write(f"sub-s001_task-{task}_timeseries", source.values["s001"] + len(task))
    for name in source.names:
        (source.scans / f"{name}.tsv").unlink()
    with pytest.raises(CohortError, match=r"one task, found 2: nback, rest\. Say which"):
        source.prepare(tmp_path / "out")
    source.prepare(tmp_path / "out", task="rest")
    found = load_cohort(tmp_path / "out").series("s001").values
    np.testing.assert_array_equal(found, source.values["s001"] + 4)


@pytest.mark.parametrize(("table", "expected"), [("2.0", None), ("2.5", "2.5 s, found 2 s")])
def test_a_sidecar_and_the_table_have_to_agree_on_the_tr(source, tmp_path, table, expected):
    (source.scans / "s001.json").write_text('{"RepetitionTime": 2.0}')
    source.participants.loc[0, "tr"] = table
    source.save_participants()
    found = reasons(source.prepare(tmp_path / "out"))
    if expected is None:
        assert found == {}
    else:
        assert expected in found["s001.tsv"]


def test_a_tr_that_nothing_gives_is_missing_not_guessed(source, tmp_path):
    source.participants = source.participants.drop(columns="tr")
    source.save_participants()
    with pytest.raises(CohortError, match="TR missing"):
        source.prepare(tmp_path / "out")
    source.prepare(tmp_path / "out", reading=source.reading._replace(tr=1.5))
    assert set(load_cohort(tmp_path / "out").participants["tr"]) == {1.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scrub_mm": 0.0}, "above 0 mm"),
        ({"band_pass": (0.1, 0.01)}, "from low to high"),
        ({"confounds": "everything"}, "everything"),
        ({"tr": 2000.0}, "milliseconds"),
    ],
)
def test_settings_that_fail_for_every_scan_are_refused_at_once(source, tmp_path, change, message):
    with pytest.raises(CohortError, match=message):
        source.prepare(tmp_path / "out", reading=source.reading._replace(**change))
    assert not (tmp_path / ".out.work").exists()


def test_a_folder_of_something_else_is_not_replaced(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(CohortError, match=r"no prepare\.json"):
        source.prepare(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_two_runs_on_one_cohort_are_refused(source, tmp_path):
    (tmp_path / ".out.work").mkdir()
    with (tmp_path / ".out.work" / "lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CohortError, match="another `prepare`"):
            source.prepare(tmp_path / "out")


# ------------------------------------------------------------------ nothing is done twice


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Subjects whose files were read, as it happens."""
    seen: list[str] = []
    real = scan_results.read_scan

    def counted(scan, **kwargs):
        seen.append(scan.subject_id)
        return real(scan, **kwargs)

    monkeypatch.setattr(scan_results, "read_scan", counted)
    return seen


def test_content_and_settings_decide_what_is_read_again(source, tmp_path, read):
    out = tmp_path / "out"
    source.prepare(out)
    assert read == source.names
    before = contents(out)

    read.clear()
    again = source.prepare(out)
    assert (read, again.num_finished_before) == ([], 6)

    for path in source.scans.iterdir():  # another date, the same bytes
        os.utime(path, (1, 1))
    source.prepare(out)
    assert read == []
    assert contents(out) == before

    source.write("s003", source.values["s003"] + 1)
    source.prepare(out)
    assert read == ["s003"]
    assert len({name for name in before if contents(out)[name] != before[name]}) > 0
    fresh = tmp_path / "fresh"
    source.prepare(fresh)
    assert contents(out) == contents(fresh), "old and new scans together differ from all new"

    read.clear()
    source.prepare(out, reading=source.reading._replace(band_pass=(0.01, 0.1)))
    assert read == source.names


def test_a_new_participants_table_reads_no_scan(source, tmp_path, read):
    source.prepare(tmp_path / "out")
    read.clear()
    source.participants["age"] = [str(40 + i) for i in range(6)]
    source.participants = source.participants.iloc[::-1]
    source.save_participants()
    source.prepare(tmp_path / "out")
    assert read == []
    cohort = load_cohort(tmp_path / "out")
    assert cohort.participants["age"].tolist() == [45, 44, 43, 42, 41, 40]
    np.testing.assert_array_equal(cohort.series("s002").values, source.values["s002"])


def test_a_new_scan_joins_those_that_are_finished(source, tmp_path, read):
    moved = (source.scans / "s004.tsv").rename(tmp_path / "s004.tsv")
    source.prepare(tmp_path / "out")
    read.clear()
    moved.rename(source.scans / "s004.tsv")
    source.prepare(tmp_path / "out")
    assert read == ["s004"]
    source.prepare(tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_damaged_result_is_read_anew(source, tmp_path, monkeypatch):
    monkeypatch.setattr(
        prepare, "write_cohort", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        source.prepare(tmp_path / "out")
    monkeypatch.undo()
    result = sorted((tmp_path / ".out.work" / "scans").glob("*.npy"))[0]
    result.write_bytes(result.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(CohortError, match="Run the same command again"):
        source.prepare(tmp_path / "out")
    assert source.prepare(tmp_path / "out").num_finished_before == 5
    source.prepare(tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


# ------------------------------------------------------------------ interruptions


class Killed(BaseException):
    """What a kill looks like from inside: nobody handles it."""


@pytest.mark.parametrize("existing", [False, True], ids=["new", "update"])
def test_a_stop_at_any_change_on_disk_leaves_the_same_bytes(
    source, tmp_path, monkeypatch, existing
):
    out, old = tmp_path / "out", tmp_path / "old"
    if existing:
        source.prepare(old)
        for name in ("s002", "s005"):
            source.write(name, source.values[name] * 2)
    source.prepare(tmp_path / "expected")
    expected, real = contents(tmp_path / "expected"), os.replace
    for stop in range(100):
        shutil.rmtree(out, ignore_errors=True)
        if existing:
            shutil.copytree(old, out)
        calls = itertools.count()

        def replace(path, target, calls=calls, stop=stop):
            if next(calls) == stop:
                raise Killed
            real(path, target)

        monkeypatch.setattr(os, "replace", replace)
        try:
            source.prepare(out)
        except Killed:
            monkeypatch.setattr(os, "replace", real)
            assert not out.exists() or contents(out) in (expected, contents(old))
            source.prepare(out)
            assert contents(out) == expected, f"stopped at change {stop}"
            continue
        break
    # Two for each scan that is read, then the finished folder and its way to its place.
    assert stop == (2 * 2 + 3 if existing else 2 * 6 + 2)


SCRIPT = """
import sys, time
from pathlib import Path
from cortexicon.cohorts import AtlasChoice, People, Reading, prepare_cohort
folder, out = Path(sys.argv[1]), sys.argv[2]
atlas = AtlasChoice(str(folder / "toy.nii.gz"), str(folder / "toy_dseg.tsv"))
print("ready", flush=True)
prepare_cohort(folder / "scans", out, People(folder / "participants.tsv"), Reading(atlas),
               num_proc=int(sys.argv[3]))
"""


def start(repository, source: Source, out: Path, num_proc: int) -> subprocess.Popen:
    """A `prepare` in a process group of its own."""
    command = [sys.executable, "-c", SCRIPT, source.folder, out, str(num_proc)]
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=repository,
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_proc", [1, 2])
def test_killed_processes_leave_the_same_bytes(repository, tmp_path, num_proc):
    source = Source(tmp_path / "source", subjects=60)
    source.prepare(tmp_path / "expected")
    out, results = tmp_path / "out", tmp_path / ".out.work" / "scans"
    for wanted in (1, 20, 45, 60):
        process = start(repository, source, out, num_proc)
        process.stdout.readline()
        while process.poll() is None and len(list(results.glob("*.json"))) < wanted:
            time.sleep(0.002)
        if wanted == 60:
            time.sleep(0.02)  # while the cohort is put together
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(repository, source, out, num_proc).wait() == 0
    assert contents(out) == contents(tmp_path / "expected")


def test_two_processes_write_what_one_writes(source, tmp_path):
    source.prepare(tmp_path / "one")
    source.prepare(tmp_path / "two", num_proc=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_two_dask_workers_write_what_one_process_writes(source, tmp_path):
    distributed = pytest.importorskip("distributed")
    source.prepare(tmp_path / "one")
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address=None,
        local_directory=str(tmp_path),
    ) as cluster:
        source.prepare(tmp_path / "dask", dask_address=cluster.scheduler_address)
    assert contents(tmp_path / "one") == contents(tmp_path / "dask")


def test_no_dask_scheduler_is_one_message(source, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "DASK_TIMEOUT_S", 0.3)
    with pytest.raises(CohortError, match=r"expected a Dask scheduler at tcp://127\.0\.0\.1:9"):
        source.prepare(tmp_path / "out", dask_address="tcp://127.0.0.1:9")


def test_a_scan_that_kills_its_process_is_the_only_one_lost(source, tmp_path, monkeypatch):
    def deadly(job):
        if job.scan.subject_id == "s002":
            (job.folder / f"{scan_results.result_stem(job)}.reading").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return scan_results.prepare_scan(job)

    def numbered(number, job):
        return number, deadly(job)

    monkeypatch.setattr(work, "_numbered", numbered)
    monkeypatch.setattr(work, "prepare_scan", deadly)
    prepared = source.prepare(tmp_path / "out", num_proc=2)
    assert list(reasons(prepared)) == ["s002.tsv"]
    assert "the process that read it was killed" in reasons(prepared)["s002.tsv"]
    assert len(load_cohort(tmp_path / "out")) == 5


def test_a_full_disk_stops_the_run_and_keeps_what_is_finished(source, tmp_path, monkeypatch, read):
    real = scan_results.write_result

    def full(folder, stem, values, stored):
        if len(read) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder, stem, values, stored)

    monkeypatch.setattr(scan_results, "write_result", full)
    with pytest.raises(CohortError, match="No space left on device"):
        source.prepare(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(scan_results, "write_result", real)
    assert source.prepare(tmp_path / "out").num_finished_before == 3
