"""What the report shows of the connectivity stream: matrices, and what its codes mean."""

from pathlib import Path

import numpy as np

from cortexicon.cohorts import Cohort
from cortexicon.evaluation.rendering_connectome import write_examples
from cortexicon.evaluation.scan_images import NETWORK_COLUMNS
from cortexicon.inference import CohortMatrices, decode_matrices
from cortexicon.modeling import AVQConnectomeModel


def examples(
    model: AVQConnectomeModel,
    cohort: Cohort,
    scans: CohortMatrices,
    codes: np.ndarray,
    mean_row: np.ndarray,
    path: Path,
) -> None:
    """Write what the report's pictures of this stream are drawn from. NOTE: it holds single scans.

    Parameters
    ----------
    model : AVQConnectomeModel
    cohort : Cohort
    scans : CohortMatrices
        Held-out ones.
    codes : int64, (scans, tokens)
        Of these scans.
    mean_row : float32, (pairs,)
        Mean Fisher z over training people.
    path : pathlib.Path
    """
    regions = cohort.regions
    names = next((name for name in NETWORK_COLUMNS if name in regions), None)
    tokens, effects, pairs = code_effects(model, codes, cohort.coordinates)

    def text(name: str | None) -> np.ndarray:
        if name not in regions:
            return np.full(len(regions), "")
        return regions[name].fillna("").astype(str).to_numpy()

    shown = slice(0, 2)
    size = len(regions)
    mean, upper = np.zeros((size, size), np.float32), np.triu_indices(size, 1)
    mean[upper] = mean_row
    write_examples(
        path,
        labels=np.array([str(label) for label in cohort.labels]),
        networks=text(names).astype(str),
        hemispheres=text("hemisphere").astype(str),
        coordinates=np.asarray(cohort.coordinates, np.float32),
        raw=scans.matrices[shown].numpy(),
        decoded=decode_matrices(model, codes[shown], cohort.coordinates),
        mean=mean + mean.T,
        effects=effects,
        effect_tokens=tokens,
        effect_codes=pairs,
    )


def code_effects(
    model: AVQConnectomeModel, codes: np.ndarray, coordinates: np.ndarray, shown: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What tokens change most, by which codes, and how.

    Parameters
    ----------
    model : AVQConnectomeModel
    codes : int64, (scans, tokens)
        For each token the two are taken that lie farthest apart along its loudest component.
    coordinates : float32, (regions, 3), mm
    shown : int

    Returns
    -------
    tokens : int64, (shown,)
    effects : float32, (shown, regions, regions)
        Matrix decoded with the first code less that with the second, all other tokens alike.
    pairs : int64, (shown, 2)
    """
    book = model.quantizer.codebook.detach().numpy()
    loudest = (book[:, 0] / book[:, -1])[codes]
    columns = np.arange(codes.shape[1])
    pairs = np.stack([codes[loudest.argmax(0), columns], codes[loudest.argmin(0), columns]], axis=1)
    both = np.repeat(codes[:1], 2 * len(pairs), axis=0).reshape(len(pairs), 2, -1)
    both[columns, 0, columns], both[columns, 1, columns] = pairs[:, 0], pairs[:, 1]
    matrices = decode_matrices(model, both.reshape(2 * len(pairs), -1), coordinates)
    effects = matrices[0::2] - matrices[1::2]
    most = np.argsort(-np.square(effects).sum((1, 2)), kind="stable")[:shown]
    return most, effects[most], pairs[most]
