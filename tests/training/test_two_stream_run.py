"""`train lm` with the connectivity stream: rows, prompts, predictions, and connectivity alone."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cortexicon.cohorts import Split, load_cohort, load_split
from cortexicon.inference import cohort_matrices, encode_matrices, load_connectome
from cortexicon.inference.answers import prompt_rows
from cortexicon.inference.predict import encode_prompts, predict_cohort
from cortexicon.modeling import AVQLMForConditionalGeneration, AVQModel
from cortexicon.tokenization import AVQProcessor
from cortexicon.training import TrainingError, lm
from cortexicon.training.lm_readouts import class_weights

from .conftest import lm_values, write_yaml
from .test_resume import assert_same_log, train_in_two_parts


@pytest.fixture(scope="module")
def subjects(two_stream_run):
    return load_split(two_stream_run / "split.json")[0]["test"][:3]


def test_the_rows_of_both_streams_stay_where_the_codecs_put_them(two_stream_run):
    model = AVQLMForConditionalGeneration.from_pretrained(two_stream_run / "lm2")
    table = model.get_input_embeddings().weight
    for codec, stream in (
        (AVQModel.from_pretrained(two_stream_run / "avq"), "fmri"),
        (load_connectome(two_stream_run / "connectome"), "fc"),
    ):
        first, count = model.block(stream)
        assert torch.equal(table[first : first + count], codec.project_codebook())


def test_prompts_hold_the_codes_of_the_whole_scan(two_stream_run, subjects):
    model = AVQLMForConditionalGeneration.from_pretrained(two_stream_run / "lm2").eval()
    processor = AVQProcessor.from_pretrained(two_stream_run / "lm2")
    cohort = load_cohort(two_stream_run / "cohort")
    found = encode_prompts(model, processor.feature_extractor, cohort, subjects, 2, 2, quiet=True)
    codec = load_connectome(two_stream_run / "connectome")
    wanted = encode_matrices(codec, cohort_matrices(cohort, subjects), cohort.coordinates)
    np.testing.assert_array_equal(found.connectivity, wanted)
    codes, connectivity = found.flat
    np.testing.assert_array_equal(connectivity, np.repeat(wanted, 2, axis=0))
    rows = prompt_rows(processor, codes, connectivity, "Age?")
    assert len({len(row) for row in rows}) == 1
    # The same prompt as the processor makes of the scan itself.
    scan = cohort.series(subjects[0])
    inputs = processor(
        text="Age?", fmri=scan.values, tr=scan.tr, region_labels=scan.labels, window_starts=[0, 0]
    )
    assert inputs["input_ids"].shape[1] == len(rows[0])


def test_predictions_are_made_from_both_streams(two_stream_run, subjects):
    cohort = load_cohort(two_stream_run / "cohort")
    table = predict_cohort(two_stream_run / "lm2", cohort, subjects, quiet=True)
    assert len(table) == 2 * len(subjects)
    assert table["free_answer_valid"].between(0, 1).all()


def test_connectivity_alone(two_stream_run, subjects, tmp_path):
    values = {
        **lm_values(two_stream_run),
        "output": str(tmp_path / "lm"),
        "connectome": str(two_stream_run / "connectome"),
        "windows_per_prompt": 0,
        "max_steps": 2,
        "eval_steps": 2,
    }
    assert lm.main([write_yaml(tmp_path / "lm.yaml", values)]) == 0
    processor = AVQProcessor.from_pretrained(tmp_path / "lm")
    assert processor.streams == ("fc",)
    cohort = load_cohort(two_stream_run / "cohort")
    table = predict_cohort(tmp_path / "lm", cohort, subjects, ["age"], quiet=True)
    assert len(table) == len(subjects)
    scan = cohort.series(subjects[0])
    inputs = processor(text="Age?", fmri=scan.values, region_labels=scan.labels)
    model = AVQLMForConditionalGeneration.from_pretrained(tmp_path / "lm")
    assert model.generate(**inputs, max_new_tokens=1).shape[1] == inputs["input_ids"].shape[1] + 1


@pytest.mark.parametrize("mode", ["codes", "features"])
def test_summary_and_heads_are_trained_and_a_readout_is_chosen(
    two_stream_run, subjects, tmp_path, mode
):
    values = {
        **lm_values(two_stream_run),
        "output": str(tmp_path / "lm"),
        "connectome": str(two_stream_run / "connectome"),
        "fmri_input": mode,
        "summary_patterns": True,
        "teacher": True,
        "answer_heads": True,
        "balance_classes": True,
        "keep": "last",
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "max_steps": 4,
        "eval_steps": 2,
    }
    assert lm.main([write_yaml(tmp_path / "lm.yaml", values)]) == 0
    model = AVQLMForConditionalGeneration.from_pretrained(tmp_path / "lm")
    assert model.summary.map.weight.abs().max() > 0
    assert model.summary.patterns.flatten(1).any(1).all()
    assert model.heads.out.weight.abs().max() > 0
    readouts = {target["kind"]: target["readout"] for target in model.config.targets}
    assert readouts["number"] in ("expectation", "median", "mode", "head")
    cohort = load_cohort(two_stream_run / "cohort")
    first = predict_cohort(tmp_path / "lm", cohort, subjects, quiet=True)
    for target in model.config.targets:
        target["readout"] = "head"
    model.save_pretrained(tmp_path / "lm")
    second = predict_cohort(tmp_path / "lm", cohort, subjects, quiet=True)
    for table in (first, second):
        ages = table.loc[table["target"] == "age", "y_hat"].astype(float)
        assert ages.between(*[model.config.targets[0][key] for key in ("minimum", "maximum")]).all()


def test_scans_kept_out_of_the_split_are_trained_on(two_stream_run, tmp_path):
    cohort = load_cohort(two_stream_run / "cohort")
    parts = load_split(two_stream_run / "split.json", cohort)[0]
    kept = {**parts, "train": parts["train"][3:]}
    Split("hash", [kept], cohort.content_hash).save(tmp_path / "split.json")
    sites = cohort.participants["site"]
    of_these_sites = {sites[subject] for subject in kept["train"]}
    further = [subject for subject in parts["train"][:3] if sites[subject] in of_these_sites]
    assert further
    values = {
        **lm_values(two_stream_run),
        "output": str(tmp_path / "lm"),
        "split": str(tmp_path / "split.json"),
        "connectome": str(two_stream_run / "connectome"),
        "windows_per_prompt": 0,
        "more_scans": True,
        "max_steps": 2,
        "eval_steps": 2,
    }
    assert lm.main([write_yaml(tmp_path / "lm.yaml", values)]) == 0
    facts = json.loads((tmp_path / "lm" / "run.json").read_text())
    assert facts["training_scans"] == len(kept["train"]) + len(further)


def test_balanced_classes_count_the_same():
    people = pd.DataFrame({"sex": ["F", "M", "M", "M", None]})
    targets = [{"name": "sex", "kind": "class"}, {"name": "age", "kind": "number"}]
    weights = class_weights(people, targets, 2.0, True)
    assert weights == {("sex", "F"): 4.0, ("sex", "M"): pytest.approx(4 / 3)}
    assert class_weights(people, targets, 2.0, False) == {("sex", "F"): 2.0, ("sex", "M"): 2.0}


def test_prompts_of_nothing_are_refused(two_stream_run, tmp_path):
    values = {**lm_values(two_stream_run), "output": str(tmp_path / "lm"), "windows_per_prompt": 0}
    with pytest.raises(TrainingError, match=r"windows_per_prompt is 0.*connectome"):
        lm.main([write_yaml(tmp_path / "lm.yaml", values)])


def test_adapters_are_merged_and_fresh_blocks_keep_the_embeddings(two_stream_run, tmp_path):
    values = {
        **lm_values(two_stream_run),
        "output": str(tmp_path / "lm"),
        "connectome": str(two_stream_run / "connectome"),
        "windows_per_prompt": 0,
        "summary_patterns": True,
        "answer_heads": True,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "max_steps": 3,
        "eval_steps": 3,
        "keep": "last",
    }
    text = AutoModelForCausalLM.from_pretrained(two_stream_run / "text")
    rows = text.get_input_embeddings().weight
    found = {}
    for name, more in (("lora", {"lora_rank": 2}), ("fresh", {"fresh_language_model": True})):
        values |= {"output": str(tmp_path / name), **more}
        assert lm.main([write_yaml(tmp_path / f"{name}.yaml", values)]) == 0
        found[name] = AVQLMForConditionalGeneration.from_pretrained(tmp_path / name)
        assert (
            found[name].get_output_embeddings().weight is found[name].get_input_embeddings().weight
        )
        values.pop(next(iter(more)))
    block = "transformer.h.0.mlp.c_fc.weight"
    before = text.state_dict()[block]
    after = {name: model.language_model.state_dict()[block] for name, model in found.items()}
    assert torch.linalg.matrix_rank(after["lora"] - before, tol=1e-6) == 2
    assert (after["fresh"] - before).abs().max() > 0.02
    # An adapter leaves the rows of text as they were; so does a fresh start, before its steps.
    assert torch.equal(found["lora"].get_input_embeddings().weight[: len(rows)], rows)
    assert (found["fresh"].get_input_embeddings().weight[: len(rows)] - rows).abs().max() < 0.1


def patterns_values(two_stream_run, output) -> dict:
    """Connectivity alone with all that is fitted before the first step."""
    return {
        **lm_values(two_stream_run),
        "output": str(output),
        "connectome": str(two_stream_run / "connectome"),
        "windows_per_prompt": 0,
        "summary_patterns": True,
        "teacher": True,
        "answer_heads": True,
        "keep": "last",
    }


def test_a_run_with_patterns_and_teacher_resumes_bit_equal(two_stream_run, tmp_path, monkeypatch):
    config = write_yaml(tmp_path / "lm.yaml", patterns_values(two_stream_run, tmp_path / "whole"))
    assert lm.main([config]) == 0
    assert train_in_two_parts(monkeypatch, lm, config, tmp_path / "parts", 7) == 4
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert any(name.startswith("summary") for name in whole)
    assert not [name for name in whole if not torch.equal(whole[name], parts[name])]
    assert_same_log(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_twice_the_batch(two_stream_run, tmp_path):
    values = patterns_values(two_stream_run, tmp_path / "one") | {"token_dropout": 0.0}
    assert lm.main([write_yaml(tmp_path / "one.yaml", values)]) == 0
    values |= {"output": str(tmp_path / "two"), "batch_size": values["batch_size"] // 2}
    config = write_yaml(tmp_path / "two.yaml", values)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["-m", "cortexicon.cli", "train", "lm", config]
    done = subprocess.run(
        [sys.executable, *launch, *train], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    values |= {"output": str(tmp_path / "half")}
    assert lm.main([write_yaml(tmp_path / "half.yaml", values)]) == 0
    # A process averages over its own answers, of one or two tokens each, and Adam takes small
    # gradients for large: nearly the same way, and nearer than half of the people lead.
    before = AutoModelForCausalLM.from_pretrained(two_stream_run / "text").state_dict()
    block = "transformer.h.0.mlp.c_fc.weight"
    ways = {}
    for name in ("one", "two", "half"):
        found = load_file(tmp_path / name / "model.safetensors")
        moved = found[f"language_model.{block}"] - before[block], found["heads.out.weight"]
        ways[name] = [part.flatten() for part in moved]
    for one, two, half in zip(*ways.values(), strict=True):
        near = torch.cosine_similarity(one, two, dim=0)
        assert near > 0.8
        assert near > torch.cosine_similarity(one, half, dim=0)
    facts = json.loads((tmp_path / "two" / "run.json").read_text())
    assert facts["processes"] == 2
