"""`cortexicon speed`: what a codec costs, as a table and as JSON."""

import shlex
import sys
from pathlib import Path

from cortexicon.evaluation import write_json
from cortexicon.evaluation.speed import compare_speed, render_speed
from cortexicon.modeling import AVQConfig


def measure_codec(
    config: AVQConfig,
    json_path: Path | None,
    regions: int,
    batch_size: int | None,
    repeats: int,
    threads: int,
) -> None:
    """Print the table of `compare_speed`, and write its figures to `json_path` if given.

    Parameters
    ----------
    config : AVQConfig
    json_path : pathlib.Path or None
    regions, batch_size, repeats, threads
        Of `compare_speed`.
    """
    results = compare_speed(
        config, regions=regions, batch_size=batch_size, repeats=repeats, threads=threads
    )
    print(render_speed(results))
    if json_path is not None:
        write_json(json_path, {"command": shlex.join(["cortexicon", *sys.argv[1:]]), **results})
        print(f"figures -> {json_path}")
