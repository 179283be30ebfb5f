"""Kills at any moment: what is left loads, and the resumed run ends as if nothing had happened."""

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cortexicon.training import TrainingError, avq, callbacks, faults, lm, text

STAGES = {"text": text, "avq": avq, "lm": lm}
# The command line as it is, but for the last state: it stays, so that it can be compared too.
COMMAND = """
import sys
from cortexicon.cli import main
from cortexicon.training import avq, lm, text
for stage in (avq, lm, text):
    stage.remove_state = lambda folder: None
sys.exit(main(sys.argv[1:]))
"""
# The same for many runs: each is a child of one process that has imported everything before.
PRELOADED = """
import json, os, sys, traceback
from cortexicon import cli
from cortexicon.training import avq, lm, text
for stage in (avq, lm, text):
    stage.remove_state = lambda folder: None
for line in sys.stdin:
    arguments, errors = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        try:
            os._exit(cli.main(arguments))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# Two batches a step, dead codes revived every fifth batch, and a state every eighth step.
LONGER = {
    "text": {"max_steps": 48, "save_steps": 8, "log_steps": 2},
    "avq": {
        "max_steps": 48,
        "save_steps": 8,
        "log_steps": 2,
        "eval_steps": 20,
        "codebook_start": 0.25,
        "accumulation_steps": 2,
        "model": {"revival_interval": 5, "revival_threshold": 0.3},
    },
    "lm": {"max_steps": 24, "save_steps": 4, "log_steps": 2, "eval_steps": 10},
}


def longer_config(run, folder, stage, **model) -> str:
    """The path of the stage's configuration with `LONGER`, and fields of the model, on top."""
    values = {"base": str(run / f"{stage}.yaml"), **LONGER[stage]}
    if model:
        values["model"] = {**values["model"], **model}
    path = folder / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def start(stage, config, output, *more) -> subprocess.Popen:
    """`cortexicon train STAGE CONFIG --set output=OUTPUT`, begun."""
    arguments = ["train", stage, config, "--set", f"output={output}", *more]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments], stderr=subprocess.PIPE, text=True
    )


class Child:
    """One command line in a child of a process that runs `PRELOADED`, with the ways of a Popen."""

    def __init__(self, parent, errors, arguments):
        self.parent, self.errors, self.returncode = parent, errors, None
        parent.stdin.write(json.dumps([arguments, str(errors)]).encode() + b"\n")
        self.pid = int(parent.stdout.readline())

    def poll(self):
        if self.returncode is None and select.select([self.parent.stdout], [], [], 0)[0]:
            self.returncode = int(self.parent.stdout.readline())
        return self.returncode

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self):
        while self.poll() is None:
            time.sleep(0.01)
        return None, self.errors.read_text(encoding="utf-8")


@pytest.fixture
def preloaded(tmp_path):
    """As `start`, at a fraction of the time."""
    pipe = subprocess.PIPE
    parent = subprocess.Popen([sys.executable, "-c", PRELOADED], stdin=pipe, stdout=pipe, bufsize=0)

    def begin(stage, config, output, *more):
        arguments = ["train", stage, config, "--set", f"output={output}", *more]
        return Child(parent, tmp_path / "errors.txt", arguments)

    yield begin
    parent.communicate()


def wait_for(process, output, step) -> float:
    """Wait until the run has logged `step`, 0: until it trains; seconds of a step, roughly."""
    facts, log = output / "run.json", output / "training_log.jsonl"
    before = facts.stat().st_mtime_ns if facts.exists() else 0
    first, began, reached = None, time.time(), 0
    while process.poll() is None and time.time() - began < 500:
        if first is None and facts.exists() and facts.stat().st_mtime_ns != before:
            first, since = reached, time.time()  # training follows at once
        if first is not None:
            reached = max((json.loads(line)["step"] for line in whole_lines(log)), default=0)
            if reached >= step:
                return (time.time() - since) / max(1, reached - first)
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[1]}")


def whole_lines(log) -> list[str]:
    """Lines of a log that may be in the middle of being written."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    return text.splitlines()[: text.count("\n")]


def killed(process, output, step, later) -> bool:
    """Kill a run `later` steps' time after it logged `step`; whether it was alive."""
    time.sleep(later * wait_for(process, output, step))
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return alive


def whole_run(stage, config, output, patch) -> None:
    """Run a stage in this process up to its end, its last state kept."""
    with patch.context() as kept:
        kept.setattr(STAGES[stage], "remove_state", lambda folder: None)
        resumed = ["resume=true"] if (output / "run.json").exists() else []
        assert STAGES[stage].main([config, f"output={output}", *resumed]) == 0


def differences(one: Path, two: Path) -> list[str]:
    """Where two ended runs differ: checkpoint, state with its codebook and moments, log."""
    found = []
    for name in ("model", "state/model", "state/optimizer"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (one, two))
        if a.keys() != b.keys():
            found.append(f"{name}: other tensors")
        found += [f"{name}: {key}" for key in a if not torch.equal(a[key], b[key])]

    def without_clock(line):
        return {key: value for key, value in json.loads(line).items() if key != "seconds"}

    logs = [callbacks.log_lines(folder / "training_log.jsonl") for folder in (one, two)]
    a, b = ([without_clock(line) for line in lines] for lines in logs)
    if a != b:
        found.append(f"log: {len(a)} lines -> {len(b)}")
    a, b = (without_clock((folder / "state/state.json").read_text()) for folder in (one, two))
    return found + [f"state.json: {key}" for key in a if a[key] != b[key]]


@pytest.mark.parametrize("model", [{}, {"token_layout": "grid", "code_branches": 8}], ids=str)
def test_a_run_killed_twice_is_bit_equal(run, tmp_path, monkeypatch, model):
    config = longer_config(run, tmp_path, "avq", **model)
    whole_run("avq", config, tmp_path / "whole", monkeypatch)
    output = tmp_path / "killed"
    assert killed(start("avq", config, output), output, 10, 0.7)
    assert killed(start("avq", config, output, "--resume"), output, 26, 1.2)
    assert not (output / "model.safetensors").exists()
    whole_run("avq", config, output, monkeypatch)
    assert not differences(tmp_path / "whole", output)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("stage", "kills"), [("avq", 20), ("lm", 5), ("text", 5)])
def test_random_kills_are_bit_equal(run, tmp_path, preloaded, stage, kills):
    """At random moments from the first step to the last file."""
    config = longer_config(run, tmp_path, stage)
    process = preloaded(stage, config, tmp_path / "whole")
    assert (process.communicate(), process.returncode)[1] == 0
    moments, equal = random.Random(7), 0
    for number in range(kills):
        output = tmp_path / f"killed{number}"
        step = 2 * moments.randint(0, LONGER[stage]["max_steps"] // 2)
        process = preloaded(stage, config, output)
        assert killed(process, output, step, moments.uniform(0, 2)), "it had ended"
        assert process.returncode == -signal.SIGKILL
        process = preloaded(stage, config, output, "--resume")
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
        assert not differences(tmp_path / "whole", output), (number, step)
        equal += 1
        shutil.rmtree(output)
    print(f"{stage}: {equal} of {kills} killed runs resumed bit-equal")


# ------------------------------------------------------------------ signals


def test_sigterm_on_the_command_line_saves_and_exits_with_143(run, tmp_path, monkeypatch):
    config = longer_config(run, tmp_path, "avq")
    whole_run("avq", config, tmp_path / "whole", monkeypatch)
    output = tmp_path / "stopped"
    process = start("avq", config, output)
    wait_for(process, output, 10)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 143, errors
    step = json.loads((output / "state/state.json").read_text(encoding="utf-8"))["step"]
    assert 0 < step < LONGER["avq"]["max_steps"]
    assert f"Stopped after step {step}; the state is saved in {output}" in errors
    assert "Traceback" not in errors
    assert not (output / "run.lock").exists()
    whole_run("avq", config, output, monkeypatch)
    assert not differences(tmp_path / "whole", output)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_ends_the_step_and_saves(run, tmp_path, monkeypatch, stage, number, code):
    script, config = STAGES[stage], str(run / f"{stage}.yaml")
    before = signal.getsignal(number)
    real, asked = callbacks.learning_rate_at, []

    def rate(step, *others):
        if step == 6 and not asked:
            asked.append(number)
            signal.raise_signal(number)
        return real(step, *others)

    with monkeypatch.context() as patch:
        patch.setattr(script, "learning_rate_at", rate)
        assert script.main([config, f"output={tmp_path}"]) == code
    assert signal.getsignal(number) is before
    assert json.loads((tmp_path / "state/state.json").read_text(encoding="utf-8"))["step"] == 7
    assert script.main([config, f"output={tmp_path}", "resume=true"]) == 0
    for name, value in load_file(run / stage / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "model.safetensors")[name], value), name


def test_a_signal_before_training_ends_at_once(run, tmp_path, monkeypatch):
    def load_fold(arguments):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(avq, "load_fold", load_fold)
    with pytest.raises(SystemExit) as stopped:
        avq.main([str(run / "avq.yaml"), f"output={tmp_path}"])
    assert stopped.value.code == 143
    assert list(tmp_path.iterdir()) == []


def test_a_second_interrupt_does_not_wait():
    with faults.StopSignals() as signals:
        signals.armed = True
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# ------------------------------------------------------------------ between micro-batches


@pytest.mark.parametrize(("kill", "saved"), [(2 * 6 + 1, 4), (2 * 9 + 1, 8)])
def test_a_kill_between_accumulated_batches_is_bit_equal(run, tmp_path, monkeypatch, kill, saved):
    config = str(run / "avq.yaml")
    arguments = [config, "accumulation_steps=2", "codebook_start=0.25"]
    assert avq.main([*arguments, f"output={tmp_path / 'whole'}"]) == 0
    forwards = 0
    real = faults.StepGuard.watch

    def watch(*values):
        nonlocal forwards
        if forwards == kill:  # in a step's second batch: the first one's gradients are there
            raise KeyboardInterrupt
        forwards += 1
        return real(*values)

    with monkeypatch.context() as patch:
        patch.setattr(faults.StepGuard, "watch", watch)
        with pytest.raises(KeyboardInterrupt):
            avq.main([*arguments, f"output={tmp_path / 'two'}"])
    state = json.loads((tmp_path / "two/state/state.json").read_text(encoding="utf-8"))
    assert state["step"] == saved
    assert avq.main([*arguments, f"output={tmp_path / 'two'}", "resume=true"]) == 0
    whole, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "two"))
    assert all(torch.equal(two[name], value) for name, value in whole.items())


# ------------------------------------------------------------------ while saving


def model_at(step, size=4):
    """A model and its optimizer, every value of which is `step`."""
    model = torch.nn.Linear(size, 3 * size)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, size)).sum().backward()
    optimizer.step()
    moments = [t for entry in optimizer.state.values() for t in entry.values()]
    with torch.no_grad():
        for tensor in (*model.parameters(), *moments):
            tensor.fill_(step)
    return model, optimizer


def assert_loads(folder, steps):
    """The state loads, is of one of `steps`, and every value in it is of that step."""
    model, optimizer = model_at(-1, model_size(folder))
    step = callbacks.load_state(folder, model, optimizer).step
    assert step in steps
    if step:
        moments = [t for entry in optimizer.state.values() for t in entry.values()]
        assert all(bool((tensor == step).all()) for tensor in (*model.parameters(), *moments))


def model_size(folder):
    where = callbacks.whole_state(folder)
    return 4 if where is None else load_file(where / "model.safetensors")["weight"].shape[1]


def dies_at(operation, work, *arguments) -> bool:
    """Do `work` in a child that dies, as by kill -9, at its `operation`th change of the disk.

    Whether it came to that. A file that is being written is left half written.
    """
    child = os.fork()
    if child == 0:
        left = operation

        def step_down():
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1

        def counted(real):
            def operate(*values, **keywords):
                step_down()
                return real(*values, **keywords)

            return operate

        for name in ("unlink", "rmdir", "rename", "replace", "mkdir", "fsync"):
            setattr(os, name, counted(getattr(os, name)))

        def half(tensors, path):
            save_file(tensors, path)
            whole = Path(path).read_bytes()
            if left == 0:
                Path(path).write_bytes(whole[: len(whole) // 2])
            step_down()

        callbacks.save_file = half
        try:
            work(*arguments)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def first_state(folder):
    pass


def a_state(folder):
    callbacks.save_state(folder, *model_at(1), 1, 1.0)


def killed_between_the_renames(folder):
    a_state(folder)
    (folder / "state").rename(folder / "state.old")
    shutil.copytree(folder / "state.old", folder / "state.new")


def killed_while_removing_the_old(folder):
    a_state(folder)
    shutil.copytree(folder / "state", folder / "state.old")
    (folder / "state.old/model.safetensors").unlink()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "before",
    [first_state, a_state, killed_between_the_renames, killed_while_removing_the_old],
)
def test_a_kill_at_every_operation_of_saving_leaves_a_whole_state(tmp_path, before):
    steps = {0, 2} if before is first_state else {1, 2}
    model, optimizer = model_at(2)
    operation, found = 0, set()
    while True:
        folder = tmp_path / str(operation)
        folder.mkdir()
        before(folder)
        died = dies_at(operation, callbacks.save_state, folder, model, optimizer, 2, 2.0)
        assert_loads(folder, steps if died else {2})
        found.add(callbacks.load_state(folder, *model_at(0)).step)
        callbacks.save_state(folder, *model_at(3), 3, 3.0)  # what was left is not in the way
        assert_loads(folder, {3})
        assert [path.name for path in folder.iterdir()] == ["state"]
        if not died:
            break
        operation += 1
    assert operation >= 8
    assert found == steps


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_every_operation_of_ending_can_be_told_from_a_run_that_goes_on(tmp_path):
    arguments = text.TextArguments(output="", resume=True)
    told = set()
    for operation in range(100):
        folder = tmp_path / str(operation)
        folder.mkdir()
        killed_while_removing_the_old(folder)
        callbacks.write_run_facts(folder, "text", arguments, seconds=1.0)
        died = dies_at(operation, callbacks.remove_state, folder)
        if callbacks.whole_state(folder):
            callbacks.check_folder(folder, arguments)
            assert_loads(folder, {1})
            told.add("goes on")
        else:
            with pytest.raises(TrainingError, match="has ended"):
                callbacks.check_folder(folder, arguments)
            assert [path.name for path in folder.iterdir()] == ["run.json"]
            told.add("has ended")
        if not died:
            break
    assert not died
    assert told == {"goes on", "has ended"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_every_operation_of_writing_a_checkpoint_leaves_whole_files(tmp_path):
    def write(folder, value):
        with faults.written_whole(folder) as part:
            (part / "config.json").write_text(str(value) * 1000, encoding="utf-8")
            save_file({"a": torch.full((9,), float(value))}, part / "model.safetensors")
        faults.write_text_whole(folder / "run.json", str(value) * 1000)

    for operation in range(100):
        folder = tmp_path / str(operation)
        folder.mkdir()
        write(folder, 1)
        died = dies_at(operation, write, folder, 2)
        weights = load_file(folder / "model.safetensors")["a"]
        configuration = (folder / "config.json").read_text(encoding="utf-8")
        assert configuration in ("1" * 1000, "2" * 1000)
        assert (folder / "run.json").read_text(encoding="utf-8") in ("1" * 1000, "2" * 1000)
        if (weights == 2).all():  # they come last
            assert configuration == "2" * 1000
        else:
            assert (weights == 1).all()
        if not died:
            break
    assert not died


SAVES_FOR_EVER = """
import itertools, sys
from pathlib import Path
import torch
from cortexicon.training import callbacks
model = torch.nn.Linear(1000, 3000)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 1000)).sum().backward()
optimizer.step()
tensors = [*model.parameters(), *(t for e in optimizer.state.values() for t in e.values())]
for step in itertools.count(1):
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(step)
    callbacks.save_state(Path(sys.argv[1]), model, optimizer, step, float(step))
    print(step, flush=True)
"""


@pytest.mark.slow
def test_random_kills_while_saving_leave_a_loadable_state(tmp_path):
    moments, kills, saved = random.Random(11), 10, []
    for trial in range(kills):
        folder = tmp_path / str(trial)
        folder.mkdir()
        process = subprocess.Popen(
            [sys.executable, "-c", SAVES_FOR_EVER, str(folder)], stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        began = time.time()
        process.stdout.readline()
        time.sleep(moments.uniform(0, 3 * (time.time() - began)))
        process.kill()
        printed = [int(line) for line in process.communicate()[0].split()]
        last = max(printed, default=2)
        assert_loads(folder, {last, last + 1})  # the last one printed, or one about to be
        saved.append(sorted(path.name for path in folder.iterdir()))
    print(f"{len(saved)} of {kills} kills while saving left a loadable state; there lay: {saved}")
    assert any("state.new" in names for names in saved), "no kill met a state being written"
