"""Commands of the connectivity stream: encode, decode, evaluate, and its table."""

import argparse
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from cortexicon._connectome_examples import examples
from cortexicon._connectome_residual import residual_system
from cortexicon._parts import chosen
from cortexicon.cohorts import Cohort, load_cohort, load_split, read_regions
from cortexicon.evaluation import EvaluationError, write_json
from cortexicon.evaluation.connectivity import correlation_by_scan
from cortexicon.evaluation.connectome import (
    GROUP_MEAN,
    PLAIN,
    RAW,
    System,
    bits_of,
    plain_system,
    score_cell,
    summary,
    tokens_of,
)
from cortexicon.evaluation.connectome_paired import differences
from cortexicon.evaluation.connectome_table import connectome_markdown, render_matrices
from cortexicon.evaluation.json_files import json_safe
from cortexicon.evaluation.predictions import write_predictions
from cortexicon.evaluation.rendering_connectome import EXAMPLES
from cortexicon.evaluation.scores import code_usage
from cortexicon.inference import (
    CohortMatrices,
    cohort_matrices,
    decode_connectomes,
    decode_matrices,
    encode_connectomes,
    encode_matrices,
    load_connectome,
    write_codes,
)
from cortexicon.inference.connectome import check_atlas, describe_connectome_codes
from cortexicon.modeling import AVQConnectomeModel

OURS = "AVQ connectome"
# The first of `PLAIN` has our bits.
FEW = (RAW, GROUP_MEAN, next(iter(PLAIN)))
PLAIN_ROWS = {"all": (RAW, GROUP_MEAN, *PLAIN), "few": FEW, "raw": (RAW,), "none": ()}
TARGETS = ("age", "sex", "diagnosis")


def encode(arguments: argparse.Namespace) -> None:
    """`cortexicon encode` with a checkpoint of the connectivity stream."""
    model, cohort = load_connectome(arguments.checkpoint), load_cohort(arguments.cohort)
    check_atlas(model, cohort, arguments.checkpoint, arguments.any_atlas)
    subjects = chosen(arguments, cohort, arguments.any_atlas)
    scans = encode_connectomes(model, cohort, subjects, arguments.batch_size)
    count = write_codes(arguments.out, scans, describe_connectome_codes(model, cohort))
    print(f"codes of {count} scans -> {arguments.out}")


def decode(arguments: argparse.Namespace) -> None:
    """`cortexicon decode` with a checkpoint of the connectivity stream: a .npz of matrices."""
    count = decode_connectomes(
        load_connectome(arguments.checkpoint),
        arguments.codes,
        arguments.out,
        arguments.batch_size,
        regions=None if arguments.regions is None else read_regions(arguments.regions),
        atlas=arguments.atlas,
    )
    print(f"matrices of {count} scans -> {arguments.out}")


def evaluate(arguments: argparse.Namespace) -> None:
    """`cortexicon evaluate` with a checkpoint of the connectivity stream: one fold's scores.

    What `cortexicon report` draws goes beside them.
    """
    if arguments.split is None:
        raise EvaluationError("expected --split FILE, for what was fitted on must be left out.")
    cohort, model = load_cohort(arguments.cohort), load_connectome(arguments.checkpoint)
    check_atlas(model, cohort, arguments.checkpoint)
    fold = Fold(cohort, load_split(arguments.split, cohort)[arguments.fold])
    started = perf_counter()
    scans = cohort_matrices(cohort, fold.tested)
    codes = encode_matrices(model, scans, cohort.coordinates)
    seconds = perf_counter() - started
    cell = fold.score(codec(model, cohort))
    facts = {
        "encode_seconds": seconds,
        "encoded_scans": len(codes),
        "code_usage": code_usage(np.bincount(codes.ravel(), minlength=model.config.num_codes)),
        "codebook_fingerprint": model.codebook_fingerprint(),
        "command": _command(),
    }
    write_json(arguments.json, {**summary([json_safe(cell)]), **facts})
    _predictions(
        arguments.predictions or arguments.json.parent / "predictions",
        fold,
        arguments.fold,
        "connectome",
        OURS,
        cell,
    )
    mean = np.nan_to_num(np.nanmean(fold.train, axis=0))
    examples(model, cohort, scans, codes, mean, arguments.json.with_name(EXAMPLES))
    print(f"scores -> {arguments.json}")


def table(arguments: argparse.Namespace) -> None:
    """`cortexicon connectome-table`: checkpoints of all folds beside plain codes."""
    cohort = load_cohort(arguments.cohort)
    other = None if arguments.other is None else load_cohort(arguments.other)
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    cross: dict[str, list[dict[str, Any]]] = {}
    tokens: dict[str, int] = {}
    bits: dict[str, float] = {}
    seen: set[tuple[str, int]] = set()
    rows_folder, picture = arguments.json.parent / "connectome_cells", None
    for folder in (bar := tqdm(arguments.checkpoints, unit="fold")):
        split, number, label = _trained_on(folder, cohort)
        bar.set_postfix_str(f"{split.scheme} {number}")
        fold = Fold(cohort, split[number])
        model = load_connectome(folder)
        key = [split.hash, number, cohort.content_hash]
        found = cells.setdefault(split.scheme, {})
        count = model.config.num_tokens
        name = OURS if count == 64 else f"{OURS}, {count} tokens"
        name = f"{name}, {label}" if label else name
        tokens[name], bits[name] = count, count * float(np.log2(model.config.num_codes))
        own = [*key, model.codebook_fingerprint()]
        ours = _kept(rows_folder, [name, *own], lambda f=fold, m=model: f.score(codec(m, cohort)))
        found.setdefault(name, []).append(ours)
        _predictions(arguments.json.parent / "predictions", fold, number, split.scheme, name, ours)
        for times in arguments.residual:
            cell = _kept(
                rows_folder,
                ["residual", times, *own],
                lambda f=fold, m=model, t=times: f.score(
                    residual_system(m, len(cohort.labels), f.train, t)
                ),
            )
            residual = f"{name}, {count // times} groups of {times} residual codes"
            tokens[residual], bits[residual] = tokens[name], bits[name]
            found.setdefault(residual, []).append(cell)
        # Once a fold, however many checkpoints of it there are.
        names = () if (split.scheme, number) in seen else PLAIN_ROWS[arguments.plain]
        seen.add((split.scheme, number))
        for plain in names:
            cell = _kept(
                rows_folder,
                [plain, *key],
                lambda f=fold, p=plain: f.score(plain_system(f.train, p)),
            )
            found.setdefault(plain, []).append(cell)
            _predictions(
                arguments.json.parent / "predictions", fold, number, split.scheme, plain, cell
            )
        if other is not None:
            cell = _kept(
                rows_folder,
                ["cross", other.content_hash, *own],
                lambda f=fold, m=model: cross_atlas(m, cohort, other, f.parts),
            )
            cross.setdefault(split.scheme, []).append(cell)
        picture = (model, fold)
    schemes: dict[str, dict[str, Any]] = {}
    for scheme, systems in cells.items():
        rows = [
            {
                "system": name,
                "tokens": tokens.get(name) or tokens_of(name),
                "bits": bits.get(name) or bits_of(name),
                "learned": name in tokens,
            }
            | summary(done)
            for name, done in systems.items()
        ]
        first = next(iter(systems))
        gaps = {
            name: differences(systems[first], done)
            for name, done in systems.items()
            if name != first and len(done) == len(systems[first])
        }
        schemes[scheme] = {"rows": rows, "judged": first, "differences": gaps}
        if scheme in cross:
            schemes[scheme]["cross_atlas"] = _joined(cross[scheme], cohort, other)
    command = _command()
    write_json(arguments.json, {"schemes": schemes, "command": command})
    if arguments.markdown is not None:
        arguments.markdown.write_text(
            HEAD + connectome_markdown(schemes, [f"Measured by `{command}`."]), encoding="utf-8"
        )
    if picture is not None:
        _picture(*picture, cohort, arguments.json.with_suffix(".png"))
    print(connectome_markdown(schemes))
    print(f"table  -> {arguments.json}")


HEAD = """# Connectivity as codes

Every row was fitted on the training and validation people of each fold and is scored on its test
people. *Full*: median over scans of the correlation, over pairs of regions, of the decoded matrix
with the raw Fisher-z matrix; *deviation*: the same after the training mean of its own kind was
taken away from both. *Top-1 of halves*: how often the two halves of a scan, each encoded and
decoded by itself, find each other among all test scans. Age by kernel ridge, classes by SVM, both
fitted on decoded matrices of training people (for raw: on raw matrices).

"""


class Fold:
    """Rows of Fisher-z pairs of one fold's training (with validation) and test people."""

    def __init__(self, cohort: Cohort, parts: Mapping[str, Sequence[str]]) -> None:
        self.cohort, self.parts = cohort, parts
        self.fitted = [*parts["train"], *parts["validation"]]
        self.tested = list(parts["test"])

    @cached_property
    def train(self) -> np.ndarray:
        """Computed when a cell needs it."""
        return pair_rows(cohort_matrices(self.cohort, self.fitted))

    @cached_property
    def test(self) -> list[np.ndarray]:
        """Whole scans, first halves, second halves."""
        parts = ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0))
        return [pair_rows(cohort_matrices(self.cohort, self.tested, part)) for part in parts]

    def score(self, system: System) -> dict[str, Any]:
        """`score_cell` of a system on the test people."""
        table, tested = self.cohort.participants, self.tested
        targets = [name for name in TARGETS if name in table and table[name].notna().all()]
        return score_cell(
            system,
            self.train,
            self.test[0],
            self.test[1:],
            (table.loc[self.fitted], table.loc[tested]),
            targets,
        )


def pair_rows(scans: CohortMatrices) -> np.ndarray:
    """Float32 (scans, pairs), the upper triangle row by row; NaN where a region is missing."""
    upper = np.triu_indices(scans.matrices.shape[1], 1)
    rows, mask = scans.matrices.numpy()[:, *upper].copy(), scans.region_mask.numpy()
    rows[~(mask[:, upper[0]] & mask[:, upper[1]])] = np.nan
    return rows


def codec(model: AVQConnectomeModel, cohort: Cohort) -> System:
    """The model as a system: rows of pairs to codes and back."""
    regions = len(cohort.labels)
    upper = np.triu_indices(regions, 1)

    def apply(rows: np.ndarray) -> np.ndarray:
        matrices = np.full((len(rows), regions, regions), np.nan, np.float32)
        matrices[:, *upper] = rows
        matrices[:, upper[1], upper[0]] = rows
        mask = torch.ones(len(rows), regions, dtype=torch.bool)
        scans = CohortMatrices([], torch.from_numpy(matrices), mask)
        codes = encode_matrices(model, scans, cohort.coordinates)
        return decode_matrices(model, codes, cohort.coordinates)[:, *upper]

    return apply


def cross_atlas(
    model: AVQConnectomeModel, cohort: Cohort, other: Cohort, parts: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Encode test people in the model's parcellation, decode in another, compare there."""
    known = set(other.subject_ids)
    fitted = [s for part in ("train", "validation") for s in parts[part] if s in known]
    tested = [s for s in parts["test"] if s in known]
    if not fitted or not tested:
        raise EvaluationError(
            f"{other.path}: expected the people of {cohort.path} in another parcellation, found "
            "none of its subject ids there."
        )
    codes = encode_matrices(model, cohort_matrices(cohort, tested), cohort.coordinates)
    raw = pair_rows(cohort_matrices(other, tested))
    mean = np.nan_to_num(np.nanmean(pair_rows(cohort_matrices(other, fitted)), axis=0))
    size = len(other.labels)
    upper = np.triu_indices(size, 1)
    square = np.zeros((size, size), np.float32)
    square[upper] = mean
    given = torch.from_numpy(square + square.T)
    decoded = decode_matrices(model, codes, other.coordinates, given)[:, *upper]
    plain = decode_matrices(model, codes, other.coordinates)[:, *upper]
    return {
        "full": correlation_by_scan(raw, decoded),
        "deviation": correlation_by_scan(raw - mean, decoded - mean),
        "group_mean": correlation_by_scan(raw, np.broadcast_to(mean, raw.shape)),
        "full_by_position": correlation_by_scan(raw, plain),
    }


def _joined(cells: list[dict[str, Any]], cohort: Cohort, other: Cohort | None) -> dict[str, Any]:
    medians = {key: float(np.median(np.concatenate([c[key] for c in cells]))) for key in cells[0]}
    scans = sum(len(cell["full"]) for cell in cells)
    names = {"source": cohort.atlas, "target": "" if other is None else other.atlas}
    return medians | names | {"scans": scans, "folds": len(cells)}


def _kept(folder: Path, inputs: list[Any], work: Any) -> dict[str, Any]:
    """What `work` returns, or what it returned before for the same inputs and code."""
    code = b"".join(
        Path(sys.modules[name].__file__ or "").read_bytes()
        for name in ("cortexicon.evaluation.connectome", "cortexicon.evaluation.baselines")
    )
    key = hashlib.sha256(code + json.dumps(inputs).encode()).hexdigest()[:20]
    path = folder / f"{key}.json"
    if not path.is_file():
        write_json(path, {"inputs": inputs, "cell": work()})
    cell: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["cell"]
    return cell


def _predictions(
    folder: Path, fold: Fold, number: int, scheme: str, system: str, cell: Mapping[str, Any]
) -> None:
    """Files of predictions of one cell, as any other system's."""
    table, slug = fold.cohort.participants, re.sub(r"[^a-z0-9]+", "-", system.lower()).strip("-")
    for target, part in cell["targets"].items():
        truth, score = table.loc[fold.tested, target], None
        y_hat = np.array(part["y_hat"], float)
        if not part["number"]:
            classes = np.unique(truth.astype(str))
            score, y_hat = y_hat, classes[(y_hat > 0).astype(int)]
        write_predictions(
            folder / f"{scheme}_{target}_{slug}_fold{number}.csv",
            fold.tested,
            truth.to_numpy() if part["number"] else truth.astype(str).to_numpy(),
            y_hat,
            system=system,
            target=target,
            fold=number,
            part="test",
            score=score,
            site=table.loc[fold.tested, "site"].astype(str).to_numpy(),
        )


def _trained_on(folder: Path, cohort: Cohort) -> tuple[Any, int, str]:
    """Split and fold that the run.json of a checkpoint names, and what tables call it."""
    path = folder / "run.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        name, fold = facts["arguments"]["split"], int(facts["arguments"]["fold"])
        expected, label = facts["split_hash"], facts["arguments"].get("label", "")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{path}: expected the facts of the training run, found {error!r}. Whom a checkpoint "
            "was trained on must be known here; copy the whole folder that training wrote."
        ) from error
    split = load_split(name, cohort)
    if split.hash != expected:
        raise EvaluationError(
            f"{folder}: expected split {expected[:12]}, on which it was trained, found "
            f"{split.hash[:12]} ({name}). Leave its split as it was."
        )
    return split, fold, label


def _picture(model: AVQConnectomeModel, fold: Fold, cohort: Cohort, path: Path) -> None:
    """Three test scans, and the mean of all, before and after."""
    scans = cohort_matrices(cohort, fold.tested)
    codes = encode_matrices(model, scans, cohort.coordinates)
    decoded = decode_matrices(model, codes, cohort.coordinates)
    raw = scans.matrices.numpy()
    pairs = [("mean of test scans", raw.mean(0), decoded.mean(0))]
    pairs += [(f"test scan {row}", raw[row], decoded[row]) for row in range(min(3, len(raw)))]
    render_matrices(pairs, path)
    print(f"figure -> {path}")


def _command() -> str:
    return shlex.join(["cortexicon", *sys.argv[1:]])
