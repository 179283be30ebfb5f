"""Parts of the AVQ: region positions, mixing into latents and back, blocks, P, classifier."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def position_size(config) -> int:
    """Width of a region's position; hidden_size where the configuration leaves it open."""
    return config.position_size or config.hidden_size


class RegionPositions(nn.Module):
    """Fourier features + MLP of MNI coordinates in mm: (batch or 1, regions, 3 -> position_size).

    The width bounds how many different maps of the regions the mixing can hold.
    """

    def __init__(self, config):
        super().__init__()
        self.wavelength = float(config.position_wavelength)
        # A fixed random projection; persistent, because the weights mean nothing without it.
        self.register_buffer("frequencies", torch.zeros(3, config.position_features))
        self.mlp = nn.Sequential(
            nn.Linear(2 * config.position_features + 3, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, position_size(config)),
            nn.GELU(),
        )

    def forward(self, coordinates):
        # Half precision would blur millimetres.
        with torch.autocast(coordinates.device.type, enabled=False):
            phase = coordinates @ self.frequencies * (2 * math.pi / self.wavelength)
            return self.mlp(torch.cat([phase.sin(), phase.cos(), coordinates / 50.0], dim=-1))


class RegionsToLatents(nn.Module):
    """Mix regions into latents by weights of positions alone, one linear map per head.

    The regions are contracted first, in one matrix product, so the cost hardly depends on how many
    heads there are.
    """

    def __init__(self, config, in_features):
        super().__init__()
        self.heads, self.latents = config.mixing_heads, config.num_latents
        self.weight = nn.Linear(position_size(config), self.heads * self.latents)
        self.out = nn.Linear(in_features * self.heads, config.hidden_size)

    def forward(self, values, positions, region_mask):
        batch, steps, features, _ = values.shape  # (batch, patches, features, regions)
        # The count of regions present, not of all, keeps the scale alike for any parcellation and
        # any missing region.
        scale = region_mask * (14.0 / region_mask.sum(-1, keepdim=True).clamp(min=1))
        values = values * scale.to(values.dtype)[:, None, None]
        mixed = multiply_shared(values.flatten(1, 2), self.weight(positions))
        mixed = mixed.view(batch, steps, features, self.heads, self.latents)
        # (batch, patches, latents, hidden)
        return self.out(mixed.permute(0, 1, 4, 2, 3).flatten(-2))


class LatentsToRegions(nn.Module):
    """Read latents back anywhere by weights of positions alone, one linear map per head."""

    def __init__(self, config, out_features):
        super().__init__()
        self.heads, self.latents = config.mixing_heads, config.num_latents
        self.value = nn.Linear(config.hidden_size, self.heads * out_features)
        self.weight = nn.Linear(position_size(config), self.heads * self.latents)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, latents, positions):
        batch, steps, count, _ = latents.shape  # (batch, patches, latents, hidden)
        value = self.value(latents).view(batch, steps, count, self.heads, -1)
        value = value.permute(0, 1, 4, 3, 2).flatten(-2).flatten(1, 2)
        weight = self.weight(positions).transpose(1, 2) / math.sqrt(self.latents * self.heads)
        read = multiply_shared(value, weight)
        # (batch, patches, out_features, regions)
        return read.view(batch, steps, -1, read.shape[-1]) + self.bias[:, None]


def multiply_shared(rows, matrix):
    """rows (batch, rows, k) times matrix (batch or 1, k, columns)."""
    return rows @ (matrix[0] if matrix.shape[0] == 1 else matrix)


class AVQBlock(nn.Module):
    """Pre-norm transformer block over all latents of a window."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.config = config
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
        if self.config._attn_implementation == "eager":
            mixed = eager_attention(q, k, v, key_mask)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
        x = x + F.dropout(
            self.attention_out(mixed.transpose(1, 2).flatten(2)), self.dropout, self.training
        )
        return x + F.dropout(
            self.down(F.gelu(self.up(self.norm_mlp(x)))), self.dropout, self.training
        )


def eager_attention(query, key, value, key_mask):
    """Attention written out: on CPU its backward pass is several times faster than sdpa's."""
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).to(value.dtype) @ value


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
        # Always float32: these numbers become rows of the language model's table.
        with torch.autocast(quantized.device.type, enabled=False):
            x = quantized * self.input_scale
            mapped = self.linear(x) + self.down(F.gelu(self.up(x)))
            return self.text_mean + self.text_scale * mapped

    @torch.no_grad()
    def start_at(self, mean, axes):
        """Begin at the text's mean (width,) and along its leading `axes` (width, axes)."""
        count = min(self.linear.in_features, axes.shape[1])
        # Codes are spread evenly, with variance 1 a direction: any turn of them will do.
        turn = torch.linalg.qr(self.linear.weight[:count].T)[0].T  # (count, code_dim)
        self.linear.weight.copy_(axes[:, :count] @ turn)
        self.linear.bias.copy_(mean)

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


class TextMoments(nn.Module):
    """Mean and covariance of real text, for critics that need no training.

    Rows are whitened by the text's own covariance, so that its many small directions count as much
    as the few large ones.
    """

    def __init__(self, config):
        super().__init__()
        width = config.text_width
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("whitening", torch.zeros(width, width))
        self.register_buffer("covariance", torch.zeros(width, width))  # of whitened text

    @torch.no_grad()
    def fit(self, rows, share):
        """Take the moments of `rows` (types, width) under `share` (types,), which sums to 1."""
        rows, share = rows.double(), share.double().to(rows.device)
        mean = share @ rows
        variances, axes = torch.linalg.eigh((rows - mean).T @ ((rows - mean) * share[:, None]))
        # A floor: directions that text hardly uses would otherwise be blown up.
        floored = variances.clamp(min=1e-3 * float(variances.max()))
        self.mean.copy_(mean)
        self.whitening.copy_((axes / floored.sqrt()) @ axes.T)
        self.covariance.copy_((axes * (variances / floored)) @ axes.T)
        # The axes at their SDs in columns (width, width), leading ones first.
        return (axes * floored.sqrt()).flip(1).float()

    def forward(self, rows):
        """Rows (rows, width), whitened."""
        with torch.autocast(rows.device.type, enabled=False):
            return (rows.float() - self.mean) @ self.whitening
