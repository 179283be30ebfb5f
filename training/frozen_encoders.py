"""Encoders whose features of windows a language model reads, all behind one call."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoFeatureExtractor, AutoModelForImageTextToText

from cortexicon.cohorts import Cohort
from cortexicon.evaluation import networks_of
from cortexicon.inference import fit_to_atlas, load_checkpoint
from cortexicon.inference.image_questions import (
    ImageQuestions,
    ScanImage,
    load_processor,
    on_device,
)
from cortexicon.inference.predict import window_starts
from cortexicon.inference.vlm import load_vlm
from cortexicon.modeling import FMRIMAEModel
from cortexicon.tokenization import AVQFeatureExtractor

from .arguments import TrainingError
from .collators import PreparedScans, prepare_scans
from .vlm import Pictures

ENCODERS = ("avq", "mae", "vision")


@dataclass
class FrozenEncoder:
    """One of the encoders, on a device, ready to read the cohort it was loaded for.

    Attributes
    ----------
    kind : str
        avq, mae or vision.
    extractor : AVQFeatureExtractor
        Checks, resamples and z-scores scans for it.
    features : function
        From the scans of one part, the place of a scan and window starts (windows,) to features,
        float32 (windows, features, width); one of all windows where only their mean says something.
    fingerprint : str
        Of the weights.
    """

    kind: str
    extractor: AVQFeatureExtractor
    features: Callable[[PreparedScans, int, np.ndarray], torch.Tensor]
    fingerprint: str


def load_encoder(
    kind: str, folder: str, cohort: Cohort, device: torch.device, image: dict[str, Any]
) -> FrozenEncoder:
    """The encoder of `folder`.

    Parameters
    ----------
    kind : {"avq", "mae", "vision"}
    folder : str
        Of `train avq`, `train mae` or `train vlm`; for "vision" also a published Qwen-VL or Mllama,
        as a folder or a Hub id.
    cohort : Cohort
    device : torch.device
    image : dict
        Fields of `ScanImage`, for a published model of "vision"; one of `train vlm` has its own.

    Raises
    ------
    TrainingError
        Unknown kind, or a folder that is not there.
    """
    if kind not in ENCODERS:
        raise TrainingError(f"encoder must be one of {', '.join(ENCODERS)}, found {kind!r}.")
    if kind != "vision" and not (Path(folder) / "model.safetensors").is_file():
        raise TrainingError(
            f"{folder} holds no trained encoder. Train it first: cortexicon train {kind} CONFIG."
        )
    load = {"avq": _avq, "mae": _mae}.get(kind)
    if load is not None:
        return load(folder, cohort, device)
    return _vision(folder, cohort, device, image)


def _windows(scans: PreparedScans, place: int, starts: np.ndarray, length: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([scans.series[place][s : s + length] for s in starts]))


def _avq(folder: str, cohort: Cohort, device: torch.device) -> FrozenEncoder:
    checkpoint = fit_to_atlas(load_checkpoint(folder, device), cohort)
    codec = checkpoint.codec.eval()

    def features(scans: PreparedScans, place: int, starts: np.ndarray) -> torch.Tensor:
        windows = _windows(scans, place, starts, codec.config.window_length).to(device)
        mask = torch.from_numpy(scans.region_masks[place]).expand(len(windows), -1).to(device)
        places = torch.from_numpy(scans.region_coordinates)[None].to(device)
        # What `AVQLMForConditionalGeneration` reads too with fmri_input="features".
        vectors, _ = codec._encode(*codec._prepare(windows, places, mask, None))
        return codec.projection(F.normalize(vectors.float(), dim=-1))

    extractor = checkpoint.processor.feature_extractor
    return FrozenEncoder("avq", extractor, features, codec.codebook_fingerprint())


def _mae(folder: str, cohort: Cohort, device: torch.device) -> FrozenEncoder:
    model = FMRIMAEModel.from_pretrained(folder).to(device).eval()
    if device.type == "cpu":
        model.set_attn_implementation("eager")
    extractor = AutoFeatureExtractor.from_pretrained(folder)

    def features(scans: PreparedScans, place: int, starts: np.ndarray) -> torch.Tensor:
        windows = _windows(scans, place, starts, model.config.window_length).to(device)
        mask = torch.from_numpy(scans.region_masks[place]).expand(len(windows), -1).to(device)
        places = torch.from_numpy(scans.region_coordinates)[None].to(device)
        found = model.encode(windows, places, region_mask=mask)
        if model.config.pooling == "similarity":  # one matrix a scan, a row for each region
            regions = windows.shape[2]
            first, second = torch.triu_indices(regions, regions, 1)
            alike = torch.eye(regions, device=device)
            alike[first, second] = alike[second, first] = found.pooled.mean(0)
            return alike[None]
        there = found.token_mask.sum(2).clamp(min=1)[..., None]
        return found.last_hidden_state.sum(2) / there  # one feature a region

    return FrozenEncoder("mae", extractor, features, _fingerprint(model.encoder))


def _vision(
    folder: str, cohort: Cohort, device: torch.device, image: dict[str, Any]
) -> FrozenEncoder:
    if (Path(folder) / "questions.json").is_file():
        loaded = load_vlm(folder)
        model, questions, drawn = loaded.model, loaded.questions, loaded.image
        model = getattr(model, "get_base_model", lambda: model)()
    else:
        family = str(image.get("family", ""))
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
        questions = ImageQuestions(load_processor(family, folder))
        drawn = ScanImage(**{key: value for key, value in image.items() if key != "family"})
    model = model.to(device).eval()
    extractor = AVQFeatureExtractor(
        sampling_interval=drawn.sampling_interval,
        window_length=drawn.window_length,
        patch_length=1,
        atlas=cohort.atlas,
        region_labels=list(cohort.labels),
        region_coordinates=cohort.coordinates.tolist(),
    )
    networks = networks_of(cohort.regions)

    def features(scans: PreparedScans, place: int, starts: np.ndarray) -> torch.Tensor:
        pictures = Pictures(drawn, scans, networks)
        subject = scans.subject_ids[place]
        inputs = questions.inputs([pictures.draw(subject, int(s)) for s in starts], "?")
        inputs = on_device(inputs, model)
        if "aspect_ratio_ids" in inputs:  # Mllama: tiles x patches
            names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
            found = model.model.vision_model(**{name: inputs[name] for name in names})
            return found.last_hidden_state.flatten(1, -2).float()
        found = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        return torch.stack(list(found.pooler_output)).float()

    vision = (
        model.model.vision_model if hasattr(model.model, "vision_model") else model.model.visual
    )
    return FrozenEncoder("vision", extractor, features, _fingerprint(vision))


def _fingerprint(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(json.dumps([name, list(weight.shape)]).encode())
        digest.update(weight.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class ScanFeatures:
    """Features of the windows of scans.

    Attributes
    ----------
    subject_ids : list of str
    values : float16 array, shape (scans, windows, features, width)
    refused : dict of str to str
    """

    subject_ids: list[str]
    values: np.ndarray
    refused: dict[str, str]


@torch.inference_mode()
def encode_features(
    encoder: FrozenEncoder,
    cohort: Cohort,
    subjects: list[str],
    windows: int,
    name: str,
    quiet: bool = False,
) -> ScanFeatures:
    """Features of `windows` windows spread evenly over each scan of `subjects`."""
    scans = prepare_scans(cohort, encoder.extractor, subjects, name, quiet)
    found = []
    for place in tqdm(range(len(scans)), f"encode {name}", mininterval=2.0, disable=quiet):
        length = len(scans.series[place])
        starts = window_starts(length, encoder.extractor.window_length, windows, 1).ravel()
        values = encoder.features(scans, place, starts).float().cpu()
        if not bool(torch.isfinite(values).all()):
            raise TrainingError(f"Features of {scans.subject_ids[place]} are not finite.")
        # Half the memory; what is lost is far below what a window varies by.
        found.append(values.clamp(-6e4, 6e4).half().numpy())
    return ScanFeatures(scans.subject_ids, np.stack(found), scans.refused)
