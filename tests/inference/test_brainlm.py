"""A tiny checkpoint in BrainLM's format, written here, computes here what it computed there.

The reference below follows the published architecture, written out with the layers of
transformers that it is made of.
"""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import NystromformerConfig
from transformers.models.nystromformer.modeling_nystromformer import NystromformerLayer

from cortexicon.inference.brainlm import load_brainlm, read_brainlm_coordinates
from cortexicon.inference.errors import InferenceError

CONFIG = {
    "model_type": "brainlm_mae",
    "architectures": ["BrainLMForPretraining"],
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "decoder_num_attention_heads": 2,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 20,
    "num_brain_voxels": 424,
    "num_timepoints_per_voxel": 12,
    "mask_ratio": 0.75,
    "timepoint_patching_size": 4,
    "use_tanh_decoder": False,
    "segment_means_seq_len": 64,
    "num_landmarks": 64,
    "conv_kernel_size": 65,
    "inv_coeff_init_option": False,
    "image_size": 224,
}


class Reference(nn.Module):
    """BrainLM, for one mask; names of its weights are those of the published files."""

    def __init__(self, values):
        super().__init__()
        width = values["hidden_size"]
        layer = {
            name: value
            for name, value in values.items()
            if name in vars(NystromformerConfig()) and name != "architectures"
        }
        layer = {name: layer[name] for name in layer if name not in ("model_type", "image_size")}
        deep = {**layer, "intermediate_size": values["decoder_intermediate_size"]}
        length, eps = values["timepoint_patching_size"], values["layer_norm_eps"]
        self.vit, self.decoder = nn.Module(), nn.Module()
        self.vit.embeddings, self.vit.encoder = nn.Module(), nn.Module()
        embeddings, decoder = self.vit.embeddings, self.decoder
        embeddings.cls_token = nn.Parameter(torch.randn(1, 1, width))
        embeddings.signal_embedding_projection = nn.Linear(length, width)
        embeddings.xyz_embedding_projection = nn.Linear(3, width)
        embeddings.pos_embedding = self.sines(width)
        self.vit.encoder.layer = nn.ModuleList(
            NystromformerLayer(NystromformerConfig(**layer))
            for _ in range(values["num_hidden_layers"])
        )
        self.vit.layernorm = nn.LayerNorm(width, eps=eps)
        decoder.mask_token = nn.Parameter(torch.randn(1, 1, width))
        decoder.decoder_embed = nn.Linear(width, width)
        decoder.decoder_xyz_projection = nn.Linear(3, width)
        decoder.pos_embedding = self.sines(width)
        decoder.decoder_layers = nn.ModuleList(
            NystromformerLayer(NystromformerConfig(**deep))
            for _ in range(values["decoder_num_hidden_layers"])
        )
        decoder.decoder_norm = nn.LayerNorm(width, eps=eps)
        decoder.decoder_pred1 = nn.Linear(width, width // 2)
        decoder.decoder_pred2 = nn.Linear(width // 2, length)

    @staticmethod
    def sines(width):
        module = nn.Module()
        table = torch.zeros(5000, width)
        for place in range(20):
            for k in range(0, width, 2):
                angle = place / 10000 ** (k / width)
                table[place, k], table[place, k + 1] = math.sin(angle), math.cos(angle)
        module.register_buffer("pe", table)
        return module

    def forward(self, signal, xyz, order, kept):
        """Signal (batch, regions, time); `order` (tokens,): the first `kept` are seen."""
        embeddings, decoder = self.vit.embeddings, self.decoder
        length = embeddings.signal_embedding_projection.in_features
        patches = signal.reshape(*signal.shape[:2], -1, length)
        x = embeddings.signal_embedding_projection(patches)
        x = x + embeddings.xyz_embedding_projection(xyz)[:, :, None]
        x = (x + embeddings.pos_embedding.pe[: x.shape[2]]).flatten(1, 2)
        x = x[:, order[:kept]]
        x = torch.cat([embeddings.cls_token.expand(len(x), -1, -1), x], 1)
        for layer in self.vit.encoder.layer:
            x = layer(x)[0]
        latent = self.vit.layernorm(x)
        x = decoder.decoder_embed(latent)
        whole = decoder.mask_token.repeat(len(x), len(order), 1)
        whole[:, order[:kept]] = x[:, 1:]
        whole = whole.reshape(len(x), signal.shape[1], -1, whole.shape[-1])
        whole = whole + decoder.decoder_xyz_projection(xyz)[:, :, None]
        whole = (whole + decoder.pos_embedding.pe[: whole.shape[2]]).flatten(1, 2)
        x = torch.cat([x[:, :1], whole], 1)
        for layer in decoder.decoder_layers:
            x = layer(x)[0]
        x = decoder.decoder_pred1(decoder.decoder_norm(x))
        x = decoder.decoder_pred2(nn.functional.leaky_relu(x, 0.1))[:, 1:]
        return latent, x.reshape(patches.shape)


def write(folder, model, binary=False, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}), encoding="utf-8")
    weights = {name: t.contiguous() for name, t in model.state_dict().items()}
    if binary:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def coordinates():
    return np.random.default_rng(0).normal(scale=30, size=(424, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(3)
    return Reference(CONFIG).eval()


@pytest.mark.parametrize("binary", [False, True])
@torch.no_grad()
def test_encoder_and_decoder_compute_what_brainlm_computes(
    reference, coordinates, tmp_path, binary
):
    model = load_brainlm(write(tmp_path / "brainlm", reference, binary), coordinates)
    signal = torch.randn(2, 424, 12)
    xyz = torch.from_numpy(coordinates)[None].expand(2, -1, -1)

    tokens = 424 * 3
    latent, _ = reference(signal, xyz, torch.arange(tokens), tokens)
    found = model.encode(signal.transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(found.flatten(1, 2), latent[:, 1:], rtol=1e-4, atol=1e-4)

    noise = torch.rand(1, tokens)
    _, filled = reference(signal, xyz, noise[0].argsort(), int(tokens * 0.25))
    out = model(signal.transpose(1, 2), noise=noise.expand(2, -1))
    wanted = filled.flatten(2).transpose(1, 2)
    torch.testing.assert_close(out.reconstruction, wanted, rtol=1e-4, atol=1e-4)


def test_the_coordinates_of_its_atlas(data_folder):
    places = read_brainlm_coordinates(data_folder / "atlases" / "A424_Coordinates.dat")
    assert places.shape == (424, 3)
    assert places[0].tolist() == [14, -78, 4]
    assert np.abs(places).max() < 120


def test_another_layout_of_coordinates_is_refused(tmp_path):
    path = tmp_path / "places.dat"
    path.write_text("1 2 3\n4 5 6\n", encoding="utf-8")
    with pytest.raises(InferenceError, match="four columns"):
        read_brainlm_coordinates(path)


def test_what_is_no_brainlm_is_refused(reference, coordinates, tmp_path):
    with pytest.raises(InferenceError, match="model_type brainlm_mae"):
        load_brainlm(write(tmp_path / "a", reference, model_type="vit_mae"))
    with pytest.raises(InferenceError, match="424 regions, found 3"):
        load_brainlm(write(tmp_path / "b", reference), coordinates[:3])
    with pytest.raises(InferenceError, match="do not fit"):
        load_brainlm(write(tmp_path / "c", reference, intermediate_size=25))
    (tmp_path / "d").mkdir()
    with pytest.raises(InferenceError, match="BrainLM's configuration"):
        load_brainlm(tmp_path / "d")
