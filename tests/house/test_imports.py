"""Who may import whom, read from the syntax trees of all rooms."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

BASE = {"modeling", "tokenization", "cohorts"}
# room -> the other rooms that it may import
MAY_IMPORT: dict[str, set[str]] = {
    "modeling": set(),
    "tokenization": set(),
    "cohorts": set(),
    "evaluation": BASE,
    "inference": BASE,
    "training": BASE | {"evaluation", "inference"},
    "model_cards": BASE | {"inference"},
    "cortexicon": BASE | {"evaluation", "inference", "training", "model_cards"},
}
# The only file that may name the training room.
KNOWS_TRAINING = {"cortexicon/cli.py"}
TRAVELLING = ("modeling", "tokenization")
# What a file that is copied into a checkpoint folder may import besides its neighbours.
# (transformers cannot be installed without tokenizers.)
TRAVEL_IMPORTS = {"torch", "transformers", "tokenizers", "numpy"} | set(sys.stdlib_module_names)
# `evaluate` copies these files elsewhere and runs them there, so they name their room in full.
COPIED_BY_EVALUATE = ("evaluation/metrics/", "evaluation/suites/")


def python_files(repository: Path, room: str) -> list[Path]:
    return sorted((repository / room).rglob("*.py"))


def imported_modules(path: Path) -> list[str]:
    """Absolute module names that a file imports anywhere, also inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.append(node.module)
            if node.module == "cortexicon":
                names += [f"cortexicon.{alias.name}" for alias in node.names]
    return names


def violations(path: Path, relative: str, room: str) -> list[str]:
    found = []
    for name in imported_modules(path):
        first, *rest = name.split(".")
        if first in MAY_IMPORT and first != "cortexicon":
            found.append(f"{relative}: `{name}` must be written cortexicon.{name}")
        if first != "cortexicon" or not rest or rest[0] not in MAY_IMPORT:
            continue
        if rest[0] == room and not relative.startswith(COPIED_BY_EVALUATE):
            found.append(f"{relative}: inside a room import relatively, not `{name}`")
        elif rest[0] != room and rest[0] not in MAY_IMPORT[room]:
            found.append(f"{relative}: {room} must not import {rest[0]}")
        elif rest[0] == "training" and relative not in KNOWS_TRAINING:
            found.append(f"{relative}: only {', '.join(KNOWS_TRAINING)} may import training")
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_it_may(repository, room):
    files = python_files(repository, room)
    assert files, f"room {room} has no Python file"
    found = []
    for path in files:
        found += violations(path, path.relative_to(repository).as_posix(), room)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("room", "source", "message"),
    [
        ("cohorts", "from cortexicon.modeling import AVQModel", "must not import modeling"),
        (
            "modeling",
            "def f():\n    import cortexicon.tokenization",
            "must not import tokenization",
        ),
        ("evaluation", "from cortexicon import inference", "must not import inference"),
        ("inference", "from modeling import AVQModel", "must be written cortexicon.modeling"),
        ("inference", "from cortexicon.inference import x", "import relatively"),
        ("cortexicon", "import cortexicon.training.avq", "may import training"),
    ],
)
def test_the_walk_sees_a_forbidden_import(tmp_path, room, source, message):
    path = tmp_path / "sample.py"
    path.write_text(source)
    assert message in "\n".join(violations(path, "sample.py", room))


@pytest.mark.parametrize("room", TRAVELLING)
def test_travelling_files_import_only_what_every_user_of_transformers_has(repository, room):
    for path in python_files(repository, room):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name in imported_modules(path):
            assert name.partition(".")[0] in TRAVEL_IMPORTS, f"{path}: {name} does not travel"
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                # `from . import x` and `from ..room import y` are not copied along.
                assert node.level == 1, f"{path}:{node.lineno}: reaches outside its folder"
                assert node.module, f"{path}:{node.lineno}: write `from .name import ...`"
                assert (path.parent / f"{node.module}.py").is_file(), f"{path}: no {node.module}.py"


@pytest.mark.parametrize("room", TRAVELLING)
def test_travelling_files_keep_annotations_as_objects(repository, room):
    # As strings they switch off the type checks of configurations and break from_pretrained.
    for path in python_files(repository, room):
        assert "__future__" not in imported_modules(path), path


def test_no_basename_occurs_in_both_travelling_rooms(repository):
    first, second = (
        {path.name for path in python_files(repository, room)} - {"__init__.py"}
        for room in TRAVELLING
    )
    assert first
    assert not first & second


def test_every_room_is_importable_and_listed(repository, pyproject):
    for room in MAY_IMPORT:
        name = room if room == "cortexicon" else f"cortexicon.{room}"
        assert name in pyproject["tool"]["setuptools"]["packages"]
        module = importlib.import_module(name)
        assert Path(module.__file__).parent == repository / room
        for public in getattr(module, "__all__", []):
            assert getattr(module, public) is not None


def test_no_module_lies_at_the_root(repository):
    # It would become importable as cortexicon.NAME in a checkout, and only there.
    assert [path.name for path in repository.glob("*.py")] == []


def test_rooms_are_importable_from_an_uninstalled_checkout(repository, tmp_path):
    # A fresh interpreter without site-packages' view of an installed cortexicon.
    script = (
        f"import sys; sys.path.insert(0, {str(repository)!r})\n"
        "import cortexicon.cohorts, cortexicon.inference\n"
        f"assert cortexicon.__path__[-1] == {str(repository)!r}\n"
        "print(cortexicon.cohorts.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "cortexicon.cohorts"
