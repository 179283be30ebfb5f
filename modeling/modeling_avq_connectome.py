"""The connectivity stream: a person's connectivity matrix to a few codes and back."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .alignment_avq import TextSpace, tensor_sha256
from .components_avq import Deal
from .components_avq_connectome import MatrixComponents, bits_of, flipped_kmeans
from .configuration_avq import ConfigurationError
from .configuration_avq_connectome import AVQConnectomeConfig
from .inputs_avq import checked_coordinates, whole_mask
from .layers_avq import DomainClassifier, TextMoments, TextProjection
from .losses_avq import reconstruction_loss
from .modeling_avq import AVQPreTrainedModel
from .outputs_avq_connectome import (
    AVQConnectomeDecoderOutput,
    AVQConnectomeEncoderOutput,
    AVQConnectomeOutput,
)
from .quantization_avq import AVQCodebook


class AVQConnectomeModel(TextSpace, AVQPreTrainedModel):
    """Vector-quantised autoencoder of a Fisher-z connectivity matrix, of any parcellation.

    Tricks used, one line each:

    * the same maps over the brain, functions of MNI coordinates, stand on both sides of the matrix;
      so codes of one parcellation decode into another;
    * what is coded is the deviation from the training mean, in its principal components, with the
      covariance shrunk towards its diagonal, for there are fewer people than components;
    * patterns that tell age, sex, ... are made louder before, and quieter after the codes: three
      directions of thousands, so that hearing them better costs other connections next to nothing;
    * components are dealt out to tokens so that each needs the same bits (reverse water-filling);
      those below the water level are left out;
    * one codebook for all tokens, by k-means on vectors with signs drawn anew at every pass;
    * a constant beside the components makes cosine lookup nearly Euclidean, and dividing by it
      undoes the normalisation exactly;
    * the projection P to text space lies *before* the decoder, as in `AVQModel`.

    All of it starts in closed form: `start_components`, then `start_codebook`. Sources: Goyal 2001
    (transform coding); Ledoit & Wolf 2004 (shrinkage, here towards the diagonal, by a fixed share).
    """

    config: AVQConnectomeConfig  # type: ignore[assignment]
    config_class = AVQConnectomeConfig
    base_model_prefix = "connectome"
    main_input_name = "matrices"
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        "quantizer.codebook",
        "quantizer.code_sum",
        "quantizer.code_count",
        "components.maps",
        "components.axes",
        "components.directions",
        "components.mixtures",
        "components.mean",
        "anchor",
        "read_code",
        "projection",
        "text_moments.mean",
        "text_moments.whitening",
        "text_moments.covariance",
    ]

    def __init__(self, config: AVQConnectomeConfig):
        super().__init__(config)
        cards = config.code_dim - 1
        self.components = MatrixComponents(config)
        self.deal = Deal(config.num_tokens, cards, config.num_components)
        self.register_buffer("anchor", torch.ones(()))
        self.quantizer = AVQCodebook(
            config.num_codes,
            config.code_dim,
            config.ema_decay,
            config.revival_threshold,
            config.revival_interval,
            config.code_gradient,
        )
        self.projection = TextProjection(config)
        self.read_code = nn.Linear(config.text_width, cards)
        self.classifier = DomainClassifier(config)
        self.text_moments = TextMoments(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MatrixComponents):
            init.copy_(module.kept, torch.arange(len(module.kept)))
            init.zeros_(module.mean)
            init.zeros_(module.directions)
            init.normal_(module.axes, std=len(module.kept) ** -0.5)
        elif module is self:
            init.ones_(self.anchor)

    # ------------------------------------------------------------------ the two halves

    def encode(
        self, matrices, region_coordinates=None, region_mask=None, mean=None
    ) -> AVQConnectomeEncoderOutput:
        """Codes of connectivity matrices.

        Parameters
        ----------
        matrices : float32, shape (batch, regions, regions)
            Fisher z (`fisher_z_matrices`); symmetric, the diagonal does not matter. A pair whose
            entry is NaN counts as missing.
        region_coordinates : float32, shape (batch or 1, regions, 3), mm MNI, optional
            Default: those of the training atlas, when the number of regions agrees.
        region_mask : bool, shape (batch, regions), optional
            False for regions without a signal.
        mean : float32, shape (regions, regions), optional
            The mean over training people in this parcellation, where it is known. Default: the
            mean of the training atlas, read at these positions.

        Raises
        ------
        ConfigurationError
            The shapes do not fit, entries are infinite, or the codebook was never started.
        """
        self._check_started()
        values, where, present = self._prepare(matrices, region_coordinates, region_mask)
        latents = self._encode(values, where, present, self._mean(mean, where))
        output = self.quantizer(latents, update=False)
        return AVQConnectomeEncoderOutput(
            codes=output.codes,
            quantized=output.quantized,
            text_embeds=self._project(output),
            latents=F.normalize(latents.float(), dim=-1),
        )

    def decode(self, codes, region_coordinates=None, mean=None) -> AVQConnectomeDecoderOutput:
        """Connectivity matrices of codes.

        Parameters
        ----------
        codes : int64, shape (batch, tokens)
        region_coordinates : float32, shape (batch or 1, regions, 3), mm MNI, optional
            Where to decode: any parcellation. Default: the training atlas.
        mean : float32, shape (regions, regions), optional
            As in `encode`, of the parcellation to decode into.

        Raises
        ------
        ConfigurationError
            Codes out of range, another number of tokens, or a codebook that was never started.
        """
        self._check_started()
        tokens, count = self.config.num_tokens, self.config.num_codes
        if codes.dtype.is_floating_point or codes.dim() != 2 or codes.shape[1] != tokens:
            raise ConfigurationError(
                f"codes must be integers of shape (batch, {tokens}), found {codes.dtype} "
                f"{tuple(codes.shape)}. Were they made by another checkpoint?"
            )
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= count):
            raise ConfigurationError(
                f"codes must lie in 0..{count - 1}, found {int(codes.min())}..{int(codes.max())}. "
                "Were they made with another codebook?"
            )
        coordinates = self._coordinates(region_coordinates, None)
        rows = F.embedding(codes, self.project_codebook())
        matrices = self._decode(rows, coordinates, self._mean(mean, coordinates))
        return AVQConnectomeDecoderOutput(matrices=matrices)

    def deviations(self, values, region_coordinates=None):
        """What tokens add to the mean matrix; linear in their values.

        Parameters
        ----------
        values : float32, shape (batch, tokens, code_dim - 1)
            A code vector (or latent) without its last entry, divided by it.
        region_coordinates : float32, shape (batch or 1, regions, 3), mm MNI, optional
            As in `decode`.

        Returns
        -------
        float32, shape (batch, regions, regions)
        """
        return self._deviations(values, self._coordinates(region_coordinates, None))

    def forward(
        self,
        matrices,
        region_coordinates=None,
        region_mask=None,
        mean=None,
        text_embeddings=None,
        reversal: float = 1.0,
    ) -> AVQConnectomeOutput:
        """Encode, quantise, project, decode; with the losses of training.

        Arguments as in `encode`; `text_embeddings` and `reversal` as in `AVQModel.forward`.
        """
        values, coordinates, present = self._prepare(matrices, region_coordinates, region_mask)
        centre = self._mean(mean, coordinates)
        quantized = self.quantizer(self._encode(values, coordinates, present, centre))
        text_embeds = self._project(quantized)
        decoded = self._decode(text_embeds, coordinates, centre)
        parts = {
            "reconstruction_loss": reconstruction_loss(decoded, values, present),
            "commitment_loss": quantized.commitment_loss,
        }
        # A code's error in units of a component's, so that the weight means what it does elsewhere.
        commitment = quantized.commitment_loss * self.config.code_anchor**2
        loss = parts["reconstruction_loss"] + self.config.commitment_weight * commitment
        if text_embeddings is not None:
            seen = self._seen_by_critics(quantized.quantized, text_embeds).flatten(0, 1)
            alignment = self.alignment_losses(seen, text_embeddings, reversal)
            loss = loss + self.weighted_alignment(alignment)
            parts |= alignment
            if self.config.neighbour_weight:
                parts["neighbour_loss"] = self.neighbour_loss(quantized.codes)
                loss = loss + self.config.neighbour_weight * parts["neighbour_loss"]
        return AVQConnectomeOutput(
            loss=loss,
            matrices=decoded,
            codes=quantized.codes,
            text_embeds=text_embeds,
            perplexity=quantized.perplexity,
            usage=quantized.usage,
            **parts,
        )

    # ------------------------------------------------------------------ the start

    @torch.no_grad()
    def start_components(
        self,
        matrices,
        region_coordinates=None,
        region_mask=None,
        more_matrices=None,
        more_region_mask=None,
        patterns=None,
        shrinkage: float = 0.1,
    ) -> torch.Tensor:
        """Start maps, components and tokens in closed form from training people.

        Parameters
        ----------
        matrices : float32, shape (scans, regions, regions)
            Of training subjects, one parcellation.
        region_coordinates, region_mask
            As in `encode`.
        more_matrices : float32, shape (scans, regions, regions), optional
            Scans that serve the covariance alone, such as noisier ones; `more_region_mask` as
            `region_mask`.
        patterns : float32, shape (patterns, regions, regions), optional
            Symmetric weights of connections whose sum has to come through well, at most
            `num_directions` of them: errors of it count `emphasis` squared times.
        shrinkage : float
            Share of the covariance that goes to its diagonal.

        Returns
        -------
        float32, shape (scans, tokens, code_dim - 1)
            What the tokens of `matrices` hold: for `start_codebook`.
        """
        values, coordinates, present = self._prepare(matrices, region_coordinates, region_mask)
        more, more_present = None, None
        if more_matrices is not None:
            more, _, more_present = self._prepare(
                more_matrices, region_coordinates, more_region_mask
            )
        if patterns is not None:
            patterns = self._checked_patterns(patterns, matrices.shape[1])
        components = self.components.start(
            values,
            present,
            coordinates[0],
            more,
            more_present,
            patterns,
            shrinkage,
            bits_of(self.config),
            self.deal,
        )
        dealt = self.deal(components[:, None])[:, 0]  # (scans, tokens, cards)
        loudest = dealt.square().sum(-1).mean(0).max().sqrt().clamp(min=1e-6)
        self.anchor.copy_(self.config.code_anchor * loudest)
        return dealt

    @torch.no_grad()
    def start_codebook(
        self,
        dealt,
        iterations: int = 14,
        draws: int = 80000,
        seed: int = 0,
        flip_sign: bool = True,
    ):
        """Place the codebook by k-means on what tokens hold, (scans, tokens, code_dim - 1).

        With `flip_sign` components meet k-means with either sign (`flipped_kmeans`). Then let P
        begin where text lies, where `set_text_space` has said so, and the decoder at reading
        P(code).
        """
        vectors = F.normalize(self._with_anchor(dealt).flatten(0, 1), dim=-1)
        size = self.config.num_codes
        codebook = flipped_kmeans(vectors, size, iterations, draws, seed, flip_sign)
        quantizer = self.quantizer
        quantizer.codebook.copy_(codebook)
        quantizer.code_sum.copy_(codebook)
        quantizer.code_count.fill_(1.0)
        quantizer.initialized.fill_(True)
        self.projection.take_codes(codebook)
        if bool(self.text_moments.fitted):
            self.projection.match(self.text_moments.mean, self.text_moments.axes(), codebook)
        else:  # nothing to be near to: P is linear, and read without a loss
            self.projection.down.weight.zero_()
        self._fit_read_code(codebook)

    def _fit_read_code(self, codebook):
        """Let the decoder read P(code) as the components of the unit code."""
        rows = self.text_moments(self.projection.standardize(self.projection(codebook))).double()
        wanted = codebook[:, :-1].double()
        mean, centre = rows.mean(0), wanted.mean(0)
        gram = (rows - mean).T @ (rows - mean)
        gram.diagonal().add_(1e-9 * gram.diagonal().mean() + 1e-30)
        weight = torch.linalg.solve(gram, (rows - mean).T @ (wanted - centre)).T
        self.read_code.weight.copy_(weight)
        self.read_code.bias.copy_(centre - weight @ mean)

    def codebook_fingerprint(self) -> str:
        """sha256 of codebook and projection, hex; travels with codes: no other decodes them."""
        stored = [self.quantizer.codebook, *self.projection.state_dict().values()]
        return tensor_sha256(torch.cat([tensor.detach().float().flatten() for tensor in stored]))

    # ------------------------------------------------------------------ inside

    def _check_started(self):
        if not bool(self.quantizer.initialized):
            raise ConfigurationError(
                "The codebook of this AVQConnectomeModel was never started, so its codes mean "
                "nothing. Train it first (`cortexicon train avq CONFIG --stream connectivity`, or "
                "start_components and start_codebook) or load a trained checkpoint."
            )

    def _coordinates(self, coordinates, regions):
        coordinates = checked_coordinates(coordinates, self.config, regions)
        return coordinates.to(self.projection.text_mean)

    def _checked_patterns(self, patterns, regions):
        room = self.config.num_directions
        shape = tuple(patterns.shape)
        if shape[1:] != (regions, regions) or not 0 < shape[0] <= room:
            raise ConfigurationError(
                f"patterns must have shape (1 to num_directions = {room}, {regions}, {regions}), "
                f"found {shape}."
            )
        patterns = patterns.to(self.projection.text_mean)
        energy = patterns.square().sum((1, 2))
        if not bool((torch.isfinite(energy) & (energy > 0)).all()):
            raise ConfigurationError("patterns must be finite, and none of them 0 everywhere.")
        return patterns

    def _mean(self, mean, coordinates):
        """The people's mean, (batch or 1, regions, regions): the one given, else that of maps."""
        if mean is None:
            return self.components.mean_at(coordinates)
        regions = coordinates.shape[1]
        if mean.shape[-2:] != (regions, regions) or not bool(torch.isfinite(mean).all()):
            raise ConfigurationError(
                f"mean must be finite and of shape ({regions}, {regions}), found "
                f"{tuple(mean.shape)}. Give the mean over training people in this parcellation."
            )
        mean = mean.to(self.projection.text_mean).view(1, regions, regions)
        return mean * (1 - torch.eye(regions, device=mean.device))

    def _prepare(self, matrices, region_coordinates, region_mask):
        """Matrices with 0 for what is missing, coordinates, and what pairs are present."""
        if matrices.dim() != 3 or matrices.shape[1] != matrices.shape[2]:
            raise ConfigurationError(
                "matrices must have shape (batch, regions, regions), found "
                f"{tuple(matrices.shape)}."
            )
        batch, regions, _ = matrices.shape
        coordinates = self._coordinates(region_coordinates, regions)
        if coordinates.shape[0] not in (1, batch):
            raise ConfigurationError(
                f"region_coordinates hold {coordinates.shape[0]} rows for {batch} matrices; "
                "expected one row for all or one for each."
            )
        mask = whole_mask(region_mask, "region_mask", batch, regions, matrices.device)
        present = mask[:, :, None] & mask[:, None, :] & ~torch.isnan(matrices)
        present = present & ~torch.eye(regions, dtype=torch.bool, device=matrices.device)
        values = matrices.float().masked_fill(~present, 0.0)
        bad = ~torch.isfinite(values).flatten(1).all(1)
        if bool(bad.any()):
            raise ConfigurationError(
                f"matrices hold infinite values in rows {bad.nonzero()[:, 0].tolist()} of the "
                "batch. Fisher z of a correlation of 1 is infinite: mask one of the two regions."
            )
        return values, coordinates, present

    def _with_anchor(self, dealt):
        """Tokens (..., cards) with the constant beside them, (..., code_dim)."""
        return torch.cat([dealt, self.anchor.expand_as(dealt[..., :1])], -1)

    def _encode(self, values, coordinates, present, mean):
        """Unnormalised code vectors, (batch, tokens, code_dim)."""
        deviations = (values - mean) * present
        there = present.any(-1)  # (batch, regions)
        if coordinates.shape[0] == 1 and bool((there == there[:1]).all()):
            there = there[:1]  # one solution for all
        components = self.components(deviations, coordinates, there)
        return self._with_anchor(self.deal(components[:, None])[:, 0])

    def _project(self, output):
        """P of the quantised codes, (batch, tokens, text_width)."""
        if self.training:
            return self.projection(output.quantized)
        # A row of the projected table: the bits must not depend on who shares the batch.
        return F.embedding(output.codes, self.project_codebook())

    def _decode(self, text_embeds, coordinates, mean):
        """Matrices (batch, regions, regions) of P(codes), (batch, tokens, text_width)."""
        with torch.autocast(text_embeds.device.type, enabled=False):
            whitened = self.text_moments(self.projection.standardize(text_embeds))
            unit = self.read_code(whitened)  # (batch, tokens, cards), without the anchor
            # The anchor's share of a unit vector follows from the others.
            rest = (1 - unit.square().sum(-1, keepdim=True)).clamp(min=1e-3).sqrt()
            return mean + self._deviations(unit / rest, coordinates)

    def _deviations(self, values, coordinates):
        """Deviations (batch, regions, regions) of values in units of the anchor."""
        components = self.deal.inverse((self.anchor * values)[:, None])[:, 0]
        return self.components.inverse(components, coordinates)


AVQConnectomeConfig.register_for_auto_class()
AVQConnectomeModel.register_for_auto_class("AutoModel")
