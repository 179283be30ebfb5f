"""`cortexicon ablate CELLS.yaml`: what each choice of the codec is worth, one factor at a time.

A file of cells names a base configuration, what all of its cells share, and for each cell what it
changes. A cell with one seed is one run of the codec's training, in a process of its own:

    runs/ablations/split-COHORT.json   the split of R2, made when missing
    runs/ablations/text/               the text side, made when missing
    runs/ablations/HASH.yaml           the run's arguments, as `cortexicon train avq` reads them
    runs/ablations/HASH.log            what it printed
    runs/ablations/HASH/               its folder: state while it runs, checkpoint afterwards
    results/HASH.json                  its scores, for good; a cell that has them is skipped

HASH covers every argument that differs from the stage's default, the cohort, the split and the
text table. An option that is added later, with the old behaviour as its default, therefore keeps
finished cells valid; where a default has changed since, the cell is run again.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from safetensors.torch import load_file
from tqdm import tqdm

from cortexicon.cohorts import load_cohort, load_split, make_split
from cortexicon.evaluation import write_json
from cortexicon.modeling import AVQConfig

from .arguments import TrainingError, load_arguments
from .avq import AVQArguments

#: Where a run lies and how often it is looked at; nothing of this changes the codec.
NOT_HASHED = {
    *("output", "cohort", "split", "text_model", "resume"),
    *("log_steps", "eval_steps", "eval_windows", "save_steps"),
}
#: Filled from the cohort and the text model, which have hashes of their own.
FROM_DATA = {
    *("atlas", "region_labels", "region_coordinates"),
    *("text_width", "text_model_id", "text_table_sha256"),
}
FILE_KEYS = ("title", "base", "common", "seeds", "probe", "cells")
CELL_KEYS = ("name", "factor", "set", "seeds", "probe")
BASE = "base"


class Cell(NamedTuple):
    """One run of the codec's training.

    Attributes
    ----------
    name, factor : str
        The base has the name `base` and no factor.
    changes : dict
        Dotted key -> value, where the cell differs from the base.
    seed : int
    probe : bool
        Whether fresh probes measure its alignment: asked for, or trained with the adversary.
    arguments : AVQArguments
    """

    name: str
    factor: str
    changes: dict[str, Any]
    seed: int
    probe: bool
    arguments: AVQArguments

    @property
    def label(self) -> str:
        """Name and seed, as they are printed."""
        return f"{self.name} (seed {self.seed})"


class CellsFile(NamedTuple):
    """A file of cells: its name without suffix, its title, and its cells, the base first."""

    name: str
    title: str
    cells: list[Cell]


class Data(NamedTuple):
    """What every cell is trained on: paths, and hashes of what lies there."""

    cohort: Path
    split: Path
    text_model: Path
    hashes: dict[str, str]


# ------------------------------------------------------------------ what is to be run


def read_cells(path: str | Path) -> CellsFile:
    """Read a file of cells; the base itself is always the first of them.

    Raises
    ------
    TrainingError
        Unknown or missing keys, two cells of one name, or arguments that the training refuses.
    """
    path = Path(path)
    if not path.is_file():
        raise TrainingError(f"No file of cells {path}. Examples: training/configs/ablations/.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise TrainingError(f"{path} is not valid YAML: {error}") from error
    _check_keys(content, FILE_KEYS, ("base", "cells"), str(path))
    common, seeds = content.get("common") or {}, content.get("seeds", [0])
    entries: list[dict] = [{"name": BASE, "factor": "", "set": {}}]
    for entry in content["cells"] or []:
        _check_keys(entry, CELL_KEYS, ("name", "factor", "set"), f"{path}, a cell")
        if entry["name"] in [known["name"] for known in entries]:
            raise TrainingError(f"{path}: two cells are named {entry['name']!r}; rename one.")
        entries.append(entry)
    cells = []
    for entry in entries:
        for seed in entry.get("seeds", seeds):
            values = {**common, **entry["set"], "seed": seed}
            overrides = [f"{key}={_flow(value)}" for key, value in values.items()]
            try:
                arguments = load_arguments(
                    AVQArguments, [str(path.parent / content["base"]), *overrides]
                )
                AVQConfig(**arguments.model)
            except ValueError as error:
                raise TrainingError(f"{path}, cell {entry['name']!r}: {error}") from error
            probe = arguments.adversary or entry.get("probe", content.get("probe", False))
            cells.append(Cell(entry["name"], entry["factor"], entry["set"], seed, probe, arguments))
    return CellsFile(path.stem, content.get("title", path.stem), cells)


def choose(files: Sequence[CellsFile], names: Sequence[str] | None = None) -> list[Cell]:
    """All cells of `files`, or those of the given names.

    Raises
    ------
    TrainingError
        A name that no file has.
    """
    cells = [cell for file in files for cell in file.cells]
    known = list(dict.fromkeys(cell.name for cell in cells))
    strange = [name for name in names or () if name not in known]
    if strange:
        raise TrainingError(
            f"expected names of cells after --only, found {', '.join(strange)}. "
            f"The files have {', '.join(known)}."
        )
    return [cell for cell in cells if names is None or cell.name in names]


def show(cells: Iterable[Cell], data: Data, results: Path) -> None:
    """Print each cell's hash, state, name and changes."""
    for cell in cells:
        name = cell_hash(cell, data)
        state = state_of(cell, read_result(results / f"{name}.json"))
        print(f"{name}  {state:<9} {cell.label:<28} {_flow(cell.changes)}")


def _check_keys(content: Any, known: Sequence[str], needed: Sequence[str], where: str) -> None:
    if not isinstance(content, dict):
        raise TrainingError(f"{where}: expected `key: value` lines, found {content!r}.")
    wrong = [key for key in content if key not in known]
    missing = [key for key in needed if key not in content]
    if wrong or missing:
        raise TrainingError(
            f"{where}: expected the keys {', '.join(known)}; "
            f"unknown: {', '.join(wrong) or 'none'}, missing: {', '.join(missing) or 'none'}."
        )


def _flow(value: Any) -> str:
    """`value` as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").strip()


def resolved(arguments: AVQArguments) -> dict[str, Any]:
    """Every argument that can change the codec, defaults included; `model` in full too."""
    values = {k: v for k, v in dataclasses.asdict(arguments).items() if k not in NOT_HASHED}
    # Where a further cohort lies changes nothing; which one it is does.
    values["more_cohorts"] = [Path(folder).name for folder in arguments.more_cohorts]
    config = AVQConfig(**arguments.model)
    values["model"] = {
        key: getattr(config, key) for key in sorted(AVQConfig.__annotations__.keys() - FROM_DATA)
    }
    return values


def essence(arguments: AVQArguments) -> dict[str, Any]:
    """Of `resolved`, what differs from the default."""
    values = resolved(arguments)
    usual = resolved(AVQArguments(output="", cohort="", split="", text_model=""))
    model = {k: v for k, v in values["model"].items() if v != usual["model"][k]}
    return {k: v for k, v in values.items() if k != "model" and v != usual[k]} | {"model": model}


def cell_hash(cell: Cell, data: Data) -> str:
    """Name of the cell's files: 16 hexadecimal digits of a sha256."""
    content = json.dumps([essence(cell.arguments), data.hashes], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


# ------------------------------------------------------------------ what the runs need


def prepare_data(cohort_folder: Path, runs: Path, text_model: Path | None = None) -> Data:
    """The cohort's split and the text side, made when they are missing, and the hashes of all.

    Raises
    ------
    TrainingError
        No cohort, or the text side could not be trained.
    """
    if not cohort_folder.is_dir():
        raise TrainingError(
            f"No cohort in {cohort_folder}: expected a folder with participants.tsv, regions.tsv "
            "and timeseries/bold.parquet. Give yours: cortexicon ablate ... --cohort FOLDER, or "
            "make ablations COHORT=FOLDER."
        )
    cohort = load_cohort(cohort_folder)
    split_path = runs / f"split-{cohort.content_hash[:12]}.json"
    if not split_path.is_file():
        make_split(cohort, "hash").save(split_path)
        print(f"split -> {split_path}")
    text_model = text_model or runs / "text"
    if not (text_model / "token_counts.safetensors").is_file():
        config = Path(__file__).parent / "configs" / "abide_text.yaml"
        command = [sys.executable, "-m", "cortexicon.training.text", str(config)]
        command.append(f"output={text_model}")
        if (text_model / "training_log.jsonl").exists():
            command.append("resume=true")
        if subprocess.run(command, env=_environment(), check=False).returncode:
            raise TrainingError(f"The text side in {text_model} could not be trained, see above.")
    return Data(
        cohort_folder,
        split_path,
        text_model,
        {
            "cohort": cohort.content_hash,
            "split": load_split(split_path, cohort).hash,
            "text_table": _table_sha256(text_model),
        },
    )


def _table_sha256(text_model: Path) -> str:
    """sha256 of the model's input embeddings as float32 bytes."""
    weights = load_file(text_model / "model.safetensors")
    names = [name for name in weights if name.endswith(("wte.weight", "embed_tokens.weight"))]
    if len(names) != 1:
        raise TrainingError(
            f"{text_model}: expected one table of input embeddings (wte or embed_tokens) in "
            f"model.safetensors, found {len(names)}. Use a text side of `cortexicon train text`."
        )
    return hashlib.sha256(weights[names[0]].float().numpy().tobytes()).hexdigest()


def _environment() -> dict[str, str]:
    """One thread for each process: two busy ones on two cores are slower, not faster."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


# ------------------------------------------------------------------ running


def read_result(path: Path) -> dict[str, Any] | None:
    """A cell's result, or None where there is none."""
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def state_of(cell: Cell, result: dict[str, Any] | None) -> str:
    """`finished`, `failed`, `unprobed` (probes are wanted and missing), `stale`, or `to do`.

    `stale` means that a default which the cell relied on has another value now.
    """
    if result is None:
        return "to do"
    before, now = result["resolved"], json.loads(json.dumps(resolved(cell.arguments)))
    changed = any(before[key] != now.get(key) for key in before if key != "model")
    changed |= any(value != now["model"].get(key) for key, value in before["model"].items())
    if changed:
        return "stale"
    if result["status"] == "finished" and cell.probe and "alignment" not in result:
        return "unprobed"
    return str(result["status"])


def run_cells(
    cells: Iterable[Cell],
    data: Data,
    runs: Path,
    results: Path,
    jobs: int = 1,
    retry_failed: bool = False,
) -> int:
    """Run the cells that have no result yet, `jobs` at once; the number that left none.

    A run that ends in an error has a result too, which says so. One that was killed has none: the
    next call goes on from its last state.
    """
    waiting: dict[str, Cell] = {}
    for cell in cells:
        name = cell_hash(cell, data)
        state = state_of(cell, read_result(results / f"{name}.json"))
        if state == "finished" or (state == "failed" and not retry_failed):
            print(f"{cell.label}: {state} before, results/{name}.json")
            continue
        if state in ("failed", "stale"):
            shutil.rmtree(runs / name, ignore_errors=True)
        waiting[name] = cell
    running: dict[str, subprocess.Popen] = {}
    queue, without = list(waiting), 0
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or children would live on
    try:
        with tqdm(total=len(queue), desc="cells", unit="cell") as bar:
            while queue or running:
                while queue and len(running) < jobs:
                    name = queue.pop(0)
                    running[name] = _start(waiting[name], name, data, runs)
                time.sleep(0.2)
                for name in [
                    name for name, process in running.items() if process.poll() is not None
                ]:
                    code = running.pop(name).returncode
                    bar.update()
                    without += not _collect(waiting[name], name, code, data, runs, results)
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return without


def _start(cell: Cell, name: str, data: Data, runs: Path) -> subprocess.Popen:
    """Write the run's configuration and start its process."""
    arguments = dataclasses.replace(
        cell.arguments,
        output=str(runs / name),
        cohort=str(data.cohort),
        split=str(data.split),
        text_model=str(data.text_model),
    )
    config, scores = runs / f"{name}.yaml", runs / f"{name}.scores.json"
    config.write_text(yaml.safe_dump(dataclasses.asdict(arguments)), encoding="utf-8")
    scores.unlink(missing_ok=True)
    tqdm.write(f"{cell.label}: {runs / name}.log")
    command = [sys.executable, "-m", "cortexicon.training.ablation_cell", str(config), str(scores)]
    with (runs / f"{name}.log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            [*command, *(["--probe"] if cell.probe else [])],
            env=_environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _collect(cell: Cell, name: str, code: int, data: Data, runs: Path, results: Path) -> bool:
    """Turn what the process left into the cell's result; whether there is one."""
    scores_path = runs / f"{name}.scores.json"
    scores = read_result(scores_path)
    if code or scores is None:
        tqdm.write(f"{cell.label}: ended with code {code} and no result, see {runs / name}.log")
        return False
    path = write_json(
        results / f"{name}.json",
        {
            "cell": cell.name,
            "seed": cell.seed,
            "arguments": essence(cell.arguments),
            "data": data.hashes,
            "commit": _commit(),
            **scores,
            "resolved": resolved(cell.arguments),
        },
    )
    scores_path.unlink()
    if scores["status"] == "failed":
        tqdm.write(f"{cell.label}: failed ({scores['error']}) -> {path}")
    else:
        tqdm.write(
            f"{cell.label}: validation R2 {scores['validation']['r2']:.4f}, "
            f"{scores['training']['seconds']:.0f} s -> {path}"
        )
    return True


def _commit() -> str | None:
    """The commit of the code, with a `+` where the working tree differs; None outside git."""
    answers = [
        subprocess.run(
            ["git", *command],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
        for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
    ]
    if any(answer.returncode for answer in answers):
        return None
    return answers[0].stdout.strip() + ("+" if answers[1].stdout.strip() else "")
