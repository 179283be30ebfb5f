"""The three scripts one after the other, and what they leave behind."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from cortexicon.cohorts import load_cohort, load_split
from cortexicon.inference.predict import predict_cohort
from cortexicon.modeling import AVQLMForConditionalGeneration, AVQModel

LOAD = """
import json, sys
import cortexicon
from transformers import AutoModel, AutoProcessor, AutoTokenizer
run = sys.argv[1]
found = {}
for name in ("avq", "lm"):
    model = AutoModel.from_pretrained(f"{run}/{name}")
    codec = model if name == "avq" else model.avq
    processor = AutoProcessor.from_pretrained(f"{run}/{name}")
    tokenizer = AutoTokenizer.from_pretrained(f"{run}/{name}")
    found[name] = {
        "model": type(model).__name__,
        "processor": type(processor).__name__,
        "tokenizer": type(tokenizer).__name__,
        "codebook": codec.codebook_fingerprint(),
        "codes": tokenizer.num_codes,
        "tokens_per_window": processor.tokens_per_window,
    }
print(json.dumps(found))
"""


def log_of(folder):
    """Lines of the training log of a stage."""
    text = (folder / "training_log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_checkpoints_load_in_a_fresh_process(run, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(run)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    same = {
        "processor": "AVQProcessor",
        "tokenizer": "AVQTokenizer",
        "codebook": AVQModel.from_pretrained(run / "avq").codebook_fingerprint(),
        "codes": 32,
        "tokens_per_window": 8,
    }
    assert found["avq"] == {"model": "AVQModel", **same}
    assert found["lm"] == {"model": "AVQLMForConditionalGeneration", **same}


def test_the_codec_log_holds_every_promised_figure(run):
    lines = [line for line in log_of(run / "avq") if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    always = {
        "seconds",
        "loss",
        "lr",
        "reconstruction_loss",
        "spectrum_loss",
        "connectivity_loss",
        "domain_loss",
        "domain_accuracy",
        "reversal_strength",
        "domain_grad_norm_projection",
        "domain_grad_norm_encoder",
    }
    with_codebook = {"commitment_loss", "perplexity", "usage"}
    for line in lines:
        assert always <= line.keys()
        assert (with_codebook <= line.keys()) == (line["step"] > 6), "the codebook starts at step 6"
        assert all(np.isfinite(value) for value in line.values())
        assert 0 <= line["domain_accuracy"] <= 1
        assert line["domain_grad_norm_projection"] > 0
        assert line["domain_grad_norm_encoder"] > 0
    assert 1 <= lines[-1]["perplexity"] <= 32
    assert 0 < lines[-1]["usage"] <= 1
    held_out = [line for line in log_of(run / "avq") if "eval_r2" in line]
    assert [line["step"] for line in held_out] == [10, 12]  # not before the codebook starts
    assert all(line["eval_r2"] < 1 and "eval_usage" in line for line in held_out)


def test_the_language_model_log_and_the_facts_of_all_runs(run):
    lines = log_of(run / "lm")
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10]
    scores = [line for line in lines if "eval_mae_age" in line]
    assert [line["step"] for line in scores] == [5, 10]
    for line in scores:
        readouts = [line[f"eval_mae_age_{name}"] for name in ("expectation", "mode")]
        assert line["eval_mae_age"] == min(readouts)
        assert 0 <= line["eval_error_sex"] <= 1
    cohort = load_cohort(run / "cohort")
    for stage in ("text", "avq", "lm"):
        facts = json.loads((run / stage / "run.json").read_text(encoding="utf-8"))
        assert facts["stage"] == stage
        assert facts["arguments"]["output"] == str(run / stage)
        assert facts["versions"]["torch"] == torch.__version__
        assert facts["seconds"] > 0
        assert not (run / stage / "state").exists(), "a finished run keeps no resume state"
        if stage != "text":
            assert facts["cohort_hash"] == cohort.content_hash
    best = json.loads((run / "lm" / "run.json").read_text(encoding="utf-8"))["best_eval_mae_age"]
    assert best == min(line["eval_mae_age"] for line in scores)


def test_training_the_language_model_leaves_the_rows_of_codes(run):
    model = AVQLMForConditionalGeneration.from_pretrained(run / "lm")
    codec = AVQModel.from_pretrained(run / "avq")
    first = model.config.fmri_offset
    table = model.get_input_embeddings().weight.detach()
    projected = codec.project_codebook()
    assert torch.equal(table[first : first + 32], projected)
    assert torch.equal(model.avq.project_codebook(), projected)
    # The rows of words did learn, so it is not that the model never trained.
    before = GPT2LMHeadModel.from_pretrained(run / "text").get_input_embeddings().weight
    assert not torch.equal(table[: len(before)], before)


def test_predictions_have_a_row_per_subject_and_target(run):
    cohort = load_cohort(run / "cohort")
    parts = load_split(run / "split.json", cohort)[0]
    subjects = [*parts["test"], *parts["test_sites"]]
    table = predict_cohort(run / "lm", cohort, subjects, quiet=True)
    assert len(table) == 2 * len(subjects)
    assert not table.duplicated(["subject_id", "target"]).any()
    assert set(table["target"]) == {"age", "sex"}
    assert set(table["system"]) == {"AVQ + LLM"}
    people = cohort.participants.loc[subjects]
    ages = table[table["target"] == "age"].set_index("subject_id").loc[subjects]
    assert ages["y_hat"].astype(float).between(15, 85).all()
    np.testing.assert_array_equal(ages["y"].astype(float), people["age"])
    sexes = table[table["target"] == "sex"].set_index("subject_id").loc[subjects]
    assert set(sexes["y_hat"]) <= {"F", "M"}
    assert list(sexes["y"]) == list(people["sex"])
    # `score` is the probability of M, the class that sorts last.
    assert ((sexes["score"] > 0.5) == (sexes["y_hat"] == "M")).all()
    assert table["free_answer_valid"].between(0, 1).all()


def test_predictions_do_not_depend_on_the_batch(run):
    cohort = load_cohort(run / "cohort")
    subjects = load_split(run / "split.json", cohort)[0]["test"][:3]
    together = predict_cohort(run / "lm", cohort, subjects, ["age"], quiet=True)
    alone = predict_cohort(run / "lm", cohort, subjects[-1:], ["age"], batch_size=1, quiet=True)
    expected = float(together["y_hat"].iloc[-1])
    assert float(alone["y_hat"].iloc[0]) == pytest.approx(expected, abs=1e-3)
