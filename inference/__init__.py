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
from .connectome import (
    CohortMatrices,
    cohort_matrices,
    decode_connectomes,
    decode_matrices,
    encode_connectomes,
    encode_matrices,
    load_connectome,
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
    "CohortMatrices",
    "InferenceError",
    "ScanCodes",
    "ScanReconstruction",
    "SkippedScan",
    "check_codebook",
    "cohort_matrices",
    "cohort_windows",
    "decode_codes",
    "decode_connectomes",
    "decode_matrices",
    "decode_windows",
    "describe_codes",
    "encode_cohort",
    "encode_connectomes",
    "encode_matrices",
    "fit_to_atlas",
    "load_checkpoint",
    "load_connectome",
    "read_codes",
    "reconstruct_cohort",
    "write_codes",
]
