"""What must hold of a folder before it is published. Each check returns its complaints."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

import cortexicon.modeling
import cortexicon.tokenization

from .errors import PublishError

_TEXT = (".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".csv", ".tsv", ".py", ".jinja", "")
#: Where the code files of a checkpoint come from.
_ROOMS = [
    Path(str(room.__file__)).parent for room in (cortexicon.modeling, cortexicon.tokenization)
]
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_HOME = re.compile(r"(?<![\w.:/])(?:/(?:home|root|Users|mnt|scratch|work)/\w|[A-Z]:\\Users\\)")
_SECTIONS = ("## Use", "## Data and consent", "## Not for", "## Licence", "## Cite")
_STATE = ("optimizer", "scheduler", "trainer_state", "training_args", "rng_state", "random_states")
_SHORT = 4  # shorter ids are looked for as whole values only: "12" stands in every file


def check_folder(folder: Path, subject_ids: Iterable[str]) -> list[str]:
    """All complaints about a staged checkpoint.

    Parameters
    ----------
    folder : pathlib.Path
        What would be pushed.
    subject_ids : iterable of str
        Of everybody in the cohort of training, held-out people included.

    Returns
    -------
    list of str
        Empty when the folder may be published.
    """
    return [
        *subject_id_complaints(folder, subject_ids),
        *secret_complaints(folder),
        *code_complaints(folder),
        *card_complaints(folder),
    ]


def subject_id_complaints(folder: Path, subject_ids: Iterable[str]) -> list[str]:
    """Files that name a subject: text, names and metadata of weights, names of files."""
    ids = sorted({str(one) for one in subject_ids if str(one)})
    if not ids:
        return []
    finder = _finder(ids)
    complaints = []
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if any(part in path.name for part in _STATE):
            complaints.append(f"{name}: state of training does not belong in a release.")
            continue
        text = f"{name}\n{_searchable(path)}"
        found = finder.search(text)
        if found:
            complaints.append(
                f"{name}: names a subject of the cohort ({found[0].strip()!r}). Remove what names "
                "people from the run's files."
            )
    return complaints


def secret_complaints(folder: Path) -> list[str]:
    """Files that hold an access token or a path in somebody's home folder."""
    complaints = []
    for path in _files(folder):
        name, text = path.relative_to(folder).as_posix(), _searchable(path)
        if _TOKEN.search(text):  # the token itself is not repeated here
            complaints.append(f"{name}: holds an access token. Revoke it, and remove it.")
        if found := _HOME.search(text):
            complaints.append(
                f"{name}: holds a path of one machine ({found[0]!r}...). Train with relative paths."
            )
    return complaints


def code_complaints(folder: Path) -> list[str]:
    """Code files that are not, byte for byte, those of the installed package."""
    complaints = []
    for path in sorted(folder.rglob("*.py")):
        sources = [room / path.name for room in _ROOMS if (room / path.name).is_file()]
        if not sources:
            complaints.append(f"{path.name}: is no file of cortexicon's modeling or tokenization.")
        elif path.read_bytes() != sources[0].read_bytes():
            complaints.append(f"{path.name}: differs from the file in {sources[0].parent.name}/.")
    return complaints


def card_complaints(folder: Path) -> list[str]:
    """What is wrong with README.md and the files of evaluation results."""
    path = folder / "README.md"
    if not path.is_file():
        return ["README.md: there is no card."]
    text = path.read_text(encoding="utf-8")
    try:
        data = ModelCard(text).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        return [f"README.md: the header cannot be read ({str(error).splitlines()[0]})."]
    complaints = []
    if not data.get("license"):
        complaints.append("README.md: the header names no licence.")
    if "!!python" in text or not _finite(data):
        complaints.append("README.md: the header holds a value that is no plain finite number.")
    if re.search(r"{{|{%|\bNone\b|\bnan\b", text.partition("\n---\n")[2]):
        complaints.append("README.md: a value was not filled in.")
    complaints += [
        f"README.md: the section {section[3:]!r} is missing."
        for section in _SECTIONS
        if f"\n{section}\n" not in text
    ]
    for results in sorted((folder / ".eval_results").glob("*.yaml")):
        try:
            entries = yaml.safe_load(results.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            complaints.append(f"{results.name}: {str(error).splitlines()[0]}")
            continue
        for entry in entries:
            if not {"dataset", "value"} <= set(entry) or not _finite(entry):
                complaints.append(f".eval_results/{results.name}: {entry} is no result.")
    return complaints


def refuse(source: Path, complaints: list[str]) -> None:
    """Raise a `PublishError` that lists the complaints; nothing where there are none."""
    if complaints:
        listed = "\n  ".join(complaints[:20])
        raise PublishError(f"{source}: not published, for\n  {listed}")


def _finder(ids: list[str]) -> re.Pattern[str]:
    """Finds an id that stands by itself; a short one only as a whole value."""
    long = "|".join(re.escape(one) for one in ids if len(one) >= _SHORT)
    short = "|".join(re.escape(one) for one in ids if len(one) < _SHORT)
    patterns = [rf"(?<![\w.-])(?:{long})(?![\w-])"] if long else []
    if short:
        patterns.append(rf"(?<=\")(?:{short})(?=\"\s*[:,\]}}])|(?m:^)(?:{short})(?=[,\t])")
    return re.compile("|".join(patterns))


def _searchable(path: Path) -> str:
    """The text of a file in which names are looked for."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:  # names of tensors, and the metadata
            size = int.from_bytes(file.read(8), "little")
            return file.read(size).decode("utf-8", "replace")
    if path.name == "tokenizer.json":
        # A vocabulary is words and numbers of text; 50642 in it is no person.
        content = json.loads(path.read_text(encoding="utf-8"))
        content.get("model", {}).update(vocab=None, merges=None)
        return json.dumps(content, ensure_ascii=False)
    if path.suffix in _TEXT:
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_finite(one) for one in value.values())
    if isinstance(value, list):
        return all(_finite(one) for one in value)
    return not isinstance(value, float) or math.isfinite(value)
