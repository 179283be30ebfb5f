"""What can go wrong while a run goes on: kills, bad batches, full disks, a second run.

* SIGTERM and Ctrl-C end the step that is under way, save the state and exit with 143 or 130.
* A batch, loss or gradient that is not finite is put back as if it had never been, and redrawn.
* A folder that is full, read-only or in use is refused before training starts.

Every decision is that of all processes together: none goes on alone, and none waits for ever.
"""

import errno
import os
import shutil
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from .arguments import TrainingError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

MOST_TRIES = 5
MOST_BYTES = 4000  # of a message between processes
STATE_FOLDERS = ("state", "state.old", "state.new")


class FolderError(TrainingError, OSError):
    """The output folder cannot be used now: full, read-only, or in use by another run.

    It is an OSError too, for it says nothing about the run's arguments.
    """


class RefusedBatchWarning(UserWarning):
    """A batch was left out of training; the text names the subject or the cause."""


# ------------------------------------------------------------------ all processes together


def refuse_divided_models() -> None:
    """Refuse launchers that divide a model among processes.

    NOTE: the scripts save what one process holds, and codebooks are buffers that every process
    updates alike. Under FSDP a checkpoint would hold one process's share, and nothing would say so.

    Raises
    ------
    TrainingError
    """
    for kind in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise TrainingError(
                f"expected a launcher that gives every process the whole model, found {kind}. "
                "Take configs/accelerate/many_gpus.yaml, or the plain Trainer (docs/cluster.md)."
            )


def of_all_processes(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Elementwise largest of `values` (any shape) over the processes; all must ask together."""
    if accelerator.num_processes == 1:
        return values
    stacked = accelerator.gather(values.to(accelerator.device)[None])
    return stacked.amax(0).cpu()


def on_main_process(accelerator: Accelerator, work: Callable[[], Any]) -> None:
    """Do `work` on the main process; where it fails there, every process stops with its message.

    NOTE: the first process that ends may take the others with it before they have said anything.
    """
    failure: Exception | None = None
    message = torch.zeros(1 + MOST_BYTES, dtype=torch.uint8)  # failed or not, and its text
    if accelerator.is_main_process:
        try:
            work()
        except Exception as error:
            failure = error
            text = str(error).encode()[:MOST_BYTES]
            message[: 1 + len(text)] = torch.tensor([1, *text])
    message = of_all_processes(accelerator, message)
    if failure is not None:
        raise failure
    if message[0]:
        raise TrainingError(bytes(message[1:].tolist()).rstrip(b"\0").decode(errors="ignore"))


# ------------------------------------------------------------------ signals


class StopSignals:
    """SIGTERM and SIGINT, as a context: they ask for a stop at the end of the step under way.

    Until `armed` there is nothing to save: SIGTERM exits with 143 at once, and SIGINT interrupts as
    always. So does a second SIGINT later: whoever insists need not wait.
    """

    def __init__(self) -> None:
        self.armed = False
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (not self.armed or self.received):
            raise KeyboardInterrupt
        if not self.armed:
            raise SystemExit(128 + number)
        if not self.received:
            self.received = number
            # NOTE: not print, which must not be entered again while the bar writes.
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: this step ends, then the state is saved.\n".encode())


# ------------------------------------------------------------------ the folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `FOLDER/run.lock` while training; a process that dies lets go of it, however it dies.

    Raises
    ------
    FolderError
        A living process holds it.
    """
    if fcntl is None:
        yield
        return
    path = folder / "run.lock"
    while True:
        handle = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            handle.close()
            raise FolderError(
                f"{folder} is in use: {owner} trains there. "
                "Wait for it, stop it, or choose another `output`."
            ) from None
        except OSError as error:
            warnings.warn(
                f"{path} cannot be locked ({error.strerror}): see to it that no second run "
                "writes there.",
                stacklevel=2,
            )
        # The run before may have removed the file between our opening and our locking it.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(handle.fileno())):
            break
        handle.close()
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    handle.flush()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        handle.close()


@contextmanager
def disk_errors(folder: Path, what: str) -> Iterator[None]:
    """Turn what the disk refuses while `what` is written into a FolderError that says so."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, FolderError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        full = "No space left" in str(error) or getattr(error, "errno", 0) == errno.EDQUOT
        raise FolderError(
            f"Cannot write {what} in {folder}: {reason}. What was saved before is whole. "
            f"{'Free some space there' if full else 'Mend the folder'} and go on with --resume."
        ) from error


def state_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Size of a saved state: weights and buffers, and Adam's two moments of what is trained."""
    stored = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return stored + sum(2 * p.numel() * p.element_size() for p in trained)


def check_free_space(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Refuse to train where the states will not fit.

    NOTE: two are there while one is saved; the checkpoint at the end is smaller than one of them.

    Raises
    ------
    FolderError
    """
    present = sum(
        file.stat().st_size for name in STATE_FOLDERS for file in (folder / name).glob("*")
    )
    needed = 2 * state_bytes(model, optimizer) - present
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FolderError(
            f"{folder} has {free / 1e6:.0f} MB of free space; the run needs about "
            f"{needed / 1e6:.0f} MB for its states. Free some, or choose another `output`."
        )


def sync(path: Path) -> None:
    """Wait until the disk holds a file, or the names in a folder, as a power cut would find it."""
    if path.is_dir() and os.name == "nt":  # Windows does not open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text_whole(path: Path, text: str) -> None:
    """Write a text file so that a kill leaves the old one or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    try:
        with disk_errors(path.parent, path.name):
            part.write_text(text, encoding="utf-8")
            sync(part)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to save a checkpoint into, whose files then take their place in `folder`.

    Weights come last: where they are, the rest is too.
    """
    part = folder / "checkpoint.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        with disk_errors(folder, "the checkpoint"):
            part.mkdir()
            yield part
            files = [path for path in part.rglob("*") if path.is_file()]
            for path in sorted(files, key=lambda path: (path.suffix == ".safetensors", path)):
                sync(path)
                target = folder / path.relative_to(part)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
            sync(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ------------------------------------------------------------------ bad batches


class StepGuard:
    """One optimizer step, tried again on other data while something in it is not finite.

    What a try has touched is put back before the next one: the codebook's statistics (all buffers)
    and the gradients. Scans that were found at fault are left out of the draws of this step.
    Everything follows from the data, so that a resumed run tries the same. Use::

        guard = StepGuard(accelerator, step, subject_ids, model, warned)
        while not guard.accepted:
            draw batches by guard.attempt without guard.excluded, until not guard.refuses(batches)
            forward, guard.watch(output, scans), backward
            guard.judge(loss, gradient, optimizer)

    Parameters
    ----------
    step : int
        Counted from 0.
    subject_ids : sequence of str
        Of the scans that batches are drawn from; none where no data are somebody's.
    model : torch.nn.Module, optional
        Whose buffers training changes.
    warned : set of str
        Causes that the user has read already; shared by the steps of a run.

    Raises
    ------
    TrainingError
        From `refuses` and `judge`, after `MOST_TRIES` tries in a row.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        step: int,
        subject_ids: Sequence[str] = (),
        model: torch.nn.Module | None = None,
        warned: set[str] | None = None,
    ):
        self.accelerator = accelerator
        self.step = step
        self.subject_ids = subject_ids
        self.attempt = 0
        self.accepted = False
        self.excluded: set[int] = set()
        self._warned = set() if warned is None else warned
        self._causes: list[str] = []
        self._bad = torch.zeros(len(subject_ids), dtype=torch.uint8)
        buffers = [] if model is None else list(model.buffers())
        self._kept = [(buffer, buffer.detach().clone()) for buffer in buffers]

    def refuses(self, batches: Sequence[dict[str, torch.Tensor]]) -> bool:
        """Whether values that no mask covers are NaN or infinite, on any process.

        Asked before the model sees the batches. Their `scan` (batch,) is the place of each row in
        `subject_ids`.
        """
        for batch in batches:
            values = batch["input_values"].masked_fill(~batch["region_mask"][:, None], 0.0)
            self._mark(torch.isfinite(values), batch["scan"])
        bad = of_all_processes(self.accelerator, self._bad).bool()
        if not bad.any():
            return False
        self._try_again(f"the data of {self._names(bad)} hold NaN or infinite values", bad)
        return True

    def watch(self, output: torch.Tensor, scans: Any) -> None:
        """Remember whose rows of an output (rows, ...) are not finite: who is to blame, if any."""
        self._mark(torch.isfinite(output.detach()), scans)

    def judge(
        self, loss: torch.Tensor, gradient: torch.Tensor, optimizer: torch.optim.Optimizer
    ) -> None:
        """Accept the try, or drop its gradients where loss or gradient norm are not finite."""
        loss, gradient = loss.detach(), gradient.detach()
        finite = bool(torch.isfinite(loss) & torch.isfinite(gradient))
        verdict = torch.cat([torch.tensor([not finite], dtype=torch.uint8), self._bad])
        verdict = of_all_processes(self.accelerator, verdict).bool()
        self.accepted = not bool(verdict[0])
        if self.accepted:
            self._kept.clear()
            return
        optimizer.zero_grad()
        cause = f"the loss is {float(loss):.3g} and the norm of its gradient {float(gradient):.3g}"
        bad = verdict[1:]
        if bad.any():
            cause = f"the model's output for {self._names(bad)} is not finite"
        self._try_again(cause, bad)

    def _mark(self, finite: torch.Tensor, scans: Any) -> None:
        rows = ~finite.flatten(1).all(1).cpu()
        self._bad[torch.as_tensor(scans)[rows]] = 1

    def _names(self, bad: torch.Tensor) -> str:
        names = [self.subject_ids[index] for index in bad.nonzero()[:, 0].tolist()]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(names[:3]) + more

    def _try_again(self, cause: str, bad: torch.Tensor) -> None:
        with torch.no_grad():
            for buffer, kept in self._kept:
                buffer.copy_(kept)
        self._bad.zero_()
        self.attempt += 1
        self._causes.append(cause)
        # Who is at fault stays out, unless all are: then it is not the data.
        if len(self.excluded | set(bad.nonzero()[:, 0].tolist())) < len(self.subject_ids):
            self.excluded |= set(bad.nonzero()[:, 0].tolist())
        if self.attempt == MOST_TRIES:
            tries = "\n".join(f"  {number}. {text}" for number, text in enumerate(self._causes, 1))
            raise TrainingError(
                f"Step {self.step + 1}: {MOST_TRIES} batches in a row were refused:\n{tries}\n"
                "Check those scans; where the data are finite, lower learning_rate."
            )
        if self.accelerator.is_main_process and cause not in self._warned:
            self._warned.add(cause)
            warnings.warn(
                f"Step {self.step + 1}: a batch is refused and drawn again: {cause}.",
                RefusedBatchWarning,
                stacklevel=3,
            )
