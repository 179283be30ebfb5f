"""What a run leaves behind while it goes: log, facts, and checkpoints that resume exactly."""

import dataclasses
import importlib.metadata
import json
import math
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from .arguments import TrainingError
from .faults import (
    FolderError,
    StopSignals,
    check_free_space,
    disk_errors,
    locked,
    of_all_processes,
    on_main_process,
    refuse_divided_models,
    sync,
    write_text_whole,
)

_PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
)

# Facts of a run without which it would not end as it began.
_SAME_ON_RESUME = {
    "cohort_hash": "cohort",
    "split_hash": "split",
    "more_cohorts_hash": "set of further cohorts",
    "text_table": "embedding table of the text model",
    "codebook": "codebook",
    "corpus_hash": "text",
    "processes": "number of processes",
}


def learning_rate_at(step: int, peak: float, warmup: int, total: int) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    progress = min(1.0, step / max(1, total))
    return (
        peak
        * min(1.0, (step + 1) / max(1, warmup))
        * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
    )


class SavedState(NamedTuple):
    """Where a run stood when its state was saved; all zero where there is none.

    Attributes
    ----------
    step : int
        Steps done.
    seconds : float
        Of training so far.
    log_lines : int
        Lines of the log at that moment.
    """

    step: int = 0
    seconds: float = 0.0
    log_lines: int = 0


class TrainingLog:
    """JSON lines in `FOLDER/training_log.jsonl`, written by the main process only.

    On resume the lines after the saved state are dropped, so that none stands twice.
    """

    def __init__(self, folder: Path, active: bool, resumed: SavedState = SavedState()):  # noqa: B008
        self.path = folder / "training_log.jsonl"
        self.active = active
        self.started = time.time() - resumed.seconds
        if not active:
            return
        kept = log_lines(self.path)[: resumed.log_lines]
        write_text_whole(self.path, "".join(line + "\n" for line in kept))

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
        with (
            disk_errors(self.path.parent, self.path.name),
            self.path.open("a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(line) + "\n")


def log_lines(path: Path) -> list[str]:
    """The lines of a log; a file that is not there has none."""
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def write_run_facts(folder: Path, stage: str, arguments: Any, **facts: Any) -> None:
    """`FOLDER/run.json`: stage, arguments, command, versions, machine, and what the stage adds."""
    by_command_line = Path(sys.argv[0]).stem in ("cortexicon", "cli")  # else a module of its own
    record = {
        "stage": stage,
        "command": shlex.join(
            ["cortexicon", *([] if by_command_line else ["train", stage]), *sys.argv[1:]]
        ),
        "arguments": dataclasses.asdict(arguments),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "threads": torch.get_num_threads(),
        **facts,
    }
    write_text_whole(folder / "run.json", json.dumps(record, indent=2, default=str) + "\n")


class Run:
    """A run on one of its processes: the folder it holds, and what may end it early.

    Attributes
    ----------
    accelerator : Accelerator
    output : Path
    warned : set of str
        Causes of refused batches that the user has read already.
    """

    def __init__(self, accelerator: Accelerator, output: Path, resume: bool, signals: StopSignals):
        self.accelerator = accelerator
        self.output = output
        self.resume = resume
        self.signals = signals
        self.warned: set[str] = set()

    def begin(self, stage: str, arguments: Any, facts: dict[str, Any], model, optimizer):
        """Write the run's facts, restore what was saved where it is resumed; the SavedState.

        Refuses data other than those the run began with, and a disk too full for its states.
        """

        def checked() -> None:
            if self.resume:
                check_same_data(self.output, facts)
            check_free_space(self.output, model, optimizer)
            write_run_facts(self.output, stage, arguments, **facts)

        on_main_process(self.accelerator, checked)
        return load_state(self.output, model, optimizer) if self.resume else SavedState()

    def steps(self, first: int, steps: int, name: str) -> tqdm:
        """A progress bar over steps `first` to `steps`, on the main process.

        From now on SIGTERM and Ctrl-C wait for the end of a step.
        """
        self.signals.armed = True
        return tqdm(
            range(first, steps),
            initial=first,
            total=steps,
            desc=name,
            mininterval=2.0,
            disable=not self.accelerator.is_main_process,
        )

    def stop_code(self) -> int:
        """0, or the exit code (143 or 130) after a signal to any process; all ask together."""
        received = of_all_processes(self.accelerator, torch.tensor(self.signals.received))
        return 128 + int(received) if received else 0

    def end_step(self, done: int, save: bool, model, optimizer, seconds: float) -> int:
        """Save the state after `done` steps if `save`, or if a signal came: then the exit code."""
        code = self.stop_code()
        if code or save:
            self.save_state(model, optimizer, done, seconds)
        return self.stop(code, done) if code else 0

    def save_state(self, model, optimizer, step: int, seconds: float) -> None:
        """`save_state` by the main process; where it fails, no process goes on."""
        on_main_process(
            self.accelerator, lambda: save_state(self.output, model, optimizer, step, seconds)
        )

    def stop(self, code: int, step: int) -> int:
        """Say where the run stands and how it goes on; returns `code`."""
        if self.accelerator.is_main_process:
            print(
                f"Stopped after step {step}; the state is saved in {self.output}. "
                "Go on with --resume.",
                file=sys.stderr,
            )
        return code


@contextmanager
def begin_run(arguments: Any, mixed_precision: str = "no") -> Iterator[Run]:
    """What every stage does first: choose the device, claim `arguments.output`, set the seed.

    As long as the context lasts the folder is this run's, and so are SIGTERM and Ctrl-C.
    """
    output = Path(arguments.output)
    if mixed_precision not in ("no", "bf16"):
        raise TrainingError(f"mixed_precision must be no or bf16, found {mixed_precision!r}.")
    refuse_divided_models()
    accelerator = Accelerator(
        cpu=arguments.cpu or not torch.cuda.is_available(),
        mixed_precision=mixed_precision,
        # Without its adversary a codec has a classifier that no loss reaches.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )

    def claim() -> None:
        make_folder(output)
        held.enter_context(locked(output))
        check_folder(output, arguments)

    with ExitStack() as held:
        signals = held.enter_context(StopSignals())
        on_main_process(accelerator, claim)
        torch.manual_seed(arguments.seed)
        yield Run(accelerator, output, arguments.resume, signals)
        accelerator.end_training()


def make_folder(folder: Path) -> None:
    """Make `folder`, and see that it can be written.

    Raises
    ------
    FolderError
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write_probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise FolderError(
            f"Cannot write to {folder}: {error.strerror}. Choose another `output`."
        ) from error


def check_folder(folder: Path, arguments: Any) -> None:
    """Refuse a folder that holds a run: an ended one always, another one unless resumed unchanged.

    Raises
    ------
    TrainingError
    """
    if not arguments.resume and (folder / "training_log.jsonl").exists():
        raise TrainingError(
            f"{folder} already holds a run. "
            "Resume it (--resume), remove the folder, or choose another `output`."
        )
    if not arguments.resume:
        return
    # The last thing that a run writes are its facts with the seconds it took; then its state goes.
    if "seconds" in run_facts(folder) and whole_state(folder) is None:
        remove_state(folder)
        raise TrainingError(
            f"{folder} holds a run that has ended; there is nothing to resume. "
            "Use its checkpoint, or choose another `output`."
        )
    check_resumable(folder, arguments)


def save_state(folder: Path, model, optimizer, step: int, seconds: float) -> None:
    """Write the state of a run; a kill at any moment leaves a complete one, the old or the new.

    ::

        FOLDER/state/model.safetensors      weights and buffers, the codebook's among them
        FOLDER/state/optimizer.safetensors  Adam's moments
        FOLDER/state/state.json             step, seconds, lines of the log; written last

    Data order and dropout need no state: both are drawn from (seed, step).

    Raises
    ------
    FolderError
        The disk is full, or refuses otherwise; the old state is whole.
    """
    new, current, old = folder / "state.new", folder / "state", folder / "state.old"
    weights = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    tensors, scalars = {}, {}
    state = optimizer.state_dict()
    for index, entry in state["state"].items():
        for name, value in entry.items():
            if torch.is_tensor(value):
                tensors[f"{index}.{name}"] = value.detach().cpu().clone()
            else:
                scalars[f"{index}.{name}"] = value
    record = {
        "step": step,
        "seconds": seconds,
        "log_lines": len(log_lines(folder / "training_log.jsonl")),
        "scalars": scalars,
        "groups": state["param_groups"],
    }
    shutil.rmtree(new, ignore_errors=True)
    try:
        with disk_errors(folder, f"the state of step {step}"):
            new.mkdir()
            save_file(weights, new / "model.safetensors")
            save_file(tensors, new / "optimizer.safetensors")
            (new / "state.json").write_text(json.dumps(record), encoding="utf-8")
            for path in (*new.iterdir(), new):
                sync(path)
            # NOTE: while `state` is missing, `state.old` may be the only complete one: it goes only
            # when `state` can take its place.
            if current.exists():
                shutil.rmtree(old, ignore_errors=True)
                current.rename(old)
            new.rename(current)
            sync(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def whole_state(folder: Path) -> Path | None:
    """The folder of the last complete state, or None."""
    for name in ("state", "state.old"):  # the second: killed between the two renames
        if (folder / name / "state.json").is_file():
            return folder / name
    return None


def load_state(folder: Path, model, optimizer) -> SavedState:
    """Restore what `save_state` wrote; a SavedState of zeros when there is nothing to resume.

    Raises
    ------
    TrainingError
        The files are damaged.
    """
    current = whole_state(folder)
    if current is None:
        return SavedState()
    try:
        record = json.loads((current / "state.json").read_text(encoding="utf-8"))
        weights = load_file(current / "model.safetensors")
        tensors = load_file(current / "optimizer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(
            f"The state in {current} is damaged ({error}), not by a kill: those leave a whole one. "
            "Remove the run's folder and train again."
        ) from error
    model.load_state_dict(weights)
    state: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | record["scalars"]).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": record["groups"]})
    return SavedState(record["step"], record["seconds"], record["log_lines"])


def remove_state(folder: Path) -> None:
    """Drop the state of a run that has ended: the checkpoint beside it is complete."""
    for name in ("state.new", "state.old", "state"):
        # Without this file it is no complete state any more, however far the removal comes.
        (folder / name / "state.json").unlink(missing_ok=True)
        shutil.rmtree(folder / name, ignore_errors=True)


def run_facts(folder: Path) -> dict[str, Any]:
    """What `FOLDER/run.json` holds; nothing where it is not there."""
    path = folder / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def check_same_data(folder: Path, facts: dict[str, Any]) -> None:
    """Refuse to resume on other data, or on another number of processes, which share the draws.

    Raises
    ------
    TrainingError
    """
    before = run_facts(folder)
    for key, what in _SAME_ON_RESUME.items():
        if key in before and before[key] != facts[key]:
            was, now = (str(value)[:12] for value in (before[key], facts[key]))
            raise TrainingError(
                f"{folder} was begun with another {what}: {was} -> {now}. "
                "Resume it as it was begun, or choose another `output`."
            )


def check_resumable(folder: Path, arguments: Any) -> None:
    """Refuse to resume under other arguments; the message lists `key: was -> now`.

    Raises
    ------
    TrainingError
    """
    facts = run_facts(folder)
    if not facts:
        return
    before = facts["arguments"]
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
