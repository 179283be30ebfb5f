"""Tiny codecs with a started codebook, a tiny GPT-2, and a Python without cortexicon."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from cortexicon.modeling import (
    AVQConfig,
    AVQConnectomeConfig,
    AVQConnectomeModel,
    AVQLMForConditionalGeneration,
    AVQModel,
)
from cortexicon.tokenization import AVQFeatureExtractor, AVQProcessor, AVQTokenizer

REGIONS, WINDOW, PATCH, CODES, TEXT_WIDTH = 10, 20, 10, 32, 24
COORDINATES = np.random.default_rng(3).uniform(-60, 60, (REGIONS, 3)).round(1).tolist()
SIZES = {
    "window_length": WINDOW,
    "patch_length": PATCH,
    "num_latents": 3,
    "num_codes": CODES,
    "num_connectivity_codes": 8,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_components": 6,
    "position_features": 8,
    "code_dim": 6,
    "text_width": TEXT_WIDTH,
    "projection_hidden_size": 12,
    "classifier_hidden_size": 12,
    "atlas": "toy",
    "region_labels": [f"R{i}" for i in range(REGIONS)],
    "region_coordinates": COORDINATES,
}


@pytest.fixture
def sizes() -> dict:
    """Fields of a tiny, valid configuration; a copy to change."""
    return dict(SIZES)


@pytest.fixture
def make_codec():
    """`make_codec(start=True, **fields)`: a tiny codec in evaluation mode."""

    def make(start: bool = True, seed: int = 0, **fields: object) -> AVQModel:
        torch.manual_seed(seed)
        model = AVQModel(AVQConfig(**{**SIZES, **fields})).eval()
        if start:
            batches = [{"input_values": torch.randn(16, WINDOW, REGIONS)}]
            model.start_components(batches)
            model.start_codebook(batches, seed=seed)
        return model

    return make


@pytest.fixture(params=[("latent", 1), ("grid", 1), ("grid", 4)], ids=str)
def codec(request: pytest.FixtureRequest, make_codec) -> AVQModel:
    """A started codec of either token layout, and one whose codebook has branches."""
    layout, branches = request.param
    return make_codec(token_layout=layout, code_branches=branches)


@pytest.fixture
def windows() -> torch.Tensor:
    """Float32 (9, WINDOW, REGIONS), unit variance."""
    return torch.randn(9, WINDOW, REGIONS, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def text_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["Question: how old is this person?\nAnswer: 23"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def tokenizer(text_tokenizer: PreTrainedTokenizerFast) -> AVQTokenizer:
    return AVQTokenizer.from_text_tokenizer(text_tokenizer, CODES, SIZES["num_connectivity_codes"])


@pytest.fixture
def make_lm(text_tokenizer: PreTrainedTokenizerFast):
    """`make_lm(**fields)`: a tiny GPT-2 over the text vocabulary alone."""

    def make(**fields: object) -> GPT2LMHeadModel:
        torch.manual_seed(1)
        values = {"n_embd": TEXT_WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 128, **fields}
        end = text_tokenizer.eos_token_id
        config = GPT2Config(
            vocab_size=len(text_tokenizer),
            bos_token_id=end,
            eos_token_id=end,
            # Sharp enough that greedy generation is not a tie between near-equal logits.
            initializer_range=0.3,
            **values,
        )
        return GPT2LMHeadModel(config).eval()

    return make


@pytest.fixture
def make_connectome():
    """`make_connectome(table)`: a tiny connectivity stream, started, in the text space of `table`.

    Three tokens a scan, as many codes as the tokenizer holds.
    """

    def make(table: torch.Tensor | None = None, **fields: object) -> AVQConnectomeModel:
        torch.manual_seed(2)
        values = {
            "num_tokens": 3,
            "num_codes": SIZES["num_connectivity_codes"],
            "code_dim": 4,
            "num_maps": REGIONS,
            "num_coordinates": 40,
            "num_pattern_coordinates": 1,
            "position_features": 64,
            "position_wavelength": 60.0,
            "text_width": TEXT_WIDTH,
            "projection_hidden_size": 8,
            "classifier_hidden_size": 8,
            "atlas": "toy",
            "region_labels": SIZES["region_labels"],
            "region_coordinates": COORDINATES,
        }
        model = AVQConnectomeModel(AVQConnectomeConfig(**{**values, **fields})).eval()
        if table is not None:
            model.set_text_space(table, "tiny")
        people = torch.randn(60, REGIONS, REGIONS, generator=torch.Generator().manual_seed(3))
        people = 0.2 * (people + people.transpose(1, 2))
        dealt = model.start_components(people, patterns=people[:1], shrinkage=0.1)
        model.start_codebook(dealt, iterations=4, draws=400)
        return model

    return make


@pytest.fixture
def make_avq_lm(make_codec, make_connectome, make_lm, tokenizer: AVQTokenizer):
    """`make_avq_lm(**fields of AVQLMConfig)`: codec and GPT-2 joined, in evaluation mode.

    With `streams=2` the connectivity stream beside the dynamics.
    """

    def make(tie: bool = True, streams: int = 1, **fields: object) -> AVQLMForConditionalGeneration:
        lm, avq = make_lm(tie_word_embeddings=tie), make_codec()
        table = lm.get_input_embeddings().weight
        avq.set_text_space(table, "tiny")
        connectome = make_connectome(table) if streams == 2 else None
        join = AVQLMForConditionalGeneration.from_avq_and_lm
        return join(avq, lm, tokenizer, connectome, **fields).eval()

    return make


@pytest.fixture
def processor(tokenizer: AVQTokenizer) -> AVQProcessor:
    extractor = AVQFeatureExtractor(
        window_length=WINDOW,
        patch_length=PATCH,
        atlas="toy",
        region_labels=SIZES["region_labels"],
        region_coordinates=COORDINATES,
    )
    return AVQProcessor(extractor, tokenizer, tokens_per_window=WINDOW // PATCH * 3)


@pytest.fixture
def two_streams(processor: AVQProcessor) -> AVQProcessor:
    """A processor whose prompts hold windows and connectivity."""
    return AVQProcessor(
        processor.feature_extractor,
        processor.tokenizer,
        tokens_per_window=processor.tokens_per_window,
        connectivity_tokens=3,
    )


@pytest.fixture
def scan() -> np.ndarray:
    """Float32 (2 windows, REGIONS) of noise around 1000."""
    noise = np.random.default_rng(5).normal(1000, 10, (2 * WINDOW, REGIONS))
    return noise.astype(np.float32)


@pytest.fixture
def run_without_package(tmp_path_factory: pytest.TempPathFactory):
    """Run code in another folder, in a Python that has transformers but not cortexicon."""
    work = tmp_path_factory.mktemp("elsewhere")
    # NOTE: an editable install is found through a hook of its own, hence the refusal.
    refuse = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'cortexicon':\n"
        "            raise ModuleNotFoundError('cortexicon is not installed here')\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )

    def run(code: str, *arguments: object) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {
            "HF_HOME": str(work / "hf"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-P", "-c", refuse + code, *map(str, arguments)],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
