"""What the methods of `AVQModel` return."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class AVQEncoderOutput(ModelOutput):
    """Output of `AVQModel.encode`.

    codes : int64, shape (batch, tokens)
        Patch by patch; within a patch by latent (`latent` layout) or by region (`grid` layout).
    quantized : float32, shape (batch, tokens, code_dim)
        The unit-norm codes.
    text_embeds : float32, shape (batch, tokens, text_width)
        P(code): what the decoder reads, and where the language model's row of the code starts.
        None, as is `quantized`, where only codes were asked for.
    token_mask : bool, shape (batch, tokens)
        False for tokens of padded patches and, in the `grid` layout, of missing regions.
    """

    codes: torch.LongTensor | None = None
    quantized: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    token_mask: torch.BoolTensor | None = None


@dataclass
class AVQDecoderOutput(ModelOutput):
    """Output of `AVQModel.decode`.

    reconstruction : float32, shape (batch, time, regions)
        In z-score units.
    """

    reconstruction: torch.FloatTensor | None = None


@dataclass
class AVQOutput(ModelOutput):
    """Output of `AVQModel.forward`: weighted loss, its parts, reconstruction, codebook's health.

    loss, reconstruction_loss, commitment_loss : float32 scalars
    spectrum_loss, connectivity_loss : float32 scalars
        None where their weight is 0.
    domain_loss, domain_accuracy : float32 scalars
        None when no text embeddings were given.
    moment_loss, energy_loss : float32 scalars
        The critics in closed form; None where their weight is 0 or no text was given.
    neighbour_loss : float32 scalar
        None where its weight is 0, no text was given, or the codebook has not started.
    reconstruction : float32, shape (batch, time, regions)
    codes : int64, shape (batch, tokens)
    text_embeds : float32, shape (batch, tokens, text_width)
    perplexity, usage : float32 scalars
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    codes: torch.LongTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    spectrum_loss: torch.FloatTensor | None = None
    connectivity_loss: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    domain_loss: torch.FloatTensor | None = None
    domain_accuracy: torch.FloatTensor | None = None
    moment_loss: torch.FloatTensor | None = None
    energy_loss: torch.FloatTensor | None = None
    neighbour_loss: torch.FloatTensor | None = None
    perplexity: torch.FloatTensor | None = None
    usage: torch.FloatTensor | None = None
