"""What the documents name is there: files, commands, options, configurations."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from cortexicon._parser import build_parser

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/*.md", "evaluation/*.md")
LINK = re.compile(r"(?:\]\(|<img src=\")([^)\s#\"]+)(?:#[^)]*)?[)\"]")
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)


def documents(repository: Path) -> list[Path]:
    return [path for pattern in DOCUMENTS for path in sorted(repository.glob(pattern))]


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


def spoken(text: str) -> list[list[str]]:
    """Words of every `cortexicon COMMAND ...` in the code of a document."""
    found = []
    for block in CODE.findall(text):
        for line in block.strip("`").replace("\\\n", " ").splitlines():
            for call in re.findall(r"(?:^|[\s`])cortexicon ([a-z][^;|&`#>]*)", f" {line}"):
                try:
                    found.append(shlex.split(call))
                except ValueError:  # an apostrophe in a sentence
                    found.append(call.split())
    return found


def wrong_words(words: list[str], commands: dict[str, argparse.ArgumentParser]) -> list[str]:
    """Commands and options in `words` that `cortexicon` does not know."""
    name = words[0]
    if "|" in name or not re.fullmatch(r"[a-z][a-z-]*", name):
        return []
    if name not in commands:
        return [name]
    known = {text for a in commands[name]._actions for text in a.option_strings}
    options = (word.partition("=")[0].rstrip(".,)]") for word in words[1:])
    return [o for o in options if re.fullmatch(r"--[a-z][a-z-]*", o) and o not in known]


def test_the_search_finds_an_unknown_command_and_option():
    commands = commands_of(build_parser())
    text = "`cortexicon divine X` and\n```bash\ncortexicon encode A B \\\n  --nowhere 1\n```\n"
    found = [word for words in spoken(text) for word in wrong_words(words, commands)]
    assert found == ["divine", "--nowhere"]
    assert not wrong_words(["encode", "A", "B", "--out", "x"], commands)


def test_commands_and_options_in_documents_exist(repository):
    commands = commands_of(build_parser())
    for path in documents(repository):
        for words in spoken(path.read_text(encoding="utf-8")):
            wrong = wrong_words(words, commands)
            assert not wrong, f"{path.name}: cortexicon {' '.join(words)}: no {', '.join(wrong)}"


def test_links_and_pictures_lead_somewhere(repository):
    for path in documents(repository):
        for target in LINK.findall(path.read_text(encoding="utf-8")):
            if "://" not in target and not target.startswith("mailto:"):
                assert (path.parent / target).exists(), f"{path.name}: {target} is not there"


def test_configurations_that_documents_name_exist(repository):
    for path in documents(repository):
        for name in re.findall(r"training/configs/[\w/]+\.yaml", path.read_text(encoding="utf-8")):
            assert (repository / name).is_file(), f"{path.name}: {name} is not there"


@pytest.mark.parametrize("name", ["README.md"])
def test_the_twelve_lines_are_twelve(repository, name):
    text = (repository / name).read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len([line for line in block.splitlines() if line.strip()]) <= 12


LOADS = re.compile(
    r"(?:from_pretrained|load_dataset|evaluate\.load|snapshot_download)\("
    r"(?:base, )?\"([^\"/]+/[^\"/]+)\"([^\n]*)"
)


def unpinned(text: str, repository: Path) -> list[str]:
    """What is loaded by a name of the Hub without saying which revision."""
    names = [(name, rest) for name, rest in LOADS.findall(text) if not name.startswith("runs/")]
    return [
        name
        for name, rest in names
        if not (repository / name).exists() and not re.search(r"revision=|\*\*pinned", rest)
    ]


def test_the_search_finds_what_is_not_pinned(repository):
    assert unpinned('AutoModel.from_pretrained("user/x")', repository) == ["user/x"]
    assert unpinned('load_dataset("user/x", split="train")', repository) == ["user/x"]
    assert not unpinned('AutoModel.from_pretrained("user/x", revision="1")', repository)
    assert not unpinned('AutoModel.from_pretrained("user/x", **pinned)', repository)
    assert not unpinned('AutoModel.from_pretrained("checkpoints/avq_abide_cc200")', repository)


def test_examples_say_which_revision_they_load(repository):
    further = ("docs/cards/*.md", "checkpoints/*/README.md", "model_cards/*.jinja", "examples/*.py")
    further += ("evaluation/metrics/*/README.md", "checkpoints/README.md")
    paths = [path for pattern in further for path in sorted(repository.glob(pattern))]
    loading = 0
    for path in [*documents(repository), *paths]:
        text = path.read_text(encoding="utf-8")
        loading += len(LOADS.findall(text))
        assert not unpinned(text, repository), path
    assert loading > 5
