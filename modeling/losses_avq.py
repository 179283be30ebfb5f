"""Losses of the AVQ: time, spectrum, connectivity; the domain loss and its reversed gradient."""

import torch
import torch.nn.functional as F


class _ReverseGradient(torch.autograd.Function):
    """Identity forward, gradient times -strength backward (Ganin & Lempitsky 2015)."""

    @staticmethod
    def forward(ctx, x, strength):
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.strength * gradient, None


def reverse_gradient(x: torch.Tensor, strength: float) -> torch.Tensor:
    """`x` unchanged; its gradient comes back multiplied by `-strength`."""
    return _ReverseGradient.apply(x, strength)


def reversal_strength(progress: float) -> float:
    """Strength of the reversal at `progress` p in [0, 1]: 2 / (1 + exp(-10 p)) - 1.

    Source: Ganin & Lempitsky 2015.
    """
    return float(2.0 / (1.0 + torch.exp(torch.tensor(-10.0 * progress))) - 1.0)


def reconstruction_loss(reconstruction, target, mask):
    """Mean squared error where `mask` is true; all (batch, time, regions); scalar."""
    return ((reconstruction - target).square() * mask).sum() / mask.sum().clamp(min=1)


def spectrum_loss(reconstruction, target, mask):
    """Mean absolute difference of amplitude spectra along time; scalar, units of the signal's SD.

    All (batch, time, regions). Masked samples are zero on both sides.
    """
    difference = torch.fft.rfft(reconstruction * mask, dim=1, norm="ortho").abs()
    difference = difference - torch.fft.rfft(target * mask, dim=1, norm="ortho").abs()
    present = mask.any(1, keepdim=True)
    return (difference.abs() * present).sum() / (present.sum() * difference.shape[1]).clamp(min=1)


def window_correlation(x, mask):
    """Correlation of regions by window: (batch, time, regions) -> (batch, regions, regions)."""
    mask = mask.to(x.dtype)
    centred = (x - (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)) * mask
    # The floor keeps the gradient bounded where a decoded region is almost flat.
    scaled = centred / (centred.square().sum(1, keepdim=True) + 1e-2 * x.shape[1]).sqrt()
    return scaled.transpose(1, 2) @ scaled


def connectivity_loss(reconstruction, target, mask):
    """Mean squared difference between the windows' correlation matrices; scalar."""
    difference = window_correlation(reconstruction, mask) - window_correlation(target, mask)
    present = mask.any(1)
    pairs = present[:, :, None] & present[:, None, :]
    return (difference.square() * pairs).sum() / pairs.sum().clamp(min=1)


def moment_loss(code_rows, text_covariance):
    """Squared distance of the codes' mean and covariance from the text's; scalar.

    `code_rows` (rows, width) are whitened as text is, around its mean; `text_covariance` (width,
    width) is what whitening left of the text's. Source: Sun & Saenko 2016 (deep CORAL), with the
    mean, and against the exact moments of text, as those of a batch would only add noise.
    """
    mean = code_rows.mean(0)
    centred = code_rows - mean
    difference = centred.T @ centred / len(code_rows) - text_covariance
    return mean.square().mean() + difference.square().sum() / code_rows.shape[1]


def energy_loss(code_rows, text_rows):
    """Energy distance between two clouds of rows (rows, width), by sqrt(width); scalar.

    2 E|x - y| - E|x - x'| - E|y - y'|: zero only where the distributions agree, so it is a critic
    that no training can starve. Source: Szekely & Rizzo 2013.
    """

    def mean_distance(first, second):
        return torch.cdist(first, second).clamp(min=1e-6).mean()

    distance = 2 * mean_distance(code_rows, text_rows) - mean_distance(code_rows, code_rows)
    return (distance - mean_distance(text_rows, text_rows)) / code_rows.shape[1] ** 0.5


def neighbour_loss(codes, code_rows, neighbours: int = 10):
    """How far P moves the codes' neighbours: KL of their neighbourhoods there from here; scalar.

    `codes` (codes, code_dim), no code twice, without gradient; `code_rows` (codes, width) are P of
    them. Each code's neighbourhood is a Gaussian as wide as its distance to the neighbour of rank
    `neighbours`. Source: Hinton & Roweis 2002 (SNE), with one width for all codes.
    """
    itself = torch.eye(len(codes), dtype=torch.bool, device=codes.device)

    def neighbourhood(rows):
        squared = torch.cdist(rows, rows).square()
        width = squared.detach().kthvalue(min(neighbours + 1, len(rows)), dim=1).values.mean()
        return (-2 * squared / width).masked_fill(itself, -1e9).log_softmax(1)

    here, there = neighbourhood(codes.detach()), neighbourhood(code_rows)
    return (here.exp() * (here - there)).sum(1).mean()


def thin(rows, count):
    """`count` rows spread evenly over `rows`."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count, device=rows.device).round().long()]


def domain_loss(code_logits, text_logits):
    """Binary cross entropy of the domain classifier (text = 1), each side weighing one half.

    Parameters
    ----------
    code_logits, text_logits : float32, shapes (codes,) and (tokens,)

    Returns
    -------
    loss, accuracy : float32 scalars
        Accuracy is the mean of both sides' accuracies, so 0.5 is chance for any batch sizes.
    """
    loss = 0.5 * (
        F.binary_cross_entropy_with_logits(code_logits, torch.zeros_like(code_logits))
        + F.binary_cross_entropy_with_logits(text_logits, torch.ones_like(text_logits))
    )
    with torch.no_grad():
        accuracy = 0.5 * ((code_logits < 0).float().mean() + (text_logits >= 0).float().mean())
    return loss, accuracy
