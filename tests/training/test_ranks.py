"""Two processes that train together: the same bits on both, and none waits for ever."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cortexicon.training import callbacks

pytestmark = pytest.mark.slow

# The command line as it is; what each process ends with is written beside.
COMMAND = """
import json, os, signal, sys
from pathlib import Path
from safetensors.torch import save_file
from cortexicon.cli import main
from cortexicon.training import atlases, avq, faults, lm, text
rank, folder, fault = os.environ["RANK"], Path(sys.argv[1]), sys.argv[2]
for stage in (avq, lm, text):
    stage.remove_state = lambda folder: None
models, revived, refused = [], [], []
build = avq.build_model
def build_model(*values):
    models.append(build(*values))
    revive = models[0].quantizer._revive
    def counted(*values):
        before = models[0].quantizer.codebook.clone()
        revive(*values)
        after = models[0].quantizer.codebook
        revived.append(int((before != after).any(1).sum()))
    models[0].quantizer._revive = counted
    return models[0]
avq.build_model = build_model
judge = faults.StepGuard.judge
def judged(guard, loss, *values):
    if fault == "loss" and rank == "1" and guard.step == 9 and guard.attempt == 0:
        loss = loss * float("nan")
    if fault == "kill" and guard.step == 117:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "signal" and rank == "1" and guard.step == 60:
        os.kill(os.getpid(), signal.SIGTERM)
    judge(guard, loss, *values)
    if guard.attempt:
        refused.append(guard.step)
faults.StepGuard.judge = judged
real = atlases.prepare_scans
def prepare_scans(*values, **keywords):
    scans = real(*values, **keywords)
    if fault == "scan" and values[3] == "training":
        scans.series[0][:, 3] = float("nan")
    return scans
atlases.prepare_scans = prepare_scans
code = main(sys.argv[3:])
save_file({k: v.clone() for k, v in models[0].state_dict().items()}, folder / f"{rank}.safetensors")
facts = {"revived": sum(revived), "refused": sorted(set(refused)), "code": code}
(folder / f"{rank}.json").write_text(json.dumps(facts))
sys.exit(code)
"""


def start(folder, config, *more, fault="none"):
    """`cortexicon train avq CONFIG` in two processes on the CPU."""
    script = folder / "command.py"
    script.write_text(COMMAND, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["train", "avq", config, "--set", f"output={folder / 'avq'}", *more]
    return subprocess.Popen(
        [sys.executable, *launch, str(script), str(folder), fault, *train],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process, limit=600) -> tuple[int, str]:
    """Exit code and output; after `limit` seconds somebody waits for ever."""
    try:
        output = process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its processes
        process.wait()
        raise
    return process.returncode, output


def facts_of(folder, rank):
    return json.loads((folder / f"{rank}.json").read_text(encoding="utf-8"))


def assert_same_bits(one, two):
    assert one.keys() == two.keys()
    assert not [name for name in one if not torch.equal(one[name], two[name])]


def config_of(run, folder, **values) -> str:
    path = folder / "avq.yaml"
    path.write_text(yaml.safe_dump({"base": str(run / "avq.yaml"), **values}), encoding="utf-8")
    return str(path)


LONG = {
    "max_steps": 200,
    "save_steps": 40,
    "log_steps": 10,
    "eval_steps": 50,
    "batch_size": 4,
    "codebook_start": 0.1,
    "model": {"revival_interval": 5, "revival_threshold": 0.9, "ema_decay": 0.9},
}


@pytest.fixture(scope="module")
def together(run, tmp_path_factory):
    """Two processes, 200 steps, of which 180 quantise, with revivals every fifth."""
    folder = tmp_path_factory.mktemp("together")
    code, output = ended(start(folder, config_of(run, folder, **LONG)))
    assert code == 0, output
    return folder


def test_both_hold_the_same_bits_after_200_steps_with_revival(together):
    one, two = (load_file(together / f"{rank}.safetensors") for rank in (0, 1))
    assert_same_bits(one, two)
    assert int(one["quantizer.updates"]) == 180
    assert facts_of(together, 0)["revived"] == facts_of(together, 1)["revived"] > 20
    assert callbacks.run_facts(together / "avq")["processes"] == 2
    assert_same_bits(one, load_file(together / "avq/state/model.safetensors"))
    print(f"200 steps, {facts_of(together, 0)['revived']} codes revived, both ranks bit-equal")


def test_a_killed_run_of_two_resumes_bit_equal(run, together, tmp_path):
    config = config_of(run, tmp_path, **LONG)
    code, output = ended(start(tmp_path, config, fault="kill"))
    assert code != 0, output
    state = json.loads((tmp_path / "avq/state/state.json").read_text(encoding="utf-8"))
    assert state["step"] == 80
    code, output = ended(start(tmp_path, config, "--resume"))
    assert code == 0, output
    for name in ("avq/model", "avq/state/model", "avq/state/optimizer", "1"):
        assert_same_bits(*(load_file(f / f"{name}.safetensors") for f in (together, tmp_path)))


def test_a_signal_to_one_process_stops_both(run, tmp_path):
    """The launcher passes on what it is sent; here only the second process gets it."""
    _, output = ended(start(tmp_path, config_of(run, tmp_path, **LONG), fault="signal"))
    assert [facts_of(tmp_path, rank)["code"] for rank in (0, 1)] == [143, 143], output
    assert_same_bits(*(load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)))
    state = load_file(tmp_path / "avq/state/model.safetensors")
    assert_same_bits(state, load_file(tmp_path / "1.safetensors"))
    step = json.loads((tmp_path / "avq/state/state.json").read_text(encoding="utf-8"))["step"]
    assert step == 61
    assert f"state is saved in {tmp_path / 'avq'}" in output


SHORT = {"accumulation_steps": 2, "batch_size": 3, "codebook_start": 0.25}


@pytest.mark.parametrize("fault", ["loss", "scan"])
def test_what_is_not_finite_on_one_process_is_refused_by_both(run, tmp_path, fault):
    code, output = ended(start(tmp_path, config_of(run, tmp_path, **SHORT), fault=fault))
    assert code == 0, output
    one, two = (facts_of(tmp_path, rank) for rank in (0, 1))
    assert one["refused"] == two["refused"]
    assert one["refused"] if fault == "scan" else one["refused"] == [9]
    assert_same_bits(*(load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)))
    assert output.count("a batch is refused and drawn again") == 1


def test_without_the_adversary_in_the_grid_layout_with_branches(run, tmp_path):
    model = {"token_layout": "grid", "code_branches": 8, "revival_interval": 2}
    more = {"adversary": False, "model": model | {"revival_threshold": 0.9}}
    code, output = ended(start(tmp_path, config_of(run, tmp_path, **SHORT, **more)))
    assert code == 0, output
    assert facts_of(tmp_path, 0)["revived"] > 0
    assert_same_bits(*(load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)))


def test_another_number_of_processes_is_refused(run, tmp_path, together):
    config = config_of(run, tmp_path, **LONG)
    (tmp_path / "avq").mkdir()
    facts = callbacks.run_facts(together / "avq")
    facts["processes"] = 3
    del facts["seconds"]  # it did not end
    facts["arguments"]["output"] = str(tmp_path / "avq")
    (tmp_path / "avq/run.json").write_text(json.dumps(facts), encoding="utf-8")
    code, output = ended(start(tmp_path, config, "--resume"))
    assert code != 0
    assert "another number of processes: 3 -> 2" in output
