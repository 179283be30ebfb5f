"""A folder that is full, read-only or in use is refused, or left with what was whole before."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cortexicon.training import TrainingError, avq, callbacks, faults, lm, text

SCRIPTS = {"text": text, "avq": avq, "lm": lm}


# ------------------------------------------------------------------ read-only


@pytest.fixture
def nobody():
    """A folder that all may enter, read by a user who owns nothing: root may write everywhere."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(0)
            shutil.rmtree(folder)
    else:
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs the users of Unix")
def test_a_read_only_folder_is_refused(nobody):
    for output in (nobody, nobody / "inside"):
        arguments = avq.AVQArguments(str(output), "no cohort", "no split", "no text", cpu=True)
        with (
            pytest.raises(faults.FolderError, match=r"Cannot write to.*Permission denied") as error,
            callbacks.begin_run(arguments),
        ):
            pass
        assert str(output) in str(error.value)
        assert "Choose another `output`" in str(error.value)
    assert list(nobody.iterdir()) == []


# ------------------------------------------------------------------ what made it


@pytest.mark.parametrize(
    "started",
    [
        ["bin/cortexicon", "train", "text", "a.yaml"],
        ["cortexicon/cli.py", "train", "text", "a.yaml"],  # python -m cortexicon.cli
        ["cortexicon/training/text.py", "a.yaml"],  # accelerate launch -m cortexicon.training.text
    ],
)
def test_the_command_of_a_run_can_be_typed_again(tmp_path, monkeypatch, started):
    monkeypatch.setattr(sys, "argv", started)
    callbacks.write_run_facts(tmp_path, "text", text.TextArguments(output=""))
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["command"] == "cortexicon train text a.yaml"


# ------------------------------------------------------------------ full


def test_a_disk_too_small_for_the_states_is_refused_before_training(run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=30_000))
    for stage, script in SCRIPTS.items():
        output = tmp_path / stage
        with pytest.raises(faults.FolderError, match=r"0 MB of free space; the run needs") as error:
            script.main([str(run / f"{stage}.yaml"), f"output={output}"])
        assert str(output) in str(error.value)
        assert list(output.iterdir()) == []  # a second try is not refused


def test_the_size_of_a_state_is_estimated_well(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.BatchNorm1d(200))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    estimated = faults.state_bytes(model, optimizer)
    model(torch.randn(3, 300)).sum().backward()
    optimizer.step()
    callbacks.save_state(tmp_path, model, optimizer, 1, 1.0)
    saved = sum(file.stat().st_size for file in (tmp_path / "state").iterdir())
    assert estimated == pytest.approx(saved, rel=0.02)


@pytest.mark.parametrize("files", [0, 1, 2])
def test_a_disk_that_fills_while_saving_leaves_the_old_state(tmp_path, monkeypatch, files):
    def model_at(value):
        model = torch.nn.Linear(3, 3)
        with torch.no_grad():
            model.weight.fill_(value)
        return model, torch.optim.AdamW(model.parameters())

    callbacks.save_state(tmp_path, *model_at(1.0), 1, 1.0)
    written = 0
    real = callbacks.save_file

    def save_file(tensors, path):
        nonlocal written
        written += 1
        if written > files:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "save_file", save_file)
        if files == 2:  # it fills when the third file is written
            patch.setattr(callbacks.json, "dumps", lambda record: no_space())
        with pytest.raises(faults.FolderError) as error:
            callbacks.save_state(tmp_path, *model_at(2.0), 2, 2.0)
    message = str(error.value)
    assert "the state of step 2" in message
    assert "No space left" in message
    assert str(tmp_path) in message
    assert "--resume" in message
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    model, optimizer = model_at(0.0)
    assert callbacks.load_state(tmp_path, model, optimizer).step == 1
    assert (model.weight == 1).all()


def no_space():
    raise OSError(errno.ENOSPC, "No space left on device")


# The command line, on a disk of its own that somebody fills after the first state.
FILLS = """
import sys
from pathlib import Path
from cortexicon.cli import main
from cortexicon.training import callbacks
real = callbacks.save_state
def save_state(folder, model, optimizer, step, seconds):
    if step == 8:
        try:
            with (folder / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            pass
    real(folder, model, optimizer, step, seconds)
callbacks.save_state = save_state
sys.exit(main(sys.argv[1:]))
"""


def mounted(size, disk, *command):
    """Run a command in a namespace where `disk` is a file system of `size`, kept as DISK.tar."""
    script = (
        'mount -t tmpfs -o size="$1" none "$2" || exit 77; disk="$2"; shift 2; "$@"; code=$?; '
        'tar -cf "$disk.tar" -C "$disk" --exclude filler . ; exit $code'
    )
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", size, str(disk), *command],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_really_full_disk_on_the_command_line(run, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("unshare") is None or mounted("1m", disk, "true").returncode:
        pytest.skip("needs a namespace in which a small file system can be mounted")
    train = ["train", "avq", str(run / "avq.yaml"), "--set", f"output={disk}"]
    done = mounted("4m", disk, sys.executable, "-c", FILLS, *train)
    assert done.returncode == 2, done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"cortexicon train: Cannot write the state of step 8 in {disk}: ")
    assert "No space left" in message
    assert "Traceback" not in done.stderr
    shutil.unpack_archive(f"{disk}.tar", disk, filter="data")
    assert sorted(path.name for path in disk.iterdir()) == [
        "run.json",
        "state",
        "training_log.jsonl",
    ]
    assert avq.main([str(run / "avq.yaml"), f"output={disk}", "resume=true"]) == 0
    resumed = load_file(disk / "model.safetensors")
    for name, value in load_file(run / "avq" / "model.safetensors").items():
        assert torch.equal(resumed[name], value), name


def test_a_log_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    log = callbacks.TrainingLog(tmp_path, True)
    log.write(1, loss=2.0)
    monkeypatch.setattr(Path, "open", lambda *_, **__: no_space())
    with pytest.raises(faults.FolderError, match=r"Cannot write training_log.jsonl in.*No space"):
        log.write(2, loss=1.0)


def test_a_log_cut_in_a_line_is_cut_back_to_the_state(tmp_path):
    log = callbacks.TrainingLog(tmp_path, True)
    log.write(1, loss=2.0)
    with log.path.open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')
    callbacks.TrainingLog(tmp_path, True, callbacks.SavedState(1, 1.0, 1))
    assert [line.split(",")[0] for line in callbacks.log_lines(log.path)] == ['{"step": 1']


def test_a_damaged_state_is_named(tmp_path):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    callbacks.save_state(tmp_path, model, optimizer, 1, 1.0)
    weights = tmp_path / "state" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20])
    with pytest.raises(TrainingError, match="is damaged") as error:
        callbacks.load_state(tmp_path, model, optimizer)
    assert str(tmp_path / "state") in str(error.value)


# ------------------------------------------------------------------ in use


HOLDS = """
import sys
from pathlib import Path
from cortexicon.training import faults
with faults.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(faults.fcntl is None, reason="needs the locks of Unix")
def test_two_runs_in_one_folder(run, tmp_path):
    pipe = subprocess.PIPE
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=pipe, stdout=pipe, text=True
    )
    assert holder.stdout.readline() == "held\n"
    arguments = [str(run / "avq.yaml"), f"output={tmp_path}"]
    for more in ([], ["resume=true"]):
        with pytest.raises(faults.FolderError, match=f"in use: process {holder.pid} on") as error:
            avq.main([*arguments, *more])
        assert str(tmp_path) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    holder.kill()
    holder.communicate()
    assert (tmp_path / "run.lock").exists()  # the dead leave it, and it keeps nobody out
    assert avq.main(arguments) == 0
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.skipif(faults.fcntl is None, reason="needs the locks of Unix")
def test_a_lock_is_let_go_of_by_a_run_that_fails(tmp_path):
    def fails():
        with faults.locked(tmp_path):
            assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
            with pytest.raises(faults.FolderError), faults.locked(tmp_path):
                pass
            raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError):
            fails()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(faults.fcntl is None, reason="needs the locks of Unix")
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(faults.fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="No locks available"), faults.locked(tmp_path):
        pass


def test_a_run_that_was_killed_before_its_first_state_is_not_taken_for_ended(run, tmp_path):
    """A language model keeps its best checkpoint on the way, often before the first state."""
    output = tmp_path / "lm"
    shutil.copytree(run / "lm", output)
    facts = callbacks.run_facts(output)
    del facts["seconds"]
    faults.write_text_whole(output / "run.json", callbacks.json.dumps(facts))
    arguments = [str(run / "lm.yaml"), f"output={output}", "resume=true"]
    with pytest.raises(TrainingError, match="other arguments"):
        lm.main(arguments)  # it was copied from another place
    facts["arguments"]["output"] = str(output)
    faults.write_text_whole(output / "run.json", callbacks.json.dumps(facts))
    assert lm.main(arguments) == 0
    with pytest.raises(TrainingError, match="has ended"):
        lm.main(arguments)
