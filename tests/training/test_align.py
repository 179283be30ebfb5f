"""A codec fitted to other language models, and the table of alignment, through the command line."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from cortexicon.cli import main
from cortexicon.cohorts import load_cohort
from cortexicon.evaluation import probes
from cortexicon.evaluation.alignment import ROWS
from cortexicon.inference import load_checkpoint
from cortexicon.modeling import AVQConfig, AVQLMForConditionalGeneration, AVQModel
from cortexicon.modeling.configuration_avq import ConfigurationError
from cortexicon.training import align
from cortexicon.training.align import AlignArguments, move_to_text_space

TYPES = 300


def tiny_codec(**fields) -> AVQModel:
    """A started codec of 64 codes in a text space of width 24, whose P is not small."""
    torch.manual_seed(0)
    model = AVQModel(
        AVQConfig(
            window_length=20,
            patch_length=10,
            num_latents=3,
            num_codes=64,
            code_dim=6,
            hidden_size=16,
            intermediate_size=24,
            num_attention_heads=2,
            encoder_layers=1,
            decoder_layers=1,
            num_components=6,
            position_features=8,
            text_width=24,
            projection_hidden_size=12,
            classifier_hidden_size=12,
            region_coordinates=np.random.default_rng(3).uniform(-60, 60, (10, 3)).tolist(),
            **fields,
        )
    ).eval()
    model.set_text_space(torch.randn(TYPES, 24), "old")
    batches = [{"input_values": torch.randn(32, 20, 10)}]
    model.start_components(batches)
    model.start_codebook(batches)
    return model


def other_table(width: int) -> torch.Tensor:
    """Correlated rows around a mean that is not zero."""
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(TYPES, width, generator=generator)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    return 0.1 * rows @ mixing + torch.randn(width, generator=generator)


@pytest.mark.parametrize("width", [24, 40])
@pytest.mark.parametrize("layout", ["latent", "grid"])
def test_the_start_decodes_as_before_with_the_moments_of_the_new_text(width, layout):
    codec = tiny_codec(token_layout=layout)
    table, share = other_table(width), torch.full((TYPES,), 1 / TYPES).double()
    counts = torch.from_numpy(np.random.default_rng(0).integers(1, 20, 64))
    moved = move_to_text_space(codec, table, share, counts, "new")
    windows = torch.randn(5, 20, 10)
    with torch.no_grad():
        before, after = codec(windows), moved(windows)
        rows = moved.project_codebook()
    assert torch.equal(before.codes, after.codes)
    torch.testing.assert_close(after.reconstruction, before.reconstruction, atol=2e-4, rtol=1e-3)
    weights = counts / counts.sum()
    mean = weights @ rows
    torch.testing.assert_close(mean, table.mean(0), atol=1e-4, rtol=1e-3)
    covariance = ((rows - mean) * weights[:, None]).T @ (rows - mean)
    found = torch.linalg.eigvalsh(covariance).flip(0)
    wanted = torch.linalg.eigvalsh(torch.cov(table.T, correction=0)).flip(0)
    rank = int((found > 1e-5 * found[0]).sum())
    assert rank > 12  # the six linear directions and most of what the small MLP adds
    torch.testing.assert_close(found[:rank], wanted[:rank], atol=1e-6, rtol=1e-2)
    assert moved.config.text_model_id == "new"
    assert moved.codebook_fingerprint() != codec.codebook_fingerprint()
    assert codec.config.text_width == 24  # the codec that was given is as it was


def test_a_narrow_text_space_keeps_what_the_decoder_hears_most():
    codec = tiny_codec()
    table, share = other_table(3), torch.full((TYPES,), 1 / TYPES).double()
    moved = move_to_text_space(codec, table, share, torch.ones(64), "new")
    with torch.no_grad():
        heard, hears = (
            model.read_code(
                model.text_moments(model.projection.standardize(model.project_codebook()))
            )
            for model in (codec, moved)
        )
    lost = (hears - heard).square().sum() / (heard - heard.mean(0)).square().sum()
    # Three of five directions; those that are kept are the three largest that there are.
    largest = torch.linalg.svdvals((heard - heard.mean(0)).double()).square()
    assert float(lost) == pytest.approx(float(largest[3:].sum() / largest.sum()), rel=1e-3)
    assert lost < 0.5


@pytest.fixture(scope="module")
def language_model(run, tmp_path_factory):
    """Folder of a GPT-2 of width 48 with the run's tokenizer; without counts of its tokens."""
    folder = tmp_path_factory.mktemp("other") / "lm"
    tokenizer = AutoTokenizer.from_pretrained(run / "text")
    torch.manual_seed(3)
    end = tokenizer.eos_token_id
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer) + 5,  # padded, as tables often are
            n_embd=48,
            n_layer=1,
            n_head=2,
            n_positions=64,
            bos_token_id=end,
            eos_token_id=end,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def command(run, language_model, out, *options):
    return [
        "align",
        str(run / "avq"),
        str(language_model),
        *("--cohort", str(run / "cohort"), "--split", str(run / "split.json")),
        *("--out", str(out), "--cpu", *options),
    ]


@pytest.fixture(scope="module")
def aligned(run, language_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("aligned") / "avq"
    assert main(command(run, language_model, out, "--max-steps", "12")) == 0
    return out


def test_codes_stay_and_only_the_text_space_changes(run, language_model, aligned):
    before, after = load_checkpoint(run / "avq"), load_checkpoint(aligned)
    weights, new = before.codec.state_dict(), after.codec.state_dict()
    for name, value in weights.items():
        if not name.startswith(align.NEW_PARTS):
            assert torch.equal(value, new[name]), name
    cohort = load_cohort(run / "cohort")
    windows = torch.from_numpy(
        before.processor.feature_extractor(
            cohort.series(cohort.subject_ids[0]).values,
            tr=cohort.series(cohort.subject_ids[0]).tr,
            region_labels=cohort.labels,
            region_coordinates=cohort.coordinates,
            atlas=cohort.atlas,
            return_tensors="np",
        )["input_values"]
    )
    with torch.no_grad():
        codes = [checkpoint.codec.encode(windows).codes for checkpoint in (before, after)]
    assert torch.equal(*codes)
    assert after.codec.codebook_fingerprint() != before.codec.codebook_fingerprint()
    assert after.codec.config.text_width == 48
    facts = json.loads((aligned / "run.json").read_text())
    assert facts["codebook"] == before.codec.codebook_fingerprint()
    assert facts["r2_at_start"] == pytest.approx(facts["r2_before"], abs=1e-3)
    assert facts["eval_r2"] == pytest.approx(facts["r2_before"], abs=0.02)
    assert not (aligned / "state").exists()
    counts = load_file(aligned / "token_counts.safetensors")["counts"]
    assert len(counts) == AutoTokenizer.from_pretrained(language_model).vocab_size + 5
    assert counts.sum() > 10_000
    # P did learn: what is saved is no longer the start.
    log = [json.loads(line) for line in (aligned / "training_log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["domain_loss"]) for line in log if "domain_loss" in line)


def test_the_new_language_model_takes_the_codec_and_the_old_one_is_refused(
    run, language_model, aligned
):
    checkpoint = load_checkpoint(aligned)
    join = AVQLMForConditionalGeneration.from_avq_and_lm
    joined = join(
        checkpoint.codec,
        GPT2LMHeadModel.from_pretrained(language_model),
        checkpoint.processor.tokenizer,
    )
    rows = joined.get_input_embeddings().weight[joined.config.fmri_offset :][:32]
    assert torch.equal(rows, checkpoint.codec.project_codebook())
    with pytest.raises(
        ConfigurationError, match="embeddings are 32 wide, the codec projects to 48"
    ):
        join(
            checkpoint.codec,
            GPT2LMHeadModel.from_pretrained(run / "text"),
            checkpoint.processor.tokenizer,
        )


def test_a_stopped_run_ends_as_an_uninterrupted_one(run, language_model, aligned, tmp_path):
    arguments = {
        "output": str(tmp_path / "avq"),
        "checkpoint": str(run / "avq"),
        "language_model": str(language_model),
        "cohort": str(run / "cohort"),
        "split": str(run / "split.json"),
        "max_steps": 12,
        "save_steps": 5,
        "cpu": True,
    }

    class Stopped(Exception):
        pass

    def stopped(log, step, **values):
        if "domain_loss" in values:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align.TrainingLog, "write", stopped)
        with pytest.raises(Stopped):
            align.align(AlignArguments(**arguments))
    assert (tmp_path / "avq" / "state").is_dir()
    assert align.align(AlignArguments(**arguments, resume=True)) == 0
    weights = load_file(tmp_path / "avq" / "model.safetensors")
    expected = load_file(aligned / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


def test_a_language_model_is_no_codec(run, language_model, tmp_path, capsys):
    argv = command(run, language_model, tmp_path / "out")
    argv[1] = str(run / "lm")
    assert main(argv) == 2
    assert "expected a codec (model_type 'avq'), found 'avq_lm'" in capsys.readouterr().err


def test_counts_of_another_table_are_refused(run, language_model, tmp_path, capsys):
    folder = tmp_path / "lm"
    shutil.copytree(language_model, folder)
    save_file({"counts": torch.ones(7, dtype=torch.int64)}, folder / "token_counts.safetensors")
    assert main(command(run, folder, tmp_path / "out")) == 2
    assert "token_counts.safetensors holds 7 tokens" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.fixture
def short_probes(monkeypatch):
    """Probes that hardly train: what they find is tests/evaluation's matter."""
    monkeypatch.setattr(probes, "STEPS", 20)
    monkeypatch.setattr(probes, "ITERATIONS", 2)


def test_the_table_of_alignment(run, tmp_path, capsys, short_probes):
    out = tmp_path / "alignment.json"
    argv = ["alignment", str(run / "avq"), str(run / "text"), str(run / "cohort")]
    argv += ["--split", str(run / "split.json"), "--json", str(out), "--off", str(run / "avq")]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    table = json.loads(out.read_text())
    assert list(table["rows"]) == [name for name in ROWS if name != "not_reversed"]
    for name, row in table["rows"].items():
        assert f"| {ROWS[name]} | {row['logistic']['accuracy']:.3f}" in printed
    # The same checkpoint twice: nothing of the gap is closed.
    assert table["rows"]["codes"] == table["rows"]["adversary_off"]
    assert set(table["gap_closed"].values()) <= {0.0, None}
    assert "Of the gap between (d) and (a), closed:" in printed
    assert 0 <= table["rows"]["codes"]["classifier_accuracy"] <= 1
    assert "classifier_accuracy" not in table["rows"]["copied"]
    assert table["rows"]["copied"]["geometry"]["neighbour_overlap"] < 0.7
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_the_table_after_another_language_model_and_with_a_wrong_one(
    run, language_model, aligned, tmp_path, capsys, short_probes
):
    options = [str(run / "cohort"), "--split", str(run / "split.json")]
    options += ["--json", str(tmp_path / "alignment.json")]
    assert main(["alignment", str(aligned), str(run / "text"), *options]) == 2
    assert "was aligned with the embedding table of" in capsys.readouterr().err
    assert main(["alignment", str(run / "avq"), str(language_model), *options]) == 2
    assert "found neither" in capsys.readouterr().err
    assert not (tmp_path / "alignment.json").exists()
    # Its counts stand beside the aligned checkpoint.
    assert main(["alignment", str(aligned), str(language_model), *options]) == 0
    assert "gap_closed" not in json.loads((tmp_path / "alignment.json").read_text())
