"""Codes in, region series out: a cohort folder that `load_cohort` reads."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from cortexicon.cohorts import Cohort, ParcelSeries, cohort_from_series, save_cohort
from cortexicon.modeling import AVQModel

from .codes_file import check_codebook, read_codes
from .encode import decode_windows
from .errors import InferenceError


def decode_codes(
    model: AVQModel,
    codes_path: str | Path,
    out_folder: str | Path,
    batch_size: int = 32,
    progress: bool = True,
    regions: pd.DataFrame | None = None,
    atlas: str | None = None,
) -> Cohort:
    """Decode a codes file into the regions it was encoded from, or others, and write a cohort.

    Parameters
    ----------
    model : AVQModel
        The codec that wrote the codes; another codebook is refused.
    codes_path : path
        Written by `write_codes` (`cortexicon encode`).
    out_folder : path
        Receives a prepared cohort: series float32 (time, regions) in z-score units, one sample
        every `sampling_interval` seconds. The folder appears complete or not at all.
    batch_size : int
        Windows per forward pass.
    progress : bool
        Show a progress bar over scans.
    regions : pandas.DataFrame, optional
        Another parcellation to decode into: label, x, y, z (MNI mm), as `read_regions` returns.
    atlas : str, optional
        Its name; needed with `regions`.

    Raises
    ------
    InferenceError
        The file is damaged or was written with another codebook; `regions` without `atlas`.
    """
    if (regions is None) != (atlas is None):
        raise InferenceError(
            "expected a table of regions and the name of their atlas together, found only "
            f"{'the name' if regions is None else 'the table'}. Give both, or none of them to "
            "decode into the regions that were encoded."
        )
    scans, info = read_codes(codes_path)
    check_codebook(model, info, codes_path)
    coordinates = np.asarray(info.region_coordinates, dtype=np.float32)
    labels, name, source = info.region_labels, info.atlas, None
    if regions is not None and atlas is not None:
        source = torch.from_numpy(coordinates)[None]  # (1, regions, 3)
        coordinates = regions[["x", "y", "z"]].to_numpy(np.float32)
        labels, name = [str(label) for label in regions["label"]], atlas
    positions = torch.from_numpy(coordinates)[None]  # (1, regions, 3)
    decoded = []
    for scan in tqdm(scans, unit="scan", disable=not progress):
        windows = decode_windows(model, scan.codes, positions, batch_size, source)
        decoded.append(
            ParcelSeries(
                windows.reshape(-1, windows.shape[-1]),  # (windows * time, regions)
                labels,
                coordinates,
                name,
                info.sampling_interval,
                scan.subject_id,
                scan.session,
                scan.site,
            )
        )
    cohort = cohort_from_series(decoded)
    save_cohort(cohort, out_folder)
    return cohort
