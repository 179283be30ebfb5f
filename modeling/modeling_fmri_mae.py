"""A masked autoencoder of region x patch tokens, the field's usual alternative to codes."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import NystromformerConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.nystromformer.modeling_nystromformer import NystromformerLayer
from transformers.utils import ModelOutput

from .configuration_avq import ConfigurationError
from .configuration_fmri_mae import FMRIMAEConfig
from .inputs_avq import checked_coordinates, whole_mask
from .layers_avq import eager_attention


@dataclass
class FMRIMAEEncoderOutput(ModelOutput):
    """Features of windows.

    Attributes
    ----------
    last_hidden_state : float, shape (batch, regions, patches, hidden)
        0 where region or time are missing.
    token_mask : bool, shape (batch, regions, patches)
        Which tokens are there.
    pooled : float, shape (batch, feature_width)
        What the heads read, see `FMRIMAEConfig.pooling`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    token_mask: torch.BoolTensor | None = None
    pooled: torch.FloatTensor | None = None


@dataclass
class FMRIMAEOutput(ModelOutput):
    """One step of pre-training.

    Attributes
    ----------
    loss : float, scalar
        Mean squared error on the hidden tokens.
    reconstruction : float, shape (batch, time, regions)
    mask : bool, shape (batch, regions, patches)
        Tokens that were hidden and are scored.
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    mask: torch.BoolTensor | None = None


class MAEBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config, width, heads, intermediate):
        super().__init__()
        self.config, self.heads = config, heads
        self.norm_attention = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.norm_mlp = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, intermediate), nn.Linear(intermediate, width)

    def forward(self, x, key_mask):
        batch, tokens, _ = x.shape
        q, k, v = (
            self.qkv(self.norm_attention(x))
            .view(batch, tokens, 3, self.heads, -1)
            .permute(2, 0, 3, 1, 4)
        )
        # (batch, heads, tokens, head_dim)
        if self.config._attn_implementation == "eager":
            mixed = eager_attention(q, k, v, key_mask)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class NystromBlock(NystromformerLayer):
    """BrainLM's block: that of Nystromformer, whose depth-wise convolution sees token order."""

    def forward(self, x, key_mask):
        # Added to the attention scores, so it must be 0 or very small.
        bias = None
        if key_mask is not None:
            bias = torch.zeros(key_mask.shape, dtype=x.dtype, device=x.device)
            bias = bias.masked_fill(~key_mask, torch.finfo(x.dtype).min)
        return super().forward(x, bias)[0]


class RegionPosition(nn.Module):
    """Coordinates (..., 3) in mm to embeddings (..., width)."""

    def __init__(self, config, width):
        super().__init__()
        self.wavelength = float(config.position_wavelength)
        self.fourier = config.position == "fourier"
        inputs = 2 * config.position_features if self.fourier else 3
        self.project = nn.Linear(inputs, width)
        if self.fourier:
            self.register_buffer("frequencies", torch.zeros(3, config.position_features))

    def forward(self, coordinates):
        if self.fourier:
            angle = 2 * math.pi * coordinates @ self.frequencies / self.wavelength
            coordinates = torch.cat([angle.sin(), angle.cos()], -1)
        return self.project(coordinates)


def time_positions(patches, width, device):
    """Sines and cosines of the patch number, float32 (patches, width) (Vaswani 2017)."""
    rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000.0) / width))
    angle = torch.arange(patches, device=device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


class FMRIMAEModel(PreTrainedModel):
    """Encoder that is trained to fill hidden patches, with linear heads for clinical variables.

    Tricks used, one line each:

    * a token is one patch of one region; 75 % are hidden, and the encoder sees the others only
      (He et al. 2022);
    * a region is known by its MNI coordinates, so one checkpoint reads any parcellation, and a
      missing region is left out of attention and of the loss;
    * `block="nystrom"` and `position="linear"` make it BrainLM (Ortega Caro et al. 2023), whose
      checkpoints `cortexicon.inference.brainlm` reads. There, tokens reach the encoder in a random
      order even where none is hidden; here they keep theirs, so features repeat.
    """

    config: FMRIMAEConfig
    config_class = FMRIMAEConfig
    base_model_prefix = "fmri_mae"
    main_input_name = "input_values"
    _supports_sdpa = True

    def __init__(self, config: FMRIMAEConfig):
        super().__init__(config)
        width, narrow = config.hidden_size, config.decoder_hidden_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Linear(config.patch_length, width)
        self.position = RegionPosition(config, width)
        self.encoder = self._blocks(
            config.num_hidden_layers, width, config.num_attention_heads, config.intermediate_size
        )
        self.encoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_embedding = nn.Linear(width, narrow)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, narrow))
        self.decoder_position = RegionPosition(config, narrow)
        self.decoder = self._blocks(
            config.decoder_num_hidden_layers,
            narrow,
            config.decoder_num_attention_heads,
            config.decoder_intermediate_size,
        )
        self.decoder_norm = nn.LayerNorm(narrow, eps=config.layer_norm_eps)
        self.head_in = nn.Linear(narrow, narrow // 2)
        self.head_out = nn.Linear(narrow // 2, config.patch_length)
        self.set_targets(config.targets)
        self.post_init()

    def set_targets(self, targets):
        """Replace the heads by untrained ones for `targets` (see `FMRIMAEConfig`)."""
        self.config.targets = targets
        self.heads = nn.ModuleList(
            nn.Linear(self.config.feature_width, len(target.get("classes") or [0]))
            for target in targets or []
        )

    def _blocks(self, count, width, heads, intermediate):
        if self.config.block == "transformer":
            blocks = (MAEBlock(self.config, width, heads, intermediate) for _ in range(count))
            return nn.ModuleList(blocks)
        config = NystromformerConfig(
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=intermediate,
            layer_norm_eps=self.config.layer_norm_eps,
            **(self.config.nystrom or {}),
        )
        return nn.ModuleList(NystromBlock(config) for _ in range(count))

    @torch.no_grad()
    def _init_weights(self, module):
        # By the number of inputs, so that a patch's content weighs as much as its place: with
        # content too small the first minutes explain nothing of what is hidden.
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            wide = isinstance(module, nn.Linear)
            init.normal_(module.weight, std=module.in_features**-0.5 if wide else 0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, RegionPosition):
            if module.fourier:
                init.normal_(module.frequencies)
            else:  # coordinates are in mm
                init.normal_(module.project.weight, std=0.02)
        elif isinstance(module, FMRIMAEModel):
            init.normal_(module.cls_token, std=0.02)
            init.normal_(module.mask_token, std=0.02)

    # ------------------------------------------------------------------ inputs

    def _prepare(self, input_values, region_coordinates, region_mask, time_mask):
        """Patches (batch, regions, patches, length), coordinates, and which tokens are there."""
        if input_values.dim() != 3 or input_values.shape[1] % self.config.patch_length:
            raise ConfigurationError(
                "input_values must have shape (batch, time, regions) with a time of whole patches "
                f"of {self.config.patch_length} samples, found {tuple(input_values.shape)}."
            )
        batch, time, regions = input_values.shape
        coordinates = checked_coordinates(region_coordinates, self.config, regions)
        coordinates = coordinates.to(input_values.device, torch.float32)
        there = whole_mask(region_mask, "region_mask", batch, regions, input_values.device)
        heard = whole_mask(time_mask, "time_mask", batch, time, input_values.device)
        heard = heard.unflatten(1, (-1, self.config.patch_length)).all(-1)  # (batch, patches)
        tokens = there[:, :, None] & heard[:, None, :]
        if not bool(tokens.flatten(1).any(1).all()):
            raise ConfigurationError("A window has no region with a whole patch.")
        values = input_values.float().transpose(1, 2).unflatten(2, (-1, self.config.patch_length))
        return values.masked_fill(~tokens[..., None], 0.0), coordinates, tokens

    def _embed(self, values, coordinates):
        """Tokens (batch, regions, patches, hidden) before any block."""
        x = self.patch_embedding(values) + self.position(coordinates)[:, :, None]
        return x + time_positions(x.shape[2], x.shape[3], x.device)

    def _encode(self, tokens, key_mask):
        """Blocks over `cls` and tokens (batch, tokens, hidden); both come back normalised."""
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        for block in self.encoder:
            x = block(x, key_mask)
        return self.encoder_norm(x)

    def _tokens(self, values, coordinates, there):
        """Encoded tokens (batch, regions, patches, hidden) of whole windows, 0 where none is."""
        x = self._embed(values, coordinates).flatten(1, 2)
        x = self._encode(x, _keys(there.flatten(1)))
        return x[:, 1:].unflatten(1, values.shape[1:3]) * there[..., None]

    # ------------------------------------------------------------------ use

    def encode(self, input_values, region_coordinates=None, region_mask=None, time_mask=None):
        """Features of whole windows, nothing hidden.

        Parameters
        ----------
        input_values : float32, shape (batch, time, regions)
            z-scored; `time` a multiple of the patch length.
        region_coordinates : float, shape (batch or 1, regions, 3), mm, optional
        region_mask : bool, shape (batch, regions), optional
        time_mask : bool, shape (batch, time), optional

        Returns
        -------
        FMRIMAEEncoderOutput
        """
        values, coordinates, there = self._prepare(
            input_values, region_coordinates, region_mask, time_mask
        )
        x = self._tokens(values, coordinates, there)
        shape = (1, *values.shape[1:3])
        if self.config.pooling == "similarity":
            one = values[:1]
            silent = self._tokens(
                torch.zeros_like(one), coordinates[:1], one.new_ones(shape).bool()
            )
            pooled = _similarity((x - silent) * there[..., None])
        elif self.config.pooling == "mean":
            pooled = x.sum((1, 2)) / there.sum((1, 2))[:, None]
        else:
            pooled = (x.sum(2) / there.sum(2).clamp(min=1)[..., None]).flatten(1)
        return FMRIMAEEncoderOutput(last_hidden_state=x, token_mask=there, pooled=pooled)

    def forward(
        self,
        input_values,
        region_coordinates=None,
        region_mask=None,
        time_mask=None,
        noise=None,
    ):
        """Hide tokens, fill them again, and score what was hidden.

        Parameters
        ----------
        input_values, region_coordinates, region_mask, time_mask
            As in `encode`.
        noise : float, shape (batch, regions x patches), optional
            The tokens of the smallest values stay; drawn anew where None.

        Returns
        -------
        FMRIMAEOutput
        """
        values, coordinates, there = self._prepare(
            input_values, region_coordinates, region_mask, time_mask
        )
        present = there.flatten(1)
        batch, total = present.shape
        if noise is None:
            noise = torch.rand(batch, total, device=values.device)
        order = noise.masked_fill(~present, torch.inf).argsort(1)
        keep = order[:, : max(1, int(total * (1 - self.config.mask_ratio)))]
        tokens = self._embed(values, coordinates).flatten(1, 2)
        width = tokens.shape[-1]
        seen = tokens.gather(1, keep[..., None].expand(-1, -1, width))
        x = self.decoder_embedding(self._encode(seen, _keys(present.gather(1, keep))))

        narrow = x.shape[-1]
        filled = self.mask_token.to(x.dtype).expand(batch, total, -1)
        filled = filled.scatter(1, keep[..., None].expand(-1, -1, narrow), x[:, 1:])
        filled = filled.unflatten(1, values.shape[1:3])
        filled = filled + self.decoder_position(coordinates)[:, :, None]
        filled = filled + time_positions(filled.shape[2], narrow, x.device)
        x = torch.cat([x[:, :1], filled.flatten(1, 2).to(x.dtype)], 1)
        keys = _keys(present)
        for block in self.decoder:
            x = block(x, keys)
        x = self.head_out(F.leaky_relu(self.head_in(self.decoder_norm(x)), 0.1))[:, 1:].float()
        if self.config.tanh_output:
            x = x.tanh()
        found = x.unflatten(1, values.shape[1:3])  # (batch, regions, patches, length)
        hidden = torch.ones_like(present).scatter(1, keep, False) & present
        error = (found - values).square().mean(-1).flatten(1)
        return FMRIMAEOutput(
            loss=(error * hidden).sum() / hidden.sum().clamp(min=1),
            reconstruction=found.flatten(2).transpose(1, 2),
            mask=hidden.unflatten(1, values.shape[1:3]),
        )

    def read_out(self, pooled):
        """What the heads say of features (scans, feature_width), a dictionary by target.

        Numbers: float (scans,). Classes: scores (scans, classes) in the order of the target's
        `classes`; they are no probabilities.
        """
        found = {}
        for target, head in zip(self.config.targets or [], self.heads, strict=True):
            scores = head(pooled.to(head.weight.dtype))
            if target["kind"] == "number":
                value = scores[:, 0].exp() if target["minimum"] > 0 else scores[:, 0]
                scores = value.clamp(target["minimum"], target["maximum"])
            found[target["name"]] = scores
        return found


def _similarity(x):
    """Cosine of the tokens of every two regions, mean over patches; (batch, pairs of regions).

    `x` (batch, regions, patches, hidden): what the signal changes in each token, so that a region's
    place does not count.
    """
    x = F.normalize(x.float(), dim=-1)
    alike = torch.einsum("brph,bsph->brs", x, x) / x.shape[2]
    first, second = torch.triu_indices(x.shape[1], x.shape[1], 1, device=x.device)
    return alike[:, first, second]


def _keys(there):
    """Attention mask over `cls` and tokens, bool (batch, 1, 1, 1 + tokens), None where all are."""
    if bool(there.all()):
        return None
    return F.pad(there, (1, 0), value=True)[:, None, None, :]


FMRIMAEModel.register_for_auto_class("AutoModel")
