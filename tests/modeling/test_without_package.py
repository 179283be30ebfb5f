"""Checkpoints load through the Auto classes, with the package and where it is not installed."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel

import cortexicon  # noqa: F401  registers the Auto classes
from cortexicon.modeling import AVQLMForConditionalGeneration, AVQModel

LOAD = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor
folder, expected = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
wanted = load_file(expected)
try:
    import cortexicon
except ModuleNotFoundError:
    print("not installed")
print(type(model).__module__.partition(".")[0], type(model).__name__)
"""
CODEC = """
with torch.no_grad():
    codes = model.encode(wanted["windows"]).codes
    print("codes", torch.equal(codes, wanted["codes"]))
    found = model.decode(codes).reconstruction
    print("series", (found - wanted["series"]).abs().max().item() < 1e-5)
"""
LANGUAGE_MODEL = """
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text="How old?", fmri=wanted["scan"].numpy(), tr=2.0)
found = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
print("answer", torch.equal(found, wanted["sequence"]))
table = model.get_input_embeddings().weight
print("tied", model.get_output_embeddings().weight is table)
print("frozen", not any(p.requires_grad for p in model.avq.parameters()))
"""


def save(path, **tensors):
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def test_auto_classes_with_the_package(codec, make_avq_lm, tmp_path):
    codec.save_pretrained(tmp_path / "avq")
    make_avq_lm().save_pretrained(tmp_path / "lm")
    assert type(AutoModel.from_pretrained(tmp_path / "avq")) is AVQModel
    assert type(AutoModel.from_pretrained(tmp_path / "lm")) is AVQLMForConditionalGeneration
    assert AutoConfig.from_pretrained(tmp_path / "avq").model_type == "avq"
    assert AutoConfig.from_pretrained(tmp_path / "lm").model_type == "avq_lm"


@pytest.mark.parametrize("name", ["avq", "lm"])
def test_every_file_that_the_code_needs_is_shipped(make_codec, make_avq_lm, tmp_path, name):
    (make_codec() if name == "avq" else make_avq_lm()).save_pretrained(tmp_path)
    shipped = {path.name for path in tmp_path.glob("*.py")}
    needed = {
        "alignment_avq",
        "components_avq",
        "configuration_avq",
        "modeling_avq",
        "layers_avq",
        "losses_avq",
        "outputs_avq",
    }
    needed |= {"quantization_avq", "code_search_avq", "inputs_avq"}
    if name == "lm":
        stream = ("configuration", "components", "outputs", "modeling")
        needed |= {f"{part}_avq_connectome" for part in stream}
        needed |= {"configuration_avq_lm", "generation_avq_lm", "modeling_avq_lm"}
        needed |= {"scan_inputs_avq_lm", "scan_summary_avq", "answer_heads_avq_lm"}
    assert shipped == {f"{stem}.py" for stem in needed}
    assert set(json.loads((tmp_path / "config.json").read_text())["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
    }


def test_a_codec_loads_without_the_package(codec, windows, tmp_path, run_without_package):
    codec.save_pretrained(tmp_path / "avq")
    with torch.no_grad():
        codes = codec.encode(windows).codes
        series = codec.decode(codes).reconstruction
    save(tmp_path / "expected.safetensors", windows=windows, codes=codes, series=series)
    found = run_without_package(LOAD + CODEC, tmp_path / "avq", tmp_path / "expected.safetensors")
    assert found.split("\n")[:4] == [
        "not installed",
        "transformers_modules AVQModel",
        "codes True",
        "series True",
    ]


def test_a_language_model_loads_without_the_package(
    make_avq_lm, two_streams, scan, tmp_path, run_without_package
):
    model = make_avq_lm(streams=2)
    model.save_pretrained(tmp_path / "lm")
    two_streams.save_pretrained(tmp_path / "lm")
    inputs = two_streams(text="How old?", fmri=scan, tr=2.0)
    sequence = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    save(tmp_path / "expected.safetensors", scan=torch.tensor(scan), sequence=sequence)
    found = run_without_package(
        LOAD + LANGUAGE_MODEL, tmp_path / "lm", tmp_path / "expected.safetensors"
    )
    assert found.split("\n")[:5] == [
        "not installed",
        "transformers_modules AVQLMForConditionalGeneration",
        "answer True",
        "tied True",
        "frozen True",
    ]
