"""Parts of the AVQ: region positions, mixing into latents and back, blocks, P, classifier."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class RegionPositions(nn.Module):
    """Fourier features + MLP of MNI coordinates in mm: (batch or 1, regions, 3 -> hidden)."""

    def __init__(self, config):
        super().__init__()
        self.wavelength = float(config.position_wavelength)
        # A fixed random projection; persistent, because the weights mean nothing without it.
        self.register_buffer("frequencies", torch.zeros(3, config.position_features))
        self.mlp = nn.Sequential(
            nn.Linear(2 * config.position_features + 3, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.GELU(),
        )

    def forward(self, coordinates):
        phase = coordinates @ self.frequencies * (2 * math.pi / self.wavelength)
        return self.mlp(torch.cat([phase.sin(), phase.cos(), coordinates / 50.0], dim=-1))


class RegionsToLatents(nn.Module):
    """Mix regions into latents by weights of positions alone, one linear map per head."""

    def __init__(self, config, in_features):
        super().__init__()
        self.heads, self.dim, self.latents = (
            config.mixing_heads,
            config.mixing_dim,
            config.num_latents,
        )
        self.value = nn.Linear(in_features, self.heads * self.dim, bias=False)
        self.weight = nn.Linear(config.hidden_size, self.heads * self.latents)
        self.out = nn.Linear(self.heads * self.dim, config.hidden_size)

    def forward(self, patches, positions, region_mask):
        batch, steps, regions, _ = patches.shape  # (batch, patches, regions, in_features)
        value = self.value(patches) * region_mask[:, None, :, None]
        value = value.view(batch, steps, regions, self.heads, self.dim)
        weight = (
            self.weight(positions)
            .view(-1, regions, self.heads, self.latents)
            .expand(batch, -1, -1, -1)
        )
        # The count of regions present, not of all, keeps the scale alike for any parcellation and
        # any missing region.
        scale = 14.0 / region_mask.sum(-1).clamp(min=1)  # (batch,)
        weight = weight * scale.to(weight.dtype)[:, None, None, None]
        mixed = torch.einsum("bprhd,brhm->bpmhd", value, weight)
        return self.out(mixed.flatten(-2))  # (batch, patches, latents, hidden)


class LatentsToRegions(nn.Module):
    """Read latents back anywhere by weights of positions alone, one linear map per head."""

    def __init__(self, config, out_features):
        super().__init__()
        self.heads, self.dim, self.latents = (
            config.mixing_heads,
            config.mixing_dim,
            config.num_latents,
        )
        self.value = nn.Linear(config.hidden_size, self.heads * self.dim)
        self.weight = nn.Linear(config.hidden_size, self.heads * self.latents)
        self.out = nn.Linear(self.heads * self.dim, out_features)

    def forward(self, latents, positions):
        batch, steps, count, _ = latents.shape  # (batch, patches, latents, hidden)
        value = self.value(latents).view(batch, steps, count, self.heads, self.dim)
        weight = self.weight(positions).view(positions.shape[0], -1, self.heads, self.latents)
        weight = weight.expand(batch, -1, -1, -1) / math.sqrt(self.latents)
        read = torch.einsum("bpmhd,brhm->bprhd", value, weight)
        return self.out(read.flatten(-2))  # (batch, patches, regions, out_features)


class AVQBlock(nn.Module):
    """Pre-norm transformer block over all latents of a window."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.heads, self.dropout = config.num_attention_heads, float(config.dropout)
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = (
            nn.Linear(width, config.intermediate_size),
            nn.Linear(config.intermediate_size, width),
        )

    def forward(self, x, key_mask):
        batch, tokens, _ = x.shape
        q, k, v = (
            self.qkv(self.norm_attention(x))
            .view(batch, tokens, 3, self.heads, -1)
            .permute(2, 0, 3, 1, 4)
        )
        # (batch, heads, tokens, head_dim)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
        x = x + F.dropout(
            self.attention_out(mixed.transpose(1, 2).flatten(2)), self.dropout, self.training
        )
        return x + F.dropout(
            self.down(F.gelu(self.up(self.norm_mlp(x)))), self.dropout, self.training
        )


class LatentTransformer(nn.Module):
    """Blocks over (patches x latents) tokens with learned patch and latent embeddings."""

    def __init__(self, config, layers):
        super().__init__()
        self.latent_embedding = nn.Parameter(torch.zeros(config.num_latents, config.hidden_size))
        self.patch_embedding = nn.Parameter(torch.zeros(config.num_patches, config.hidden_size))
        self.blocks = nn.ModuleList(AVQBlock(config) for _ in range(layers))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, latents, patch_mask):
        batch, steps, count, width = latents.shape  # (batch, patches, latents, hidden)
        x = latents + self.patch_embedding[:steps, None] + self.latent_embedding
        key_mask = None
        if not bool(patch_mask.all()):
            # A row whose every patch is padding attends everywhere instead of nowhere (no NaN).
            keep = patch_mask | ~patch_mask.any(-1, keepdim=True)
            key_mask = keep.repeat_interleave(count, dim=1)[:, None, None, :]
        x = x.flatten(1, 2)
        for block in self.blocks:
            x = block(x, key_mask)
        return self.norm(x).view(batch, steps, count, width)


class TextProjection(nn.Module):
    """P: unit-norm codes (..., code_dim) -> embeddings (..., text_width) of the language model.

    Linear plus a small residual MLP; its output is shifted and scaled by the text table's mean and
    SD, so that no later step rescales it: the language model's rows of codes are these numbers,
    bit for bit.
    """

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.code_dim, config.text_width)
        self.up = nn.Linear(config.code_dim, config.projection_hidden_size)
        self.down = nn.Linear(config.projection_hidden_size, config.text_width)
        self.input_scale = math.sqrt(config.code_dim)
        self.register_buffer("text_mean", torch.zeros(config.text_width))
        self.register_buffer("text_scale", torch.ones(()))

    def forward(self, quantized):
        x = quantized * self.input_scale
        return self.text_mean + self.text_scale * (self.linear(x) + self.down(F.gelu(self.up(x))))

    def standardize(self, embeddings):
        """Embeddings (..., text_width) in units of the text table's SD around its mean."""
        return (embeddings - self.text_mean) / self.text_scale


class DomainClassifier(nn.Module):
    """Is this embedding (..., text_width) of text or of a code? One logit, positive = text."""

    def __init__(self, config):
        super().__init__()
        hidden = config.classifier_hidden_size
        self.layers = nn.Sequential(
            nn.Linear(config.text_width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, embeddings):
        return self.layers(embeddings.to(self.layers[0].weight.dtype))[..., 0].float()
