"""What is handed to clusters: accelerate's files, the SLURM script, and what is refused there."""

import os
import signal
import subprocess
import time

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from cortexicon.training.arguments import TrainingError
from cortexicon.training.faults import refuse_divided_models

FILES = {"one_gpu": ("NO", 1), "many_gpus": ("MULTI_GPU", 8), "fsdp": ("FSDP", 8)}


@pytest.fixture(scope="module")
def folder(repository):
    return repository / "training" / "configs" / "accelerate"


def test_every_file_is_in_the_table(folder):
    assert {path.stem for path in folder.glob("*")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_each_file(folder, name):
    kind, processes = FILES[name]
    config = load_config_from_file(str(folder / f"{name}.yaml"))  # refuses unknown keys
    assert config.distributed_type.value == kind
    assert config.num_processes == processes
    assert not config.use_cpu


@pytest.mark.parametrize("name", FILES)
def test_a_launch_takes_its_settings_from_the_file(folder, name, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    argv = ["--config_file", str(folder / f"{name}.yaml"), "--num_machines", "2"]
    argv += ["--machine_rank", "1", "--main_process_ip", "node1", "--main_process_port", "29501"]
    argv += ["-m", "cortexicon.training.avq", "my.yaml", "output=x"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    kind, processes = FILES[name]
    assert arguments.num_processes == processes
    assert arguments.multi_gpu == (kind == "MULTI_GPU")
    assert arguments.use_fsdp == (kind == "FSDP")
    assert arguments.training_script == "cortexicon.training.avq"
    assert arguments.training_script_args == ["my.yaml", "output=x"]
    if kind == "FSDP":
        assert str(arguments.fsdp_version) == "2"
        assert arguments.fsdp_state_dict_type == "FULL_STATE_DICT"
        assert arguments.fsdp_transformer_layer_cls_to_wrap == "LlamaDecoderLayer"


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_divided_model_is_refused(monkeypatch, kind):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    refuse_divided_models()
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(TrainingError, match=f"found {kind}"):
        refuse_divided_models()


# ----------------------------------------------------------------------------------- SLURM

SRUN = """#!/bin/bash
# Stands in for srun: one task here, and a signal is passed on, as the real one does.
shift  # --kill-on-bad-exit
"$@" & child=$!
trap 'kill -TERM $child' TERM
wait $child; code=$?
while kill -0 $child 2>/dev/null; do wait $child; code=$?; done
exit $code
"""
ACCELERATE = """#!/bin/bash
printf '%s\\n' "$@" > "$LOG/accelerate"
trap 'echo saved > "$LOG/saved"; exit 143' TERM
touch "$LOG/started"
for _ in $(seq "${TENTHS:-0}"); do sleep 0.1; done
exit "${CODE:-0}"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node1\\nnode2\\n'; else echo "$@" > "$LOG/scontrol"; fi
"""


@pytest.fixture
def slurm(tmp_path, repository):
    """Start the script with SLURM's commands replaced; `LOG` is where they write."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("accelerate", ACCELERATE), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def start(*argv, **more):
        environment = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "LOG": str(tmp_path),
            "SLURM_JOB_ID": "41234",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_NODEID": "1",
            "SLURM_GPUS_ON_NODE": "4",
            **more,
        }
        script = repository / "examples" / "slurm_train.sh"
        return subprocess.Popen(
            ["bash", str(script), *argv], env=environment, stdout=subprocess.PIPE, text=True
        )

    return start


def test_the_script_starts_a_process_for_every_gpu_of_every_node(slurm, tmp_path):
    process = slurm("avq", "my config.yaml", "cohort=/some where/cohort")
    process.communicate(timeout=30)
    assert process.returncode == 0
    words = (tmp_path / "accelerate").read_text().splitlines()
    pairs = dict(zip(words[1::2], words[2::2], strict=False))
    assert words[0] == "launch"
    assert pairs["--config_file"] == "training/configs/accelerate/many_gpus.yaml"
    assert pairs["--num_machines"] == "2"
    assert pairs["--machine_rank"] == "1"
    assert pairs["--num_processes"] == "8"
    assert pairs["--main_process_ip"] == "node1"
    assert pairs["--main_process_port"] == "21234"
    tail = ["-m", "cortexicon.training.avq", "my config.yaml", "cohort=/some where/cohort"]
    assert words[-5:] == [*tail, "resume=true"]
    launch_command_parser().parse_args(words[1:])  # as accelerate itself would
    assert not (tmp_path / "scontrol").exists()


def test_out_of_time_the_run_saves_and_the_job_queues_again(slurm, tmp_path):
    process = slurm("avq", "my.yaml", TENTHS="300")
    for _ in range(300):
        if (tmp_path / "started").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=30)
    assert (tmp_path / "saved").read_text() == "saved\n"
    assert (tmp_path / "scontrol").read_text() == "requeue 41234\n"
    assert process.returncode == 0
    assert "queueing again" in output


def test_a_run_that_fails_is_not_queued_again(slurm, tmp_path):
    process = slurm("avq", "my.yaml", CODE="2")
    process.communicate(timeout=30)
    assert process.returncode == 2
    assert not (tmp_path / "scontrol").exists()
    assert slurm("avq").wait(timeout=30) != 0  # no configuration
