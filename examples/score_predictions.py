"""Anybody's predictions, scored by a metric of `evaluate` that is loaded by its path.

    python examples/score_predictions.py runs/demo/predictions/*.csv

A file of predictions has a row per subject: subject_id, y, y_hat, system, target, fold, part.
Without a file two made-up systems are scored. More: docs/adding_a_system.md.
"""

import argparse
import tempfile
from pathlib import Path

import evaluate
import numpy as np

import cortexicon.evaluation.metrics
from cortexicon.evaluation.predictions import read_predictions, write_predictions

(METRIC,) = Path(cortexicon.evaluation.metrics.__file__).parent.glob("*regression*")


def made_up(folder: Path) -> list[Path]:
    """Two files of predictions of age: one system knows something, the other says the median."""
    draw = np.random.default_rng(0)
    age = draw.uniform(18, 80, 200)
    names = [f"sub-{number:03d}" for number in range(len(age))]
    guesses = {
        "knows something": age + draw.normal(0, 8, len(age)),
        "median": np.full(len(age), np.median(age)) + draw.normal(0, 1e-6, len(age)),
    }
    return [
        write_predictions(
            folder / f"{number}.csv",
            names,
            age.round(2),
            guess.round(4),
            system=system,
            target="age",
            fold=0,
            part="test",
        )
        for number, (system, guess) in enumerate(guesses.items())
    ]


def main(argv: list[str] | None = None) -> None:
    """Print each system's mean absolute error in years, with its interval over subjects, and r."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--target", default="age")
    parser.add_argument("--part", default="test")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = read_predictions(arguments.files or made_up(Path(folder)))
    rows = rows[(rows["target"] == arguments.target) & (rows["part"] == arguments.part)]
    metric = evaluate.load(str(METRIC))
    for system, table in rows.groupby("system"):
        scores = metric.compute(
            predictions=table["y_hat"].astype(float).tolist(),
            references=table["y"].astype(float).tolist(),
        )
        low, high = scores["mae_interval"]
        print(
            f"{system}: MAE {scores['mae']:.2f} [{low:.2f}, {high:.2f}], r {scores['r']:.3f}, "
            f"{len(table)} subjects"
        )


if __name__ == "__main__":
    main()
