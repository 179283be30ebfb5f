"""A checkpoint and a cohort in, files out."""

from .checkpoints import Checkpoint, fit_to_atlas, load_checkpoint
from .codes_file import (
    CodesFile,
    CodesInfo,
    check_codebook,
    describe_codes,
    read_codes,
    write_codes,
)
from .decode import decode_codes
from .encode import (
    ScanCodes,
    ScanReconstruction,
    SkippedScan,
    cohort_windows,
    decode_windows,
    encode_cohort,
    reconstruct_cohort,
)
from .errors import InferenceError

__all__ = [
    "Checkpoint",
    "CodesFile",
    "CodesInfo",
    "InferenceError",
    "ScanCodes",
    "ScanReconstruction",
    "SkippedScan",
    "check_codebook",
    "cohort_windows",
    "decode_codes",
    "decode_windows",
    "describe_codes",
    "encode_cohort",
    "fit_to_atlas",
    "load_checkpoint",
    "read_codes",
    "reconstruct_cohort",
    "write_codes",
]
