"""Errors of the command line: one message, exit code 2, no traceback."""

import subprocess
import sys

import pytest

from cortexicon import cli
from cortexicon.cohorts import CohortError


def test_a_missing_extra_is_one_line_that_says_what_to_install(repository):
    # A None entry in sys.modules is how Python spells "not installed".
    script = """
import sys
sys.modules["datasets"] = None
from cortexicon.cli import main
sys.exit(main(["split", "nowhere", "--out", "x.json"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "cortexicon split: needs datasets, which is not installed: pip install 'cortexicon[io]'"
    )


def test_a_module_of_the_project_that_is_missing_is_not_blamed_on_an_extra():
    assert cli.user_message(ModuleNotFoundError("no", name="cortexicon.cohorts.gone")) is None


def test_user_errors_have_a_message_and_faults_do_not():
    assert cli.user_message(CohortError("TR missing")) == "TR missing"
    assert "nowhere" in cli.user_message(FileNotFoundError(2, "No such file", "nowhere"))
    assert cli.user_message(ValueError("not ours")) is None
    assert cli.user_message(KeyError("x")) is None


def test_a_user_error_exits_with_2_and_debug_shows_it(tmp_path, capsys):
    argv = ["split", str(tmp_path / "nowhere"), "--out", str(tmp_path / "split.json")]
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert "nowhere" in captured.err
    assert "Traceback" not in captured.err
    assert captured.err.startswith("cortexicon split: ")
    with pytest.raises(CohortError):
        cli.main(["--debug", *argv])
    assert not (tmp_path / "split.json").exists()


def test_ctrl_c_is_130(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", interrupted)
    assert cli.main(["info", "folder"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_train_forwards_config_overrides_and_resume(monkeypatch):
    import importlib
    import types

    seen = []
    script = types.SimpleNamespace(main=lambda argv: seen.append(argv) or 0)
    real = importlib.import_module
    monkeypatch.setattr(
        importlib,
        "import_module",
        lambda name, *rest: script if name == "cortexicon.training.avq" else real(name, *rest),
    )
    argv = ["train", "avq", "c.yaml", "--set", "a=1", "b=x=y", "--set", "c=2", "--resume"]
    assert cli.main(argv) == 0
    assert seen == [["c.yaml", "a=1", "b=x=y", "c=2", "resume=true"]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["no_such_key=1"], "unknown key 'no_such_key'"),
        (["max_step=1"], "Did you mean 'max_steps'?"),
        (["max_steps=many"], "max_steps must be int, found 'many'"),
        (["no equals sign"], "Expected key=value"),
    ],
)
def test_a_wrong_training_config_is_one_line(repository, tmp_path, capsys, overrides, message):
    config = str(repository / "training" / "configs" / "demo_avq.yaml")
    output = f"output={tmp_path / 'run'}"
    assert cli.main(["train", "avq", config, "--set", output, *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cortexicon train: ")
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["", "divine", "train"])
def test_wrong_usage_exits_with_2(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(command.split())
    assert stop.value.code == 2
    assert "usage: cortexicon" in capsys.readouterr().err
