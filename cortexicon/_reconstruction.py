"""`cortexicon reconstruction`: the table of reconstructions of a cohort, ours beside the plain."""

import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cortexicon.cohorts import Cohort, Split
from cortexicon.evaluation import EvaluationError, evaluate_reconstruction, write_json
from cortexicon.evaluation.json_files import json_safe
from cortexicon.evaluation.reconstruction_table import (
    PlainTokenizer,
    counterpart,
    plain_rows,
    section,
    standard_tokenizers,
    summary,
    table_markdown,
)
from cortexicon.evaluation.rendering_rate import render_rate_distortion
from cortexicon.inference import (
    Checkpoint,
    ScanReconstruction,
    cohort_windows,
    fit_to_atlas,
    load_checkpoint,
    reconstruct_cohort,
)
from cortexicon.tokenization import AVQFeatureExtractor

# What makes two extractors hand out the same windows of a cohort.
_SIGNAL = (
    "sampling_interval",
    "window_length",
    "band_pass",
    "scaling",
    "scaling_center",
    "scaling_scale",
)
_TIMED_BATCHES = 3

Windows = list[tuple[str, np.ndarray]]


class Signal(NamedTuple):
    """What enters the tokenizers of one part of the table.

    Attributes
    ----------
    extractor : AVQFeatureExtractor
    train, test : list of (subject_id, windows)
        windows: float32 (windows, window, regions).
    """

    extractor: AVQFeatureExtractor
    train: Windows
    test: Windows

    @property
    def name(self) -> str:
        """What a person calls it."""
        name = "unfiltered"
        if self.extractor.band_pass is not None:
            name = "band-pass {:g}-{:g} Hz".format(*self.extractor.band_pass)
        scaling = self.extractor.scaling
        return name if scaling == "zscore" else f"{name}, {scaling} scaling"

    @property
    def window_seconds(self) -> float:
        return self.extractor.window_length * self.extractor.sampling_interval


def reconstruction_table(
    cohort: Cohort,
    split: Split,
    fold: int,
    json_path: Path,
    markdown_path: Path | None = None,
    checkpoints: Sequence[Path] = (),
    band_pass: Sequence[float] | None = None,
    any_atlas: bool = False,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Score tokenizers that learn nothing, and checkpoints, on the same held-out windows.

    Scored are the scans of the fold's test part that were acquired at the sampling interval (TR
    2 s), so that nothing is resampled, in windows from sample 0 on without overlap. The plain
    tokenizers, the Gaussian reference and the mean connectivity matrices are fitted on the scans
    of the training and validation parts with that TR: with nothing to select, validation is
    training. A checkpoint is scored on windows of its own feature extractor: one that was trained
    on a pass band stands beside plain tokenizers of band-passed windows.

    Parameters
    ----------
    cohort : Cohort
    split : Split
    fold : int
    json_path : pathlib.Path
        Receives the table. The figure goes beside it (.png), finished rows into the folder `rows`
        beside it; a later call reads those instead of computing them again.
    markdown_path : pathlib.Path, optional
        Receives the table for people.
    checkpoints : sequence of pathlib.Path
        Folders of codecs, or of language models with one.
    band_pass : [low, high], optional
        Hz; adds a part of the table for this band.
    any_atlas : bool
        Let a codec read the cohort's regions by their coordinates, whatever its own atlas.
    batch_size : int
        Windows per forward pass.

    Returns
    -------
    dict
        `sections` (see `reconstruction_table.section`), `notes`, `command`, the hashes of cohort
        and split.

    Raises
    ------
    EvaluationError
        No scan of a part was acquired at the sampling interval.
    InferenceError
        A checkpoint of another atlas without `any_atlas`, or one that cannot be loaded.
    """
    atlas = {
        "atlas": cohort.atlas,
        "region_labels": cohort.labels,
        "region_coordinates": cohort.coordinates,
    }
    # Bands and folders are checked before anything is computed.
    extractors = [AVQFeatureExtractor(**atlas)]
    if band_pass is not None:
        extractors.append(AVQFeatureExtractor(**atlas, band_pass=band_pass))
    signals: dict[str, tuple[AVQFeatureExtractor, list[Checkpoint]]] = {
        _settings(extractor): (extractor, []) for extractor in extractors
    }
    for folder in checkpoints:
        checkpoint = fit_to_atlas(load_checkpoint(folder), cohort, any_atlas)
        extractor = checkpoint.processor.feature_extractor
        signals.setdefault(_settings(extractor), (extractor, []))[1].append(checkpoint)

    sections = []
    for extractor, codecs in signals.values():
        train, test = _scored(cohort, split[fold], extractor.sampling_interval)
        signal = Signal(
            extractor,
            list(cohort_windows(extractor, cohort, train)),
            list(cohort_windows(extractor, cohort, test)),
        )
        plain, beside = _plain_rows(signal, codecs, len(cohort.labels), json_path.parent / "rows")
        rows = [_score(codec, cohort, signal, (split.hash, fold), batch_size) for codec in codecs]
        sections.append(
            section(
                signal.name,
                signal.train,
                plain,
                list(zip(beside, rows, strict=True)),
                signal.window_seconds,
            )
        )
    notes = []
    if any(row.get("split") == "another" for part in sections for row in part["rows"]):
        notes.append("\\* Trained on another split than this one: it may know these scans.")
    table = json_safe(
        {
            "sections": sections,
            "notes": notes,
            "command": shlex.join(["cortexicon", *sys.argv[1:]]),
            "atlas": cohort.atlas,
            "cohort_hash": cohort.content_hash,
            "split_hash": split.hash,
            "fold": fold,
            "threads": torch.get_num_threads(),
        }
    )
    write_json(json_path, table)
    if markdown_path is not None:
        markdown_path.parent.mkdir(parents=True, exist_ok=True)
        markdown_path.write_text(table_markdown(table), encoding="utf-8")
    render_rate_distortion(table, json_path.with_suffix(".png"))
    print(table_markdown(table))
    return dict(table)


def _settings(extractor: AVQFeatureExtractor) -> str:
    return json.dumps([getattr(extractor, name) for name in _SIGNAL])


def _scored(
    cohort: Cohort, parts: dict[str, list[str]], interval: float
) -> tuple[list[str], list[str]]:
    """Subjects to fit on and to score, all acquired at the sampling interval."""
    same = cohort.participants["tr"].sub(interval).abs() < 1e-3
    native = {str(subject) for subject in same.index[same]}
    train = [s for part in ("train", "validation") for s in parts.get(part, ()) if s in native]
    test = [subject for subject in parts.get("test", ()) if subject in native]
    if not train or not test:
        raise EvaluationError(
            f"The table needs scans of TR {interval:g} s in the training and the test part; found "
            f"{len(train)} and {len(test)}. Choose another split, or another cohort."
        )
    return train, test


def _plain_rows(
    signal: Signal, codecs: list[Checkpoint], num_regions: int, cache: Path
) -> tuple[dict[PlainTokenizer, dict[str, Any]], list[PlainTokenizer | None]]:
    """Rows that learn nothing, and for each codec which of them it is measured against."""
    window_length = signal.extractor.window_length
    beside = [
        counterpart(
            checkpoint.codec.config.token_layout,
            checkpoint.tokens_per_window,
            checkpoint.codec.config.num_codes,
            window_length,
            num_regions,
        )
        for checkpoint in codecs
    ]
    wanted = standard_tokenizers(window_length, num_regions)
    wanted += [plain for plain in dict.fromkeys(beside) if plain and plain not in wanted]
    rows = plain_rows(wanted, signal.train, signal.test, signal.window_seconds, cache, signal.name)
    return rows, beside


def _score(
    checkpoint: Checkpoint,
    cohort: Cohort,
    signal: Signal,
    split: tuple[str, int],
    batch_size: int,
) -> dict[str, Any]:
    """The row of a checkpoint, without what it is compared with."""
    config = checkpoint.codec.config

    def scans(part: Windows) -> Iterator[ScanReconstruction]:
        subjects = [name for name, _ in part]
        return reconstruct_cohort(checkpoint.codec, signal.extractor, cohort, subjects, batch_size)

    scores = evaluate_reconstruction(
        scans(signal.train),
        scans(signal.test),
        num_codes=config.num_codes,
        window_seconds=signal.window_seconds,
        tokens_per_window=checkpoint.tokens_per_window,
        regions=cohort.regions,
    )
    facts = _run_facts(checkpoint.folder)
    known = facts.get("split_hash")
    trained_on = (known, facts.get("arguments", {}).get("fold", 0))
    return {
        **summary(scores),
        "system": str(checkpoint.folder),
        "layout": config.token_layout,
        "split": "unknown" if known is None else "same" if trained_on == split else "another",
        "codebook_fingerprint": checkpoint.codec.codebook_fingerprint(),
        "cost": {
            "parameters": checkpoint.codec.num_parameters(),
            "training_seconds": facts.get("seconds") if facts.get("stage") == "avq" else None,
            "windows_per_second": _windows_per_second(checkpoint, cohort, signal.test, batch_size),
        },
    }


def _run_facts(folder: Path) -> dict[str, Any]:
    """What training noted beside the checkpoint; nothing for one from elsewhere."""
    path = folder / "run.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


@torch.inference_mode()
def _windows_per_second(
    checkpoint: Checkpoint, cohort: Cohort, test: Windows, batch_size: int
) -> float:
    """Windows that `encode` takes in per second: the median batch, after one to warm up."""
    batch = torch.from_numpy(np.concatenate([windows for _, windows in test])[:batch_size])
    coordinates = torch.tensor(cohort.coordinates, dtype=torch.float32)[None]
    seconds = []
    for _ in range(1 + _TIMED_BATCHES):
        start = time.perf_counter()
        checkpoint.codec.encode(batch, region_coordinates=coordinates, codes_only=True)
        seconds.append(time.perf_counter() - start)
    return len(batch) / float(np.median(seconds[1:]))
