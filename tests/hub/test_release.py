"""Slow promises: kills at random moments, and environments that never saw the package."""

import ast
import os
import random
import shutil
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
# What a stranger writes who has the libraries and no cortexicon. `found` is printed.
START = """
import sys
import torch
from transformers import AutoModel, AutoProcessor
try:
    import cortexicon
    sys.exit("cortexicon is installed here")
except ModuleNotFoundError:
    pass
pinned = {"revision": sys.argv[1], "trust_remote_code": True}
series = torch.randn(90, 48, generator=torch.Generator().manual_seed(0)).numpy() + 100
found = []
"""
BOTH = """
model = AutoModel.from_pretrained("user/both", **pinned)
connectome = AutoModel.from_pretrained("user/both", subfolder="connectome", **pinned)
processor = AutoProcessor.from_pretrained("user/both", **pinned)
scan = processor(fmri=series, tr=2.0)
found += model.encode(scan["input_values"]).codes.flatten().tolist()
found += connectome.encode(scan["connectivity"]).codes.flatten().tolist()
"""
MATRICES = """
connectome = AutoModel.from_pretrained("user/matrices", **pinned)
z = torch.atanh(torch.corrcoef(torch.as_tensor(series, dtype=torch.float64).T).clamp(-0.999, 0.999))
found += connectome.encode(z.fill_diagonal_(0)[None].float()).codes.flatten().tolist()
"""
READER = """
model = AutoModel.from_pretrained("user/NAME", **pinned).eval()
processor = AutoProcessor.from_pretrained("user/NAME", **pinned)
inputs = processor(text="Age?", fmri=series, tr=2.0, window_starts=[0])
with torch.no_grad():
    found += [len(inputs["input_ids"][0]), *model(**inputs).logits[0, -1].topk(5).indices.tolist()]
found += model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, -2:].tolist()
"""
COHORT = """
from datasets import load_dataset
stream = load_dataset("user/cohort", split="train", streaming=True, revision=sys.argv[1])
found += [sum(1 for _ in stream), stream.features["subject_id"].dtype]
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
        # Every request takes a moment, so that a kill finds it at work; the one that moves the
        # branch has an answer that takes as long as all before, so that a kill finds that, too.
        hub.faults[:] = [
            fault("POST .*/commit/", delay=0.1, wait_after=1.5, times=10**6),
            fault(".", delay=0.1, times=10**6),
        ]
        return client.run(PUSH, folder=str(folder))

    def wait(child):
        return client.run("found = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])", child=child)

    def remote():
        files = dict(hub.repository("user/killed").head.files)
        files.pop(".gitattributes")
        return files

    old = make_folder(folder, 0)
    assert wait(start()) == 0
    assert remote() == old
    old = make_folder(folder, 99)
    began = time.monotonic()
    assert wait(start()) == 0
    duration = time.monotonic() - began
    commits = len(hub.repository("user/killed").commits)

    # One random moment in each tenth of a push, in random order.
    chance = random.Random(0)
    moments = [(tenth + chance.random()) / 10 * duration for tenth in range(10)]
    chance.shuffle(moments)
    seen = {"old": 0, "new": 0}
    for number, moment in enumerate(moments, 1):
        new = make_folder(folder, number)
        child = start()
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        ended = wait(child)
        assert ended in (-signal.SIGKILL, 0)
        time.sleep(0.5)  # what the Hub was carrying out, it carries out
        found = remote()
        assert found in (old, new), f"kill {number} at {moment:.2f} s: a revision in between"
        seen["new" if found == new else "old"] += 1
        assert wait(start()) == 0
        assert remote() == new
        old = new
    print(seen, f"a push takes {duration:.1f} s")
    assert seen["old"] >= 2, seen
    assert seen["new"] >= 2, seen
    assert len(hub.repository("user/killed").commits) == commits + 10  # one of each


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


@pytest.fixture(scope="module")
def published(client, hub, run_folder, tmp_path_factory):
    """Everything that is loaded below, on the Hub; gives the pin of each."""
    both = tmp_path_factory.mktemp("both") / "run"
    both.mkdir()
    shutil.copy(run_folder / "results.json", both)
    for stream in ("avq", "connectome"):
        shutil.copytree(run_folder / stream, both / stream)
    pins = {}
    for name, what, kind in (
        ("both", both, "model"),
        ("matrices", run_folder / "connectome", "model"),
        ("reader", run_folder / "lm", "model"),
        ("two", run_folder / "two", "model"),
        ("cohort", run_folder / "cohort", "dataset"),
    ):
        code, out = client.cli("publish", what, f"user/{name}")
        assert code == 0, out
        ((pins[name], _),) = hub.repository(f"user/{name}", kind).tags.items()
    return pins


@pytest.fixture(scope="module")
def stranger(client_environment, clean_python, tmp_path_factory):
    """Runs code in the clean environment; gives what it found."""
    home = tmp_path_factory.mktemp("home")
    environment = {k: v for k, v in client_environment.items() if k != "PYTHONPATH"}

    def run(code, pin, **more):
        done = subprocess.run(
            [clean_python, "-c", f"{START}{code}\nprint('found', found)", pin],
            env=environment | {"HF_HOME": str(home)} | more,
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return ast.literal_eval(done.stdout.partition("found ")[2])

    return run


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("both", BOTH),
        ("matrices", MATRICES),
        ("reader", READER.replace("NAME", "reader")),
        ("two", READER.replace("NAME", "two")),
    ],
)
def test_models_load_without_the_package_and_then_without_a_network(
    client, hub, published, stranger, name, code
):
    online = stranger(code, published[name])
    asked = len(hub.requests)
    assert stranger(code, published[name], HF_HUB_OFFLINE="1") == online
    assert len(hub.requests) == asked
    # With the package the same numbers come out, and no remote code is run for them.
    here = "import torch\nfrom transformers import AutoModel, AutoProcessor\nfound = []\n"
    here += START.partition("pass\n")[2].replace('"trust_remote_code": True', "")
    here = here.replace("sys.argv[1]", "pin")
    assert client.run(here + code, pin=published[name]) == online


def test_a_cohort_streams_without_the_package(published, stranger):
    assert stranger(COHORT, published["cohort"]) == [60, "string"]
