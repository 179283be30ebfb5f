"""Versions, extras and files that the package promises."""

import re
import subprocess
import sys
from importlib.metadata import version

import pytest

import cortexicon
from cortexicon import cli


def requirement_name(line: str) -> str:
    return re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0].lower()


def test_the_version_is_one(repository, pyproject):
    assert pyproject["project"]["version"] == cortexicon.__version__
    assert f"version: {cortexicon.__version__}\n" in (repository / "CITATION.cff").read_text()
    assert f"## {cortexicon.__version__}" in (repository / "CHANGELOG.md").read_text()


def test_the_base_install_is_what_loading_a_checkpoint_needs(pyproject):
    names = {requirement_name(line) for line in pyproject["project"]["dependencies"]}
    assert names == {"torch", "transformers", "numpy", "safetensors", "huggingface-hub"}


def test_every_direct_dependency_has_a_tested_version_within_its_bound(repository, pyproject):
    pinned = dict(
        line.lower().split("==")
        for line in (repository / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    project = pyproject["project"]
    lines = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        lines += extra
    for line in lines:
        name = requirement_name(line)
        if name == "cortexicon":
            continue
        assert name in pinned, f"{name} is missing from constraints.txt"
        lowest = re.search(r">=([0-9.]+)", line)
        assert lowest, f"{line}: no lower bound"
        assert as_tuple(pinned[name]) >= as_tuple(lowest[1]), line


def as_tuple(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def test_the_extra_named_for_a_missing_module_brings_it(pyproject):
    distribution = {"sklearn": "scikit-learn", "yaml": "pyyaml", "PIL": "pillow"}
    extras = pyproject["project"]["optional-dependencies"]
    for module, extra in cli._EXTRA_OF.items():
        names = {requirement_name(line) for line in extras[extra]}
        assert distribution.get(module, module) in names, f"{extra} does not bring {module}"


def test_promised_files_are_there(repository):
    for name in (
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "CITATION.cff",
        "Makefile",
        "constraints.txt",
        "cortexicon/py.typed",
    ):
        assert (repository / name).is_file(), name
    licence = (repository / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in licence
    assert "limitations under the License." in licence


def test_every_config_and_template_is_package_data(repository, pyproject):
    listed = pyproject["tool"]["setuptools"]["package-data"]
    packages = pyproject["tool"]["setuptools"]["package-dir"]
    for package, folder in packages.items():
        root = repository / folder
        shipped = {path for pattern in listed.get(package, []) for path in root.glob(pattern)}
        for path in root.rglob("*"):
            if path.suffix in (".yaml", ".jinja", ".html", ".css"):
                assert path in shipped, f"{path} is not in package-data of {package}"


def test_every_package_of_the_checkout_is_listed(repository, pyproject):
    listed = pyproject["tool"]["setuptools"]
    for package in listed["packages"]:
        assert listed["package-dir"][package] == package.removeprefix("cortexicon.").replace(
            ".", "/"
        )
    folders = {listed["package-dir"][package] for package in listed["packages"]}
    for room in {folder.partition("/")[0] for folder in folders}:
        for path in (repository / room).rglob("__init__.py"):
            assert path.parent.relative_to(repository).as_posix() in folders, path


def test_torch_is_pinned_exactly(repository):
    assert "torch==2.13.0\n" in (repository / "constraints.txt").read_text()


@pytest.mark.slow
def test_the_wheel_holds_every_room(repository, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, repository],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    import zipfile

    names = zipfile.ZipFile(wheel).namelist()
    for room in ("modeling", "tokenization", "cohorts", "evaluation", "training", "inference"):
        assert f"cortexicon/{room}/__init__.py" in names
    assert "cortexicon/py.typed" in names
    assert any(name.endswith(".yaml") for name in names)
    assert not any(name.startswith(("tests/", "modeling/")) for name in names)


def test_tested_versions_are_those_that_run_here(repository):
    for line in (repository / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, pinned = line.split("==")
            assert version(name).partition("+")[0] == pinned
