"""A tiny codec with a started codebook, and a cohort with one scan that is too short."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from cortexicon.cohorts import ParcelSeries, cohort_from_series
from cortexicon.modeling import AVQConfig, AVQModel
from cortexicon.tokenization import AVQFeatureExtractor, AVQProcessor, AVQTokenizer

REGIONS = 12
WINDOW = 40


def make_codec(seed: int, **changes) -> AVQModel:
    torch.manual_seed(seed)
    model = AVQModel(
        AVQConfig(
            window_length=WINDOW,
            patch_length=20,
            num_latents=4,
            num_codes=32,
            num_connectivity_codes=0,
            hidden_size=32,
            intermediate_size=32,
            num_attention_heads=2,
            encoder_layers=1,
            decoder_layers=1,
            text_width=16,
            atlas="toy",
            **changes,
        )
    ).eval()
    # Start the codebook on what the encoder makes of noise: different scans get different codes.
    latents = []
    hook = model.quantizer.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[0]))
    with torch.no_grad():
        model(torch.randn(16, WINDOW, REGIONS), torch.rand(1, REGIONS, 3) * 120 - 60)
    hook.remove()
    model.quantizer.start(latents[0].flatten(0, 1), seed=seed)
    return model


@pytest.fixture(scope="session")
def cohort():
    """Seven scans of 12 regions: TR 2 s or 1.5 s, one of them shorter than a window."""
    generator = np.random.default_rng(0)
    coordinates = generator.uniform(-60, 60, (REGIONS, 3)).astype(np.float32)
    lengths = {"a": 100, "b": 85, "c": 130, "short": 30, "d": 45, "e": 90, "f": 81}
    return cohort_from_series(
        ParcelSeries(
            generator.normal(100, 5, (length, REGIONS)).astype(np.float32),
            [f"region {i}" for i in range(REGIONS)],
            coordinates,
            "toy",
            1.5 if name == "c" else 2.0,
            name,
            "1",
            "here",
        )
        for name, length in lengths.items()
    )


@pytest.fixture
def codec():
    return make_codec(0)


@pytest.fixture
def other_codec():
    return make_codec(1)


@pytest.fixture(scope="session")
def feature_extractor(cohort):
    return AVQFeatureExtractor(
        window_length=WINDOW,
        patch_length=20,
        atlas="toy",
        region_labels=cohort.labels,
        region_coordinates=cohort.coordinates,
    )


def save_checkpoint(codec, feature_extractor, folder):
    """Save the codec and its processor as training saves them."""
    words = {word: number for number, word in enumerate(["[UNK]", "[EOS]", "age", "?"])}
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    text = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]", pad_token="[EOS]"
    )
    tokenizer = AVQTokenizer.from_text_tokenizer(text, num_codes=32)
    codec.save_pretrained(folder)
    AVQProcessor(feature_extractor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint_folder(codec, feature_extractor, tmp_path):
    """Folder of the codec and its processor."""
    return save_checkpoint(codec, feature_extractor, tmp_path / "checkpoint")
