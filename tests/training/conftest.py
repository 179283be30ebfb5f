"""One whole run in small: a simulated cohort, its split, text model, codec and language model."""

from pathlib import Path

import pytest
import yaml

from cortexicon.cohorts import make_split, save_cohort, simulate_cohort
from cortexicon.training import avq, connectome, lm, text

TARGETS = [
    {"name": "age", "kind": "number", "minimum": 15, "maximum": 85, "question": "Age?"},
    {"name": "sex", "kind": "class", "question": "Sex?"},
]


def write_yaml(path: Path, values: dict) -> str:
    """The path of a configuration file that holds `values`, as `main` takes it."""
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def text_values(folder: Path) -> dict:
    """A tokenizer as large as the demo's, in which every number is one token, and a tiny GPT-2."""
    return {
        "output": str(folder / "text"),
        "vocab_size": 4096,
        "sentences": 6000,
        "model": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_inner": 32, "n_positions": 128},
        "max_steps": 10,
        "batch_size": 2,
        "sequence_length": 32,
        "log_steps": 5,
        "cpu": True,
    }


def avq_values(folder: Path) -> dict:
    """A codec of a few thousand parameters; the codebook starts at step 6 of 12."""
    return {
        "output": str(folder / "avq"),
        "cohort": str(folder / "cohort"),
        "split": str(folder / "split.json"),
        "text_model": str(folder / "text"),
        "model": {
            "sampling_interval": 2.0,
            "window_length": 40,
            "patch_length": 10,
            "num_latents": 2,
            "num_codes": 32,
            "num_connectivity_codes": 8,
            "code_dim": 8,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "num_components": 6,
            "position_features": 16,
            "projection_hidden_size": 16,
            "classifier_hidden_size": 16,
            "spectrum_weight": 0.1,
            "connectivity_weight": 0.1,
        },
        "max_steps": 12,
        "batch_size": 8,
        "warmup_steps": 2,
        "codebook_start": 0.5,
        "codebook_batches": 4,
        "text_batch_size": 64,
        "log_steps": 2,
        "eval_steps": 5,
        "save_steps": 4,
        "cpu": True,
    }


def lm_values(folder: Path) -> dict:
    """Few steps on prompts of two windows."""
    return {
        "output": str(folder / "lm"),
        "cohort": str(folder / "cohort"),
        "split": str(folder / "split.json"),
        "avq": str(folder / "avq"),
        "text_model": str(folder / "text"),
        "targets": TARGETS,
        "windows_per_prompt": 2,
        "max_steps": 10,
        "batch_size": 4,
        "warmup_steps": 2,
        "log_steps": 2,
        "eval_steps": 5,
        "save_steps": 4,
        "cpu": True,
    }


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """Folder with cohort/, split.json, text/, avq/ and lm/, made by the three scripts."""
    folder = tmp_path_factory.mktemp("run")
    cohort = simulate_cohort(24, num_regions=28, duration=240.0, progress=False)
    save_cohort(cohort, folder / "cohort")
    make_split(cohort, "holdout", validation_fraction=0.25).save(folder / "split.json")
    for script, name, values in (
        (text, "text", text_values(folder)),
        (avq, "avq", avq_values(folder)),
        (lm, "lm", lm_values(folder)),
    ):
        assert script.main([write_yaml(folder / f"{name}.yaml", values)]) == 0
    return folder


def connectome_values(folder: Path) -> dict:
    """A connectivity stream of four tokens in the text space of the tiny GPT-2."""
    return {
        "stream": "connectivity",
        "output": str(folder / "connectome"),
        "cohort": str(folder / "cohort"),
        "split": str(folder / "split.json"),
        "text_model": str(folder / "text"),
        "model": {
            "num_tokens": 4,
            "num_codes": 16,
            "code_dim": 4,
            "num_maps": 28,
            "num_coordinates": 100,
            "position_features": 64,
            "projection_hidden_size": 8,
            "classifier_hidden_size": 8,
        },
        "kmeans_iterations": 3,
        "kmeans_draws": 400,
        "cpu": True,
    }


@pytest.fixture(scope="session")
def two_stream_run(run: Path) -> Path:
    """`run` with connectome/ beside it, and lm2/, which reads both streams."""
    values = connectome_values(run)
    assert connectome.main([write_yaml(run / "connectome.yaml", values)]) == 0
    values = {**lm_values(run), "output": str(run / "lm2"), "connectome": str(run / "connectome")}
    assert lm.main([write_yaml(run / "lm2.yaml", values)]) == 0
    return run
