"""Loading a checkpoint folder that training wrote, refusing one that is damaged or incomplete."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from cortexicon.cohorts import Cohort
from cortexicon.modeling import AVQLMForConditionalGeneration, AVQModel
from cortexicon.tokenization import AVQProcessor

from .errors import InferenceError


class Checkpoint(NamedTuple):
    """What one folder holds, ready to run.

    Attributes
    ----------
    folder : pathlib.Path
    model_type : {"avq", "avq_lm"}
    model : AVQModel or AVQLMForConditionalGeneration
        In evaluation mode.
    codec : AVQModel
        `model` itself, or the AVQ inside the language model.
    processor : AVQProcessor
        Holds `feature_extractor` and `tokenizer`.
    """

    folder: Path
    model_type: str
    model: AVQModel | AVQLMForConditionalGeneration
    codec: AVQModel
    processor: AVQProcessor

    @property
    def tokens_per_window(self) -> int:
        """Codes of one window of the parcellation that the feature extractor reads."""
        config, regions = self.codec.config, self.processor.feature_extractor.num_regions
        if config.token_layout == "grid" and regions is not None:
            return config.num_patches * regions
        return config.tokens_per_window


def load_checkpoint(folder: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Load model and processor of an AVQ or AVQ-LM checkpoint folder.

    Raises
    ------
    InferenceError
        The folder or a file of it is missing, its weights are truncated, incomplete or not finite,
        or it holds a model of another kind.
    """
    folder = Path(folder)
    model_type = _model_type(folder)
    model_class = AVQModel if model_type == "avq" else AVQLMForConditionalGeneration
    redo = "Copy or train the checkpoint again."
    try:
        model, loading = model_class.from_pretrained(folder, output_loading_info=True)
    except SafetensorError as error:
        raise InferenceError(
            f"{folder}: the weights (*.safetensors) are truncated or corrupted ({error}). {redo}"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise InferenceError(
            f"{folder}: expected every weight of {model_class.__name__}, found {len(missing)} "
            f"missing, such as {missing[0]}. {redo}"
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InferenceError(f"{folder}: weight {name} holds NaN or infinite values. {redo}")
    model = model.to(device).eval()
    codec = model if isinstance(model, AVQModel) else model.avq
    return Checkpoint(folder, model_type, model, codec, _processor(folder))


def fit_to_atlas(checkpoint: Checkpoint, cohort: Cohort, any_atlas: bool = False) -> Checkpoint:
    """The checkpoint as it reads `cohort`, which may be of another parcellation than it stores.

    The codec knows regions by their coordinates alone, so it reads any parcellation; but whoever
    wants that says so. Then labels and coordinates are the cohort's own.

    Parameters
    ----------
    checkpoint : Checkpoint
    cohort : Cohort
    any_atlas : bool
        False: another atlas than the checkpoint's is an error.

    Raises
    ------
    InferenceError
        Another atlas without `any_atlas`.
    """
    extractor = checkpoint.processor.feature_extractor
    if extractor.atlas in (None, cohort.atlas):
        return checkpoint
    if not any_atlas:
        raise InferenceError(
            f"{cohort.path or 'cohort'}: expected regions of atlas {extractor.atlas!r}, which "
            f"{checkpoint.folder} stores, found atlas {cohort.atlas!r}. Extract the series with "
            f"{extractor.atlas!r}, or have the regions of {cohort.atlas!r} read by their "
            "coordinates: any_atlas=True, on the command line --any-atlas."
        )
    fitted = checkpoint._replace(
        processor=AVQProcessor(
            extractor.for_atlas(cohort.atlas, cohort.labels, cohort.coordinates),
            checkpoint.processor.tokenizer,
            connectivity_tokens=checkpoint.processor.connectivity_tokens,
        )
    )
    fitted.processor.tokens_per_window = fitted.tokens_per_window
    return fitted


def _model_type(folder: Path) -> str:
    """`model_type` of the folder's config.json."""
    if not folder.is_dir():
        raise InferenceError(
            f"{folder}: expected a checkpoint folder, found "
            f"{'a file' if folder.exists() else 'nothing'}. Give the folder that training wrote."
        )
    path = folder / "config.json"
    if not path.is_file():
        raise InferenceError(
            f"{folder}: expected config.json in a checkpoint folder, found none. "
            "Give the folder that training wrote, such as runs/demo/avq."
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InferenceError(f"{path}: not valid JSON ({error}). Copy the file again.") from error
    found = config.get("model_type")
    if found not in ("avq", "avq_lm"):
        raise InferenceError(
            f"{path}: expected model_type 'avq' or 'avq_lm', found {found!r}. "
            "This folder holds a model of another kind."
        )
    return str(found)


def _processor(folder: Path) -> AVQProcessor:
    try:
        return AVQProcessor.from_pretrained(folder)
    except OSError as error:
        raise InferenceError(
            f"{folder}: the processor (tokenizer.json, processor_config.json) cannot be loaded: "
            f"{str(error).splitlines()[0]} Copy the whole folder that training wrote."
        ) from error
