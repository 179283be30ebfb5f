"""A tiny codec and a tiny language model of codes, saved as training saves them."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from cortexicon.modeling import AVQConfig, AVQLMForConditionalGeneration, AVQModel
from cortexicon.tokenization import AVQFeatureExtractor, AVQProcessor, AVQTokenizer

REGIONS, WINDOW, PATCH, CODES, LATENTS = 6, 20, 10, 16, 2


@pytest.fixture
def series() -> np.ndarray:
    """Float32 (3 windows and a rest, REGIONS)."""
    noise = np.random.default_rng(0).normal(1000, 10, (3 * WINDOW + 7, REGIONS))
    return noise.astype(np.float32)


@pytest.fixture
def checkpoints(tmp_path):
    """Folders `avq` and `lm` in a new folder, each a whole checkpoint."""
    return make_checkpoints(tmp_path)


@pytest.fixture(scope="module")
def kept_checkpoints(tmp_path_factory):
    """The same, for tests that change nothing in them."""
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def make_checkpoints(folder):
    """Write `avq` and `lm` into a folder, and return it."""
    torch.manual_seed(0)
    labels = [f"R{i}" for i in range(REGIONS)]
    coordinates = np.random.default_rng(1).uniform(-60, 60, (REGIONS, 3)).tolist()
    atlas = {"atlas": "toy", "region_labels": labels, "region_coordinates": coordinates}
    codec = AVQModel(
        AVQConfig(
            window_length=WINDOW,
            patch_length=PATCH,
            num_latents=LATENTS,
            num_codes=CODES,
            num_connectivity_codes=4,
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

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "<|endoftext|>"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    text = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    end = text.eos_token_id
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(text),
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=128,
            bos_token_id=end,
            eos_token_id=end,
        )
    )
    codec.set_text_space(gpt2.get_input_embeddings().weight, "tiny")
    tokenizer = AVQTokenizer.from_text_tokenizer(text, CODES, 4)
    targets = [
        {"name": "age", "kind": "number", "question": "Age?", "minimum": 15, "maximum": 85},
        {"name": "sex", "kind": "class", "question": "Sex?", "classes": ["F", "M"]},
    ]
    model = AVQLMForConditionalGeneration.from_avq_and_lm(
        codec, gpt2, tokenizer, windows_per_prompt=2, targets=targets
    )
    extractor = AVQFeatureExtractor(window_length=WINDOW, patch_length=PATCH, **atlas)
    processor = AVQProcessor(extractor, tokenizer, tokens_per_window=codec.config.tokens_per_window)
    for name, saved in (("avq", codec), ("lm", model)):
        saved.eval().save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder
