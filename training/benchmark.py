"""`cortexicon benchmark SUITE.yaml --out RESULTS`: systems x targets x folds x seeds, in one table.

A cell is one system (or one control of it) on one fold with one seed, in a process of its own:

    RESULTS/splits/HASH.json           the folds, of the cohort and of each control's cohort
    RESULTS/cohorts/CONTROL-seedN/     a control's cohort, made when it is needed
    RESULTS/cells/HASH/cell.json       what the cell is
    RESULTS/cells/HASH/log.txt         what its commands printed
    RESULTS/cells/HASH/run/            `{run}`: whatever a command keeps, to go on from
    RESULTS/cells/HASH/predictions/    files of predictions
    RESULTS/cells/HASH/outcome.json    how it ended and what it cost; such a cell is never run again
    RESULTS/shared/HASH/               what cells with the same `shared` steps share
    RESULTS/results.json, report.html  all scores, with commit and command
    RESULTS/scores.csv                 a row for each split, target and system

HASH covers the system's name and entry, the configurations that its commands read, the control, the
folds and the cohort. A cell that was killed goes on; `--only` and `--jobs` choose what is run, and
the results are written from whatever is there.
"""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from cortexicon.cohorts import Cohort, Split, load_cohort, load_split, make_split, save_cohort
from cortexicon.evaluation import write_json

from .arguments import TrainingError, read_config
from .benchmark_controls import KIND, control_cohort
from .benchmark_suite import SplitEntry, Suite, System, read_suite
from .faults import locked


class View(NamedTuple):
    """One table: a split and the part of it that is scored."""

    entry: SplitEntry
    split: Split


class Cell(NamedTuple):
    """One system, or one control of it, on one fold with one seed."""

    system: System
    control: str
    split: Split
    fold: int
    seed: int
    target: str | None
    hash: str

    @property
    def label(self) -> str:
        """As it is printed."""
        parts = [self.system.name, self.control, self.split.scheme, f"fold {self.fold}"]
        parts += [f"seed {self.seed}", self.target or ""]
        return ", ".join(part for part in parts if part)


def run_benchmark(
    suite_path: str | Path,
    out: str | Path,
    cohort: str | Path | None = None,
    jobs: int = 1,
    only: Sequence[str] | None = None,
    retry_failed: bool = False,
    show: bool = False,
    report_only: bool = False,
) -> int:
    """Run the cells that have no outcome yet, score all that have, write results and report.

    Parameters
    ----------
    suite_path : path
        See `evaluation/suites/demo.yaml`.
    out : path
        Folder to write.
    cohort : path, optional
        In place of the suite's.
    jobs : int
        Cells at once, one thread each.
    only : list of str, optional
        Names of systems to run.
    retry_failed : bool
        Run failed cells again.
    show : bool
        Print the cells and run nothing.
    report_only : bool
        Score and report what is there, run nothing.

    Returns
    -------
    int
        Number of cells that left no outcome, or failed.

    Raises
    ------
    TrainingError
        The suite cannot be read, or names a system, a target or a fold that is not there.
    """
    from .benchmark_scores import write_results

    suite, out = read_suite(suite_path), Path(out)
    if cohort is not None:
        suite = suite._replace(cohort=Path(cohort))
    data = load_cohort(suite.cohort)
    absent = [target for target in suite.targets if target not in data.participants]
    if absent:
        raise TrainingError(
            f"{suite.path}: target {absent[0]!r} is no column of the participants of "
            f"{suite.cohort}: {', '.join(data.participants.columns)}."
        )
    views = [View(entry, _split(entry, data)) for entry in suite.splits]
    cells = make_cells(suite, data, views)
    strange = [name for name in only or () if name not in {c.system.name for c in cells}]
    if strange:
        known = dict.fromkeys(cell.system.name for cell in cells)
        raise TrainingError(f"--only: no system {strange[0]!r}; the suite runs {', '.join(known)}.")
    chosen = [cell for cell in cells if only is None or cell.system.name in only]
    if show:
        for cell in chosen:
            print(f"{cell.hash}  {state_of(cell, out):<9} {cell.label}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        if not report_only:
            _run(chosen, suite, data, out, jobs, retry_failed)
        write_results(suite, data, views, cells, out)
    return sum(state_of(cell, out) != "finished" for cell in chosen)


def _split(entry: SplitEntry, cohort: Cohort) -> Split:
    if entry.file is not None:
        split = load_split(entry.file, cohort)
    else:
        split = make_split(cohort, str(entry.scheme), entry.seed, entry.num_folds)
    folds = range(len(split)) if entry.folds is None else entry.folds
    wrong = [fold for fold in folds if not 0 <= fold < len(split)]
    if wrong or not any(split[fold].get(entry.part) for fold in folds):
        raise TrainingError(
            f"split {entry.name!r}: expected folds in 0..{len(split) - 1} with subjects in part "
            f"{entry.part!r}, found folds {list(folds)}."
        )
    return split


def make_cells(suite: Suite, cohort: Cohort, views: Sequence[View]) -> list[Cell]:
    """Every cell of the suite once, also where two tables share a split."""
    cells: dict[str, Cell] = {}
    for system in suite.systems:
        if system.kind == "file":
            continue
        configs = _configurations(system.arguments)
        seeds = suite.seeds if system.kind == "baseline" or system.uses("seed") else suite.seeds[:1]
        targets = suite.targets if system.uses("target") else [None]
        for view in views:
            folds = view.entry.folds or range(len(view.split))
            controlled = folds if view.entry.control_folds is None else view.entry.control_folds
            controlled = system.control_folds.get(view.entry.name, controlled)
            if strange := sorted(set(controlled) - set(folds)):
                raise TrainingError(
                    f"split {view.entry.name!r}, control_folds: expected some of the folds "
                    f"{list(folds)}, found {strange}."
                )
            for fold in folds:
                controls = system.controls if fold in controlled else {}
                for control, arguments in {"": [], **controls}.items():
                    for seed in seeds:
                        for target in targets:
                            told = control
                            if control and arguments is None:
                                told = f"{control}, {KIND}"
                            content = [
                                *(system.name, system.definition, configs, told, arguments),
                                *(view.split.hash, fold, seed, target or suite.targets),
                                cohort.content_hash,
                            ]
                            name = _sha256(content)[:16]
                            cells[name] = Cell(
                                system, control, view.split, fold, seed, target, name
                            )
    return list(cells.values())


def _configurations(arguments: Sequence[str]) -> dict[str, str]:
    """sha256 of every YAML file that a command's arguments name, with what it is based on."""
    paths = [text for text in arguments if text.endswith((".yaml", ".yml"))]
    return {path: _sha256(read_config(path)) for path in paths if Path(path).is_file()}


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def state_of(cell: Cell, out: Path) -> str:
    """`finished`, `failed`, `begun`, or `to do`."""
    outcome = read_outcome(cell, out)
    if outcome is None:
        return "begun" if (out / "cells" / cell.hash / "cell.json").is_file() else "to do"
    return str(outcome["status"])


def read_outcome(cell: Cell, out: Path) -> dict[str, Any] | None:
    """How a cell ended, or None."""
    path = out / "cells" / cell.hash / "outcome.json"
    if not path.is_file():
        return None
    outcome: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return outcome


# ------------------------------------------------------------------ running


def _run(
    cells: Sequence[Cell], suite: Suite, cohort: Cohort, out: Path, jobs: int, retry_failed: bool
) -> None:
    """Run the cells without an outcome, `jobs` at once."""
    splits = list(dict.fromkeys(cell.split.hash for cell in cells))

    def order(cell: Cell) -> tuple[bool, int, int]:
        """Fold by fold, so that systems can be compared before all is done; controls at last."""
        return bool(cell.control), splits.index(cell.split.hash), cell.fold

    queue = []
    for cell in sorted(cells, key=order):
        state = state_of(cell, out)
        if state == "failed" and retry_failed:
            (out / "cells" / cell.hash / "outcome.json").unlink()
        elif state in ("finished", "failed"):
            continue
        queue.append(cell)
    running: dict[str, tuple[Cell, subprocess.Popen]] = {}
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or children would live on
    try:
        with tqdm(total=len(queue), desc="cells", unit="cell") as bar:
            while queue or running:
                while queue and len(running) < jobs:
                    cell = queue.pop(0)
                    running[cell.hash] = cell, _start(cell, suite, cohort, out)
                time.sleep(0.1)
                for name in [n for n, (_, child) in running.items() if child.poll() is not None]:
                    cell, process = running.pop(name)
                    bar.update()
                    _tell(cell, process.returncode, out)
    finally:
        signal.signal(signal.SIGTERM, before)
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def _tell(cell: Cell, code: int, out: Path) -> None:
    outcome = read_outcome(cell, out)
    if code or outcome is None:
        tqdm.write(f"{cell.label}: stopped with code {code}; run again to go on ({cell.hash})")
    elif outcome["status"] == "failed":
        tqdm.write(f"{cell.label}: failed, {outcome['error']} ({cell.hash})")
    else:
        tqdm.write(f"{cell.label}: {outcome['seconds']:.0f} s")


def _start(cell: Cell, suite: Suite, cohort: Cohort, out: Path) -> subprocess.Popen:
    """Write what the cell is, and start its process."""
    folder, split = out / "cells" / cell.hash, cell.split
    folder.mkdir(parents=True, exist_ok=True)
    arguments = cell.system.controls.get(cell.control)
    path = suite.cohort
    if cell.control and arguments is None:
        path, content_hash = _control_folder(cell, suite, cohort, out)
        split = dataclasses.replace(split, cohort_hash=content_hash)
    split_path = _saved(split, out)
    content = {
        **{name: getattr(cell.system, name) for name in ("name", "kind", "definition")},
        **{"control": cell.control, "arguments": arguments or []},
        **{"cohort": path, "split": split_path, "fold": cell.fold, "seed": cell.seed},
        **{"target": cell.target, "targets": [cell.target] if cell.target else suite.targets},
        **{"scheme": split.scheme, "shared": _shared(cell, suite, cohort, out, path, split_path)},
    }
    write_json(folder / "cell.json", content)
    command = [sys.executable, "-m", "cortexicon.training.benchmark_cell", str(folder)]
    with (folder / "process.txt").open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _shared(
    cell: Cell, suite: Suite, cohort: Cohort, out: Path, path: Path, split_path: Path
) -> dict[str, Any] | None:
    """Folder, cohort and split of the shared steps, None for a system without any.

    They read no labels, so they are the same where labels are permuted, and run on the true cohort.
    """
    steps = cell.system.definition.get("shared")
    if not steps:
        return None
    arguments = [str(text) for step in steps for text in step]
    if cell.control == "permuted labels" and path != suite.cohort:
        path, split_path = suite.cohort, _saved(cell.split, out)
    changed = "" if path == suite.cohort else cell.control
    seed = cell.seed if changed or any("{seed}" in text for text in arguments) else 0
    content = [steps, _configurations(arguments), cohort.content_hash, changed]
    name = _sha256([*content, cell.split.hash, cell.fold, seed])[:16]
    return {"folder": out / "shared" / name, "cohort": path, "split": split_path}


def _saved(split: Split, out: Path) -> Path:
    """The file of a split in RESULTS."""
    path = out / "splits" / f"{split.hash[:16]}.json"
    if not path.is_file():
        split.save(path)
    return path


def _control_folder(cell: Cell, suite: Suite, cohort: Cohort, out: Path) -> tuple[Path, str]:
    """Folder and content hash of a control's cohort, made when it is missing."""
    of_fold = [cell.split.hash, cell.fold] if cell.control == "permuted labels" else []
    key = _sha256([cohort.content_hash, suite.targets, KIND, *of_fold])[:8]
    folder = out / "cohorts" / f"{cell.control.replace(' ', '_')}-seed{cell.seed}-{key}"
    if not (folder / "cohort.json").is_file():
        parts = cell.split[cell.fold]
        save_cohort(control_cohort(cohort, cell.control, suite.targets, cell.seed, parts), folder)
    return folder, load_cohort(folder).content_hash
