"""What a run leaves behind while it goes: log, facts, and checkpoints that resume exactly."""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from .arguments import TrainingError

_PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
)


def learning_rate_at(step: int, peak: float, warmup: int, total: int) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    progress = min(1.0, step / max(1, total))
    return (
        peak
        * min(1.0, (step + 1) / max(1, warmup))
        * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
    )


def progress(first: int, steps: int, name: str, accelerator) -> tqdm:
    """A progress bar over steps `first` to `steps`, on the main process."""
    return tqdm(
        range(first, steps),
        initial=first,
        total=steps,
        desc=name,
        mininterval=2.0,
        disable=not accelerator.is_main_process,
    )


class TrainingLog:
    """JSON lines in `FOLDER/training_log.jsonl`, written by the main process only.

    On resume the lines after the resumed step are dropped, so that no step stands twice.
    """

    def __init__(
        self, folder: Path, active: bool, resumed_step: int = 0, seconds_before: float = 0.0
    ):
        self.path = folder / "training_log.jsonl"
        self.active = active
        self.started = time.time() - seconds_before
        if not active:
            return
        kept = []
        if resumed_step and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= resumed_step]
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return time.time() - self.started

    def write(self, step: int, **values: Any) -> None:
        """Add one line; tensors become numbers, None is left out."""
        if not self.active:
            return
        line: dict[str, Any] = {"step": step, "seconds": round(self.seconds, 2)}
        for key, value in values.items():
            if value is not None:
                line[key] = float(value.detach() if torch.is_tensor(value) else value)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def write_run_facts(folder: Path, stage: str, arguments: Any, **facts: Any) -> None:
    """`FOLDER/run.json`: stage, arguments, command, versions, machine, and what the stage adds."""
    record = {
        "stage": stage,
        "command": shlex.join(["cortexicon", "train", stage, *sys.argv[1:]])
        if not sys.argv[0].endswith("cortexicon")
        else shlex.join(["cortexicon", *sys.argv[1:]]),
        "arguments": dataclasses.asdict(arguments),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "threads": torch.get_num_threads(),
        **facts,
    }
    (folder / "run.json").write_text(
        json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8"
    )


def begin_run(arguments: Any) -> tuple[Accelerator, Path]:
    """What every stage does first: choose the device, claim `arguments.output`, set the seed."""
    output = Path(arguments.output)
    accelerator = Accelerator(cpu=arguments.cpu or not torch.cuda.is_available())
    if accelerator.is_main_process:
        prepare_output(output, arguments.resume)
        if arguments.resume:
            check_resumable(output, arguments)
    accelerator.wait_for_everyone()
    torch.manual_seed(arguments.seed)
    return accelerator, output


def prepare_output(folder: Path, resume: bool) -> None:
    """Make `folder`, or refuse it before any work is done.

    Raises
    ------
    TrainingError
        The folder cannot be written, or holds another run and `resume` is off.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write_probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise TrainingError(
            f"Cannot write to {folder}: {error.strerror}. Choose another `output`."
        ) from error
    ended = (folder / "training_log.jsonl").exists() and not any(
        (folder / name).exists() for name in ("state", "state.old", "state.new")
    )
    if resume and ended and (folder / "model.safetensors").exists():
        raise TrainingError(
            f"{folder} holds a run that has ended; there is nothing to resume. "
            "Use its checkpoint, or choose another `output`."
        )
    if not resume and (folder / "training_log.jsonl").exists():
        raise TrainingError(
            f"{folder} already holds a run. "
            "Resume it (--resume), remove the folder, or choose another `output`."
        )


def save_state(folder: Path, model, optimizer, step: int, seconds: float) -> None:
    """Write `FOLDER/state` (weights, optimizer, step); a kill at any moment leaves a complete one.

    Data order and dropout need no state: both are drawn from (seed, step).
    """
    new, current, old = folder / "state.new", folder / "state", folder / "state.old"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    weights = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    save_file(weights, new / "model.safetensors")
    tensors, scalars = {}, {}
    state = optimizer.state_dict()
    for index, entry in state["state"].items():
        for name, value in entry.items():
            if torch.is_tensor(value):
                tensors[f"{index}.{name}"] = value.detach().cpu().clone()
            else:
                scalars[f"{index}.{name}"] = value
    save_file(tensors, new / "optimizer.safetensors")
    record = {"step": step, "seconds": seconds, "scalars": scalars, "groups": state["param_groups"]}
    (new / "state.json").write_text(json.dumps(record), encoding="utf-8")
    for file in new.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(old, ignore_errors=True)
    if current.exists():
        current.rename(old)
    new.rename(current)
    shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path, model, optimizer) -> tuple[int, float]:
    """Restore what `save_state` wrote.

    Returns (step, seconds), or (0, 0.0) when there is nothing to resume.
    """
    current = folder / "state"
    if not (current / "state.json").is_file():
        current = folder / "state.old"  # killed between the two renames
    if not (current / "state.json").is_file():
        return 0, 0.0
    record = json.loads((current / "state.json").read_text(encoding="utf-8"))
    model.load_state_dict(load_file(current / "model.safetensors"))
    state: dict[int, dict[str, Any]] = {}
    for key, value in load_file(current / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    for key, value in record["scalars"].items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": record["groups"]})
    return record["step"], record["seconds"]


def remove_state(folder: Path) -> None:
    """Drop the resume state of a run that has ended: the checkpoint beside it is complete."""
    for name in ("state", "state.old", "state.new"):
        shutil.rmtree(folder / name, ignore_errors=True)


def check_same_data(folder: Path, facts: dict[str, Any]) -> None:
    """Refuse to resume on other data: cohort and split must be those the run began with.

    Raises
    ------
    TrainingError
    """
    path = folder / "run.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for key in ("cohort_hash", "split_hash"):
        if key in before and before[key] != facts[key]:
            raise TrainingError(
                f"{folder} was begun with another {key.removesuffix('_hash')}: "
                f"{before[key][:12]}... -> {facts[key][:12]}... Choose another `output`."
            )


def check_resumable(folder: Path, arguments: Any) -> None:
    """Refuse to resume under other arguments; the message lists `key: was -> now`.

    Raises
    ------
    TrainingError
    """
    path = folder / "run.json"
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))["arguments"]
    now = json.loads(json.dumps(dataclasses.asdict(arguments), default=str))
    changed = [
        f"  {key}: {before.get(key)!r} -> {now[key]!r}"
        for key in now
        if key != "resume" and before.get(key) != now[key]
    ]
    if changed:
        raise TrainingError(
            f"{folder} was begun with other arguments; "
            "resume it unchanged or choose another `output`:\n" + "\n".join(changed)
        )
