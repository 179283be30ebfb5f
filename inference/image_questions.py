"""Questions about scans drawn as images, for the vision-language models of transformers.

Llama 3.2 Vision (Mllama) and Qwen-VL take images in different ways; their own processors know how.
What is added here: a scan as a picture, one prompt for all, answers token by token, and a Qwen
processor without videos (the library's own needs torchvision only to prepare those).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import MllamaProcessor, Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin

from .errors import InferenceError
from .grammar import Answers, grammar_answers

FAMILIES = ("mllama", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@dataclass(frozen=True)
class ScanImage:
    """How a window of a scan becomes a picture.

    Attributes
    ----------
    kind : str
        carpet, connectivity, both or blank, as `cortexicon.evaluation.render_scan` has them.
    size : list of int
        Height and width, pixels.
    palette : str
    sampling_interval : float
        Seconds; every scan is resampled to it.
    window_length : int
        Samples that a picture shows, the same for all: a scan's length names its site.
    """

    kind: str = "both"
    size: list = dataclasses.field(default_factory=lambda: [448, 448])
    palette: str = "gray"
    sampling_interval: float = 2.0
    window_length: int = 80


class QwenImageProcessor(Qwen2VLProcessor):
    """The processor of Qwen-VL for still images: no video processor, hence no torchvision."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def load_processor(family: str, folder: str) -> Any:
    """The processor of a model's folder or Hub id.

    Raises
    ------
    InferenceError
        Unknown family.
    """
    if family not in FAMILIES:
        raise InferenceError(f"family must be one of {', '.join(FAMILIES)}, found {family!r}.")
    if family == "mllama":
        return MllamaProcessor.from_pretrained(folder)
    return QwenImageProcessor.from_pretrained(folder)


class ImageQuestions:
    """Prompts of one image and one question, and the answers that may follow them.

    A prompt is the model's chat template with an image and the question, where the processor has
    one, and else ``IMAGE Question: {question}\\nAnswer:``. Without an image only the text stays.

    Parameters
    ----------
    processor : MllamaProcessor or QwenImageProcessor
    with_image : bool
        False: the control that sees the question alone.
    """

    def __init__(self, processor: Any, with_image: bool = True):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.with_image = with_image
        self.chat = processor.chat_template is not None

    def prompt(self, question: str) -> str:
        """Text of a prompt, special tokens included.

        Raises
        ------
        InferenceError
            The question holds one of the tokenizer's special tokens.
        """
        for token in self.tokenizer.get_added_vocab():
            if token in question:
                raise InferenceError(f"The question {question!r} holds the control token {token}.")
        image = [{"type": "image"}] if self.with_image else []
        if self.chat:
            content = [*image, {"type": "text", "text": question}]
            return str(
                self.processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True
                )
            )
        start = self.tokenizer.bos_token or ""
        if self.with_image and isinstance(self.processor, MllamaProcessor):
            start = self.processor.image_token + start
        elif self.with_image:
            start += f"<|vision_start|>{self.processor.image_token}<|vision_end|>"
        return f"{start}Question: {question}\nAnswer:"

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of an answer as it follows the prompt, and of the end of a turn."""
        text = answer if self.chat else " " + answer
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [*ids, self.tokenizer.eos_token_id]

    def inputs(self, images: Sequence[np.ndarray], question: str) -> dict[str, torch.Tensor]:
        """The model's inputs for one question about several images of one size.

        Parameters
        ----------
        images : sequence of uint8 arrays, (height, width, 3)
            Where `with_image` is False only their number counts.
        question : str

        Returns
        -------
        dict of tensors
            input_ids int64 (images, sequence), without padding, and what the family needs besides.
        """
        text = [self.prompt(question)] * len(images)
        pictures = [[Image.fromarray(image)] for image in images] if self.with_image else None
        # NOTE: the chat template has written the beginning of the text already.
        found = self.processor(
            images=pictures, text=text, add_special_tokens=False, return_tensors="pt"
        )
        return dict(found)

    @staticmethod
    def extended(
        inputs: dict[str, torch.Tensor], rows: Sequence[Sequence[int]]
    ) -> dict[str, torch.Tensor]:
        """Inputs with further ids behind each prompt; shorter rows are padded on the right."""
        length = max((len(row) for row in rows), default=0)
        if length == 0:
            return inputs
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        there = torch.zeros(len(rows), length, dtype=torch.int64)
        for row, more in enumerate(rows):
            ids[row, : len(more)] = torch.tensor(more, dtype=torch.int64)
            there[row, : len(more)] = 1
        further = {"input_ids": ids, "attention_mask": there}
        if "mm_token_type_ids" in inputs:  # what follows is text
            further["mm_token_type_ids"] = torch.zeros_like(ids)
        if "cross_attention_mask" in inputs:  # what follows sees what the prompt's end sees
            last = inputs["cross_attention_mask"][:, -1:]
            further["cross_attention_mask"] = last.expand(-1, length, *last.shape[2:])
        return {
            name: torch.cat([value, further[name].to(value)], 1) if name in further else value
            for name, value in inputs.items()
        }

    @torch.inference_mode()
    def answers(
        self,
        model: Any,
        subject_ids: Sequence[str],
        images: Sequence[np.ndarray],
        question: str,
        valid: Sequence[tuple[int, ...]],
    ) -> Answers:
        """Answers under a grammar to one question about one image of each subject.

        Parameters
        ----------
        model : PreTrainedModel or PeftModel
        subject_ids : sequence of str
        images : sequence of uint8 arrays, (height, width, 3)
        question : str
        valid : sequence of tuples of int
            Ids of each valid answer, from `answer_ids`.
        """
        inputs = self.inputs(images, question)

        def next_logits(beginning: tuple[int, ...]) -> torch.Tensor:
            rows = self.extended(inputs, [beginning] * len(images))
            rows = on_device(rows, model)
            return model(**rows, logits_to_keep=1, use_cache=False).logits[:, -1]

        return grammar_answers(subject_ids, next_logits, valid)


def on_device(inputs: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Inputs on the model's device, pictures in its number format."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
