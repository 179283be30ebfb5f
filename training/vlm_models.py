"""Vision-language models for `train vlm`: the published ones, tiny random ones, and their plans.

A published model comes from the Hub or a folder. A tiny one has the same classes and a processor of
the same class, random weights, and a vocabulary of sentences about scans: it shows that the path
works, and says nothing about the model. A plan builds the published architecture on the meta device
(no memory) and counts.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    MllamaProcessor,
    PreTrainedModel,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cortexicon.inference.image_questions import QwenImageProcessor, load_processor

from .arguments import TrainingError
from .corpus import brain_sentences
from .text import train_tokenizer

ARCHITECTURES = Path(__file__).parent / "configs" / "architectures"
# The linear layers of the language half, cross-attention to the image included.
LANGUAGE_LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
_TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_TOKENS = {
    "mllama": ("<|begin_of_text|>", "<|image|>", "<|python_tag|>", "<|eot_id|>"),
    "qwen": (
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ),
}
# As the published ones, in what matters here: an image, the question, the beginning of an answer.
_PARTS = (
    "{%% for part in messages[0]['content'] %%}{%% if part['type'] == 'image' %%}%s"
    "{%% else %%}{{ part['text'] }}{%% endif %%}{%% endfor %%}"
)
_TEMPLATES = {
    "mllama": "{{ bos_token }}" + _PARTS % "<|image|>" + "<|eot_id|>",
    "qwen": "<|im_start|>"
    + _PARTS % "<|vision_start|><|image_pad|><|vision_end|>"
    + "<|im_end|><|im_start|>",
}


def tiny_processor(family: str, pixels: int) -> Any:
    """A processor of the family's class around a tokenizer trained on sentences about scans."""
    kind = "mllama" if family == "mllama" else "qwen"
    tokenizer = train_tokenizer([brain_sentences(2000)], 1024)
    tokenizer.add_special_tokens({"additional_special_tokens": list(_TOKENS[kind])})
    tokenizer.eos_token = "<|eot_id|>" if kind == "mllama" else "<|im_end|>"
    if kind == "mllama":
        tokenizer.bos_token = "<|begin_of_text|>"
        images = MllamaImageProcessorPil(
            size={"height": pixels, "width": pixels}, max_image_tiles=1
        )
        return MllamaProcessor(images, tokenizer, chat_template=_TEMPLATES[kind])
    area = pixels * pixels
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": area, "longest_edge": area},
        patch_size=16 if family == "qwen3_vl" else 14,
    )
    return QwenImageProcessor(images, tokenizer, chat_template=_TEMPLATES[kind])


def tiny_model(family: str, processor: Any, pixels: int, seed: int) -> PreTrainedModel:
    """A random model of the family's class; 14-pixel patches, two layers a side."""
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in tokenizer.get_added_vocab()}
    text: dict[str, Any] = {
        **_TINY_TEXT,
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    width = text["hidden_size"]
    values: dict[str, Any]
    if family == "mllama":
        text |= {
            "num_hidden_layers": 4,
            "cross_attention_layers": [1, 3],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        }
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "attention_heads": 2,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
            "image_size": pixels,
            "patch_size": 14,
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
        }
        values = {"image_token_index": ids["<|image|>"]}
    else:
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 2, 2],
        }
        vision = {"depth": 2, "num_heads": 2, "patch_size": 14}
        if family == "qwen2_vl":
            vision |= {"embed_dim": 32, "hidden_size": width, "mlp_ratio": 2}
        else:
            vision |= {"hidden_size": 32, "out_hidden_size": width, "intermediate_size": 64}
        if family == "qwen2_5_vl":
            vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
        if family == "qwen3_vl":
            vision |= {"patch_size": 16, "num_position_embeddings": 64}
            vision["deepstack_visual_indexes"] = [0]
            text |= {"head_dim": 16}
            text["rope_parameters"]["mrope_interleaved"] = True
        values = {
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
        }
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, **values)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):  # 0 in a new Mllama: the image would reach nothing
                parameter.fill_(0.5)
    return model


def load_base(arguments: Any) -> tuple[PreTrainedModel, Any]:
    """Base model and processor, as the arguments of `train vlm` name them.

    Raises
    ------
    TrainingError
        4-bit weights without bitsandbytes, or together with `tiny`.
    """
    if arguments.tiny:
        if arguments.quantize != "no":
            raise TrainingError("A tiny model is not quantised: set quantize to no.")
        pixels = min(arguments.image_size)
        processor = tiny_processor(arguments.family, pixels)
        return tiny_model(arguments.family, processor, pixels, arguments.seed), processor
    quantization = None
    if arguments.quantize == "nf4":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise TrainingError(
                "quantize: nf4 needs bitsandbytes and a GPU: pip install bitsandbytes, or set "
                "quantize to no."
            )
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForImageTextToText.from_pretrained(
        arguments.model_id, dtype=torch.bfloat16, quantization_config=quantization
    )
    return model, load_processor(arguments.family, arguments.model_id)


def with_lora(model: PreTrainedModel, values: dict[str, Any]) -> PeftModel:
    """The model with a LoRA adapter; `values` are fields of `peft.LoraConfig`."""
    settings = {"r": 16, "lora_alpha": 32, "target_modules": LANGUAGE_LAYERS, **values}
    return get_peft_model(model, LoraConfig(**settings))


def shard_frozen(model: PeftModel, device: torch.device, processes: int) -> None:
    """Spread the frozen weights over all processes (FSDP), layer by layer; adapters stay whole.

    A process then holds one layer besides its share. What is trained is small and stays the same on
    every process: its gradients must be averaged by the caller.
    """
    base = model.get_base_model()
    mesh = init_device_mesh(device.type, (processes,))
    whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
    layers = set(base._no_split_modules or ())
    for module in [m for m in base.modules() if type(m).__name__ in layers]:
        fully_shard(module, mesh=mesh, ignored_params=whole)
    fully_shard(base, mesh=mesh, ignored_params=whole)
    for parameter in whole:
        parameter.data = parameter.data.to(device)


class TrainedParts:
    """The weights that training changes, as far as saving and resuming a run need them.

    The others are those of the base model, tens of gigabytes that are there already.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Trainable weights by name."""
        named = self.model.named_parameters()
        return {name: weight.detach() for name, weight in named if weight.requires_grad}

    @torch.no_grad()
    def load_state_dict(self, weights: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` gave."""
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                weight.copy_(weights[name])


def architecture(name: str) -> dict[str, Any]:
    """Published figures of an architecture, from training/configs/architectures/NAME.yaml.

    Raises
    ------
    TrainingError
        No such file.
    """
    path = ARCHITECTURES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in ARCHITECTURES.glob("*.yaml")))
        raise TrainingError(f"No architecture {name!r}; known are {known}.")
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


def plan(name: str, lora: dict[str, Any], batch_size: int, tokens: int) -> dict[str, float]:
    """Parameters and memory of a full-size run, computed from the architecture alone.

    Parameters
    ----------
    name : str
        Of an architecture.
    lora : dict
        Fields of `peft.LoraConfig`.
    batch_size : int
        Images per process and step.
    tokens : int
        Positions of one prompt in the language model, those of the image included.

    Returns
    -------
    dict
        parameters, trainable; then GiB per process: weights_bf16, weights_nf4 (4.5 bits a weight of
        linear layers, embeddings in bf16), trained (adapter, gradient and Adam's moments, float32),
        activations (layer inputs kept by activation checkpointing, one layer recomputed, logits in
        float32). No workspace or fragmentation: leave a fifth of the device free.
    """
    values = architecture(name)
    config = AutoConfig.for_model(values["model_type"], **values["config"])
    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        total = sum(parameter.numel() for parameter in base.parameters())
        linear = sum(
            module.weight.numel()
            for path, module in base.named_modules()
            if isinstance(module, torch.nn.Linear) and not path.endswith("lm_head")
        )
        model = with_lora(base, lora)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = config.get_text_config()
    rows = batch_size * tokens
    kept = 2 * rows * text.hidden_size * text.num_hidden_layers
    one_layer = 2 * rows * (8 * text.hidden_size + 3 * text.intermediate_size)
    logits = 3 * 4 * batch_size * 16 * text.vocab_size  # of the answer's positions only
    gib = 2.0**30
    return {
        "parameters": total,
        "trainable": trainable,
        "weights_bf16": 2 * total / gib,
        "weights_nf4": (4.5 / 8 * linear + 2 * (total - linear)) / gib,
        "trained": 16 * trainable / gib,
        "activations": (kept + one_layer + logits) / gib,
    }
