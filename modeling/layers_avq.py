"""Parts of the AVQ: transformer blocks, P, the domain classifier, moments of text."""

import math

import torch
import torch.nn.functional as F
from torch import nn


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
        # Of the codes that come in, so that they are centred and of unit variance on average.
        self.register_buffer("code_mean", torch.zeros(config.code_dim))
        self.register_buffer("code_scale", torch.ones(()))
        self.register_buffer("text_mean", torch.zeros(config.text_width))
        self.register_buffer("text_scale", torch.ones(()))

    def forward(self, quantized):
        # Always float32: these numbers become rows of the language model's table.
        with torch.autocast(quantized.device.type, enabled=False):
            x = (quantized - self.code_mean) * self.code_scale
            mapped = self.linear(x) + self.down(F.gelu(self.up(x)))
            return self.text_mean + self.text_scale * mapped

    @torch.no_grad()
    def take_codes(self, codes):
        """Learn where unit `codes` (codes, code_dim) lie."""
        self.code_mean.copy_(codes.mean(0))
        self.code_scale.copy_((codes - self.code_mean).square().mean().rsqrt().clamp(max=1e3))

    @torch.no_grad()
    def start_at(self, mean, axes):
        """Begin at the text's mean (width,) and along its leading `axes` (width, axes).

        As if codes were spread evenly, with variance 1 a direction: any turn of them will do.
        """
        count = min(self.linear.in_features, axes.shape[1])
        turn = torch.linalg.qr(self.linear.weight[:count].T)[0].T  # (count, code_dim)
        self.linear.weight.copy_(axes[:, :count] @ turn)
        self.linear.bias.copy_(mean)

    @torch.no_grad()
    def match(self, mean, axes, codes):
        """Give P of unit `codes` (codes, code_dim) the text's mean and, along `axes`, covariance.

        The codes' leading directions go to the text's in their order, so that near codes stay near;
        what text fills beyond those is filled by the MLP's leading directions that are uncorrelated
        with them.
        """
        x = ((codes - self.code_mean) * self.code_scale).double()
        white, along = _whitened(x, axes.shape[1])  # (codes, k), (code_dim, k)
        bent = F.gelu(self.up(x.float())).double()
        centre, slope = bent.mean(0), white.T @ bent / len(x)
        rest, turned = _whitened(bent - centre - white @ slope, axes.shape[1] - white.shape[1])
        first, second = axes.double()[:, : white.shape[1]], axes.double()[:, white.shape[1] :]
        second = second[:, : rest.shape[1]]
        self.down.weight.copy_(second @ turned.T)
        self.linear.weight.copy_(first @ along.T - second @ turned.T @ slope.T @ along.T)
        self.down.bias.zero_()
        self.linear.bias.copy_(mean - second @ turned.T @ centre)

    def standardize(self, embeddings):
        """Embeddings (..., text_width) in units of the text table's SD around its mean."""
        return (embeddings - self.text_mean) / self.text_scale


def _whitened(rows, most):
    """`rows` (rows, width), centred, on at most `most` leading directions at variance 1, and how.

    (rows, k) and (width, k): the first is the second's product with the centred rows.
    """
    variances, directions = torch.linalg.eigh(rows.T @ rows / len(rows))
    kept = min(most, int((variances > 1e-6 * variances[-1]).sum()))
    scaled = (directions / variances.clamp(min=1e-30).sqrt()).flip(1)[:, :kept]
    return rows @ scaled, scaled


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
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

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
        self.fitted.fill_(True)

    def axes(self):
        """Directions of the text at their SDs, in columns (width, width), leading ones first."""
        scales, axes = torch.linalg.eigh(self.whitening.double())
        return (axes / scales).float()

    def forward(self, rows):
        """Rows (rows, width), whitened."""
        with torch.autocast(rows.device.type, enabled=False):
            return (rows.float() - self.mean) @ self.whitening
