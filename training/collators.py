"""Scans in memory, and the batches of windows that are drawn from them."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from cortexicon.cohorts import Cohort, Split, load_cohort, load_split
from cortexicon.tokenization import AVQFeatureExtractor, TokenizationError

from .arguments import TrainingError


def load_fold(arguments: Any) -> tuple[Cohort, Split, dict[str, list[str]]]:
    """Cohort, split and the parts of the fold that a stage's arguments name.

    Raises
    ------
    TrainingError
        The split has no such fold.
    """
    cohort = load_cohort(arguments.cohort)
    split = load_split(arguments.split, cohort)
    if not 0 <= arguments.fold < len(split):
        raise TrainingError(
            f"fold {arguments.fold} does not exist: "
            f"{arguments.split} holds folds 0..{len(split) - 1}."
        )
    return cohort, split, split[arguments.fold]


@dataclass
class PreparedScans:
    """Normalised scans at the model's sampling interval.

    Attributes
    ----------
    subject_ids : list of str
    series : list of float32 arrays (time, regions)
    region_masks : list of bool arrays (regions,)
    refused : dict of str to str
        Subjects left out, and why.
    region_coordinates : float32 array (regions, 3), mm, MNI
    """

    subject_ids: list[str]
    series: list[np.ndarray]
    region_masks: list[np.ndarray]
    refused: dict[str, str]
    region_coordinates: np.ndarray

    def __len__(self) -> int:
        return len(self.series)


def prepare_scans(
    cohort: Cohort,
    extractor: AVQFeatureExtractor,
    subject_ids: list[str],
    name: str,
    quiet: bool = False,
) -> PreparedScans:
    """Check, resample and normalise the scans of `subject_ids`, all of `extractor`'s atlas.

    Those that cannot serve are listed in `refused`, not hidden.

    Raises
    ------
    TrainingError
        No scan is left.
    """
    coordinates = np.asarray(extractor.region_coordinates, dtype=np.float32)
    scans = PreparedScans([], [], [], {}, coordinates)
    for subject in tqdm(subject_ids, desc=f"prepare {name}", mininterval=2.0, disable=quiet):
        scan = cohort.series(subject)
        try:
            values, mask = extractor.prepare_scan(
                scan.values,
                scan.tr,
                region_labels=scan.labels,
                atlas=scan.atlas,
                where=f"{subject}: ",
            )
        except TokenizationError as error:
            scans.refused[subject] = str(error)
            continue
        if len(values) < extractor.window_length:
            seconds = extractor.window_length * extractor.sampling_interval
            scans.refused[subject] = f"{subject}: shorter than one window of {seconds:g} s"
            continue
        scans.subject_ids.append(subject)
        scans.series.append(values)
        scans.region_masks.append(mask)
    if scans.refused and not quiet:
        print(
            f"{len(scans.refused)} of {len(subject_ids)} {name} scans left out, "
            f"e.g. {next(iter(scans.refused.values()))}"
        )
    if not scans.series:
        first = next(iter(scans.refused.values()), "the split names no subject for this part")
        raise TrainingError(f"No {name} scan is left. {first}")
    return scans


def draw_scans(
    rng: np.random.Generator, count: int, total: int, excluded: Collection[int] = ()
) -> np.ndarray:
    """`count` of `total` scans without the excluded, int64 (count,); none twice before all once."""
    left = np.array([scan for scan in range(total) if scan not in excluded])
    rounds = [rng.permutation(len(left)) for _ in range(-(-count // len(left)))]
    return left[np.concatenate(rounds)[:count]]


def draw_windows(
    scans: PreparedScans,
    window_length: int,
    count: int,
    seed: list[int],
    rank: int = 0,
    world_size: int = 1,
    excluded: Collection[int] = (),
    jitter: bool = True,
) -> dict[str, torch.Tensor]:
    """One batch of one atlas: `count` windows of different scans, at random starts.

    Without `jitter` a window starts at a whole number of windows, as in evaluation.

    It is share `rank` of `world_size` of one common draw. Different scans matter twice: the
    gradient sees more people, and dead codes are revived from several of them. Everything follows
    from `seed`, so a resumed run sees the same data. `scan` int64 (batch,) in it says whose windows
    they are; no index of `excluded` is among them.
    """
    rng = np.random.default_rng(seed)
    chosen = draw_scans(rng, count * world_size, len(scans), excluded)
    grain = 1 if jitter else window_length
    starts = [
        rng.integers(0, (len(scans.series[i]) - window_length) // grain + 1) * grain for i in chosen
    ]
    mine = range(rank * count, (rank + 1) * count)
    values = [scans.series[chosen[k]][starts[k] : starts[k] + window_length] for k in mine]
    return {
        "scan": torch.from_numpy(chosen[rank * count : (rank + 1) * count]),
        "input_values": torch.from_numpy(np.stack(values)),  # (batch, time, regions)
        "region_mask": torch.from_numpy(np.stack([scans.region_masks[chosen[k]] for k in mine])),
        "region_coordinates": torch.from_numpy(scans.region_coordinates)[None],
    }


def augment(
    batch: dict[str, torch.Tensor],
    seed: list[int],
    flip_sign: bool,
    reverse_time: bool,
    region_dropout: float,
) -> dict[str, torch.Tensor]:
    """The batch with windows changed at random: its sign, its direction in time, regions hidden.

    The first two keep every covariance as it is, and make four scans of one. With `region_dropout`
    each window loses a share of its regions, drawn anew between 0 and that.
    """
    rng = np.random.default_rng(seed)
    values, mask = batch["input_values"], batch["region_mask"]
    count = len(values)
    # Drawn whether used or not, so that one option does not change another's draw.
    signs, backwards = rng.integers(0, 2, count), rng.integers(0, 2, count)
    hidden = rng.random(mask.shape) < region_dropout * rng.random((count, 1))
    if flip_sign:
        values = values * torch.from_numpy(1.0 - 2.0 * signs).float()[:, None, None]
    if reverse_time:
        backwards = torch.from_numpy(backwards.astype(bool))
        values = torch.where(backwards[:, None, None], values.flip(1), values)
    return batch | {"input_values": values, "region_mask": mask & ~torch.from_numpy(hidden)}


def whole_windows(
    scans: PreparedScans, window_length: int, batch_size: int, limit: int | None = None
):
    """Batches of the non-overlapping windows from sample 0, in order; at most `limit` windows."""
    pairs = [
        (scan, start)
        for scan, series in enumerate(scans.series)
        for start in range(0, len(series) - window_length + 1, window_length)
    ][:limit]
    for first in range(0, len(pairs), batch_size):
        part = pairs[first : first + batch_size]
        yield {
            "input_values": torch.from_numpy(
                np.stack([scans.series[i][s : s + window_length] for i, s in part])
            ),
            "region_mask": torch.from_numpy(np.stack([scans.region_masks[i] for i, _ in part])),
            "region_coordinates": torch.from_numpy(scans.region_coordinates)[None],
        }


def load_text_side(folder: str | Path) -> tuple[PreTrainedModel, "TextDomain"]:
    """What `train text` left in `folder`: the language model, and draws of real text.

    Raises
    ------
    TrainingError
        The folder holds no counts of tokens.
    """
    counts = Path(folder) / "token_counts.safetensors"
    if not counts.is_file():
        raise TrainingError(
            f"{folder} holds no {counts.name}. "
            "The text side comes first: cortexicon train text CONFIG."
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, TextDomain(model.get_input_embeddings().weight, load_file(counts)["counts"])


class TextDomain:
    """Input embeddings of real text, drawn by capped token frequency.

    No type gets more than 0.5 % of the mass: otherwise a handful of commas and articles would be
    the text domain.
    """

    def __init__(self, table: torch.Tensor, counts: torch.Tensor, cap: float = 0.005):
        if len(counts) != len(table):
            raise TrainingError(
                f"token_counts.safetensors holds {len(counts)} tokens, "
                f"the embedding table {len(table)}: not of one model."
            )
        share = counts.double() / counts.sum()
        for _ in range(50):  # capping raises the others' shares; a few rounds settle it
            share = share.clamp(max=cap)
            share = share / share.sum()
        self.table = table.detach()
        self.share = share
        self.cumulative = share.cumsum(0).numpy()

    def draw(self, count: int, seed: list[int]) -> torch.Tensor:
        """`count` rows of the table, float32 (count, width)."""
        ids = np.searchsorted(self.cumulative, np.random.default_rng(seed).random(count))
        return self.table[torch.from_numpy(ids.clip(max=len(self.table) - 1))]
