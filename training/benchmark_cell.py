"""One cell of a benchmark in a process of its own: fit on a fold, predict its test subjects.

`python -m cortexicon.training.benchmark_cell FOLDER` reads FOLDER/cell.json, leaves files of
predictions in FOLDER/predictions and what they cost in FOLDER/outcome.json. A command that ends in
an error leaves an outcome too: a failure is a result. A kill leaves none; run again, the steps that
had ended are not repeated, and the one that was under way gets `{resume}` as `true`.

Steps that a system shares with others (`shared` of the suite) run in a folder of their own, once.
What they cost is part of what every cell that needs them costs.
"""

import fcntl
import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cortexicon.evaluation import write_json

#: The baseline of every suite: the rows of `run_baselines`.
STANDARD = "standard"
#: An argument of its own, replaced by the arguments of the control that is run (usually none).
CONTROL_ARGUMENT = "{control}"
LAST_LINES = 5
CHILDREN = resource.RUSAGE_CHILDREN
HARMONISED = {False: (False,), True: (True,), "both": (False, True)}
#: Tokens a scan of the plain tokenizers (series: per window of 160 s).
TOKENS = {"connectivity_tokens": 64, "series_tokens": 128}


def main(argv: list[str]) -> int:
    """Run the cell in the folder that `argv` names; 0, or 143 where it was stopped."""
    folder = Path(argv[0])
    cell = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
    (folder / "predictions").mkdir(exist_ok=True)
    shared = {"seconds": 0.0, "peak_memory_mb": 0}
    start, before = time.monotonic(), _seconds_before(folder)
    try:
        if cell.get("shared"):
            shared = run_shared(cell)
            start = time.monotonic()
        cost = run_baseline(cell, folder) if cell["kind"] == "baseline" else run_steps(cell, folder)
        outcome: dict[str, Any] = {"status": "finished", "cost": cost}
    except (ValueError, ArithmeticError, subprocess.CalledProcessError) as error:
        outcome = {"status": "failed", "error": _told(error)}
    # A command's memory is its own, not that of this process that waits for it.
    peak = _peak_memory(resource.RUSAGE_SELF if cell["kind"] == "baseline" else CHILDREN)
    outcome["seconds"] = round(shared["seconds"] + before + time.monotonic() - start, 3)
    outcome["peak_memory_mb"] = max(shared["peak_memory_mb"], peak)
    write_json(folder / "outcome.json", outcome)
    return 0


def run_shared(cell: dict[str, Any]) -> dict[str, Any]:
    """Run the shared steps if nobody has yet, or wait for who does; what they cost."""
    folder = Path(cell["shared"]["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cost.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            start, before = time.monotonic(), _seconds_before(folder)
            run_commands(cell["definition"]["shared"], {**cell, **cell["shared"]}, folder)
            seconds = round(before + time.monotonic() - start, 3)
            write_json(path, {"seconds": seconds, "peak_memory_mb": _peak_memory(CHILDREN)})
    cost: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return cost


def _peak_memory(who: int) -> int:
    """Largest resident memory in MB; `ru_maxrss` counts kilobytes on Linux."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(who).ru_maxrss / unit)


def run_baseline(cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fit and predict in this process; what is known of the cost besides time and memory."""
    from cortexicon.cohorts import load_cohort, load_split
    from cortexicon.evaluation import run_baselines
    from cortexicon.evaluation.baselines_connectivity import run_connectivity

    cohort = load_cohort(cell["cohort"])
    fold = load_split(cell["split"], cohort)[cell["fold"]]
    definition = cell["definition"]
    where = (cohort, fold, cell["targets"], folder / "predictions")
    if definition["features"] == STANDARD:
        run_baselines(*where, fold=cell["fold"], seed=cell["seed"])
        return {}
    further = []
    if definition.get("more_scans"):
        from .connectome_sources import further_scans

        further = further_scans(cohort, fold, [*fold["train"], *fold.get("validation", ())])
    run_connectivity(
        *where,
        features=definition["features"],
        harmonised=HARMONISED[definition.get("harmonised", False)],
        fold=cell["fold"],
        seed=cell["seed"],
        further=further,
    )
    tokens = TOKENS.get(definition["features"])
    return {} if tokens is None else {"tokens_per_scan": tokens}


def run_steps(cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the cell's own commands; what they wrote to `{cost}`."""
    run_commands(cell["definition"]["steps"], cell, folder)
    cost = folder / "cost.json"
    return json.loads(cost.read_text(encoding="utf-8")) if cost.is_file() else {}


def run_commands(steps: list[list[str]], cell: dict[str, Any], folder: Path) -> None:
    """Run commands one after the other, those in FOLDER that ended before left out.

    Raises
    ------
    CalledProcessError
        A command ended with an error; its last lines are in `output`.
    """
    for number, step in enumerate(steps):
        done, begun = folder / f"step{number}.done", folder / f"step{number}.begun"
        if done.exists():
            continue
        argv = filled(step, cell, folder, resume=begun.exists())
        begun.touch()
        log = folder / "log.txt"
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(argv)}\n")
            file.flush()
            process = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT)
            signal.signal(signal.SIGTERM, lambda *_, child=process: child.terminate())
            code = process.wait()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if code in (130, 143, -signal.SIGTERM, -signal.SIGINT, -signal.SIGKILL):
            sys.exit(143)  # stopped, not failed: the next call goes on here
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            raise subprocess.CalledProcessError(code, argv, "\n".join(lines[-LAST_LINES:]))
        done.touch()


def filled(step: list[str], cell: dict[str, Any], folder: Path, resume: bool = False) -> list[str]:
    """A command with its placeholders replaced; `cortexicon` and `python` are those that run now.

    Returns
    -------
    list of str
    """
    values = {
        **{name: cell[name] for name in ("cohort", "split", "fold", "seed")},
        "target": cell["target"] or "",
        "targets": ",".join(cell["targets"]),
        "out": folder / "predictions" / "predictions.csv",
        "predictions": folder / "predictions",
        "run": folder / "run",
        "shared": Path((cell.get("shared") or {}).get("folder", folder)) / "run",
        "cost": folder / "cost.json",
        "resume": "true" if resume and any(folder.glob("run/*")) else "false",
    }
    argv: list[str] = []
    for text in map(str, step):
        argv += cell["arguments"] if text == CONTROL_ARGUMENT else [text.format(**values)]
    programs = {
        "cortexicon": [sys.executable, "-m", "cortexicon.cli"],
        "python": [sys.executable],
    }
    return [*programs.get(argv[0], argv[:1]), *argv[1:]]


def _seconds_before(folder: Path) -> float:
    """What earlier, killed calls spent; their last sign of life is the log."""
    begun, log = folder / "step0.begun", folder / "log.txt"
    if not begun.exists() or not log.exists():
        return 0.0
    return max(0.0, log.stat().st_mtime - begun.stat().st_mtime)


def _told(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"exit code {error.returncode}: {error.output}"
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
