"""One cell of an ablation in a process of its own: train the codec, then score it.

`python -m cortexicon.training.ablation_cell CONFIG.yaml SCORES.json [--probe]` goes on where an
earlier call was killed. A run that diverges, or is refused, ends with a record of it: a failure is
a result. A full disk or a kill is none.
"""

import itertools
import json
import re
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cortexicon.cohorts import Cohort, load_split
from cortexicon.evaluation import EvaluationError, ReconstructionScores, write_json
from cortexicon.evaluation.code_geometry import geometry
from cortexicon.evaluation.probes import probe_alignment
from cortexicon.evaluation.scores import code_usage, squared_error_sums
from cortexicon.inference import (
    Checkpoint,
    ScanReconstruction,
    load_checkpoint,
    reconstruct_cohort,
)
from cortexicon.modeling import AVQModel

from . import avq
from .arguments import TrainingError, load_arguments
from .callbacks import check_resumable
from .collators import load_fold

MAX_TRAINING_SCANS = 300
LAST_LINES = 3
NATIVE = "native"
SUMMARY = (
    "r2", "r2_interval", "num_subjects", "num_windows", "connectivity", "codebook",
    "spectrum_error_db", "power_kept", "tokens_per_window", "bits_per_second",
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Train and score; `argv` is CONFIG SCORES [--probe]."""
    arguments = load_arguments(avq.AVQArguments, argv[:1])
    folder = Path(arguments.output)
    record = train(argv[0], arguments)
    if record["status"] == "finished":
        record |= score(arguments, folder, probe="--probe" in argv[2:])
    write_json(argv[1], record)
    return 0


# ------------------------------------------------------------------ training


def train(config: str, arguments: avq.AVQArguments) -> dict[str, Any]:
    """Train, or go on, or nothing where the run has ended; what the run cost, or why it failed."""
    folder = Path(arguments.output)
    if not has_ended(folder):
        resume = can_resume(folder, arguments)
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            code = avq.main([config, *(["resume=true"] if resume else [])])
        except OSError:
            raise
        except Exception as error:
            return {
                "status": "failed",
                "error": f"{type(error).__name__}: {publishable(str(error), arguments.split)}",
                "last_log_lines": log_lines(folder)[-LAST_LINES:],
            }
        if code:  # stopped by a signal, with its state saved
            sys.exit(code)
        write_json(folder / "peak_memory.json", {"mb": peak_memory_mb()})
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    lines = [line for line in log_lines(folder) if "loss" in line]
    paces = [
        (b["seconds"] - a["seconds"]) / (b["step"] - a["step"])
        for a, b in itertools.pairwise(lines)
    ]
    return {
        "status": "finished",
        "training": {
            "seconds": round(facts["seconds"], 1),
            # The median passes over evaluations, saving and the start of the codebook.
            "seconds_per_step": round(statistics.median(paces), 5) if paces else None,
            "steps": arguments.max_steps,
            "peak_memory_mb": read_peak(folder),
            "parameters": facts["parameters"],
            "scans": facts["training_scans"],
            "threads": facts["threads"],
            "versions": {name: facts["versions"][name] for name in ("torch", "transformers")},
            "last_log_line": lines[-1] if lines else None,
        },
    }


def has_ended(folder: Path) -> bool:
    """Whether the run wrote its last facts; its checkpoint was complete by then."""
    path = folder / "run.json"
    return path.is_file() and "eval_r2" in json.loads(path.read_text(encoding="utf-8"))


def can_resume(folder: Path, arguments: avq.AVQArguments) -> bool:
    """Whether there is a state of a run under these very arguments."""
    if not any(folder.glob("state*")):
        return False
    try:
        check_resumable(folder, arguments)
    except TrainingError:  # the stage has got other arguments since the run began
        return False
    return True


def log_lines(folder: Path) -> list[dict[str, Any]]:
    """Lines of the run's log."""
    path = folder / "training_log.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def publishable(text: str, split: str) -> str:
    """`text` without folders of this machine, and without the names of the split's subjects."""
    text = re.sub(r"(?<![\w.~-])/(?:[^\s/:,'\"]+/)+", "", text)
    people = {person for fold in load_split(split) for part in fold.values() for person in part}
    named = "|".join(re.escape(person) for person in sorted(people, key=len, reverse=True))
    return re.sub(rf"(?<!\w)(?:{named})(?!\w)", "SUBJECT", text)


def read_peak(folder: Path) -> float | None:
    """What `train` noted of the run's memory; None where it was killed just before."""
    path = folder / "peak_memory.json"
    return json.loads(path.read_text(encoding="utf-8"))["mb"] if path.is_file() else None


def peak_memory_mb() -> float:
    """Largest resident size of this process so far in MB, loading of the cohort included."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent held before it started us
        kilobytes = re.search(r"VmHWM:\s+(\d+)", status.read_text())
        if kilobytes:
            return round(int(kilobytes[1]) / 1024, 1)
    import resource  # absent on Windows

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(largest / (1024**2 if sys.platform == "darwin" else 1024), 1)


# ------------------------------------------------------------------ scores


def score(arguments: avq.AVQArguments, folder: Path, probe: bool) -> dict[str, Any]:
    """Scores on validation scans, which choose, and on test scans, which must not.

    R2 of both is that of the scans acquired at the codec's own interval, where there are any; all
    validation scans are under `r2_all`. Nothing of single persons is kept.
    """
    checkpoint = load_checkpoint(folder)
    config = checkpoint.codec.config
    cohort, _, parts = load_fold(arguments)
    validation, test = (
        ReconstructionScores(
            config.num_codes,
            config.window_length * config.sampling_interval,
            config.tokens_per_window,
        )
        for _ in range(2)
    )
    training = parts["train"][:: -(-len(parts["train"]) // MAX_TRAINING_SCANS)]
    counts = np.zeros(config.num_codes, dtype=np.int64)
    sse = sst = 0.0
    for scan in scans_of(checkpoint, cohort, training):
        validation.add_training(scan)
        errors, totals = squared_error_sums(scan.raw, scan.reconstruction, scan.region_mask)
        sse, sst = sse + np.nansum(errors), sst + np.nansum(totals)
        counts += np.bincount(scan.codes.ravel(), minlength=config.num_codes)
    test.training_raw, test.training_decoded = validation.training_raw, validation.training_decoded
    test.num_training = validation.num_training
    for scan in scans_of(checkpoint, cohort, parts["validation"]):
        validation.add(scan)
    native = at_interval(cohort, config.sampling_interval)
    test_scans = [s for s in parts["test"] if s in native] or parts["test"]
    for scan in scans_of(checkpoint, cohort, test_scans):
        test.add(scan)

    chosen_by = validation.results(groups=dict.fromkeys(native, NATIVE))
    record = {
        "validation": {
            **{key: chosen_by[key] for key in SUMMARY},
            "r2_all": chosen_by["r2"],  # of `num_subjects_all`, as all but R2 is
            "num_subjects_all": chosen_by["num_subjects"],
            **chosen_by.get("r2_by_group", {}).get(NATIVE, {}),
        },
        "test": {key: value for key, value in test.results().items() if key in SUMMARY},
        "training_r2": float(1 - sse / sst),
        "training_codebook": code_usage(counts),
    }
    if probe:
        record["alignment"] = alignment(checkpoint.codec, counts, Path(arguments.text_model))
    return record


def scans_of(
    checkpoint: Checkpoint, cohort: Cohort, subjects: Sequence[str]
) -> Iterator[ScanReconstruction]:
    """Scans with their reconstructions."""
    return reconstruct_cohort(
        checkpoint.codec, checkpoint.processor.feature_extractor, cohort, list(subjects)
    )


def at_interval(cohort: Cohort, interval: float) -> set[str]:
    """Subjects whose scans were acquired at the codec's own interval: nothing is resampled."""
    same = cohort.participants["tr"].sub(interval).abs() < 1e-6
    return {str(subject) for subject in same.index[same]}


@torch.no_grad()
def alignment(codec: AVQModel, counts: np.ndarray, text_model: Path) -> dict[str, Any]:
    """Fresh probes and geometry of P(codes), weighed by how often training scans use each code."""
    table = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32)
    text_counts = load_file(text_model / "token_counts.safetensors")["counts"]
    rows = codec.project_codebook()
    try:
        found = probe_alignment(rows, counts, table.get_input_embeddings().weight, text_counts)
        kept = geometry(codec.quantizer.codebook, rows, counts)
    except EvaluationError as error:  # a collapsed codebook leaves too few codes to probe
        return {"error": str(error)}
    return {"probes": found, "geometry": kept}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
