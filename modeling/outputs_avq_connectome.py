"""What the methods of `AVQConnectomeModel` return."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class AVQConnectomeEncoderOutput(ModelOutput):
    """Output of `AVQConnectomeModel.encode`.

    codes : int64, shape (batch, tokens)
    quantized : float32, shape (batch, tokens, code_dim)
        The unit-norm codes.
    text_embeds : float32, shape (batch, tokens, text_width)
        P(code): what the decoder reads, and where the language model's row of the code starts.
    latents : float32, shape (batch, tokens, code_dim)
        What was quantised, of unit norm.
    """

    codes: torch.LongTensor | None = None
    quantized: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None


@dataclass
class AVQConnectomeDecoderOutput(ModelOutput):
    """Output of `AVQConnectomeModel.decode`.

    matrices : float32, shape (batch, regions, regions)
        Fisher z, symmetric, the diagonal 0.
    """

    matrices: torch.FloatTensor | None = None


@dataclass
class AVQConnectomeOutput(ModelOutput):
    """Output of `AVQConnectomeModel.forward`: loss, its parts, matrices, codebook's health.

    loss, reconstruction_loss, commitment_loss : float32 scalars
    domain_loss, domain_accuracy, moment_loss, energy_loss, neighbour_loss : float32 scalars
        None where no text embeddings were given, or their weight is 0.
    matrices : float32, shape (batch, regions, regions)
    codes : int64, shape (batch, tokens)
    text_embeds : float32, shape (batch, tokens, text_width)
    perplexity, usage : float32 scalars
    """

    loss: torch.FloatTensor | None = None
    matrices: torch.FloatTensor | None = None
    codes: torch.LongTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    domain_loss: torch.FloatTensor | None = None
    domain_accuracy: torch.FloatTensor | None = None
    moment_loss: torch.FloatTensor | None = None
    energy_loss: torch.FloatTensor | None = None
    neighbour_loss: torch.FloatTensor | None = None
    perplexity: torch.FloatTensor | None = None
    usage: torch.FloatTensor | None = None
