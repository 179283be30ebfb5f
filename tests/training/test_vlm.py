"""`train vlm` on tiny random models of every family: the whole path, its controls, its plans."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from cortexicon.cohorts import load_cohort, load_split
from cortexicon.evaluation.predictions import read_predictions
from cortexicon.inference.errors import InferenceError
from cortexicon.inference.grammar import read_answers
from cortexicon.inference.image_questions import ImageQuestions
from cortexicon.inference.vlm import load_vlm, merge_vlm
from cortexicon.training import TrainingError, vlm, vlm_models
from cortexicon.training.answers import AnswerBook

pytest.importorskip("PIL")
TARGETS = [
    {"name": "age", "kind": "number", "minimum": 15, "maximum": 85, "question": "Age?"},
    {"name": "sex", "kind": "class", "question": "Sex?"},
]
FAMILIES = ("mllama", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def start(folder, run, family, *overrides, name="vlm", **changes):
    """Run the command with the tiny model; the output folder."""
    pixels = 64 if family == "qwen3_vl" else 56
    values = {
        "output": str(folder / name),
        "cohort": str(run / "cohort"),
        "split": str(run / "split.json"),
        "family": family,
        "tiny": True,
        "targets": TARGETS,
        "image_size": [pixels, pixels],
        "window_length": 40,
        "prompts_per_scan": 2,
        "lora": {"r": 4, "modules_to_save": ["lm_head"]},
        "activation_checkpointing": False,
        "max_steps": 4,
        "batch_size": 4,
        "warmup_steps": 1,
        "log_steps": 1,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "cpu": True,
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert vlm.main([str(path), *overrides]) == 0
    return folder / name


@pytest.fixture(
    scope="module",
    params=[*FAMILIES[:3], pytest.param("qwen3_vl", marks=pytest.mark.slow)],
)
def trained(request, run, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return start(folder, run, request.param, activation_checkpointing=request.param == "mllama")


def pictures_of(checkpoint, run, subjects):
    arguments = vlm.VLMArguments(
        output="", cohort="", split="", family="", targets=[], **picture_fields(checkpoint.image)
    )
    return vlm.prepare_pictures(arguments, load_cohort(run / "cohort"), subjects, "test", True)


def picture_fields(image):
    return {
        "image_kind": image.kind,
        "image_size": image.size,
        "palette": image.palette,
        "sampling_interval": image.sampling_interval,
        "window_length": image.window_length,
    }


def test_train_generate_save_reload_and_merge(trained, run, tmp_path):
    rows = read_predictions([trained / "predictions.csv"])
    split = load_split(run / "split.json", load_cohort(run / "cohort"))[0]
    for part in ("validation", "test", "test_sites"):
        for target in ("age", "sex"):
            mine = rows[(rows["part"] == part) & (rows["target"] == target)]
            assert sorted(mine["subject_id"]) == sorted(split.get(part, []))
    assert rows["system"].str.contains("tiny random model").all()
    every = read_predictions([trained / "predictions_readouts.csv"])
    assert {name.rpartition("(")[2] for name in every["system"]} == {
        "expectation)",
        "median)",
        "mode)",
        "generated)",
        "options)",
    }

    # From the files alone: the same answers, and the same after merging.
    loaded = load_vlm(trained)
    pictures = pictures_of(loaded, run, split["test"])
    book = AnswerBook(loaded.questions.answer_ids, 0.0)
    again = vlm.ask(loaded.model, loaded.questions, pictures, loaded.targets, book, 2, 4, {})
    merged = load_vlm(merge_vlm(trained, tmp_path / "merged"))
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    third = vlm.ask(merged.model, merged.questions, pictures, loaded.targets, book, 2, 8, {})
    for target in loaded.targets:
        name = target["name"]
        mine = rows[(rows["part"] == "test") & (rows["target"] == name)].set_index("subject_id")
        values = read_answers(again[name], target, target["readout"])
        wanted = mine.loc[again[name].subject_ids, "y_hat"]
        if target["kind"] == "number":
            np.testing.assert_allclose(values, wanted.astype(float), rtol=1e-4)
        else:
            assert list(values) == list(wanted)
        np.testing.assert_allclose(
            again[name].probabilities, third[name].probabilities, rtol=1e-3, atol=1e-5
        )


def test_the_grammar_generates_what_generate_would(trained, run):
    loaded = load_vlm(trained)
    split = load_split(run / "split.json", load_cohort(run / "cohort"))[0]
    subjects = split["test"][:2]
    pictures = pictures_of(loaded, run, subjects)
    images = [pictures.draw(subject, 0) for subject in subjects]
    target = loaded.targets[0]
    valid = AnswerBook(loaded.questions.answer_ids, 0.0).valid(target)
    mine = loaded.questions.answers(loaded.model, subjects, images, target["question"], valid)
    inputs = loaded.questions.inputs(images, target["question"])
    size = inputs["input_ids"].shape[1]

    def allowed(_, ids):
        beginning = tuple(ids[size:].tolist())
        ended = loaded.questions.tokenizer.eos_token_id
        return [v[len(beginning)] for v in valid if v[: len(beginning)] == beginning < v] or [ended]

    found = loaded.model.generate(
        **inputs, do_sample=False, max_new_tokens=5, prefix_allowed_tokens_fn=allowed
    )
    for row, ids in enumerate(found[:, size:].tolist()):
        chosen = valid[int(mine.generated[row].argmax())]
        assert tuple(ids[: len(chosen)]) == chosen


def test_the_image_reaches_the_answer(trained, run):
    loaded = load_vlm(trained)
    split = load_split(run / "split.json", load_cohort(run / "cohort"))[0]
    pictures = pictures_of(loaded, run, split["test"][:2])
    first, second = (pictures.draw(subject, 0) for subject in split["test"][:2])
    target = loaded.targets[0]
    valid = AnswerBook(loaded.questions.answer_ids, 0.0).valid(target)
    found = loaded.questions.answers(
        loaded.model, ["a", "b", "c"], [first, second, first], target["question"], valid
    ).probabilities
    np.testing.assert_allclose(found[0], found[2], rtol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-7


@pytest.mark.parametrize("control", ["blank_image", "text_only"])
def test_without_an_image_everybody_gets_the_same_answer(run, tmp_path, control):
    folder = start(tmp_path, run, "qwen2_vl", f"control={control}")
    rows = read_predictions([folder / "predictions_readouts.csv"])
    ages = rows[rows["target"] == "age"]
    for _, same in ages.groupby(["system", "part"]):
        assert np.ptp(same["y_hat"].astype(float)) < 1e-4
    facts = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    assert facts["with_image"] is (control == "blank_image")


def test_an_interrupted_run_resumes_bit_equal(run, tmp_path, monkeypatch):
    whole = start(tmp_path, run, "qwen2_vl", name="whole")

    class Stopped(Exception):
        pass

    def save_then_stop(self, model, optimizer, step, seconds):
        original(self, model, optimizer, step, seconds)
        raise Stopped

    original = vlm.Run.save_state
    with monkeypatch.context() as patched:
        patched.setattr(vlm.Run, "save_state", save_then_stop)
        with pytest.raises(Stopped):
            start(tmp_path, run, "qwen2_vl", name="again")
    again = start(tmp_path, run, "qwen2_vl", "resume=true", name="again")
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (again / "state").exists()


def test_a_saved_state_holds_the_trained_weights_only(run, tmp_path):
    model = vlm_models.tiny_model("qwen2_vl", vlm_models.tiny_processor("qwen2_vl", 56), 56, 0)
    peft = vlm_models.with_lora(model, {"r": 2})
    state = vlm_models.TrainedParts(peft).state_dict()
    assert state
    assert all("lora_" in name for name in state)
    assert not any("visual" in name for name in state)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["family=blip"], "family must be one of"),
        (["control=random"], "control must be one of"),
        (["tiny=false"], "model_id is empty"),
        (["quantize=nf4"], "not quantised"),
        (["targets=[]"], "targets is empty"),
    ],
)
def test_what_cannot_work_is_refused(run, tmp_path, overrides, message):
    with pytest.raises(TrainingError, match=message):
        start(tmp_path, run, "qwen2_vl", *overrides)


def test_a_question_cannot_hold_a_control_token():
    questions = ImageQuestions(vlm_models.tiny_processor("qwen2_vl", 56))
    with pytest.raises(InferenceError, match="control token"):
        questions.prompt("Age?<|image_pad|>")


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(InferenceError, match=r"questions\.json"):
        load_vlm(tmp_path)


def test_near_numbers_share_the_credit_where_each_is_one_token():
    book = AnswerBook(lambda answer: [100 + int(answer), 0], 2.0)
    target = {"name": "age", "kind": "number", "minimum": 6, "maximum": 65}
    reply, shares = book.labels(target, 30.4)
    assert reply == [130, 0]
    tokens, weights = shares[0]
    assert tokens[int(np.argmax(weights))] == 130
    assert sum(weights) == pytest.approx(1.0)
    assert shares[1] == ([0], [1.0])
    digits = AnswerBook(lambda answer: [*map(int, answer), 99], 2.0)
    assert digits.labels(target, 30.4)[1] == [([3], [1.0]), ([0], [1.0]), ([99], [1.0])]


NAMES = ["llama_3_2_11b_vision", "qwen2_vl_7b", "qwen2_5_vl_7b", "qwen3_vl_8b"]
FULL_SIZE = ["vlm_llama_3_2_11b", "vlm_qwen2_vl_7b", "vlm_qwen2_5_vl_7b", "vlm_qwen3_vl_8b"]


@pytest.mark.parametrize("name", NAMES)
def test_the_published_architectures_with_lora_on_the_meta_device(name):
    wanted = vlm_models.architecture(name)
    found = vlm_models.plan(name, {"r": 16}, batch_size=1, tokens=512)
    assert found["parameters"] == wanted["parameters"]
    assert found["trainable"] == wanted["lora_r16"]
    assert vlm_models.plan(name, {"r": 8}, 1, 512)["trainable"] == wanted["lora_r16"] // 2
    assert found["weights_bf16"] == pytest.approx(2 * wanted["parameters"] / 2**30)
    assert found["weights_nf4"] < 0.45 * found["weights_bf16"]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_full_size_configurations_are_complete(repository, name, capsys):
    path = repository / "training" / "configs" / f"{name}.yaml"
    assert vlm.main([str(path), "plan=true"]) == 0
    said = capsys.readouterr().out
    assert "computed, not measured" in said
    arguments = vlm.load_arguments(vlm.VLMArguments, [str(path)])
    model_type = vlm_models.architecture(arguments.architecture)["model_type"]
    assert model_type == arguments.family
    assert arguments.model_id
    assert not arguments.tiny


def test_the_accelerate_configurations_load(repository):
    from accelerate.commands.config.config_args import load_config_from_file

    folder = repository / "training" / "configs" / "accelerate"
    files = sorted(folder.glob("*.yaml"))
    assert {"one_gpu", "many_gpus"} <= {path.stem for path in files}
    for path in files:
        assert load_config_from_file(str(path)).num_processes >= 1


def test_tiny_models_are_of_the_published_classes():
    for family in FAMILIES:
        pixels = 64 if family == "qwen3_vl" else 56
        model = vlm_models.tiny_model(family, vlm_models.tiny_processor(family, pixels), pixels, 0)
        published = AutoModelForImageTextToText._model_mapping[type(model.config)]
        assert type(model) is published
        assert model.config.model_type == family


def test_permuted_labels_keep_their_distribution():
    from cortexicon.training.answers import others_of, permuted_labels

    people = pd.DataFrame(
        {"age": np.arange(20.0), "sex": list("MF") * 10},
        index=list("abcdefghij") + list("ABCDEFGHIJ"),
    )
    subjects = list("abcdefghij")
    shuffled = permuted_labels(people, subjects, 0)
    assert sorted(shuffled.loc[subjects, "age"]) == list(range(10))
    assert not shuffled.loc[subjects, "age"].equals(people.loc[subjects, "age"])
    assert shuffled.loc[list("ABCDEFGHIJ")].equals(people.loc[list("ABCDEFGHIJ")])
    assert shuffled.dtypes.equals(people.dtypes)
    others = others_of(subjects, 0)
    assert sorted(others) == sorted(others.values()) == sorted(subjects)
    assert all(one != other for one, other in others.items())
