"""Base tokenizers made offline, and a Python in which cortexicon cannot be imported."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

from cortexicon.tokenization import AVQFeatureExtractor, AVQProcessor, AVQTokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("CORTEXICON_DATA", REPOSITORY.parent / "shared" / "data"))

SENTENCES = [
    "The thalamus relays signals between the cortex and the rest of the brain.",
    "How old is this person? Answer: 23.4 years.",
    "Question: is the scan of a patient or of a control?\nAnswer: control",
    "Numbers 0 1 2 3 4 5 6 7 8 9 and signs < > / _ | [ ] ( ) % stand in this text.",
]


def small_text_tokenizer(normalizer: object = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens, with one special and one ordinary added control token."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 20, trainer)
    backend.add_tokens(["<tool_call>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def text_tokenizer() -> PreTrainedTokenizerFast:
    return small_text_tokenizer()


@pytest.fixture(scope="session")
def normalizing_text_tokenizer() -> PreTrainedTokenizerFast:
    """Maps look-alike characters such as the full-width "＜" to plain ones before splitting."""
    return small_text_tokenizer(normalizers.NFKC())


@pytest.fixture(scope="session")
def gpt2() -> PreTrainedTokenizerFast:
    folder = DATA / "tokenizer"
    if not folder.is_dir():
        pytest.skip(f"needs the GPT-2 files in {folder} (set CORTEXICON_DATA)")
    return GPT2TokenizerFast(vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"))


@pytest.fixture(scope="session")
def tokenizer(text_tokenizer: PreTrainedTokenizerFast) -> AVQTokenizer:
    return AVQTokenizer.from_text_tokenizer(text_tokenizer, 512, 64)


@pytest.fixture(scope="session")
def coordinates() -> np.ndarray:
    return np.random.default_rng(1).uniform(-60, 60, size=(30, 3)).round(2)


@pytest.fixture
def extractor(coordinates: np.ndarray) -> AVQFeatureExtractor:
    """30 regions, windows of 40 samples at 2 s."""
    return AVQFeatureExtractor(
        window_length=40,
        patch_length=10,
        atlas="test30",
        region_labels=[f"R{region:02d}" for region in range(30)],
        region_coordinates=coordinates,
    )


@pytest.fixture
def processor(extractor: AVQFeatureExtractor, tokenizer: AVQTokenizer) -> AVQProcessor:
    return AVQProcessor(extractor, tokenizer, tokens_per_window=16)


@pytest.fixture
def scan() -> np.ndarray:
    """float32 (130, 30), smooth noise around 1000, TR 2 s: three windows and ten samples."""
    noise = np.random.default_rng(0).normal(size=(133, 30))
    return (1000 + 10 * (noise[:-3] + noise[1:-2] + noise[2:-1] + noise[3:])).astype(np.float32)


@pytest.fixture
def run_without_package(tmp_path_factory: pytest.TempPathFactory):
    """Run code in another folder, in a Python that has transformers but not cortexicon."""
    work = tmp_path_factory.mktemp("elsewhere")
    # NOTE: an editable install puts the package on sys.path by a .pth file, hence the refusal.
    refuse = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'cortexicon':\n"
        "            raise ModuleNotFoundError('cortexicon is not installed here')\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )

    def run(code: str, *arguments: str) -> str:
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
