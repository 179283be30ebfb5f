"""Facts of the data behind a checkpoint or cohort, and what its licence asks of the weights."""

from pathlib import Path
from typing import Any, NamedTuple

from .errors import PublishError

_FOLDER = Path(__file__).parent / "data"
# Terms of data -> terms that weights fitted on them may carry; None: any. Weights are treated as
# adapted material, which is the stricter reading. A version may be replaced by a later one.
_PERMISSIVE = ("cc0-1.0", "pddl", "odc-by", "cc-by-4.0", "cc-by-3.0", "apache-2.0", "mit")
_NON_COMMERCIAL = ("cc-by-nc-", "cc-by-nc-sa-")


class DataFacts(NamedTuple):
    """What a card says of the data; each field is a key of the YAML file.

    Attributes
    ----------
    name, people, consent, preprocessing : str
    license : str
        As the Hub spells it, such as ``cc-by-nc-sa-3.0``; ``other`` when it has no such name.
    url, attribution, citation : str or None
    public_ids : bool
        Whether the ids of the scans are those under which their owners published them; others are
        replaced when a cohort is published.
    redistribution : bool
        Whether the terms let the scans be passed on.
    """

    name: str
    people: str
    consent: str
    preprocessing: str
    license: str
    url: str | None = None
    attribution: str | None = None
    citation: str | None = None
    public_ids: bool = False
    redistribution: bool = False


def read_data_facts(name: str | Path) -> DataFacts:
    """Read a YAML file of facts, or one of those that come along: ``simulated``, ``abide1``.

    Raises
    ------
    PublishError
        No such file, or a key is missing, unknown or of the wrong type.
    """
    import yaml

    path = _FOLDER / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in _FOLDER.glob("*.yaml")))
        raise PublishError(
            f"{name}: expected a YAML file of facts about the data or one of {known}, found "
            "nothing. Copy model_cards/data/abide1.yaml and fill it in for your data."
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PublishError(f"{path}: not valid YAML ({str(error).splitlines()[0]}).") from error
    return _checked(values, path)


def _checked(values: Any, path: Path) -> DataFacts:
    if not isinstance(values, dict):
        raise PublishError(f"{path}: expected keys with values, found {type(values).__name__}.")
    required = [name for name in DataFacts._fields if name not in DataFacts._field_defaults]
    missing = [name for name in required if not values.get(name)]
    unknown = [name for name in values if name not in DataFacts._fields]
    if missing or unknown:
        raise PublishError(
            f"{path}: expected the keys {', '.join(DataFacts._fields)}; "
            + "; ".join(
                f"{what}: {', '.join(map(str, names))}"
                for what, names in (("missing", missing), ("unknown", unknown))
                if names
            )
            + "."
        )
    for name, value in values.items():
        wanted = bool if name in ("public_ids", "redistribution") else str
        if value is not None and not isinstance(value, wanted):
            raise PublishError(
                f"{path}: {name}: expected {'true or false' if wanted is bool else 'text'}, found "
                f"{value!r}."
            )
    plain: dict[str, Any] = {k: v.strip() if isinstance(v, str) else v for k, v in values.items()}
    return DataFacts(**plain)


def weights_license(data: str) -> str:
    """The licence for weights when none is asked for: open where it may be, else the data's."""
    return "apache-2.0" if data in _PERMISSIVE else data


def check_licenses(data: str, weights: str) -> None:
    """Refuse weights under terms that the data they were fitted on do not allow.

    Raises
    ------
    PublishError
        It names both, and what is allowed.
    """
    if data in _PERMISSIVE or data == weights:
        return
    family, _, version = data.rpartition("-")
    wanted, _, found = weights.rpartition("-")
    allowed = False
    if family.endswith("-sa"):  # share alike: the same terms, or a later version of them
        allowed = wanted == family and found >= version
        advice = f"{data} or a later version of it"
    elif family == "cc-by-nc":  # any terms that keep commerce out
        allowed = weights.startswith(_NON_COMMERCIAL)
        advice = "a licence for non-commercial use, such as cc-by-nc-4.0"
    else:  # no derivatives, terms of its own, or unknown: nothing but the owner's own terms
        advice = repr(data)
    if not allowed:
        raise PublishError(
            f"weights fitted on data under {data!r} cannot carry the licence {weights!r}; expected "
            f"{advice}. Leave --license out, or correct `license` in the facts of the data."
        )
