"""The loopback Hub, a client process for it, and tiny things to publish."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def load(name: str):
    """A module of this folder; tests are imported one by one, not as a package."""
    if f"tests_hub_{name}" not in sys.modules:
        spec = importlib.util.spec_from_file_location(f"tests_hub_{name}", HERE / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return sys.modules[f"tests_hub_{name}"]


class Client:
    """A process with the real client; `run` gives what the code bound to `found`."""

    def __init__(self, environment: dict[str, str], folder: Path):
        self.process = subprocess.Popen(
            [sys.executable, HERE / "client.py"],
            env=environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, code: str, **values):
        self.process.stdin.write(json.dumps({"code": code, "values": values}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def run(self, code: str, **values):
        answer = self.ask(code, **values)
        assert answer["error"] is None, answer["out"][-3000:]
        return answer["found"]

    def cli(self, *argv: object) -> tuple[int, str]:
        """Exit code and output of `cortexicon`."""
        answer = self.ask(
            "from cortexicon.cli import main\nfound = main(argv)", argv=[str(one) for one in argv]
        )
        assert answer["error"] is None, answer["out"][-3000:]
        return answer["found"], answer["out"]


@pytest.fixture(scope="module")
def hub():
    with load("server").LoopbackHub() as running:
        yield running


@pytest.fixture(autouse=True)
def no_fault_is_left(request):
    yield
    if "hub" in request.fixturenames:
        request.getfixturevalue("hub").faults.clear()


@pytest.fixture(scope="module")
def client_environment(hub, tmp_path_factory, repository) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return keep | hub.environment(tmp_path_factory.mktemp("home")) | {"PYTHONPATH": str(repository)}


@pytest.fixture(scope="module")
def client(client_environment, tmp_path_factory):
    made = Client(client_environment, tmp_path_factory.mktemp("work"))
    made.run("import cortexicon.model_cards.push as push\npush._PAUSES = (0.1, 0.1, 0.1, 0.1)")
    yield made
    made.process.stdin.close()
    made.process.wait(300)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """A finished run in small: cohort, split, codecs of both streams, language model, adapter."""
    folder = tmp_path_factory.mktemp("published") / "run"
    load("small_run").write_small_run(folder)
    return folder


@pytest.fixture(scope="session")
def fault():
    return load("server").Fault


@pytest.fixture(scope="session")
def start_hub():
    return load("server").LoopbackHub
