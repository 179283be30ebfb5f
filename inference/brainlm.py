"""BrainLM's checkpoints (Ortega Caro et al. 2023) as an `FMRIMAEModel`, encoder and decoder.

Its published files are a `config.json` (model_type `brainlm_mae`) and `pytorch_model.bin` or
`model.safetensors`; its regions are those of the atlas A424, whose coordinates lie in a text file
of four columns. The weights are renamed, nothing is trained or rounded.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from cortexicon.modeling import FMRIMAEConfig, FMRIMAEModel

from .errors import InferenceError

# Beginning of a name in BrainLM -> in FMRIMAEModel.
_NAMES = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.signal_embedding_projection.": "patch_embedding.",
    "vit.embeddings.xyz_embedding_projection.": "position.project.",
    "vit.encoder.layer.": "encoder.",
    "vit.layernorm.": "encoder_norm.",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_embed.": "decoder_embedding.",
    "decoder.decoder_xyz_projection.": "decoder_position.project.",
    "decoder.decoder_layers.": "decoder.",
    "decoder.decoder_norm.": "decoder_norm.",
    "decoder.decoder_pred1.": "head_in.",
    "decoder.decoder_pred2.": "head_out.",
}
# Computed here: the sines of time, and what the image model that it was made from left behind.
_LEFT_BEHIND = ("pos_embedding.pe", "position_embeddings", "decoder_pos_embed", "patch_embeddings")
_NYSTROM = (
    "num_landmarks",
    "segment_means_seq_len",
    "conv_kernel_size",
    "inv_coeff_init_option",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "hidden_act",
)


def read_brainlm_coordinates(path: str | Path) -> np.ndarray:
    """Centres of BrainLM's regions from its text file of index, x, y, z.

    Returns
    -------
    float32 array, shape (regions, 3)
        mm, in the order of the index.

    Raises
    ------
    InferenceError
        Another layout.
    """
    try:
        table = np.loadtxt(path, dtype=np.float32, ndmin=2)
    except (OSError, ValueError) as error:
        raise InferenceError(
            f"{path}: expected rows of index, x, y and z, could not read them ({error})."
        ) from error
    if table.shape[1] != 4 or not np.array_equal(np.sort(table[:, 0]), np.arange(len(table)) + 1):
        raise InferenceError(
            f"{path}: expected four columns, an index from 1 to the number of regions and their "
            f"centres in mm; found shape {table.shape}."
        )
    return table[np.argsort(table[:, 0]), 1:]


def load_brainlm(
    folder: str | Path, coordinates: np.ndarray | None = None, sampling_interval: float = 0.735
) -> FMRIMAEModel:
    """A checkpoint of BrainLM's format as a model of ours; it encodes, and fills masked patches.

    Parameters
    ----------
    folder : path
        Holds config.json, and model.safetensors or pytorch_model.bin.
    coordinates : float array, shape (regions, 3), mm, optional
        Kept in the model's configuration, e.g. `read_brainlm_coordinates` of A424.
    sampling_interval : float
        Seconds between samples of what it was trained on; that of UK Biobank by default.

    Returns
    -------
    FMRIMAEModel
        In evaluation mode. Its input is what BrainLM's is: the caller scales it as it was scaled
        there (each region by its median and quartiles over training people).

    Raises
    ------
    InferenceError
        Files missing, another model, or weights that do not fit.
    """
    folder = Path(folder)
    config = _brainlm_config(folder)
    weights = _brainlm_weights(folder)
    if coordinates is not None and len(coordinates) != config["num_brain_voxels"]:
        raise InferenceError(
            f"{folder} was trained on {config['num_brain_voxels']} regions, found "
            f"{len(coordinates)} coordinates. Pass those of its atlas (A424 has 424)."
        )
    if config["hidden_size"] != config["decoder_hidden_size"]:
        raise InferenceError(
            f"{folder}: hidden_size {config['hidden_size']} and decoder_hidden_size "
            f"{config['decoder_hidden_size']} differ; BrainLM's decoder adds one to the other."
        )
    model = FMRIMAEModel(
        FMRIMAEConfig(
            sampling_interval=sampling_interval,
            window_length=config["num_timepoints_per_voxel"],
            patch_length=config["timepoint_patching_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"],
            decoder_hidden_size=config["decoder_hidden_size"],
            decoder_intermediate_size=config["decoder_intermediate_size"],
            decoder_num_hidden_layers=config["decoder_num_hidden_layers"],
            decoder_num_attention_heads=config["decoder_num_attention_heads"],
            mask_ratio=config["mask_ratio"],
            position="linear",
            block="nystrom",
            nystrom={name: config[name] for name in _NYSTROM if name in config},
            layer_norm_eps=config["layer_norm_eps"],
            tanh_output=bool(config.get("use_tanh_decoder", False)),
            atlas="A424" if config["num_brain_voxels"] == 424 else None,
            region_coordinates=None if coordinates is None else np.asarray(coordinates).tolist(),
        )
    )
    renamed = {}
    for name, tensor in weights.items():
        if any(part in name for part in _LEFT_BEHIND):
            continue
        start = next((start for start in _NAMES if name.startswith(start)), None)
        if start is None:
            raise InferenceError(f"{folder}: weight {name} is none of BrainLM's.")
        renamed[_NAMES[start] + name[len(start) :]] = tensor.float()
    try:
        model.load_state_dict(renamed)
    except RuntimeError as error:
        raise InferenceError(
            f"{folder}: the weights do not fit its config.json: {error}"
        ) from error
    return model.eval()


def _brainlm_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InferenceError(f"{path}: expected BrainLM's configuration ({error}).") from error
    if config.get("model_type") != "brainlm_mae":
        raise InferenceError(
            f"{path}: expected model_type brainlm_mae, found {config.get('model_type')!r}."
        )
    return config


def _brainlm_weights(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / "model.safetensors").is_file():
        return load_file(folder / "model.safetensors")
    path = folder / "pytorch_model.bin"
    if not path.is_file():
        raise InferenceError(f"{folder}: expected model.safetensors or pytorch_model.bin.")
    # The published format is a pickle; only tensors are taken out of it.
    return torch.load(path, map_location="cpu", weights_only=True)
