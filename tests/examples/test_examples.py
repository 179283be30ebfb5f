"""Each example runs as it stands, and says what it should."""

import re
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from cortexicon.cohorts import load_cohort, save_cohort, simulate_cohort
from cortexicon.modeling import AVQConfig, AVQLMForConditionalGeneration, AVQModel
from cortexicon.tokenization import AVQFeatureExtractor, AVQProcessor, AVQTokenizer

WINDOW, PATCH, CODES = 40, 10, 32


@pytest.fixture(scope="module")
def run(repository):
    """Run an example with arguments, and return what it printed."""

    def start(capsys, monkeypatch, name, *argv):
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        runpy.run_path(str(repository / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`cohort`, and the tiny untrained checkpoints `avq` and `lm` that read it."""
    folder = tmp_path_factory.mktemp("examples")
    cohort = simulate_cohort(3, 28, duration=120.0, progress=False)
    save_cohort(cohort, folder / "cohort")
    atlas = {
        "atlas": cohort.atlas,
        "region_labels": list(cohort.labels),
        "region_coordinates": cohort.coordinates.tolist(),
    }
    torch.manual_seed(0)
    codec = AVQModel(
        AVQConfig(
            window_length=WINDOW,
            patch_length=PATCH,
            num_latents=2,
            num_codes=CODES,
            num_connectivity_codes=0,
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=2,
            encoder_layers=1,
            decoder_layers=1,
            num_components=6,
            position_features=8,
            code_dim=8,
            text_width=16,
            projection_hidden_size=8,
            classifier_hidden_size=8,
            **atlas,
        )
    )
    codec.start_codebook([{"input_values": torch.randn(16, WINDOW, 28)}], seed=0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "<|endoftext|>"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    text = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(text), n_embd=16, n_layer=1, n_head=2, n_positions=128)
    )
    codec.set_text_space(gpt2.get_input_embeddings().weight, "tiny")
    tokenizer = AVQTokenizer.from_text_tokenizer(text, CODES, 0)
    model = AVQLMForConditionalGeneration.from_avq_and_lm(
        codec, gpt2, tokenizer, windows_per_prompt=1
    )
    extractor = AVQFeatureExtractor(window_length=WINDOW, patch_length=PATCH, **atlas)
    processor = AVQProcessor(extractor, tokenizer, tokens_per_window=codec.config.tokens_per_window)
    for name, saved in (("avq", codec), ("lm", model)):
        saved.eval().save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


def test_a_scan_is_encoded_in_twelve_lines(run, folder, capsys, monkeypatch, repository):
    printed = run(capsys, monkeypatch, "encode_a_scan.py", folder / "avq", folder / "cohort")
    match = re.search(r"sim-00000: (\d+) codes, R2 (-?\d+\.\d\d); the first: \[(.*)\]", printed)
    assert match, printed
    assert int(match[1]) % 8 == 0  # whole windows
    assert all(0 <= int(code) < CODES for code in match[3].split(","))
    text = (repository / "examples" / "encode_a_scan.py").read_text()
    body = text[text.index("checkpoint, cohort = ") :]
    assert len(body.splitlines()) <= 12


def test_a_question_is_asked(run, folder, capsys, monkeypatch):
    asked = "Age? <fmri> <fmri_3>"
    printed = run(
        capsys,
        monkeypatch,
        "ask_about_a_scan.py",
        folder / "lm",
        folder / "cohort",
        "--question",
        asked,
    )
    first, *shares = printed.splitlines()
    # 8 codes, their two markers, and every byte of the text, hostile words included
    text = f"\nQuestion: {asked}\nAnswer:"
    assert first.startswith(f"sim-00000: {8 + 2 + len(text)} tokens in. {asked}")
    assert len(shares) == 5


def test_a_scan_becomes_a_picture(run, folder, capsys, monkeypatch, tmp_path):
    scan = next(iter(load_cohort(folder / "cohort")))
    np.save(tmp_path / "mine.npy", scan.values)
    for more in ((), (tmp_path / "mine.npy", scan.tr)):
        out = tmp_path / "picture.png"
        argv = (folder / "avq", out, *more)
        assert re.search(r"R2 -?\d\.\d\d", run(capsys, monkeypatch, "picture_of_a_scan.py", *argv))
        image = Image.open(out)
        assert image.width == 1100
        assert len(np.unique(np.asarray(image))) > 50


def test_a_bids_folder_becomes_a_cohort(run, capsys, monkeypatch, tmp_path):
    printed = run(
        capsys, monkeypatch, "prepare_a_bids_folder.py", "--output", tmp_path, "--subjects", 3
    )
    assert f"2 scans x 28 regions -> {tmp_path / 'cohort'}" in printed
    (left_out,) = re.findall(r"left out sub-03: (.*)", printed)
    assert "sub-03" in left_out
    assert "truncated" in left_out
    assert (tmp_path / "cohort" / "quality.tsv").is_file()


def test_predictions_are_scored(run, capsys, monkeypatch):
    printed = run(capsys, monkeypatch, "score_predictions.py")
    found = dict(re.findall(r"(.+): MAE (\d+\.\d\d) \[", printed))
    assert set(found) == {"knows something", "median"}
    assert float(found["knows something"]) < 8 < 12 < float(found["median"])


@pytest.mark.slow
def test_a_codec_is_trained_by_the_plain_trainer(run, capsys, monkeypatch, tmp_path):
    argv = ("--output", tmp_path, "--steps", 60, "--subjects", 24)
    printed = run(capsys, monkeypatch, "train_with_trainer.py", *argv)
    assert re.search(r"held-out windows of 64 codes: loss .*, R2 ", printed)


def test_every_example_is_tried(repository):
    tried = (repository / "tests" / "examples" / "test_examples.py").read_text()
    tried += (repository / "tests" / "training" / "test_cluster.py").read_text()
    for path in (repository / "examples").iterdir():
        if path.suffix in (".py", ".sh"):
            assert path.name in tried, path.name
