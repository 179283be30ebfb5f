"""What the Space lets in: kinds and sizes of files, length and characters of a question."""

import unicodedata
import zipfile
from pathlib import Path

import numpy as np

#: Endings that the Space reads; .mat is left to the command line.
ENDINGS = (".nii.gz", ".nii", ".tsv", ".csv", ".1d", ".npy", ".npz")
#: Bytes on disk, and bytes in memory that a header promises.
MAX_FILE_BYTES, MAX_TABLE_BYTES, MAX_MEMORY_BYTES = 512 * 2**20, 64 * 2**20, 2 * 2**30
#: Volumes x regions that are encoded and drawn.
MAX_NUMBERS = 4_000_000
MAX_QUESTION = 200


class SpaceError(ValueError):
    """Something a visitor can mend; the text says what."""


def check_file(path: Path, what: str) -> str:
    """The ending of an upload that may be read; `what` names it in messages.

    Raises
    ------
    SpaceError
        Not there, of another kind, empty, too large, or a small file that would become a huge one.
    """
    name = path.name.lower()
    ending = next((end for end in ENDINGS if name.endswith(end)), None)
    if ending is None:
        raise SpaceError(
            f"{what}: expected one of {', '.join(ENDINGS)}, found another kind of file."
        )
    if not path.is_file():
        raise SpaceError(f"{what} is not there. Upload it again.")
    size = path.stat().st_size
    if size == 0:
        raise SpaceError(f"{what} is empty. Upload it again.")
    most = MAX_FILE_BYTES if ending.startswith(".nii") else MAX_TABLE_BYTES
    if size > most:
        raise SpaceError(
            f"{what}: expected at most {most / 2**20:.0f} MB, found {size / 2**20:.0f} MB. "
            "Use `cortexicon encode` on your own machine."
        )
    inside = _bytes_inside(path, ending, what)
    if inside > MAX_MEMORY_BYTES:
        raise SpaceError(
            f"{what} would take {inside / 2**30:.1f} GB of memory, expected at most "
            f"{MAX_MEMORY_BYTES / 2**30:.0f}. Use `cortexicon encode` on your own machine."
        )
    if ending == ".1d":
        return ".1D"
    if ending == ".nii" and name.endswith((".ptseries.nii", ".dtseries.nii")):
        return name[-len(".ptseries.nii") :]
    return ending


def _bytes_inside(path: Path, ending: str, what: str) -> int:
    """Bytes in memory that the file's own header promises; reads nothing else of it."""
    try:
        if ending.startswith(".nii"):
            import nibabel

            shape = nibabel.load(path).shape
            return int(np.prod([float(length) for length in shape])) * 4
        if ending == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            return int(array.nbytes)
        if ending == ".npz":
            with zipfile.ZipFile(path) as archive:
                return sum(member.file_size for member in archive.infolist())
    # NOTE: the readers of damaged files raise errors of every type; `read_scan` names the damage.
    except Exception:
        raise SpaceError(
            f"{what} is damaged, or is no {ending} file. Export or upload it again."
        ) from None
    return path.stat().st_size


def check_question(question: str) -> str:
    """The question on one line, or a `SpaceError` for what is no question.

    Markers and code tokens in it stay plain text: the tokenizer never reads them as ids.
    """
    if not isinstance(question, str):
        raise SpaceError("expected a question in words.")
    question = " ".join(question.split())
    if not question:
        raise SpaceError("Type a question first.")
    if len(question) > MAX_QUESTION:
        raise SpaceError(
            f"expected a question of at most {MAX_QUESTION} characters, found {len(question)}."
        )
    # Cc: control, Cf: invisible formatting, Cs: lone halves of characters.
    if any(unicodedata.category(character) in ("Cc", "Cf", "Cs") for character in question):
        raise SpaceError("The question holds invisible control characters. Type it again.")
    return question
