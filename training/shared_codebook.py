"""One codebook for both streams against one for each: what sharing costs.

    python -m cortexicon.training.shared_codebook CODEC CONNECTOME COHORT --split FILE --json FILE

Both checkpoints keep everything but their codebooks, which k-means places anew on the unit vectors
of training people: one of K codes for each stream, one of K / 2 codes for each (as many ids as a
shared one has), and one of K codes for both, from equally many vectors of either. Test people are
scored as in training. NOTE: the codec's own rows are k-means too, as its trained codebook had
hundreds of steps to grow together with the decoder; that one stands beside them.
"""

import argparse
import copy
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cortexicon.cohorts import Cohort, load_cohort, load_split
from cortexicon.evaluation import write_json
from cortexicon.inference import Checkpoint, fit_to_atlas, load_checkpoint, load_connectome
from cortexicon.modeling import AVQConnectomeModel, AVQModel
from cortexicon.modeling.quantization_avq import spherical_kmeans

from . import avq, connectome
from .arguments import TrainingError
from .collators import PreparedScans, prepare_scans, whole_windows
from .connectome_sources import Matrices, matrices_of

VECTORS = 80_000  # of each stream
ROUNDS = 8
_BATCH = 32


def compare(
    checkpoint: Checkpoint,
    model: AVQConnectomeModel,
    cohort: Cohort,
    parts: dict[str, list[str]],
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Scores of test people by row of the table.

    Parameters
    ----------
    checkpoint : Checkpoint
        A codec of the cohort's atlas.
    model : AVQConnectomeModel
        Of the same code width.
    cohort : Cohort
    parts : dict of str to list of str
        One fold of the split that both were trained on.
    seed : int

    Returns
    -------
    dict
        For each row `r2` and `usage` of the codec, `correlation`, `deviation` and
        `connectivity_usage` of the connectivity stream.

    Raises
    ------
    TrainingError
        Codes of two widths or codebooks of two sizes.
    """
    codec, extractor = checkpoint.codec, checkpoint.processor.feature_extractor
    sizes = [(one.config.code_dim, one.config.num_codes) for one in (codec, model)]
    if sizes[0] != sizes[1]:
        raise TrainingError(
            f"expected codes of one width and codebooks of one size, found {sizes[0]} in the codec "
            f"and {sizes[1]} in the connectivity stream (code_dim, num_codes). Train the latter "
            f"with --set model.code_dim={sizes[0][0]} model.num_codes={sizes[0][1]}."
        )
    generator = torch.Generator().manual_seed(seed)
    windows = _drawn(
        _codec_vectors(codec, prepare_scans(cohort, extractor, parts["train"], "training")),
        generator,
    )
    scans = _drawn(_connectome_vectors(model, matrices_of(cohort, parts["train"])), generator)
    signs = 2.0 * torch.randint(2, scans.shape, generator=generator) - 1.0
    signs[:, -1] = 1.0  # the anchor; the others as in `flipped_kmeans`
    scans = scans * signs
    test = (
        prepare_scans(cohort, extractor, parts["test"], "test"),
        matrices_of(cohort, parts["test"]),
    )
    centre = model.components.mean_at(model._coordinates(None, None))[0]

    def scores(first: torch.Tensor | None, second: torch.Tensor | None) -> dict[str, float]:
        one, other = codec, model
        if first is not None:
            one = _with_codebook(codec, first)
        if second is not None:
            other = _with_codebook(model, second)
            with torch.no_grad():
                other._fit_read_code(second)
        dynamics = avq.evaluate(one, test[0], _BATCH, 10**9, "cpu")
        still = connectome.evaluate(other.eval(), test[1], _BATCH, centre)
        return {
            "r2": dynamics["eval_r2"],
            "usage": dynamics["eval_usage"],
            "correlation": still["eval_correlation"],
            "deviation": still["eval_deviation"],
            "connectivity_usage": still["eval_usage"],
        }

    def means(vectors: torch.Tensor, size: int) -> torch.Tensor:
        return spherical_kmeans(vectors, size, ROUNDS, seed)

    size = codec.config.num_codes
    shared = means(torch.cat([windows, scans]), size)
    return {
        f"as trained, {size} codes each": scores(None, None),
        f"k-means, {size} codes each": scores(means(windows, size), means(scans, size)),
        f"k-means, {size // 2} codes each": scores(
            means(windows, size // 2), means(scans, size // 2)
        ),
        f"k-means, {size} codes for both": scores(shared, shared),
    }


@torch.no_grad()
def _codec_vectors(codec: AVQModel, scans: PreparedScans) -> torch.Tensor:
    parts = []
    for batch in whole_windows(scans, codec.config.window_length, _BATCH):
        parts.append(F.normalize(codec._vectors(*codec._prepare(**batch)).float(), dim=-1))
    return torch.cat(parts)


@torch.no_grad()
def _connectome_vectors(model: AVQConnectomeModel, scans: Matrices) -> torch.Tensor:
    rows = torch.arange(len(scans.matrices)).split(_BATCH)
    return torch.cat([model.encode(**scans.rows(part)).latents.flatten(0, 1) for part in rows])


def _drawn(vectors: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return vectors[torch.randint(len(vectors), (VECTORS,), generator=generator)]


def _with_codebook(model: Any, codebook: torch.Tensor) -> Any:
    """A copy of a model of either stream that quantises by `codebook` (codes, code_dim)."""
    model = copy.deepcopy(model)
    model.config.num_codes = len(codebook)
    model.quantizer.codebook = codebook.clone()
    model.quantizer.code_sum = codebook.clone()
    model.quantizer.code_count = torch.ones(len(codebook))
    return model


def main(argv: list[str]) -> int:
    """Compare, print a table, write it."""
    parser = argparse.ArgumentParser(prog="python -m cortexicon.training.shared_codebook")
    parser.add_argument("codec", type=Path)
    parser.add_argument("connectome", type=Path)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--split", type=Path, required=True)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args(argv)
    cohort = load_cohort(arguments.cohort)
    rows = compare(
        fit_to_atlas(load_checkpoint(arguments.codec), cohort),
        load_connectome(arguments.connectome),
        cohort,
        load_split(arguments.split, cohort)[arguments.fold],
    )
    command = shlex.join(["python", "-m", "cortexicon.training.shared_codebook", *argv])
    write_json(arguments.json, {"rows": rows, "command": command})
    print("| codebooks | R2 | usage | correlation | deviation | usage |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
