"""Work that may be interrupted: a folder for unfinished results, and processes that survive."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import ProcessPoolExecutor

from .scan_results import Job, Outcome, mark_of, prepare_scan
from .series import CohortError

try:
    import fcntl
except ImportError:  # Windows: nothing stops two runs there
    fcntl = None  # type: ignore[assignment]

DASK_TIMEOUT_S = 30
Run = Callable[[Sequence[Job]], Iterator[tuple[Job, Outcome]]]


# ------------------------------------------------------------------ processes


@contextmanager
def workers(num_proc: int, dask_address: str | None = None) -> Iterator[Run]:
    """A function that runs jobs and gives each with its outcome, in the order of finishing.

    Parameters
    ----------
    num_proc : int
        Processes on this machine; 1 works in this one.
    dask_address : str, optional
        Scheduler of a Dask cluster, as ``tcp://host:8786``; joblib's Dask backend then sends the
        jobs there. Its workers have to see the same files under the same names.

    Raises
    ------
    CohortError
        No scheduler or no worker answers.
    ModuleNotFoundError
        The extra `dask` is not installed.
    """
    if dask_address is None:
        yield lambda jobs: _run_here(jobs, num_proc)
        return
    from distributed import Client
    from distributed.scheduler import KilledWorker

    again = "Then run the same command again; finished scans are kept."
    try:
        client = Client(dask_address, timeout=DASK_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise CohortError(
            f"expected a Dask scheduler at {dask_address}, found: {error}. Start one with "
            "`dask scheduler`, workers with `dask worker ADDRESS`, and give its address."
        ) from error
    with client, parallel_config("dask", client=client, wait_for_workers_timeout=DASK_TIMEOUT_S):
        try:
            yield lambda jobs: _in_any_order(jobs, -1)
        except KilledWorker as error:
            raise CohortError(
                f"Dask workers were killed again and again ({error}), probably for want of "
                f"memory. Give each worker more. {again}"
            ) from error
        except TimeoutError as error:
            raise CohortError(
                f"expected workers at {dask_address}, found none within {DASK_TIMEOUT_S} s. Start "
                f"some with `dask worker {dask_address}`. {again}"
            ) from error


def _run_here(jobs: Sequence[Job], num_proc: int) -> Iterator[tuple[Job, Outcome]]:
    """Run jobs on this machine; a scan whose process dies is an outcome like any other."""
    waiting = dict.fromkeys(jobs)  # a set that keeps its order
    while waiting:
        try:
            for job, outcome in _in_any_order(list(waiting), num_proc):
                del waiting[job]
                yield job, outcome
        except BrokenProcessPool:
            # Something killed a process, most often a scan that needs too much memory. Those that
            # were being read get a process each, so that only the guilty one is lost.
            suspects = [job for job in waiting if mark_of(job).exists()] or list(waiting)
            for job in suspects:
                del waiting[job]
                yield job, _run_apart(job)


def _in_any_order(jobs: Sequence[Job], num_proc: int) -> Iterator[tuple[Job, Outcome]]:
    parallel = Parallel(n_jobs=num_proc, return_as="generator_unordered")
    numbered = parallel(delayed(_numbered)(number, job) for number, job in enumerate(jobs))
    for number, outcome in numbered:
        yield jobs[number], outcome


def _numbered(number: int, job: Job) -> tuple[int, Outcome]:
    return number, prepare_scan(job)


def _run_apart(job: Job) -> Outcome:
    with ProcessPoolExecutor(max_workers=1) as pool:
        try:
            return pool.submit(prepare_scan, job).result()
        except BrokenProcessPool:
            mark_of(job).unlink(missing_ok=True)
            return Outcome(
                "",
                "the process that read it was killed: probably it needs more memory than there is",
            )


# ------------------------------------------------------------------ folders


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """Hold the folder of unfinished results beside `out`; it stays when the block fails.

    A process that dies lets go of it, however it dies. What an interrupted `put_in_place` left is
    put right first.

    Raises
    ------
    CohortError
        Another process works on the same cohort, or the folder cannot be written.
    """
    work = out.parent / f".{out.name}.work"
    try:
        (work / "scans").mkdir(parents=True, exist_ok=True)
        with (work / "lock").open("a") as handle:
            if fcntl is not None and not _lock(handle.fileno(), work / "lock"):
                raise CohortError(
                    f"{out}: expected to be alone, found another `prepare` writing this cohort. "
                    "Wait for it, or choose another folder."
                )
            if (work / "old").exists():
                if out.exists():
                    shutil.rmtree(work / "old")
                else:
                    os.replace(work / "old", out)
            for mark in (work / "scans").glob("*.reading"):
                mark.unlink()
            yield work
            shutil.rmtree(work)
    except OSError as error:
        raise CohortError(
            f"{work}: expected to write unfinished results there, found: {error}. Check space and "
            "permissions."
        ) from error


def _lock(handle: int, path: Path) -> bool:
    """Lock an open file; False when another process holds it, or has just finished with it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks; two runs at once are then the user's care
        return True
    return path.exists() and os.path.samestat(path.stat(), os.fstat(handle))


def put_in_place(new: Path, out: Path, work: Path) -> None:
    """Replace the folder `out` by `new`; a kill in between is put right by `work_folder`."""
    if out.exists():
        os.replace(out, work / "old")
    os.replace(new, out)
