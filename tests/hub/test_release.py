"""Slow promises: kills at random moments, and environments that never saw the package."""

import os
import random
import signal
import subprocess
import sysconfig
import time
import venv

import pytest

pytestmark = [pytest.mark.hub, pytest.mark.slow]

# A child of the client, which has everything imported; the child is what gets killed.
PUSH = """
import os
from cortexicon.model_cards.push import push_folder
found = os.fork()
if not found:
    try:
        push_folder(folder, "user/killed", say=lambda _: None)
        os._exit(0)
    finally:
        os._exit(1)
"""
CLEAN = """
import sys
import torch
from transformers import AutoModel, AutoProcessor
try:
    import cortexicon
    sys.exit("cortexicon is installed here")
except ModuleNotFoundError:
    pass
model = AutoModel.from_pretrained("user/codec", trust_remote_code=True, revision=sys.argv[1])
processor = AutoProcessor.from_pretrained("user/codec", trust_remote_code=True)
series = torch.randn(90, 48, generator=torch.Generator().manual_seed(0)).numpy() + 100
scan = processor.feature_extractor(series, tr=2.0)
codes = model.encode(**{name: scan[name] for name in scan if name != "num_windows"}).codes
print("codes", codes.flatten().tolist())
from datasets import load_dataset
stream = load_dataset("user/cohort", split="train", streaming=True)
print("scans", sum(1 for _ in stream))
"""


def make_folder(folder, number):
    """Eight files of 200 kB and one text, all of them new for every number."""
    folder.mkdir(exist_ok=True)
    for part in range(8):
        seed = random.Random(1000 * number + part)
        (folder / f"part{part}.safetensors").write_bytes(seed.randbytes(200_000))
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\nVersion {number}\n")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_push_killed_at_ten_random_moments_is_all_or_nothing(client, hub, tmp_path, fault):
    folder = tmp_path / "folder"

    def start():
        # Every request takes a moment, so that a kill finds it at work.
        hub.faults[:] = [fault(".", delay=0.1, times=10**6)]
        return client.run(PUSH, folder=str(folder))

    def wait(child):
        return client.run("found = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])", child=child)

    def remote():
        files = dict(hub.repository("user/killed").head.files)
        files.pop(".gitattributes")
        return files

    old = make_folder(folder, 0)
    began = time.monotonic()
    assert wait(start()) == 0
    duration = time.monotonic() - began
    assert remote() == old

    seen, chance = {"old": 0, "new": 0}, random.Random(0)
    for number in range(1, 11):
        new = make_folder(folder, number)
        child = start()
        time.sleep(chance.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        ended = wait(child)
        assert ended in (-signal.SIGKILL, 0)
        time.sleep(0.5)  # what the Hub was carrying out, it carries out
        found = remote()
        assert found in (old, new), f"kill {number}: a revision in between"
        seen["new" if found == new else "old"] += 1
        assert wait(start()) == 0
        assert remote() == new
        old = new
    print(seen, f"a push takes {duration:.1f} s")
    assert seen["old"]  # else the kills came after the work
    assert len(hub.repository("user/killed").commits) == 12  # the Hub's own, and one of each


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory):
    """A Python whose environment has the libraries and not cortexicon."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    packages = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    # NOTE: .pth files of a folder named in a .pth file are not read, so an editable install that
    # lies in it stays unseen.
    with open(os.path.join(packages, "libraries.pth"), "w", encoding="utf-8") as file:
        file.write(sysconfig.get_paths()["purelib"] + "\n")
    return python


def test_a_clean_environment_loads_model_and_cohort(
    client, hub, run_folder, client_environment, clean_python, tmp_path
):
    for what, name in (("avq", "user/codec"), ("cohort", "user/cohort")):
        code, out = client.cli("publish", run_folder / what, name)
        assert code == 0, out
    ((tag, _),) = hub.repository("user/codec").tags.items()
    environment = {k: v for k, v in client_environment.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home")}

    def run(**more):
        done = subprocess.run(
            [clean_python, "-c", CLEAN, tag],
            env=environment | more,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    online = run()
    assert "scans 60" in online
    found = client.run(
        "from cortexicon.inference import load_checkpoint\n"
        "import torch\n"
        "c = load_checkpoint(folder)\n"
        "series = torch.randn(90, 48, generator=torch.Generator().manual_seed(0)).numpy() + 100\n"
        "scan = c.processor.feature_extractor(series, tr=2.0)\n"
        "inputs = {k: scan[k] for k in scan if k != 'num_windows'}\n"
        "found = c.model.encode(**inputs).codes.flatten().tolist()",
        folder=str(run_folder / "avq"),
    )
    assert f"codes {found}" in online


def test_what_was_downloaded_loads_without_a_network(
    client, hub, run_folder, client_environment, clean_python, tmp_path
):
    code, out = client.cli("publish", run_folder / "avq", "user/codec")
    assert code == 0, out
    ((tag, _),) = hub.repository("user/codec").tags.items()
    script = CLEAN.partition("from datasets")[0].replace(
        "trust_remote_code=True)\nseries", "trust_remote_code=True, revision=sys.argv[1])\nseries"
    )
    environment = {k: v for k, v in client_environment.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home")}
    outs = []
    for offline in ("0", "1"):
        asked = len(hub.requests)
        done = subprocess.run(
            [clean_python, "-c", script, tag],
            env=environment | {"HF_HUB_OFFLINE": offline},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        outs.append(done.stdout)
    assert outs[0] == outs[1] != ""
    assert len(hub.requests) == asked
