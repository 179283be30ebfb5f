"""Which codes and which regions move an answer, and what a code stands for in networks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from cortexicon.modeling import AVQLMForConditionalGeneration
from cortexicon.tokenization import AVQProcessor

from .answers import answers_of
from .errors import InferenceError


class Attribution(NamedTuple):
    """How the answer about one scan changes when one code at a time is hidden.

    Attributes
    ----------
    answer : float
        With all codes: a number, or the probability of the class that sorts last.
    fmri : float64 array, shape (windows, tokens)
        Answer with all codes minus answer without this one; in the answer's unit.
    fc : float64 array, shape (tokens,), or None
        The same of connectivity codes.
    regions : float64 array, shape (regions,)
        Sizes of the changes, each dealt out over the regions in which its code is seen; sums to
        the sum of all sizes.
    """

    answer: float
    fmri: np.ndarray
    fc: np.ndarray | None
    regions: np.ndarray


@torch.inference_mode()
def attribute(
    model: AVQLMForConditionalGeneration,
    processor: AVQProcessor,
    codes: np.ndarray,
    target: dict[str, Any],
    connectivity: np.ndarray | None = None,
    batch_size: int = 32,
) -> Attribution:
    """Occlusion: hide each code behind the placeholder, as training does, and answer again.

    Parameters
    ----------
    codes : int64 array, shape (windows, tokens)
        Of one prompt; 0 windows: connectivity alone.
    target : dict
        One of `AVQLMConfig.targets`; answered by its readout.
    connectivity : int64 array, shape (tokens,), optional

    Raises
    ------
    InferenceError
        A model that reads features: there is no code to hide.
    """
    if model.config.fmri_input != "codes":
        raise InferenceError(
            "expected a model that reads codes, found one that reads features: nothing to hide."
        )
    row = processor.prompt_ids(codes if len(codes) else None, target["question"], connectivity)
    places = [place for place, token in enumerate(row) if token >= model.config.fmri_offset]
    rows = [list(row) for _ in range(1 + len(places))]
    for hidden, place in zip(rows[1:], places, strict=True):
        hidden[place] = model.config.fmri_token_id
    values = np.concatenate(
        [
            _answers(model, processor, rows[first : first + batch_size], target)
            for first in range(0, len(rows), batch_size)
        ]
    )
    changes = values[0] - values[1:]
    fmri = changes[: codes.size].reshape(codes.shape)
    fc = None if connectivity is None else changes[codes.size :]
    regions = np.zeros(_num_regions(model))
    if codes.size:
        shares = window_footprints(model, codes, batch_size)  # (windows, tokens, regions)
        regions += (np.abs(fmri)[..., None] * shares).sum((0, 1))
    if fc is not None and connectivity is not None:
        regions += np.abs(fc) @ matrix_footprints(model, connectivity, batch_size)
    return Attribution(float(values[0]), fmri, fc, regions)


def _answers(
    model: AVQLMForConditionalGeneration,
    processor: AVQProcessor,
    rows: list[list[int]],
    target: dict[str, Any],
) -> np.ndarray:
    """One number per prompt: the answer, or the probability of the class that sorts last."""
    ids = torch.tensor(rows, device=model.device)
    last = 0
    if target["kind"] == "class":
        last = int(np.argsort(np.array(target["classes"]))[-1])
    if target.get("readout") == "head":
        out = model(input_ids=ids, logits_to_keep=1, output_hidden_states=True)
        found = model.heads.read(out.hidden_states[-1][:, -1], target["name"])
        return (found if target["kind"] == "number" else found[:, last]).double().cpu().numpy()
    options = [processor.answer_ids(answer) for answer in answers_of(target)]
    first = [option[0] for option in options]
    if len(set(first)) == len(first):  # the first token says it all
        scores = model(input_ids=ids, logits_to_keep=1).logits[:, -1].float()[:, first]
    else:
        mask = torch.ones_like(ids)
        scores = model.score_options(options, input_ids=ids, attention_mask=mask)
    shares = torch.softmax(scores.double(), -1).cpu().numpy()
    if target["kind"] == "class":
        return shares[:, last]
    # NOTE: the expectation also where the readout is the mode, which hardly ever moves.
    return shares @ np.arange(target["minimum"], target["maximum"] + 1)


@torch.inference_mode()
def window_footprints(
    model: AVQLMForConditionalGeneration, codes: np.ndarray, batch_size: int = 32
) -> np.ndarray:
    """Where each code of windows is seen, float64 (windows, tokens, regions), summing to 1.

    How much a region's decoded series changes when the code gives way to the codebook's most
    average one.
    """
    codec, neutral = model.avq, _neutral(model.avq)
    found = []
    for window in codes:
        whole = torch.from_numpy(window)[None].to(model.device)
        changed = whole.repeat(len(window), 1)
        changed[range(len(window)), range(len(window))] = neutral
        base = codec.decode(whole).reconstruction
        parts = [
            (codec.decode(changed[k : k + batch_size]).reconstruction - base).square().mean(1)
            for k in range(0, len(changed), batch_size)
        ]
        found.append(_shares(torch.cat(parts).sqrt()))
    return np.stack(found)


@torch.inference_mode()
def matrix_footprints(
    model: AVQLMForConditionalGeneration, codes: np.ndarray, batch_size: int = 32
) -> np.ndarray:
    """Where each connectivity code (tokens,) is seen, float64 (tokens, regions), summing to 1."""
    codec = model.connectome
    neutral = _neutral(codec)
    whole = torch.from_numpy(codes)[None].to(model.device)
    changed = whole.repeat(len(codes), 1)
    changed[range(len(codes)), range(len(codes))] = neutral
    base = codec.decode(whole).matrices
    parts = [
        (codec.decode(changed[k : k + batch_size]).matrices - base).abs().sum(2)
        for k in range(0, len(changed), batch_size)
    ]
    return _shares(torch.cat(parts))


@torch.inference_mode()
def code_networks(
    model: AVQLMForConditionalGeneration,
    codes: Sequence[int],
    networks: Sequence[str],
    batch_size: int = 32,
) -> tuple[np.ndarray, list[str]]:
    """What codes of the dynamics stand for: their share in each network, wherever they stand.

    Parameters
    ----------
    codes : sequence of int
    networks : sequence of str
        Network of each region of the checkpoint's atlas.

    Returns
    -------
    shares : float64 array, shape (codes, networks)
        Mean change of the decoded series in the network's regions, over the places of a window;
        each row sums to 1.
    names : list of str
        Networks in the order of columns.
    """
    codec, neutral = model.avq, _neutral(model.avq)
    tokens = codec.config.tokens_per_window
    empty = torch.full((1, tokens), neutral, device=model.device)
    base = codec.decode(empty).reconstruction
    rows = []
    for code in codes:
        changed = empty.repeat(tokens, 1)
        changed[range(tokens), range(tokens)] = int(code)
        parts = [
            (codec.decode(changed[k : k + batch_size]).reconstruction - base).square().mean(1)
            for k in range(0, tokens, batch_size)
        ]
        rows.append(torch.cat(parts).sqrt().mean(0))
    return by_network(_shares(torch.stack(rows)), networks)


def by_network(values: np.ndarray, networks: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Mean of values (..., regions) in each network, rows scaled to sum to 1, and their names."""
    if values.shape[-1] != len(networks):
        raise InferenceError(
            f"expected a network for each of {values.shape[-1]} regions, found {len(networks)}."
        )
    names = sorted({str(name) for name in networks})
    own = np.array([str(name) for name in networks])
    means = np.stack([values[..., own == name].mean(-1) for name in names], -1)
    return means / np.maximum(means.sum(-1, keepdims=True), 1e-30), names


def _neutral(codec: Any) -> int:
    """The code whose place in text space is nearest to the mean of all."""
    rows = codec.project_codebook()
    return int((rows - rows.mean(0)).square().sum(1).argmin())


def _shares(sizes: torch.Tensor) -> np.ndarray:
    """Sizes (..., regions) as float64 rows that sum to 1; equal shares where all are 0."""
    values = sizes.double().cpu().numpy() + 1e-12
    return values / values.sum(-1, keepdims=True)


def _num_regions(model: AVQLMForConditionalGeneration) -> int:
    places = model.avq.config.region_coordinates
    if places is None:
        raise InferenceError("this checkpoint stores no regions to lay an answer out on.")
    return len(places)
