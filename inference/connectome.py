"""The connectivity stream of a cohort: matrices in, codes out, and back."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError

from cortexicon.cohorts import Cohort
from cortexicon.modeling import AVQConnectomeModel, fisher_z_matrices

from .codes_file import CodesInfo, check_codebook, read_codes
from .encode import ScanCodes, evaluation_mode
from .errors import InferenceError

# Written where a codes file of windows names its layout.
LAYOUT = "connectivity"


class CohortMatrices(NamedTuple):
    """Connectivity of the scans of one cohort.

    Attributes
    ----------
    subject_ids : list of str
    matrices : float32 tensor, (scans, regions, regions)
        Fisher z; the diagonal and missing regions 0.
    region_mask : bool tensor, (scans, regions)
        False for regions that do not vary or are not finite.
    """

    subject_ids: list[str]
    matrices: torch.Tensor
    region_mask: torch.Tensor


def cohort_matrices(
    cohort: Cohort, subject_ids: Sequence[str] | None = None, part: tuple[float, float] = (0.0, 1.0)
) -> CohortMatrices:
    """Fisher-z matrices of whole scans at their own TR, or of a `part` of each.

    Parameters
    ----------
    cohort : Cohort
    subject_ids : sequence of str, optional
        Default: all of the cohort.
    part : (first, last)
        Shares of the scan's duration, such as (0, 0.5) for its first half.
    """
    subjects = list(cohort.subject_ids if subject_ids is None else subject_ids)
    if not subjects:
        raise InferenceError("expected subjects to make matrices of, found none. Name some.")
    matrices, masks = [], []
    for subject in subjects:
        values = np.asarray(cohort.series(subject).values)
        first, last = (int(share * len(values)) for share in part)
        series = torch.from_numpy(np.ascontiguousarray(values[first:last]))[None]
        matrix, mask = fisher_z_matrices(series)
        matrices.append(matrix)
        masks.append(mask)
    return CohortMatrices(subjects, torch.cat(matrices), torch.cat(masks))


def is_connectome(folder: str | Path) -> bool:
    """Whether a checkpoint folder holds the connectivity stream."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8"))["model_type"] == "avq_connectome"
    except (ValueError, KeyError, TypeError):
        return False  # whoever loads it says what is wrong


def load_connectome(folder: str | Path, device: str | torch.device = "cpu") -> AVQConnectomeModel:
    """Load a checkpoint of the connectivity stream, in evaluation mode.

    Raises
    ------
    InferenceError
        The folder holds something else, or its weights are damaged, incomplete or not finite.
    """
    folder = Path(folder)
    if not is_connectome(folder):
        raise InferenceError(
            f"{folder}: expected a checkpoint of the connectivity stream, found none. Give the "
            "folder that `cortexicon train avq CONFIG --stream connectivity` wrote."
        )
    redo = "Copy or train the checkpoint again."
    try:
        model, loading = AVQConnectomeModel.from_pretrained(folder, output_loading_info=True)
    except SafetensorError as error:
        raise InferenceError(
            f"{folder}: the weights (*.safetensors) are truncated or corrupted ({error}). {redo}"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise InferenceError(f"{folder}: {len(missing)} weights are missing: {missing[0]}. {redo}")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InferenceError(f"{folder}: weight {name} holds NaN or infinite values. {redo}")
    return model.to(device).eval()


def encode_matrices(
    model: AVQConnectomeModel,
    scans: CohortMatrices,
    coordinates: np.ndarray | None = None,
    mean: torch.Tensor | None = None,
    batch_size: int = 64,
) -> np.ndarray:
    """Codes int64 (scans, tokens); `coordinates` (regions, 3) in mm, `mean` as the model's own."""
    positions = None if coordinates is None else _positions(model, coordinates)
    parts = []
    with evaluation_mode(model), torch.inference_mode():
        for start in range(0, len(scans.matrices), batch_size):
            rows = slice(start, start + batch_size)
            output = model.encode(
                scans.matrices[rows].to(model.device),
                positions,
                scans.region_mask[rows].to(model.device),
                mean,
            )
            parts.append(output.codes.cpu().numpy())
    return np.concatenate(parts)


def decode_matrices(
    model: AVQConnectomeModel,
    codes: np.ndarray,
    coordinates: np.ndarray | None = None,
    mean: torch.Tensor | None = None,
    batch_size: int = 64,
) -> np.ndarray:
    """Matrices float32 (scans, regions, regions) of codes (scans, tokens), at any positions."""
    positions = None if coordinates is None else _positions(model, coordinates)
    parts = []
    with evaluation_mode(model), torch.inference_mode():
        for start in range(0, len(codes), batch_size):
            rows = torch.from_numpy(np.ascontiguousarray(codes[start : start + batch_size]))
            output = model.decode(rows.long().to(model.device), positions, mean)
            parts.append(output.matrices.cpu().numpy())
    return np.concatenate(parts)


def check_atlas(
    model: AVQConnectomeModel, cohort: Cohort, folder: str | Path, any_atlas: bool = False
) -> None:
    """Refuse a cohort of another parcellation, unless whoever asks wants that.

    Raises
    ------
    InferenceError
        Another atlas without `any_atlas`.
    """
    stored = model.config.atlas
    if stored not in (None, cohort.atlas) and not any_atlas:
        raise InferenceError(
            f"{cohort.path or 'cohort'}: expected regions of atlas {stored!r}, which {folder} "
            f"stores, found atlas {cohort.atlas!r}. Extract the series with {stored!r}, or have "
            "the regions read by their coordinates: --any-atlas."
        )


def encode_connectomes(
    model: AVQConnectomeModel,
    cohort: Cohort,
    subject_ids: Sequence[str] | None = None,
    batch_size: int = 64,
) -> list[ScanCodes]:
    """Codes of every scan, one row a scan, for `write_codes`."""
    found = []
    subjects = list(cohort.subject_ids if subject_ids is None else subject_ids)
    for start in range(0, len(subjects), batch_size):
        scans = cohort_matrices(cohort, subjects[start : start + batch_size])
        codes = encode_matrices(model, scans, cohort.coordinates, batch_size=batch_size)
        for subject, row in zip(scans.subject_ids, codes, strict=True):
            series = cohort.series(subject)
            found.append(ScanCodes(subject, series.session, series.site, row[None]))
    return found


def describe_connectome_codes(model: AVQConnectomeModel, cohort: Cohort) -> CodesInfo:
    """`CodesInfo` of matrices: a whole scan is the one window, so lengths and interval are 0."""
    return CodesInfo(
        codebook_fingerprint=model.codebook_fingerprint(),
        num_codes=model.config.num_codes,
        window_length=0,
        patch_length=0,
        sampling_interval=0.0,
        token_layout=LAYOUT,
        atlas=cohort.atlas,
        cohort_hash=cohort.content_hash,
        region_labels=[str(label) for label in cohort.labels],
        region_coordinates=np.asarray(cohort.coordinates, dtype=float).round(4).tolist(),
    )


def decode_connectomes(
    model: AVQConnectomeModel,
    codes_path: str | Path,
    out_path: str | Path,
    batch_size: int = 64,
    regions: pd.DataFrame | None = None,
    atlas: str | None = None,
) -> int:
    """Decode a codes file into one .npz of matrices; returns the number of scans.

    ::

        matrices      float32 (scans, regions, regions), Fisher z, the diagonal 0
        subject_id    str (scans,)
        label         str (regions,)
        coordinates   float32 (regions, 3), mm, MNI
        atlas         str

    Parameters
    ----------
    model : AVQConnectomeModel
        The one that wrote the codes; another codebook is refused.
    codes_path, out_path : path
    batch_size : int
    regions, atlas
        Another parcellation to decode into, as in `decode_codes`.

    Raises
    ------
    InferenceError
        The file is damaged or of another codebook; `regions` without `atlas`.
    """
    if (regions is None) != (atlas is None):
        raise InferenceError(
            "expected a table of regions and the name of their atlas together, found only "
            f"{'the name' if regions is None else 'the table'}. Give both, or none of them."
        )
    scans, info = read_codes(codes_path)
    check_codebook(model, info, codes_path)  # type: ignore[arg-type]
    labels, name = info.region_labels, info.atlas
    coordinates = np.asarray(info.region_coordinates, dtype=np.float32)
    if regions is not None and atlas is not None:
        coordinates = regions[["x", "y", "z"]].to_numpy(np.float32)
        labels, name = [str(label) for label in regions["label"]], atlas
    codes = np.concatenate([scan.codes for scan in scans])
    matrices = decode_matrices(model, codes, coordinates, batch_size=batch_size)
    out_path = Path(out_path)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = out_path.with_name(f".{out_path.name}.{os.getpid()}.tmp.npz")
    try:
        np.savez_compressed(
            temporary,
            matrices=matrices,
            subject_id=np.array([scan.subject_id for scan in scans]),
            label=np.array(labels),
            coordinates=coordinates,
            atlas=np.array(name),
        )
        os.replace(temporary, out_path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(scans)


def _positions(model: AVQConnectomeModel, coordinates: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.array(coordinates, np.float32))[None].to(model.device)
