"""What must not occur anywhere in the code, and limits on files."""

import ast
import re
from pathlib import Path

import pytest

ROOMS = (
    "cortexicon",
    "modeling",
    "tokenization",
    "cohorts",
    "evaluation",
    "training",
    "inference",
    "model_cards",
)
MAX_LINES = 450
# A home or work folder of somebody's machine; these files are read by others.
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|work|Users|mnt|scratch)/\w")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".txt", ".cff", ".jinja", ".html"}


def sources(repository: Path) -> list[Path]:
    return [path for room in ROOMS for path in sorted((repository / room).rglob("*.py"))]


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangers(source: str) -> list[str]:
    """Calls and imports that can run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name in ("pickle", "dill", "cloudpickle")]
        elif isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "cloudpickle"):
            found.append(node.module)
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            keywords = {k.arg: k.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            values = {name: value.value for name, value in keywords.items()}
            if name in ("eval", "exec", "yaml.load", "os.system", "joblib.load"):
                found.append(name)
            if name == "torch.load" and values.get("weights_only") is not True:
                found.append("torch.load without weights_only=True")
            if values.get("weights_only") is False:
                found.append("weights_only=False")
            if values.get("allow_pickle") is True:
                found.append("allow_pickle=True")
            if values.get("shell") is True:
                found.append("shell=True")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "yaml.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run('x', shell=True)",
    ],
)
def test_the_search_finds_each_danger(source):
    assert dangers(source)


def test_the_search_lets_safe_code_pass():
    assert not dangers("model.eval()\nyaml.safe_load(f)\nnp.load(f, allow_pickle=False)")


def test_nothing_that_a_file_holds_is_ever_run(repository):
    for path in sources(repository):
        assert not dangers(path.read_text(encoding="utf-8")), path


def test_no_file_names_a_folder_of_one_machine(repository):
    folders = [repository / name for name in (*ROOMS, "tests", "docs", "examples", ".ci")]
    files = [path for folder in folders if folder.is_dir() for path in folder.rglob("*")]
    files += [path for path in repository.iterdir() if path.is_file()]
    for path in files:
        if path.suffix in TEXT_SUFFIXES or path.name == "Makefile":
            match = MACHINE_PATH.search(path.read_text(encoding="utf-8"))
            assert match is None, f"{path}: {match[0] if match else ''}"


def test_files_stay_readable(repository):
    for path in sources(repository):
        count = len(path.read_text(encoding="utf-8").splitlines())
        assert count <= MAX_LINES, f"{path}: {count} lines; split it"


def test_no_open_ends_are_left_in_the_code(repository):
    for path in sources(repository):
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text(encoding="utf-8")), path


def test_public_functions_say_what_they_do(repository):
    for path in sources(repository):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{path}: no module docstring"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}:{node.lineno}: {node.name}"
