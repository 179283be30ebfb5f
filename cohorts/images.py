"""NIfTI files at the door: opened with plain words for what is wrong, read in blocks of volumes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .series import MIN_TIMEPOINTS, CohortError

#: One byte of deflate never becomes more; a header that promises more bytes is damaged.
MAX_INFLATION = 1032
SUFFIXES = (".nii", ".gz", ".hdr", ".img")
#: What the units of NIfTI's time axis are in seconds; nibabel names an unknown unit "unknown".
SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6, "unknown": 1.0}
DOWNLOAD_AGAIN = "Copy or download the file again."


def load_image(path: str | Path) -> Any:
    """Open a NIfTI file (.nii, .nii.gz or a pair .hdr/.img) and check its header.

    Returns
    -------
    nibabel.Nifti1Pair
        With a shape and an affine that can be used; the data are not read yet.

    Raises
    ------
    CohortError
        Not there, empty, a web page, no NIfTI, damaged, shorter than its header says, no numbers,
        or an affine that places no voxel.
    """
    import nibabel

    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise CohortError(f"{path}: expected a NIfTI file, found {found}. Check the path.")
    if not path.stat().st_size:
        raise CohortError(f"{path}: expected a NIfTI file, found an empty file. {DOWNLOAD_AGAIN}")
    if path.suffix.lower() not in SUFFIXES:
        raise CohortError(
            f"{path}: expected a NIfTI file (.nii, .nii.gz, .hdr with .img), found the ending "
            f"{path.suffix!r}. Convert or rename it."
        )
    try:
        image: Any = nibabel.load(path)
        known = isinstance(image, nibabel.Nifti1Pair)
        affine: Any = image.affine if known else np.zeros((4, 4))
        data = image.dataobj
        shape, dtype = tuple(int(n) for n in image.shape), np.dtype(data.dtype)
        offset, data_path = int(data.offset), Path(data.file_like)
        stored = data_path.stat().st_size
    # NOTE: nibabel raises whatever the damage runs into (struct, value, overflow, zlib errors).
    except Exception as error:
        raise _unreadable(path, error) from None
    if isinstance(image, nibabel.Cifti2Image):
        raise CohortError(
            f"{path}: expected a NIfTI volume, found a CIFTI file of shape {shape}. Name it "
            "*.ptseries.nii or *.dtseries.nii, so that it is read as CIFTI."
        )
    if not known:
        raise CohortError(
            f"{path}: expected NIfTI, found {type(image).__name__}. Convert it to .nii.gz first."
        )
    if dtype.kind not in "iuf":
        raise CohortError(f"{path}: expected real numbers, found voxels of {dtype}. Convert it.")
    if not shape or min(shape) < 1:
        raise CohortError(f"{path}: expected voxels, found shape {shape}. {DOWNLOAD_AGAIN}")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise CohortError(
            f"{path}: expected an affine that places the voxels in mm, found one that is not "
            f"finite or has no volume: {np.round(affine, 3).tolist()}. Repair the header."
        )
    bytes_needed = offset + math.prod(shape) * dtype.itemsize
    packed = data_path.suffix.lower() == ".gz"
    if offset < 0 or bytes_needed > stored * (MAX_INFLATION if packed else 1):
        raise CohortError(
            f"{path}: expected {bytes_needed:,} bytes for shape {shape} of {dtype}, found a file "
            f"of {stored:,}: truncated or corrupted. {DOWNLOAD_AGAIN}"
        )
    return image


def read_image(image: Any, where: str | Path) -> np.ndarray:
    """All voxels of an image that `load_image` opened, scaled as its header says.

    Raises
    ------
    CohortError
        The file ends early or is corrupted.
    """
    try:
        return np.asanyarray(image.dataobj)
    # NOTE: as in `load_image`; the data of a compressed file fail only here.
    except Exception as error:
        raise _broken_off(where, error) from None


def repetition_time(image: Any) -> float | None:
    """Seconds between volumes as the header says them; None where it says nothing.

    The unit is the header's own; a number without unit is taken as seconds and left to `check_tr`,
    which knows what milliseconds look like.
    """
    zooms = image.header.get_zooms()
    if len(zooms) < 4 or not math.isfinite(zooms[3]) or zooms[3] == 0:
        return None
    try:
        unit = image.header.get_xyzt_units()[1]
    except KeyError:  # a code that NIfTI does not know
        unit = "unknown"
    # Hz, ppm and rad/s are units of spectra: a file that claims them has no repetition time.
    return float(zooms[3]) * SECONDS[unit] if unit in SECONDS else None


def scaling(image: Any) -> tuple[float, float]:
    """Slope and intercept that turn stored numbers into the signal; 1 and 0 in memory."""
    if isinstance(image.dataobj, np.ndarray):
        return 1.0, 0.0
    return float(image.dataobj.slope), float(image.dataobj.inter)


def check_4d(shape: tuple[int, ...], where: str | Path) -> None:
    """Refuse what is no series of volumes.

    Raises
    ------
    CohortError
        Not four axes, or fewer than `MIN_TIMEPOINTS` volumes.
    """
    if len(shape) == 4 and shape[3] >= MIN_TIMEPOINTS:
        return
    advice = {
        3: "This is one volume (a mask, an atlas, an average?); pass the time series.",
        4: "Leave the scan out.",
        5: "Pass one series of volumes at a time.",
    }.get(len(shape), "Check what this file is.")
    raise CohortError(
        f"{where}: expected 4-D with at least {MIN_TIMEPOINTS} volumes, found shape {shape}. "
        f"{advice}"
    )


def read_blocks(
    image: Any, where: str | Path, block_bytes: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Volumes of a 4-D image in the order of the file, a few at a time.

    NOTE: each block is read into the same buffer instead of being mapped. The pages of a mapped
    file count as this process's memory until the system takes them back, mapping was not faster
    where it was tried, and a compressed file goes the same way.

    Parameters
    ----------
    image : nibabel image
        From `load_image`, or one that lies in memory.
    block_bytes : int
        Size of the buffer; at least one volume is read at a time.

    Yields
    ------
    int
        Number of the block's first volume.
    numpy.ndarray, shape (volumes, voxels)
        As stored (see `scaling`), voxels with the first axis fastest. Valid until the next block.

    Raises
    ------
    CohortError
        The file ends early or is corrupted.
    """
    from nibabel.openers import ImageOpener

    count = image.shape[3]
    voxels = math.prod(image.shape[:3])
    data = image.dataobj
    if isinstance(data, np.ndarray):
        step = max(1, block_bytes // (voxels * data.dtype.itemsize))
        for first in range(0, count, step):
            block = data[..., first : first + step]
            yield first, block.reshape(voxels, -1, order="F").T
        return
    step = min(count, max(1, block_bytes // (voxels * data.dtype.itemsize)))
    buffer = np.empty((step, voxels), data.dtype)
    volume = -1
    try:
        with ImageOpener(data.file_like) as stream:
            stream.seek(data.offset)
            for first in range(0, count, step):
                volume, size = first, min(step, count - first)
                _fill(stream, buffer[:size].data.cast("B"))
                yield first, buffer[:size]
            # The checksum of a compressed file is looked at where it ends, which damage can move.
            while str(data.file_like).lower().endswith(".gz") and stream.read(2**20):
                pass
    except (EOFError, OSError, zlib.error, ValueError) as error:
        raise _broken_off(f"{where}, volume {volume} of {count}", error) from None


def _fill(stream: Any, view: memoryview) -> None:
    """Read exactly as many bytes as `view` holds."""
    place = 0
    while place < len(view):
        got = stream.readinto(view[place:])
        if not got:
            raise EOFError("the file ends here")
        place += got


def _broken_off(where: str | Path, error: Exception) -> CohortError:
    return CohortError(
        f"{where}: expected voxels, found {_first_line(error)}: truncated or corrupted. "
        f"{DOWNLOAD_AGAIN}"
    )


def _unreadable(path: Path, error: Exception) -> CohortError:
    """What a file that nibabel refuses looks like."""
    try:
        with path.open("rb") as stream:
            start = stream.read(16)
    except OSError as problem:
        return CohortError(f"{path}: cannot be read: {problem.strerror}. Check its permissions.")
    packed = path.suffix.lower() == ".gz"
    if start.lstrip()[:1] == b"<":
        found = f"what looks like a web page ({start!r}). Download the file again"
    elif packed and not start.startswith(b"\x1f\x8b"):
        found = f"bytes that are not compressed ({start!r}). Rename it to .nii, or download again"
    elif not packed and start.startswith(b"\x1f\x8b"):
        found = "compressed bytes. Rename it to end in .nii.gz"
    else:
        found = (
            f"{_first_line(error)} (first bytes {start!r}): truncated or corrupted. "
            f"{DOWNLOAD_AGAIN[:-1]}"
        )
    return CohortError(f"{path}: expected a NIfTI file, found {found}.")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__
