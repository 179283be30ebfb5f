"""Tables of ablations, written between the markers of a document; its prose stays as it is."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cortexicon.evaluation import EvaluationError

from .ablations import BASE, Cell, CellsFile, essence

BEGIN, END = "<!-- ablations: {} -->", "<!-- end of ablations: {} -->"
PROBES = ("logistic", "quadratic", "mlp")


def write_tables(files: Sequence[CellsFile], results: Path, document: Path) -> int:
    """Put one table per file of cells into `document`; the number of cells without a result.

    A file whose markers the document does not hold yet gets a section at its end.

    Raises
    ------
    EvaluationError
        No document, or a beginning marker without its end.
    """
    if not document.is_file():
        raise EvaluationError(f"No document {document} to write tables into; make it first.")
    text, missing = document.read_text(encoding="utf-8"), 0
    known = [json.loads(path.read_text("utf-8")) for path in sorted(results.glob("*.json"))]
    for file in files:
        begin, end = BEGIN.format(file.name), END.format(file.name)
        if begin not in text:
            text = f"{text.rstrip()}\n\n### {file.title}\n\n{begin}\n{end}\n"
        before, _, rest = text.partition(begin)
        if end not in rest:
            raise EvaluationError(f"{document}: expected {end} after {begin}, found none. Add it.")
        table, without = render(file, known)
        text, missing = (
            f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}",
            missing + without,
        )
    document.write_text(text, encoding="utf-8")
    return missing


def render(file: CellsFile, known: Sequence[dict[str, Any]]) -> tuple[str, int]:
    """One table of Markdown, best validation R2 first, and the number of cells without result.

    Cells that were run on other data alone stand in a table of their own, beside their own base.
    """
    groups = _groups_of(file, known)
    missing = len({(c.name, c.seed) for c in file.cells} - {key for one in groups for key in one})
    if not groups:
        return "No cell has been run yet.", missing
    tables: list[str] = []
    for found in groups:
        data = next(iter(found.values()))[1]["data"]
        names = ", ".join(f"{key.replace('_', ' ')} `{value[:12]}`" for key, value in data.items())
        of = f"{len(found)} of {len(file.cells)} runs have a result. " if not tables else ""
        tables.append(f"{_table(found)}\n\n{of}Data: {names}.")
    return "\n\nOn other data:\n\n".join(tables), missing


def _table(found: dict[tuple[str, int], tuple[Cell, dict[str, Any]]]) -> str:
    runs: dict[str, list[tuple[Cell, dict[str, Any]]]] = {}
    for cell, result in found.values():
        runs.setdefault(cell.name, []).append((cell, result))
    probed = any("alignment" in result for _, result in found.values())
    rows, failures = [], []
    for cells in runs.values():
        finished = [(c, r) for c, r in cells if r["status"] == "finished"]
        failures += [_failure(c, r, probed) for c, r in cells if r["status"] != "finished"]
        if finished:
            rows.append((_mean(finished, "validation", "r2"), _row(finished, found, probed)))
    rows.sort(key=lambda row: -row[0])
    heads = [
        "cell", "factor", "what changed", "validation R2", "to base", "test R2 [95 %]", "usage",
        "connectivity", "deviation", *(["probes: log. / quad. / MLP", "10-NN"] if probed else []),
        "training R2", "perplexity", "s", "ms / step", "MB",
    ]  # fmt: skip
    lines = [_line(heads), _line(["---"] * len(heads)), *[row for _, row in rows], *failures]
    return "\n".join(lines)


def _groups_of(
    file: CellsFile, known: Sequence[dict[str, Any]]
) -> list[dict[tuple[str, int], tuple[Cell, dict[str, Any]]]]:
    """(cell, seed) -> its result, for each data that cells were run on, the commonest first.

    Of other data, the base and those cells that no group before has.
    """
    on: dict[str, dict[tuple[str, int], tuple[Cell, dict[str, Any]]]] = {}
    for cell in file.cells:
        wanted = json.loads(json.dumps(essence(cell.arguments)))
        for result in known:
            if result["arguments"] == wanted:
                data = json.dumps(result["data"], sort_keys=True)
                on.setdefault(data, {})[cell.name, cell.seed] = (cell, result)
    groups: list[dict[tuple[str, int], tuple[Cell, dict[str, Any]]]] = []
    for group in sorted(on.values(), key=len, reverse=True):
        new = group.keys() - {key for before in groups for key in before}
        if new:
            groups.append({k: v for k, v in group.items() if k in new or k[0] == BASE})
    return groups


def _row(
    runs: list[tuple[Cell, dict[str, Any]]],
    found: dict[tuple[str, int], tuple[Cell, dict[str, Any]]],
    probed: bool,
) -> str:
    """One cell's line: over several seeds mean +- SD."""
    cell, results = runs[0][0], [result for _, result in runs]
    name = f"**{cell.name}**" if cell.name == BASE else cell.name
    bounds = [r["test"]["r2_interval"] for r in results if None not in r["test"]["r2_interval"]]
    interval = [f"{statistics.fmean(side):.3f}" for side in zip(*bounds, strict=True)]
    cells = [
        name + (f" ({len(runs)} seeds)" if len(runs) > 1 else ""),
        cell.factor,
        ", ".join(f"`{key}={value}`" for key, value in cell.changes.items()),
        _number(results, "validation", "r2"),
        _to_base(runs, found),
        f"{_number(results, 'test', 'r2')} [{', '.join(interval) or '-'}]",
        _number(results, "test", "codebook", "usage", digits=2),
        _number(results, "test", "connectivity", "full"),
        _number(results, "test", "connectivity", "deviation"),
    ]
    if probed:
        probes = [
            _number(results, "alignment", "probes", probe, "accuracy", digits=2) for probe in PROBES
        ]
        cells += [
            " / ".join(probes),
            _number(results, "alignment", "geometry", "neighbour_overlap", digits=2),
        ]
    pace = [r["training"]["seconds_per_step"] for _, r in runs if r["training"]["seconds_per_step"]]
    cells += [
        _number(results, "training_r2"),
        _number(results, "training_codebook", "perplexity", digits=0),
        _number(results, "training", "seconds", digits=0),
        f"{1000 * statistics.fmean(pace):.0f}" if pace else "-",
        _number(results, "training", "peak_memory_mb", digits=0),
    ]
    return _line(cells)


def _failure(cell: Cell, result: dict[str, Any], probed: bool) -> str:
    last = (result.get("last_log_lines") or [{}])[-1].get("step", 0)
    changed = ", ".join(f"`{key}={value}`" for key, value in cell.changes.items())
    text = f"failed after step {last}: {' '.join(result['error'].split())}".replace("|", "/")
    return _line([cell.label, cell.factor, changed, text, *[""] * (12 if probed else 10)])


def _to_base(
    runs: list[tuple[Cell, dict[str, Any]]],
    found: dict[tuple[str, int], tuple[Cell, dict[str, Any]]],
) -> str:
    """Mean difference of validation R2 to the base's, over the seeds that both have."""
    if runs[0][0].name == BASE:
        return ""
    differences = []
    for cell, result in runs:
        base = found[BASE, cell.seed][1] if (BASE, cell.seed) in found else None
        if base is not None and base["status"] == "finished":
            differences.append(result["validation"]["r2"] - base["validation"]["r2"])
    return f"{statistics.fmean(differences):+.4f}" if differences else "-"


def _values(results: Sequence[dict[str, Any]], *keys: str) -> list[float]:
    """The number under nested `keys` of each result that has one."""
    found = []
    for result in results:
        value: Any = result
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found.append(float(value))
    return found


def _mean(runs: list[tuple[Cell, dict[str, Any]]], *keys: str) -> float:
    return statistics.fmean(_values([result for _, result in runs], *keys))


def _number(results: Sequence[dict[str, Any]], *keys: str, digits: int = 4) -> str:
    """Mean, with the SD over several runs; `-` where no run has it."""
    values = _values(results, *keys)
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
