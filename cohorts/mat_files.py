"""MATLAB's .mat files without SciPy: arrays of numbers, texts, and cells of texts.

NOTE: SciPy's reader crashes the process on some damaged files (a segmentation fault, found by
flipping bytes), and one bad scan must not take the others with it. This reader checks every length
before it is used and leaves structs, objects and sparse matrices alone, which no scan needs.

Source: "MAT-File Format", The MathWorks, version R2025a, chapter 1 (level 5).
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .series import CohortError

#: Largest number of samples that one scan may hold; more is damage, not data.
MAX_SAMPLES = 2**31
#: Data types of elements.
_STORED = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
    16: "u1", 17: "u2", 18: "u4",
}  # fmt: skip
_MATRIX, _COMPRESSED = 14, 15
#: Classes of arrays, as the types that they have in memory.
_NUMBERS = {
    6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8",
}  # fmt: skip
_CELL, _CHAR = 1, 4
_OTHERS = {1: "cell", 2: "struct", 3: "object", 5: "sparse", 16: "function", 17: "object"}
_COMPLEX = 0x0800


class Variables(NamedTuple):
    """What a file holds.

    Attributes
    ----------
    arrays : dict of str to numpy.ndarray
        Numbers as stored; texts, and cells of texts, as arrays of str.
    others : list of str
        Names and kinds of the variables that were left alone.
    """

    arrays: dict[str, np.ndarray]
    others: list[str]


class _Element(NamedTuple):
    kind: int
    data: memoryview
    end: int


def read_variables(path: Path) -> Variables:
    """Read the variables of a .mat file of level 5 (MATLAB 5 to 7.2) or 7.3 (HDF5).

    Raises
    ------
    CohortError
        7.3 without h5py; MATLAB 4.
    ValueError, struct.error, zlib.error, OSError
        Damage, for the caller to name the file.
    """
    raw = path.read_bytes()
    if b"\x89HDF\r\n\x1a\n" in (raw[:8], raw[512:520]) or raw.startswith(b"MATLAB 7.3"):
        return _read_hdf5(path)
    mark = raw[126:128]
    if len(raw) < 128 or mark not in (b"IM", b"MI"):
        if raw[:1] in (b"\0", b"\1", b"\2", b"\x0a") and not raw.startswith(b"MATLAB"):
            raise CohortError(
                f"{path}: expected MATLAB's format 5 or later, found none of its marks (MATLAB 4, "
                "or another file). Save it again in MATLAB with -v7."
            )
        raise ValueError("no mark of MATLAB's format 5")
    order = "<" if mark == b"IM" else ">"
    arrays: dict[str, np.ndarray] = {}
    others: list[str] = []
    buffer, place = memoryview(raw), 128
    while place < len(buffer):
        element = _element(buffer, place, order)
        place = element.end
        if element.kind == _COMPRESSED:
            unpacked = zlib.decompressobj()
            data = unpacked.decompress(element.data, 8 * MAX_SAMPLES)
            if not unpacked.eof:
                raise ValueError("a compressed variable that does not end")
            element = _element(memoryview(data), 0, order)
        if element.kind != _MATRIX:
            continue  # MATLAB's own notes at the end of a file
        name, value = _matrix(element.data, order, 0)
        if isinstance(value, np.ndarray):
            arrays[name] = value
        else:
            others.append(f"{name} ({value})")
    return Variables(arrays, others)


def _element(buffer: memoryview, place: int, order: str) -> _Element:
    """The element at a place; its data never reach beyond the buffer."""
    (word,) = struct.unpack_from(f"{order}I", buffer, place)
    if word >> 16:  # up to four bytes of data stand inside the tag
        kind, size, start, end = word & 0xFFFF, word >> 16, place + 4, place + 8
        if size > 4:
            raise ValueError(f"a small element of {size} bytes")
    else:
        (size,) = struct.unpack_from(f"{order}I", buffer, place + 4)
        kind, start = word, place + 8
        end = start + size + (-size % 8 if kind != _COMPRESSED else 0)
    if start + size > len(buffer):
        raise ValueError(f"an element of {size} bytes where {len(buffer) - start} are left")
    return _Element(kind, buffer[start : start + size], min(end, len(buffer)))


def _numbers(element: _Element, order: str) -> np.ndarray:
    if element.kind not in _STORED:
        raise ValueError(f"data of the unknown type {element.kind}")
    return np.frombuffer(element.data, np.dtype(order + _STORED[element.kind]))


def _matrix(data: memoryview, order: str, depth: int) -> tuple[str, np.ndarray | str]:
    """Name and value of an array, or what it is when it is neither numbers nor text."""
    if not len(data):
        return "", np.empty((0, 0))
    flags = _element(data, 0, order)
    dimensions = _element(data, flags.end, order)
    title = _element(data, dimensions.end, order)
    word = int(_numbers(flags, order)[0])
    kind, shape = word & 0xFF, tuple(int(n) for n in _numbers(dimensions, order))
    name = bytes(title.data).decode("utf-8", "replace")
    count = math.prod(shape)
    if min(shape, default=0) < 0 or count > MAX_SAMPLES:
        raise ValueError(f"an array of shape {shape}")
    if kind in _NUMBERS and not word & _COMPLEX:
        values = _numbers(_element(data, title.end, order), order)
        if len(values) != count:
            raise ValueError(f"{len(values)} numbers for shape {shape}")
        with np.errstate(over="ignore", invalid="ignore"):
            return name, values.astype(_NUMBERS[kind]).reshape(shape, order="F")
    if kind == _CHAR:
        return name, np.array(_rows(_element(data, title.end, order), shape, order))
    if kind == _CELL and depth == 0:
        texts, place = [], title.end
        for _ in range(count):
            element = _element(data, place, order)
            _, value = _matrix(element.data, order, 1)
            if not isinstance(value, np.ndarray) or value.dtype.kind != "U" or value.size != 1:
                return name, "cell"
            texts.append(str(value.ravel()[0]))
            place = element.end
        return name, np.array(texts)
    return name, "complex numbers" if kind in _NUMBERS else _OTHERS.get(kind, "unknown")


def _rows(element: _Element, shape: tuple[int, ...], order: str) -> list[str]:
    """Rows of a matrix of characters."""
    if element.kind == 16:  # UTF-8, whose bytes are not characters
        text = bytes(element.data).decode("utf-8", "replace")
        codes = np.array([ord(letter) for letter in text], np.int64)
    else:
        codes = _numbers(element, order)
    if len(shape) != 2 or len(codes) != shape[0] * shape[1] or codes.dtype.kind == "f":
        raise ValueError(f"{len(codes)} characters for shape {shape}")
    table = codes.reshape(shape, order="F").astype(np.int64) & 0x1FFFFF
    return [_text(row) for row in table]


def _text(codes: np.ndarray) -> str:
    """Characters by their codes; halves of surrogate pairs, which no file can be named by, as ?."""
    return "".join(map(chr, codes.ravel().tolist())).encode("utf-8", "replace").decode()


def _read_hdf5(path: Path) -> Variables:
    """Arrays and cells of texts at the top of an HDF5-based file."""
    try:
        import h5py
    except ModuleNotFoundError:
        raise CohortError(
            f"{path}: expected MATLAB's format 5 to 7.2, found 7.3 (HDF5), which needs h5py: "
            "pip install 'cortexicon[mat73]', or save(..., '-v7') in MATLAB."
        ) from None
    found: dict[str, np.ndarray] = {}
    others: list[str] = []
    with h5py.File(path, "r") as file:
        for name, item in file.items():
            if name.startswith("#"):
                continue  # where MATLAB keeps what cells refer to
            numeric = isinstance(item, h5py.Dataset) and item.dtype.kind in "fiu"
            if numeric and item.size is not None and item.size <= MAX_SAMPLES:
                found[name] = np.asarray(item[()]).T  # HDF5 keeps MATLAB's columns as rows
                continue
            others.append(f"{name} (struct, cell or object)")
            if (
                isinstance(item, h5py.Dataset)
                and h5py.check_ref_dtype(item.dtype) is h5py.Reference
            ):
                texts = [file[reference][()] for reference in item[()].ravel()]
                if all(isinstance(t, np.ndarray) and t.dtype == np.uint16 for t in texts):
                    others.pop()
                    found[name] = np.array([_text(t) for t in texts])
    return Variables(found, others)
