"""From a YAML file and `key=value` overrides to a checked dataclass of arguments."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

Arguments = TypeVar("Arguments")


class TrainingError(ValueError):
    """A run that cannot start or go on; the text says what to change."""


def read_config(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    A key `base` names a file beside it whose values it overrides, nested ones too.
    """
    path = Path(path)
    if not path.is_file():
        raise TrainingError(f"No configuration file {path}. Examples: training/configs/.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise TrainingError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise TrainingError(f"{path}: expected `key: value` lines, found {type(values).__name__}.")
    if "base" in values:
        base = read_config(path.parent / values.pop("base"))
        values = _merged(base, values)
    return values


def load_arguments(cls: type[Arguments], argv: list[str]) -> Arguments:
    """Arguments of a training script: `CONFIG.yaml [key=value ...]`.

    Dotted keys reach into nested mappings.

    Raises
    ------
    TrainingError
        No such file, a key that `cls` does not have (the nearest is named), a value of the wrong
        type.
    """
    if not argv:
        raise TrainingError("A configuration file is needed, e.g. training/configs/demo_avq.yaml.")
    values = read_config(argv[0])
    for override in argv[1:]:
        key, equals, text = override.partition("=")
        if not equals:
            raise TrainingError(f"Expected key=value after the configuration, found {override!r}.")
        try:
            nested = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise TrainingError(f"The value of {override!r} is not valid YAML.") from error
        for part in reversed(key.split(".")):
            nested = {part: nested}
        values = _merged(values, nested)
    fields = {field.name: field for field in dataclasses.fields(cast(Any, cls))}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            raise TrainingError(
                f"{argv[0]}: unknown key {key!r}." + (f" Did you mean {near[0]!r}?" if near else "")
            )
    for name, field in fields.items():
        if name not in values:
            if (
                field.default is dataclasses.MISSING
                and field.default_factory is dataclasses.MISSING
            ):
                raise TrainingError(f"{argv[0]}: key {name!r} is missing.")
            continue
        values[name] = _typed(values[name], field.type, f"{argv[0]}: {name}")
    return cls(**values)


def _typed(value, kind, where):
    """`value`, checked where a field is int, float, str, bool, dict or list; unions pass."""
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except ValueError:
            pass
    if kind in (int, float, str, bool, dict, list) and (
        not isinstance(value, kind) or (kind is int and isinstance(value, bool))
    ):
        raise TrainingError(f"{where} must be {kind.__name__}, found {value!r}.")
    if where.endswith("_steps") and kind is int and value < (0 if "warmup" in where else 1):
        raise TrainingError(f"{where} must be at least 1, found {value}.")
    return value


def _merged(base: dict, over: dict) -> dict:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
