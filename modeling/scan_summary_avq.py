"""What all tokens of a scan's connectivity say together about the questions that were trained."""

import torch
from torch import nn
from transformers import initialization as init

FURTHEST = 4.0  # scores are cut here, in SD: nobody is so far from what was trained on
LOUDNESS = 5.0  # of scores as the map reads them: how fast it learns, beside the language model


class ScanSummary(nn.Module):
    """Scores of a scan along fitted patterns of connectivity, told to every token of the scan.

    Codes of all slots share one codebook, but the same code means another component of the matrix
    in another slot. A language model would have to multiply code and slot to read them, and has a
    few hundred scans to learn it from. A pattern has the slot built in: it is a linear function of
    all tokens, fitted in closed form. What the scores say is added to the embeddings of the scan's
    tokens and of the markers around them, so that attention finds it wherever it looks.

    Tricks used, one line each:

    * inputs are a code's component values, not its unit vector, around the training people's mean;
    * while the language model is trained, a person's scores come from patterns fitted without that
      person (`scores` in `forward`): it learns how far to trust them from people they are new to,
      as it will meet them (stacking, Wolpert 1992);
    * the map from scores to embeddings starts at random vectors as long as an embedding: from zero,
      neither it nor the language model has a reason to begin.

    Parameters
    ----------
    config : AVQConnectomeConfig
        Of the connectivity codec.
    width : int
        Of the language model's embeddings.
    num_patterns : int
    """

    def __init__(self, config, width: int, num_patterns: int):
        super().__init__()
        slots = config.num_tokens, config.code_dim - 1
        self.register_buffer("mean", torch.zeros(slots))
        self.register_buffer("patterns", torch.zeros(num_patterns, *slots))
        self.register_buffer("offset", torch.zeros(num_patterns))
        self.register_buffer("gain", torch.ones(()))
        self.map = nn.Linear(num_patterns, width, bias=False)

    def reset(self):
        """Weights and statistics of a summary that says nothing yet."""
        for tensor in (self.map.weight, self.mean, self.patterns, self.offset):
            init.zeros_(tensor)
        init.ones_(self.gain)

    @staticmethod
    def values(vectors):
        """Component values, (..., code_dim - 1), of code vectors of any length, (..., code_dim).

        In units of the codec's constant, which stands last in a code vector.
        """
        return vectors[..., :-1] / vectors[..., -1:]

    @torch.no_grad()
    def take(self, mean, patterns, offset):
        """Take what was fitted to scans.

        Parameters
        ----------
        mean : float32, shape (tokens, code_dim - 1)
            Of their component values.
        patterns : float32, shape (patterns, tokens, code_dim - 1)
            Their scores shall have about mean 0 and SD 1 over people that they were not fitted to.
        offset : float32, shape (patterns,)
            Score of the mean.
        """
        self.mean.copy_(mean)
        self.patterns.copy_(patterns)
        self.offset.copy_(offset)

    @torch.no_grad()
    def start(self, row_size: float, seed: int = 0):
        """Draw the map; `row_size` is the root mean square of the language model's embeddings."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.map.weight.shape, generator=generator) / LOUDNESS
        self.map.weight.copy_(drawn)
        self.gain.fill_(row_size)

    def scores(self, vectors, known=None):
        """Scores, float32 (scans, patterns), of code vectors (scans, tokens, code_dim).

        Tokens that `known`, bool (scans, tokens), is False for count as the mean.
        """
        values = self.values(vectors.float()) - self.mean.float()
        if known is not None:
            values = values.masked_fill(~known[..., None], 0.0)
        return values.flatten(1) @ self.patterns.float().flatten(1).T + self.offset.float()

    def forward(self, vectors, known=None, scores=None):
        """Vectors to add, (scans, width), of code vectors (scans, tokens, code_dim).

        `known` as in `scores`; `scores`, float32 (scans, patterns), stand in their place.
        """
        if scores is None:
            scores = self.scores(vectors, known)
        loud = LOUDNESS * scores.clamp(-FURTHEST, FURTHEST)
        return self.gain * self.map(loud.to(self.map.weight))
