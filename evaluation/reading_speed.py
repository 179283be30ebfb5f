"""How fast windows are read from a prepared cohort, and how long a training step waits for them.

    python -m cortexicon.evaluation.reading_speed COHORT CHECKPOINT --json FILE

Every way of reading copies the same randomly drawn windows into a batch (batch, time, regions). The
ways take turns, and the median over the turns is reported. The training step is the codec's forward
and backward pass and AdamW on windows that are drawn from the mapped cohort, z-scored with the
statistics of their scans and brought to the device in the same process, with nothing read ahead:
what a DataLoader with workers would hide is counted as waiting.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from cortexicon.cohorts import (
    Cohort,
    load_cohort,
    map_cohort,
    read_windows,
    series_views,
    stream_cohort,
)
from cortexicon.modeling import AVQConfig, AVQModel

from .errors import EvaluationError
from .json_files import write_json

RIVAL = "Array2D, numpy format, whole rows"
OURS = "views of the mapped cohort"
#: What the issue asks for.
MARKS = {"windows": "at least 2 times the rival", "waiting": "at most 0.10 of a step"}

Draw = tuple[list[int], list[int]]


def compare_reading(
    folder: Path,
    checkpoint: Path | None = None,
    *,
    batch_size: int = 32,
    window_length: int = 80,
    batches: int = 20,
    repeats: int = 7,
    steps: int = 6,
    cache: Path | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Windows per second of each way of reading, and the share of a training step that waits.

    Parameters
    ----------
    folder : path
        A cohort of `save_cohort`.
    checkpoint : path, optional
        Codec whose training step is timed, in the cohort's regions; its `window_length` is used.
        Without it only reading is measured.
    batch_size, window_length : int
        Windows of a batch, volumes of a window.
    batches, repeats : int
        Batches that a turn reads, turns.
    steps : int
        Training steps that are timed, after one that is not.
    cache : path, optional
        Of `map_cohort`.
    device : str, optional
        Default: ``cuda`` when there is one, else ``cpu``.

    Returns
    -------
    dict
        ``windows_per_second`` by way of reading; ``ratio`` of `OURS` to `RIVAL`;
        ``streamed_scans_per_second`` of one pass over the shards; ``training`` (median seconds of
        reading and of computing a step, share of waiting); and what was measured.

    Raises
    ------
    EvaluationError
        No scan is as long as a window.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = None if checkpoint is None else AVQConfig.from_pretrained(checkpoint)
    if config is not None:
        window_length = config.window_length
    mapped, loaded = map_cohort(folder, cache), load_cohort(folder)
    views, in_memory = series_views(mapped), series_views(loaded)
    series = loaded.dataset.select_columns(["time_series"])  # the rival need not decode the rest
    draws = draw_batches(views, window_length, batch_size, batches)
    ways: dict[str, Callable[[Draw], np.ndarray]] = {
        RIVAL: lambda draw: _whole_rows(series, *draw, window_length),
        "views of the loaded cohort": lambda draw: read_windows(in_memory, *draw, window_length),
        OURS: lambda draw: read_windows(views, *draw, window_length),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tqdm(total=len(ways) * repeats, desc="reading", mininterval=1.0) as bar:
        for _ in range(repeats):
            for name, way in ways.items():
                begun = time.perf_counter()
                for draw in draws:
                    way(draw)
                seconds[name].append(time.perf_counter() - begun)
                bar.update()
    rates = {
        name: batches * batch_size / statistics.median(turns) for name, turns in seconds.items()
    }
    results: dict[str, Any] = {
        "scans": len(mapped),
        "regions": len(mapped.labels),
        "window_length": window_length,
        "batch_size": batch_size,
        "repeats": repeats,
        "windows_per_second": rates,
        "ratio": rates[OURS] / rates[RIVAL],
        "streamed_scans_per_second": _stream_rate(folder),
        "marks": MARKS,
    }
    if config is not None:
        results["training"] = waiting_share(mapped, views, config, batch_size, steps, device)
    return results


def draw_batches(
    views: list[np.ndarray], length: int, batch_size: int, batches: int, seed: int = 0
) -> list[Draw]:
    """Scans and starts of random windows, the same for every way of reading."""
    long_enough = [row for row, view in enumerate(views) if len(view) >= length]
    if not long_enough:
        raise EvaluationError(
            f"expected scans of at least {length} volumes, found none. Give a shorter window."
        )
    rng = np.random.default_rng(seed)
    rows = rng.choice(long_enough, (batches, batch_size)).tolist()
    return [
        (batch, [int(rng.integers(0, len(views[row]) - length + 1)) for row in batch])
        for batch in rows
    ]


def waiting_share(
    cohort: Cohort,
    views: list[np.ndarray],
    config: AVQConfig,
    batch_size: int,
    steps: int,
    device: str,
) -> dict[str, Any]:
    """Median seconds that a training step reads and computes, and the share of reading."""
    config = AVQConfig.from_dict(
        {
            **config.to_dict(),
            "region_labels": cohort.labels,
            "region_coordinates": cohort.coordinates.tolist(),
        }
    )
    torch.manual_seed(0)
    model = AVQModel._from_config(config, attn_implementation="sdpa").to(device).train()
    with torch.no_grad():
        model.quantizer.start(torch.randn(64, config.code_dim, device=device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    text = torch.randn(1024, config.text_width, device=device)
    places = torch.from_numpy(cohort.coordinates)[None].to(device)
    # Of every scan, as the feature extractor takes them: 1.6 KB each, kept in memory.
    means = [view.mean(axis=0) for view in views]
    scales = [np.maximum(view.std(axis=0), 1e-6) for view in views]
    reading, computing = [], []
    for rows, starts in draw_batches(views, config.window_length, batch_size, steps + 1, seed=1):
        begun = time.perf_counter()
        windows = read_windows(views, rows, starts, config.window_length)
        for window, row in zip(windows, rows, strict=True):
            window -= means[row]
            window /= scales[row]
        values = torch.from_numpy(windows).to(device)
        _wait_for(device)
        read = time.perf_counter()
        model(values, places, text_embeddings=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait_for(device)
        reading.append(read - begun)
        computing.append(time.perf_counter() - read)
    read_seconds = statistics.median(reading[1:])  # the first step also warms up
    compute_seconds = statistics.median(computing[1:])
    return {
        "read_seconds": read_seconds,
        "compute_seconds": compute_seconds,
        "waiting_share": read_seconds / (read_seconds + compute_seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.device(device).type,
        "threads": torch.get_num_threads(),
    }


def render_reading(results: dict[str, Any]) -> str:
    """The table of `compare_reading`'s results, as Markdown."""
    lines = [
        f"{results['scans']} scans x {results['regions']} regions, batches of "
        f"{results['batch_size']} windows of {results['window_length']} volumes, medians of "
        f"{results['repeats']}",
        "",
        "| reading | windows/s |",
        "|---|---|",
        *(f"| {name} | {rate:,.0f} |" for name, rate in results["windows_per_second"].items()),
        "",
        f"{OURS}: {results['ratio']:.1f} times the rival (mark: {results['marks']['windows']}). "
        f"One pass over the shards: {results['streamed_scans_per_second']:,.0f} scans/s.",
    ]
    if "training" in results:
        step = results["training"]
        lines.append(
            f"A training step of {step['parameters']:,} parameters ({step['device']}, "
            f"{step['threads']} thread(s)) reads for {1e3 * step['read_seconds']:.1f} ms and "
            f"computes for {1e3 * step['compute_seconds']:.1f} ms: {step['waiting_share']:.2%} of "
            f"it waits for data (mark: {results['marks']['waiting']})."
        )
    return "\n".join(lines)


def _whole_rows(
    series: datasets.Dataset, rows: list[int], starts: list[int], length: int
) -> np.ndarray:
    """The usual way: every row is decoded whole, and the window is a slice of it."""
    return np.stack(
        [
            series[row]["time_series"][start : start + length]
            for row, start in zip(rows, starts, strict=True)
        ]
    )


def _stream_rate(folder: Path) -> float:
    """Scans per second of one pass over the shards in this process."""
    begun = time.perf_counter()
    count = sum(1 for _ in stream_cohort(folder).scans)
    return count / (time.perf_counter() - begun)


def _wait_for(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: list[str] | None = None) -> int:
    """Print the table, and write the figures where asked; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cortexicon.evaluation.reading_speed")
    parser.add_argument("cohort", metavar="COHORT", type=Path, help="folder of `prepare`")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, nargs="?", help="codec")
    parser.add_argument("--batch-size", type=int, default=32, help="windows of a batch")
    parser.add_argument("--window-length", type=int, default=80, help="without a checkpoint")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each way of reading")
    parser.add_argument("--cache", type=Path, default=None, help="folder for the mapped series")
    parser.add_argument("--json", type=Path, default=None, help="file of figures to write")
    given = parser.parse_args(argv)
    results = compare_reading(
        given.cohort,
        given.checkpoint,
        batch_size=given.batch_size,
        window_length=given.window_length,
        repeats=given.repeats,
        cache=given.cache,
    )
    print(render_reading(results))
    if given.json is not None:
        command = ["python", "-m", "cortexicon.evaluation.reading_speed", *(argv or sys.argv[1:])]
        write_json(given.json, {"command": shlex.join(command), **results})
        print(f"figures -> {given.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
