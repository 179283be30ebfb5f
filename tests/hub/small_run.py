"""Writes a finished run in small: what `make demo` leaves behind, untrained, in a second."""

import copy
import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from cortexicon.cohorts import make_split, save_cohort, simulate_cohort
from cortexicon.inference.connectome import cohort_matrices
from cortexicon.inference.exposure import blur_exposed, connectome_latents
from cortexicon.modeling import (
    AVQConfig,
    AVQConnectomeConfig,
    AVQConnectomeModel,
    AVQLMForConditionalGeneration,
    AVQModel,
)
from cortexicon.tokenization import AVQFeatureExtractor, AVQProcessor, AVQTokenizer

SUBJECTS, REGIONS, WINDOW, PATCH, CODES = 60, 48, 40, 20, 8


def write_small_run(folder: Path) -> None:
    torch.manual_seed(0)
    cohort = simulate_cohort(num_subjects=SUBJECTS, num_regions=REGIONS, seed=0)
    save_cohort(cohort, folder / "cohort")
    split = make_split(cohort, "holdout", seed=0)
    split.save(folder / "split.json")
    atlas = {
        "atlas": cohort.atlas,
        "region_labels": list(cohort.labels),
        "region_coordinates": cohort.coordinates.tolist(),
    }
    codec, connectome = _codec(cohort, split, atlas), _connectome(cohort, split, atlas)
    tokenizer, gpt2 = _text()
    for stream in (codec, connectome):
        stream.set_text_space(gpt2.get_input_embeddings().weight, "tiny")
    targets = [{"name": "age", "kind": "number", "question": "Age?", "minimum": 15, "maximum": 85}]
    lm, two = (
        AVQLMForConditionalGeneration.from_avq_and_lm(
            codec, copy.deepcopy(gpt2), tokenizer, more, windows_per_prompt=1, targets=targets
        )
        for more in (None, connectome)
    )
    extractor = AVQFeatureExtractor(window_length=WINDOW, patch_length=PATCH, **atlas)
    tokens = codec.config.tokens_per_window
    for name, model, more in (
        ("avq", codec, None),
        ("lm", lm, None),
        ("two", two, connectome.config.num_tokens),
    ):
        model.eval().save_pretrained(folder / name)
        AVQProcessor(extractor, tokenizer, tokens, more).save_pretrained(folder / name)
    connectome.eval().save_pretrained(folder / "connectome")
    _adapter(lm, folder / "adapter")
    for name in ("avq", "lm", "two", "connectome"):
        _facts(folder, name, cohort, split)
    _results(folder, split)


def _codec(cohort, split, atlas) -> AVQModel:
    codec = AVQModel(
        AVQConfig(
            window_length=WINDOW,
            patch_length=PATCH,
            num_latents=2,
            num_codes=CODES,
            num_connectivity_codes=CODES,
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=2,
            encoder_layers=1,
            decoder_layers=1,
            num_components=6,
            position_features=8,
            code_dim=4,
            text_width=16,
            projection_hidden_size=8,
            classifier_hidden_size=8,
            **atlas,
        )
    )
    codec.start_codebook([{"input_values": torch.randn(16, WINDOW, REGIONS)}], seed=0)
    return codec


def _connectome(cohort, split, atlas) -> AVQConnectomeModel:
    model = AVQConnectomeModel(
        AVQConnectomeConfig(
            num_tokens=4,
            num_codes=CODES,
            num_maps=8,
            num_coordinates=12,
            code_dim=4,
            text_width=16,
            position_features=8,
            projection_hidden_size=8,
            classifier_hidden_size=8,
            **atlas,
        )
    )
    scans = cohort_matrices(cohort, split[0]["train"])
    dealt = model.start_components(scans.matrices, region_mask=scans.region_mask)
    model.start_codebook(dealt, iterations=4, seed=0)
    # Eight codes of 40 people: one of them may well be a single person's.
    blur_exposed(model.quantizer, connectome_latents(model, cohort, split[0]["train"]))
    return model


def _text() -> tuple[AVQTokenizer, GPT2LMHeadModel]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "<|endoftext|>"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    text = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    end = text.eos_token_id
    sizes = {"vocab_size": len(text), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}
    gpt2 = GPT2LMHeadModel(GPT2Config(bos_token_id=end, eos_token_id=end, **sizes))
    return AVQTokenizer.from_text_tokenizer(text, CODES, CODES), gpt2


def _adapter(lm, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    get_peft_model(lm, lora).save_pretrained(folder, save_embedding_layers=False)


def _facts(folder: Path, name: str, cohort, split) -> None:
    facts = {
        "stage": name,
        "command": f"cortexicon train {name} CONFIG",
        "arguments": {
            "cohort": str(folder / "cohort"),
            "split": str(folder / "split.json"),
            "connectome": str(folder / "connectome"),
            "fold": 0,
            "seed": 0,
        },
        "versions": {"torch": torch.__version__},
        "seconds": 1.0,
        "training_scans": len(split[0]["train"]),
        "refused_scans": {split[0]["train"][0]: "too short"},
        "cohort_hash": cohort.content_hash,
        "split_hash": split.hash,
    }
    (folder / name / "run.json").write_text(json.dumps(facts))


def _results(folder: Path, split) -> None:
    tested = split[0]["test"]
    values = dict(zip(tested, np.linspace(0.1, 0.3, len(tested)), strict=True))
    reconstruction = {
        "r2": 0.2,
        "r2_interval": [0.15, 0.25],
        "r2_per_subject": values,
        "num_subjects": len(tested),
        "connectivity": {"full": 0.6, "full_interval": [0.5, 0.7], "training_mean_alone": 0.5},
        "usage": 0.9,
        "gaussian_reference_r2": 0.3,
        "command": "cortexicon evaluate avq cohort --json scores.json",
    }
    plain = {"system": "PCA + k-means", "r2": 0.1, "connectivity": {"full": 0.4}}
    age = {"num_subjects": len(tested), "mae": 9.0, "mae_interval": [8.0, 10.0], "r": None}
    systems = {"AVQ + LLM": age, "cohort median": {**age, "mae": 12.0}}
    results = {
        "reconstruction": reconstruction,
        "tokenizer_baseline": plain,
        "clinical": {"age": {"kind": "number", "parts": {"test": {"systems": systems}}}},
        "environment": {"commit": "0123456789abcdef"},
    }
    (folder / "results.json").write_text(json.dumps(results))
