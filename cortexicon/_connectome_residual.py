"""Residual codes of the connectivity stream: the rival of one code for each token.

A checkpoint's components stay as they are; what changes is how they become codes. Neighbouring
tokens are put together and quantised several times, every time what the time before has left: as
many codes of as many bits a scan, from a codebook for each time.
"""

import numpy as np
import torch
import torch.nn.functional as F

from cortexicon.evaluation import EvaluationError
from cortexicon.evaluation.connectome import System
from cortexicon.modeling import AVQConnectomeModel
from cortexicon.modeling.components_avq_connectome import flipped_kmeans
from cortexicon.modeling.quantization_avq import nearest_code

_DRAWS = 4  # times that a training vector serves the next codebook, with signs drawn anew
_BATCH = 64


def residual_system(
    model: AVQConnectomeModel, regions: int, train: np.ndarray, times: int, seed: int = 0
) -> System:
    """Rows of pairs to `num_tokens` codes and back, in groups of `times` codes.

    Parameters
    ----------
    model : AVQConnectomeModel
        Its components and how they are dealt; its parcellation has `regions` regions.
    regions : int
    train : float32, (scans, pairs)
        Rows of training people, NaN where a pair is missing: what the codebooks are fitted on.
    times : int
        1 is the present quantiser fitted again from these rows, to compare the others with.
    seed : int

    Raises
    ------
    EvaluationError
        `times` does not divide the number of tokens.
    """
    if model.config.num_tokens % times:
        raise EvaluationError(
            f"residual codes: expected a divisor of {model.config.num_tokens} tokens, found "
            f"{times}. Choose another number."
        )
    books: list[tuple[torch.Tensor, torch.Tensor]] = []  # an anchor and a codebook each
    generator = torch.Generator().manual_seed(seed)
    left = _groups(_dealt(model, regions, train), times).repeat(_DRAWS, 1)
    left = left * (2.0 * torch.randint(2, left.shape, generator=generator) - 1.0)
    for stage in range(times):
        lengths = left.square().sum(-1).view(-1, model.config.num_tokens // times).mean(0)
        anchor = model.config.code_anchor * lengths.max().sqrt()
        vectors = _anchored(left, anchor)
        book = flipped_kmeans(vectors, model.config.num_codes, 14, 80000, seed + stage)
        books.append((anchor, book))
        left = left - _nearest(left, anchor, book)

    def apply(rows: np.ndarray) -> np.ndarray:
        dealt = _dealt(model, regions, rows)
        left = _groups(dealt, times)
        found = torch.zeros_like(left)
        for anchor, book in books:
            found = found + _nearest(left - found, anchor, book)
        return _decoded(model, regions, found.view(dealt.shape))

    return apply


def _dealt(model: AVQConnectomeModel, regions: int, rows: np.ndarray) -> torch.Tensor:
    """What tokens hold before they are quantised, (scans, tokens, code_dim - 1)."""
    upper = torch.triu_indices(regions, regions, 1)
    parts = []
    with torch.inference_mode():
        for part in torch.from_numpy(np.ascontiguousarray(rows)).split(_BATCH):
            matrices = torch.full((len(part), regions, regions), torch.nan)
            matrices[:, upper[0], upper[1]] = part
            matrices[:, upper[1], upper[0]] = part
            unit = torch.as_tensor(model.encode(matrices).latents)
            parts.append(unit[..., :-1] / unit[..., -1:] * model.anchor)
    return torch.cat(parts)


def _decoded(model: AVQConnectomeModel, regions: int, dealt: torch.Tensor) -> np.ndarray:
    """Rows of pairs of what tokens hold."""
    upper = np.triu_indices(regions, 1)
    coordinates = torch.tensor(model.config.region_coordinates)[None]
    parts = []
    with torch.inference_mode():
        mean = model.components.mean_at(coordinates)
        for part in dealt.split(_BATCH):
            components = model.deal.inverse(part[:, None])[:, 0]
            matrices = mean + model.components.inverse(components, coordinates)
            parts.append(matrices.numpy()[:, upper[0], upper[1]])
    return np.concatenate(parts)


def _groups(dealt: torch.Tensor, times: int) -> torch.Tensor:
    """Neighbouring tokens side by side, (scans x groups, times x cards)."""
    return dealt.reshape(-1, times * dealt.shape[-1])


def _anchored(vectors: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    return F.normalize(torch.cat([vectors, anchor.expand(len(vectors), 1)], -1), dim=-1)


def _nearest(vectors: torch.Tensor, anchor: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """The codebook's vector for each of `vectors`, its anchor taken off."""
    chosen = book[nearest_code(_anchored(vectors, anchor), book)]
    return chosen[:, :-1] / chosen[:, -1:] * anchor
