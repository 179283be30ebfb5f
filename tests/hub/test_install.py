"""Wheel and source archive, installed where nothing else is, used from outside the checkout."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.hub, pytest.mark.slow]

BASE = ("torch", "transformers", "numpy", "safetensors", "huggingface-hub")
SMOKE = """
import importlib.util, sys
import cortexicon
assert "site-packages" in cortexicon.__file__, cortexicon.__file__
for name in ("datasets", "pandas", "scipy", "sklearn", "matplotlib", "nibabel", "accelerate"):
    assert importlib.util.find_spec(name) is None, f"{name} came along"
import torch
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1])  # no remote code: the package is here
processor = AutoProcessor.from_pretrained(sys.argv[1])
assert type(model).__module__.startswith("cortexicon.modeling")
scan = processor.feature_extractor(torch.randn(90, 48).numpy() + 100, tr=2.0)
codes = model.encode(**{name: scan[name] for name in scan if name != "num_windows"}).codes
print(tuple(codes.shape))
box = {"pretrained_model_name_or_path": sys.argv[2]}
model = AutoModel.from_pretrained(**box)
connectome = AutoModel.from_pretrained(**box, subfolder="connectome")
scan = AutoProcessor.from_pretrained(**box)(fmri=torch.randn(150, 200).numpy() + 100, tr=1.5)
print(tuple(model.encode(scan["input_values"]).codes.shape))
print(tuple(connectome.encode(scan["connectivity"]).codes.shape))
"""


def run(*command, **more):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **more
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def archives(repository, tmp_path_factory):
    """The wheel and the source archive, built from a copy of the tracked files."""
    work = tmp_path_factory.mktemp("build")
    source, out = work / "source", work / "dist"
    tracked = run("git", "-C", repository, "ls-files", "-z").split("\0")
    for name in filter(None, tracked):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((repository / name).read_bytes())
    out.mkdir()
    build = (
        "import sys, setuptools.build_meta as b\n"
        "out = sys.argv[1]  # setuptools writes into sys.argv\n"
        "print(b.build_sdist(out), b.build_wheel(out))"
    )
    run(sys.executable, "-c", build, out, cwd=source)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def empty_python(tmp_path_factory):
    """A Python with what the base install asks for, and what that asks for, and nothing else."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    asked = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = Path(run(python, "-c", asked).strip())
    for name in closure(BASE):
        for top in top_levels(name):
            if not (packages / top.name).exists():
                (packages / top.name).symlink_to(top)
    return python


def closure(names):
    """Names of distributions that these need, extras left out."""
    found, open_ends = set(), [name.lower() for name in names]
    while open_ends:
        name = open_ends.pop()
        if name in found:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        found.add(name)
        open_ends += [
            re.split(r"[\[<>=!~; (]", line, maxsplit=1)[0].lower()
            for line in requirements
            if "extra ==" not in line
        ]
    return sorted(found)


def top_levels(name):
    """Files and folders of a distribution at the top of site-packages."""
    distribution = importlib.metadata.distribution(name)
    root = Path(str(distribution.locate_file("")))
    parts = {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}
    return [root / part for part in sorted(parts - {"__pycache__"})]


def test_the_archives_hold_what_a_user_needs_and_no_weights(archives):
    wheel, source = archives
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("modeling/modeling_avq.py", "model_cards/checkpoint.md.jinja", "py.typed"):
        assert f"cortexicon/{wanted}" in names
    assert "cortexicon/model_cards/data/abide1.yaml" in names
    assert not [name for name in names if name.endswith(".safetensors")]
    with tarfile.open(source) as archive:
        files = [name.partition("/")[2] for name in archive.getnames()]
    assert {"LICENSE", "pyproject.toml", "modeling/modeling_avq.py"} <= set(files)


@pytest.mark.parametrize("number", [0, 1], ids=["wheel", "source archive"])
def test_a_base_install_loads_a_checkpoint_from_outside_the_checkout(
    archives, empty_python, run_folder, repository, tmp_path, number
):
    keep = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if k not in keep}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    install = [empty_python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    if number:
        # The archive needs its build backend; it is not part of what is tested here.
        import setuptools

        where = Path(setuptools.__file__).parent.parent
        environment["PYTHONPATH"] = str(where)
        install.append("--no-build-isolation")
    run(*install, "--force-reinstall", archives[number], env=environment, cwd=tmp_path)
    environment.pop("PYTHONPATH", None)
    box = repository / "checkpoints" / "avq_abide_cc200"
    out = run(empty_python, "-c", SMOKE, run_folder / "avq", box, env=environment, cwd=tmp_path)
    assert out.splitlines() == ["(2, 4)", "(1, 128)", "(1, 64)"]
    command = empty_python.parent / "cortexicon"
    assert "usage: cortexicon" in run(command, "--help", env=environment, cwd=tmp_path)
    done = subprocess.run(
        [command, "simulate", "--out", tmp_path / "c"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install 'cortexicon[" in done.stderr
