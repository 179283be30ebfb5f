"""One vector that says what all tokens of a scan's connectivity hold together."""

import torch
from torch import nn
from transformers import initialization as init

SIZE = 10.0  # length of a typical scan's values as the map reads them


class ScanSummary(nn.Module):
    """A linear map of all of a scan's connectivity tokens, each slot with weights of its own.

    Codes of all slots share one codebook, but the same code means another component of the matrix
    in another slot. A language model would have to multiply code and slot to read them, and has a
    few hundred scans to learn it from; this map has the slot built in. What it gives is added to
    the embedding of the marker that closes the scan, so the language model reads it like any token.

    Tricks used, one line each:

    * inputs are a code's component values, not its unit vector, around the training people's mean;
    * one scale for all of them, so the loud components, where people truly differ, are learnt first
      and the quiet ones hardly: what the penalty of a ridge regression does;
    * it starts at zero: before training the scan is read by its tokens alone;
    * noise in training, fresh at every step, keeps it from learning people by heart: the same
      penalty once more (Bishop 1995), and the one that helped most.

    Parameters
    ----------
    config : AVQConnectomeConfig
        Of the connectivity codec.
    width : int
        Of the language model's embeddings.
    noise : float
        Standard deviation of the noise in training, in units of the values' root mean square.
    """

    def __init__(self, config, width: int, noise: float = 0.0):
        super().__init__()
        self.noise = noise
        self.map = nn.Linear(config.num_tokens * (config.code_dim - 1), width, bias=False)
        self.register_buffer("mean", torch.zeros(config.num_tokens, config.code_dim - 1))
        self.register_buffer("scale", torch.ones(()))
        used = torch.ones(config.num_tokens, config.code_dim - 1, dtype=torch.bool)
        self.register_buffer("used", used)
        self.register_buffer("gain", torch.ones(()))

    def reset(self):
        """Weights and statistics of a summary that says nothing yet."""
        init.zeros_(self.map.weight)
        init.zeros_(self.mean)
        init.ones_(self.scale)
        init.ones_(self.gain)
        init.ones_(self.used)

    @staticmethod
    def values(vectors):
        """Component values, (..., code_dim - 1), of code vectors of any length, (..., code_dim).

        In units of the codec's constant, which stands last in a code vector.
        """
        return vectors[..., :-1] / vectors[..., -1:]

    @torch.no_grad()
    def start(self, vectors, row_size: float):
        """Take mean and scale from training scans.

        Parameters
        ----------
        vectors : float32, shape (scans, tokens, code_dim)
            Of training subjects: code vectors, or what they were before quantisation.
        row_size : float
            Root mean square of the language model's embeddings, the size of what is added.
        """
        values = self.values(vectors)
        self.mean.copy_(values.mean(0))
        spread = (values - self.mean).square().sum((1, 2)).mean().sqrt()
        self.scale.copy_(spread.clamp(min=1e-6) / SIZE)
        self.used.copy_((values != values[:1]).any(0))
        self.gain.fill_(row_size)

    def forward(self, vectors, known=None):
        """Vectors to add, (scans, width), of code vectors (scans, tokens, code_dim).

        Tokens that `known`, bool (scans, tokens), is False for count as the mean.
        """
        values = (self.values(vectors) - self.mean) / self.scale
        if known is not None:
            values = values.masked_fill(~known[..., None], 0.0)
        if self.training and self.noise:
            size = self.noise * SIZE / self.used.sum().clamp(min=1).sqrt()
            values = values + size * self.used * torch.randn_like(values)
        return self.gain * self.map(values.flatten(1).to(self.map.weight))
