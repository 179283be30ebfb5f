"""What `cortexicon train vlm` writes, loaded and merged again.

::

    FOLDER/adapter_model.safetensors, adapter_config.json   the LoRA adapter
    FOLDER/processor_config.json, tokenizer.json, ...       the processor
    FOLDER/questions.json                                   how scans are drawn, what is asked
    FOLDER/base/                                            the base model, where it was a tiny one
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForImageTextToText

from .errors import InferenceError
from .image_questions import ImageQuestions, ScanImage, load_processor


class VisionLanguageCheckpoint(NamedTuple):
    """A model that answers questions about pictures of scans.

    Attributes
    ----------
    model : PeftModel or PreTrainedModel
    questions : ImageQuestions
    image : ScanImage
        How the pictures of its training were drawn.
    targets : list of dict
        What it was trained to answer, as `AVQLMConfig.targets`.
    """

    model: Any
    questions: ImageQuestions
    image: ScanImage
    targets: list[dict[str, Any]]


def load_vlm(folder: str | Path, dtype: torch.dtype | None = None) -> VisionLanguageCheckpoint:
    """The base model with its adapter, ready to answer.

    Parameters
    ----------
    folder : path
        Written by `cortexicon train vlm` or `merge_vlm`.
    dtype : torch.dtype, optional
        Of the base model's weights; default: as they are stored.

    Raises
    ------
    InferenceError
        No such checkpoint.
    """
    folder = Path(folder)
    facts = _facts(folder)
    if (folder / "adapter_config.json").is_file():
        name = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = folder / "base" if (folder / "base").is_dir() else name["base_model_name_or_path"]
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype or "auto")
        from peft import PeftModel  # what reads no adapter does not need it

        model = PeftModel.from_pretrained(model, folder)
    else:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype or "auto")
    processor = load_processor(facts["family"], str(folder))
    questions = ImageQuestions(processor, facts["with_image"])
    image = ScanImage(**facts["image"])
    return VisionLanguageCheckpoint(model.eval(), questions, image, facts["targets"])


def merge_vlm(folder: str | Path, out: str | Path) -> Path:
    """Write the model with its adapter merged into the weights: a checkpoint that needs no PEFT.

    Raises
    ------
    InferenceError
        No such checkpoint, or one that is merged already.
    """
    out = Path(out)
    loaded = load_vlm(folder)
    from peft import PeftModel  # as in `load_vlm`

    if not isinstance(loaded.model, PeftModel):
        raise InferenceError(f"{folder} holds no adapter: it is merged already.")
    loaded.model.merge_and_unload().save_pretrained(out)
    loaded.questions.processor.save_pretrained(out)
    (out / "questions.json").write_text(
        (Path(folder) / "questions.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    return out


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / "questions.json"
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InferenceError(
            f"{path}: expected what `cortexicon train vlm` writes, could not read it ({error})."
        ) from error
    return facts
