"""`train lm` in stages: code modelling and descriptions first, then questions, text beside them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cortexicon.modeling import AVQLMForConditionalGeneration
from cortexicon.tokenization import AVQProcessor
from cortexicon.training import TrainingError, lm
from cortexicon.training.lm_stages import SideLosses, text_perplexity
from cortexicon.training.stages import IGNORED, code_loss, without_summary

from .conftest import lm_values, write_yaml

TEXT = {"sentences": 300, "max_characters": 0, "text_length": 16}


def run(folder, two_stream_run, name, **values):
    values = {
        **lm_values(two_stream_run),
        "output": str(folder / name),
        "connectome": str(two_stream_run / "connectome"),
        "windows_per_prompt": 1,
        "keep": "last",
        "warmup_steps": 1,
        "max_steps": 2,
        "eval_steps": 2,
        **values,
    }
    assert lm.main([write_yaml(folder / f"{name}.yaml", values)]) == 0
    lines = (folder / name / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    scores = [json.loads(line) for line in lines if "eval_mae_age" in line][-1]
    return AVQLMForConditionalGeneration.from_pretrained(folder / name), scores


@pytest.fixture(scope="module")
def first_stage(two_stream_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    weights = {f"{name}_weight": 1.0 for name in ("code", "masked", "description", "text")}
    return folder, *run(folder, two_stream_run, "one", answer_weight=0.0, **weights, **TEXT)


def test_every_stage_has_its_loss_and_text_is_watched(first_stage):
    _, model, scores = first_stage
    assert scores["eval_text_perplexity"] > 1
    assert scores["text_perplexity_before"] > 1
    for stream in ("fmri", "fc"):
        assert 1 < scores[f"eval_{stream}_unigram_perplexity"] <= model.block(stream)[1] * 1.1
        assert scores[f"eval_{stream}_code_perplexity"] > 1
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_the_next_stage_starts_where_the_one_before_ended(first_stage, two_stream_run):
    folder, earlier, _ = first_stage
    options = {"learning_rate": 0.0, "paraphrases": True, "start": str(folder / "one")}
    later, _ = run(folder, two_stream_run, "two", **options)
    for name, value in earlier.language_model.state_dict().items():
        assert torch.equal(value, later.language_model.state_dict()[name]), name
    fresh, _ = run(folder, two_stream_run, "three", learning_rate=0.0)
    table = "transformer.h.0.mlp.c_fc.weight"
    names = fresh.language_model.state_dict()
    assert not torch.equal(names[table], earlier.language_model.state_dict()[table])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"start": "nowhere"}, "holds no trained language model"),
        ({"code_weight": 1.0, "fmri_input": "features"}, "code_weight needs codes"),
        ({"text_weight": 1.0, **TEXT, "text_length": 10**6}, "must be longer than one sequence"),
    ],
)
def test_stages_that_cannot_be(two_stream_run, tmp_path, values, message):
    values = {
        **lm_values(two_stream_run),
        "output": str(tmp_path / "lm"),
        "connectome": str(two_stream_run / "connectome"),
        **values,
    }
    with pytest.raises(TrainingError, match=message):
        lm.main([write_yaml(tmp_path / "lm.yaml", values)])


def test_text_perplexity_is_that_of_whole_sequences(first_stage):
    folder, model, _ = first_stage
    processor = AVQProcessor.from_pretrained(folder / "one")
    ids = processor.tokenizer.encode("The visual network and the limbic network. " * 8)
    ids = np.array(ids[:40], dtype=np.int64)
    rows = torch.tensor(ids).reshape(2, 20)
    with torch.no_grad():
        logits = model(input_ids=rows).logits[:, :-1].log_softmax(-1)
    taken = logits.gather(-1, rows[:, 1:, None])
    wanted = float((-taken.mean()).exp())
    assert text_perplexity(model, ids, 20) == pytest.approx(wanted, rel=1e-4)


def test_side_losses_are_those_of_whole_rows(first_stage):
    folder, model, _ = first_stage
    processor = AVQProcessor.from_pretrained(folder / "one")
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, 32, (1, 8)) for _ in range(3)]
    more = [rng.integers(0, 16, 4) for _ in range(3)]
    values = {f"{name}_weight": weight for name, weight in (("code", 1.0), ("masked", 0.5))}
    values |= {"description_weight": 2.0, "text_weight": 0.0, "fmri_input": "codes", "seed": 0}
    values |= {"batch_size": 3, "text_batch_size": 0, "text_length": 16, "text_first_share": 0.5}
    arguments = SimpleNamespace(**values)
    told = [["The visual network rests.", "It does."]] * 3
    side = SideLosses(arguments, processor, lambda scan, rng: codes[scan], more, told)
    with torch.no_grad():
        found = side.loss(model.eval(), np.arange(3), [5])
        rng, wanted = np.random.default_rng([5]), 0.0
        for name, weight in side.weights.items():
            rows = side._rows(name, np.arange(3), rng)
            labels = rows.pop("labels")
            logits = model(**rows, **without_summary(model)).logits
            wanted += weight * code_loss(logits, labels)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_text_comes_first_in_the_share_asked_for_and_has_rows_of_its_own(first_stage, share):
    folder = first_stage[0]
    processor = AVQProcessor.from_pretrained(folder / "one")
    told = ["The visual network rests.", "The limbic network rises."]
    values = {"text_batch_size": 2, "text_first_share": share, "batch_size": 5, "seed": 0}
    values |= {"code_weight": 0.0, "masked_weight": 0.0, "fmri_input": "codes", "text_files": []}
    arguments = SimpleNamespace(**values, description_weight=1.0, text_weight=1.0, **TEXT)
    more = [np.arange(4)] * 3
    side = SideLosses(arguments, processor, lambda *_: np.zeros((0, 0), int), more, [told] * 3)
    rng = np.random.default_rng(0)
    assert side._rows("text", np.arange(3), rng)["input_ids"].shape == (2, TEXT["text_length"])
    for _ in range(8):
        rows = side._rows("description", np.arange(3), rng)
        # What comes second is predicted: codes where text comes first, words where it does not.
        predicted = rows["labels"][rows["labels"] != IGNORED]
        is_code = predicted >= processor.tokenizer.fmri_offset
        assert bool(is_code.any()) == bool(share)
