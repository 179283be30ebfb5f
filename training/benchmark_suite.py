"""The file of a benchmark: which systems are compared, on which splits, and what is a control."""

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cortexicon.cohorts.splits import PARTS, SCHEMES
from cortexicon.evaluation.baselines_connectivity import FEATURES

from .arguments import TrainingError
from .benchmark_cell import CONTROL_ARGUMENT, HARMONISED, STANDARD

KINDS = ("baseline", "command", "file")
#: Controls that need nothing of a system: it is given another cohort in place of the true one.
COHORT_CONTROLS = ("permuted labels", "another scan", "noise scan")
SUITE_KEYS = ("title", "cohort", "targets", "seeds", "splits", "systems", "num_resamples")
SPLIT_KEYS = ("scheme", "num_folds", "seed", "file", "part", "folds", "control_folds")
SYSTEM_KEYS = {
    "baseline": ("name", "kind", "features", "harmonised", "more_scans", "seen"),
    "command": (
        *("name", "kind", "shared", "steps", "controls", "control_folds"),
        *("ranked", "reason", "seen", "what"),
    ),
    "file": ("name", "kind", "files", "ranked", "reason", "seen", "what"),
}
#: What `shared` steps are given; the others belong to one cell.
SHARED_PLACEHOLDERS = ("cohort", "split", "fold", "seed", "shared", "resume")
PLACEHOLDERS = (
    *(*SHARED_PLACEHOLDERS, "target", "targets"),
    *("out", "predictions", "run", "cost"),
)
#: Whether a system met the test subjects before: stated, since nobody can see it in predictions.
SEEN = ("unseen", "seen", "unknown")


class SplitEntry(NamedTuple):
    """How one table's folds are made.

    Attributes
    ----------
    name : str
        Heading of the table.
    part : str
        The part that is scored.
    scheme, num_folds, seed : str, int, int
        Of `make_split`; or `file` is a split file.
    folds : list of int or None
        Those to run; None: all.
    control_folds : list of int or None
        Those of them in which controls are run; None: all.
    """

    name: str
    part: str
    scheme: str | None
    num_folds: int
    seed: int
    file: str | None
    folds: list[int] | None
    control_folds: list[int] | None


class System(NamedTuple):
    """One entry of the suite.

    Attributes
    ----------
    name, kind : str
    definition : dict
        What of the entry decides its predictions; part of a cell's hash.
    controls : dict of str to list of str or None
        Name -> further arguments of the command; None for those that need another cohort.
    control_folds : dict of str to list of int
        Heading of a split -> folds of this system's controls, whatever the split says.
    ranked : bool
        False for what is never ranked; `reason` says why, in every table and figure.
    reason, seen, what : str
    """

    name: str
    kind: str
    definition: dict[str, Any]
    controls: dict[str, list[str] | None]
    control_folds: dict[str, list[int]]
    ranked: bool
    reason: str
    seen: str
    what: str

    def uses(self, placeholder: str) -> bool:
        """Whether a command holds a placeholder, as `{seed}`."""
        return any(placeholder in fields_of(text) for text in self.arguments)

    @property
    def arguments(self) -> list[str]:
        """All arguments of all its commands, the shared ones first."""
        steps = [*self.definition.get("shared", ()), *self.definition.get("steps", ())]
        return [str(text) for step in steps for text in step]


class Suite(NamedTuple):
    """A suite as read; see `evaluation/suites/demo.yaml` for what each key does."""

    path: Path
    title: str
    cohort: Path
    targets: list[str]
    seeds: list[int]
    splits: list[SplitEntry]
    systems: list[System]
    num_resamples: int


def fields_of(text: str) -> list[str]:
    """Names between braces in an argument.

    Raises
    ------
    ValueError
        A brace without its partner.
    """
    return [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]


def read_suite(path: str | Path) -> Suite:
    """Read and check a suite; the connectivity baseline and the plain rows are always in it.

    Raises
    ------
    TrainingError
        No such file, unknown or missing keys, two systems of one name, an unknown placeholder.
    """
    path = Path(path)
    if not path.is_file():
        raise TrainingError(f"No suite {path}. Examples: evaluation/suites/.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise TrainingError(f"{path} is not valid YAML: {error}") from error
    _check_keys(content, SUITE_KEYS, ("cohort", "targets", "splits", "systems"), str(path))
    systems = [_system({"name": STANDARD, "kind": "baseline", "features": STANDARD}, path)]
    for entry in content["systems"] or []:
        system = _system(entry, path)
        if system.name in [known.name for known in systems]:
            raise TrainingError(f"{path}: two systems are named {system.name!r}; rename one.")
        systems.append(system)
    splits = [_split(name, entry, path) for name, entry in (content["splits"] or {}).items()]
    if not splits or not content["targets"]:
        raise TrainingError(f"{path}: expected at least one split and one target.")
    return Suite(
        path,
        str(content.get("title", path.stem)),
        Path(content["cohort"]),
        [str(target) for target in content["targets"]],
        [int(seed) for seed in content.get("seeds", [0])],
        splits,
        systems,
        int(content.get("num_resamples", 1000)),
    )


def _split(name: str, entry: Any, path: Path) -> SplitEntry:
    where = f"{path}, split {name!r}"
    _check_keys(entry, SPLIT_KEYS, (), where)
    if ("scheme" in entry) == ("file" in entry):
        raise TrainingError(f"{where}: expected either `scheme` or `file`.")
    scheme, part = entry.get("scheme"), entry.get("part", "test")
    if scheme is not None and scheme not in SCHEMES:
        raise TrainingError(f"{where}: expected a scheme of {', '.join(SCHEMES)}, found {scheme!r}")
    if part not in PARTS[2:]:
        raise TrainingError(f"{where}: expected part {' or '.join(PARTS[2:])}, found {part!r}.")
    return SplitEntry(
        str(name),
        part,
        scheme,
        int(entry.get("num_folds", 5)),
        int(entry.get("seed", 0)),
        entry.get("file"),
        entry.get("folds"),
        entry.get("control_folds"),
    )


def _system(entry: Any, path: Path) -> System:
    where = f"{path}, a system"
    _check_keys(entry, sorted({k for keys in SYSTEM_KEYS.values() for k in keys}), ("kind",), where)
    kind = entry["kind"]
    if kind not in KINDS:
        raise TrainingError(f"{where}: expected a kind of {', '.join(KINDS)}, found {kind!r}.")
    where = f"{path}, system {entry.get('name', '?')!r}"
    needed = {"baseline": ("features",), "command": ("steps",), "file": ("files",)}[kind]
    _check_keys(entry, SYSTEM_KEYS[kind], ("name", *needed), where)
    if kind == "baseline":
        _check_baseline(entry, where)
    if kind == "command":
        _check_steps(entry["steps"], where, PLACEHOLDERS)
        if "shared" in entry:
            _check_steps(entry["shared"], f"{where}, shared", SHARED_PLACEHOLDERS)
    ranked, reason = bool(entry.get("ranked", True)), str(entry.get("reason", ""))
    if ranked == bool(reason):
        raise TrainingError(f"{where}: `ranked: false` needs a `reason`, and only that does.")
    seen = entry.get("seen", "unseen" if kind == "baseline" else "unknown")
    if seen not in SEEN:
        raise TrainingError(f"{where}: seen must be one of {', '.join(SEEN)}, found {seen!r}.")
    told = ("name", "controls", "control_folds", "ranked", "reason", "seen", "what")
    definition = {key: value for key, value in entry.items() if key not in told}
    return System(
        str(entry["name"]),
        kind,
        definition,
        _controls(entry, where),
        dict(entry.get("control_folds", {})),
        ranked,
        reason,
        seen,
        str(entry.get("what", "")),
    )


def _check_baseline(entry: dict[str, Any], where: str) -> None:
    known = (STANDARD, *FEATURES)
    if entry["features"] not in known:
        raise TrainingError(
            f"{where}: expected features of {', '.join(known)}, found {entry['features']!r}."
        )
    if entry.get("harmonised", False) not in HARMONISED:
        raise TrainingError(f"{where}: harmonised must be true, false or both.")
    if not isinstance(entry.get("more_scans", False), bool):
        raise TrainingError(f"{where}: more_scans must be true or false.")
    if entry["features"] == STANDARD and entry["name"] != STANDARD:
        raise TrainingError(f"{where}: the standard rows are in every suite; leave them out here.")


def _check_steps(steps: Any, where: str, placeholders: Sequence[str]) -> None:
    if not isinstance(steps, list) or not steps or not all(isinstance(s, list) for s in steps):
        raise TrainingError(f"{where}: steps must be a list of commands, each a list of arguments.")
    for step in steps:
        for text in step:
            try:
                fields = [] if text == CONTROL_ARGUMENT else fields_of(str(text))
            except ValueError as error:
                raise TrainingError(
                    f"{where}: {text!r}: {error}; write {{{{ for a brace."
                ) from None
            unknown = [field for field in fields if field not in placeholders]
            if unknown:
                raise TrainingError(
                    f"{where}: unknown placeholder {unknown[0]!r} in {text!r}; known are "
                    f"{', '.join(placeholders)}, and {CONTROL_ARGUMENT} as an argument of its own."
                )


def _controls(entry: dict[str, Any], where: str) -> dict[str, list[str] | None]:
    controls: dict[str, list[str] | None] = {}
    for control in entry.get("controls", ()):
        if isinstance(control, dict):
            for name, arguments in control.items():
                if not any(text == CONTROL_ARGUMENT for step in entry["steps"] for text in step):
                    raise TrainingError(
                        f"{where}: control {name!r} has arguments, but no step holds the argument "
                        f"{CONTROL_ARGUMENT!r} that they would replace."
                    )
                controls[str(name)] = [str(argument) for argument in arguments]
        elif control in COHORT_CONTROLS:
            controls[control] = None
        else:
            raise TrainingError(
                f"{where}: expected controls of {', '.join(COHORT_CONTROLS)}, or NAME: [ARGUMENT, "
                f"...]; found {control!r}."
            )
    return controls


def _check_keys(content: Any, known: Sequence[str], needed: Sequence[str], where: str) -> None:
    if not isinstance(content, dict):
        raise TrainingError(f"{where}: expected `key: value` lines, found {content!r}.")
    wrong = [str(key) for key in content if key not in known]
    missing = [key for key in needed if key not in content]
    if wrong or missing:
        raise TrainingError(
            f"{where}: expected the keys {', '.join(known)}; "
            f"unknown: {', '.join(wrong) or 'none'}, missing: {', '.join(missing) or 'none'}."
        )
