"""The AVQ autoencoder: fMRI windows to codes and back, through a language model's text space."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .alignment_avq import TextSpace, tensor_sha256
from .components_avq import (
    ComponentStart,
    Correction,
    Deal,
    PatchComponents,
    RegionMaps,
    exactly,
    multiply_shared,
)
from .configuration_avq import AVQConfig, ConfigurationError
from .inputs_avq import checked_coordinates, whole_mask
from .layers_avq import DomainClassifier, LatentTransformer, TextMoments, TextProjection
from .losses_avq import (
    connectivity_loss,
    reconstruction_loss,
    spectrum_loss,
    thin,
)
from .outputs_avq import AVQDecoderOutput, AVQEncoderOutput, AVQOutput
from .quantization_avq import AVQCodebook

# Of a batch, how many tokens the critics of the alignment see at most.
CRITIC_TOKENS = 4096


class AVQPreTrainedModel(PreTrainedModel):
    """Initialisation and what loading a checkpoint needs to know."""

    config: AVQConfig
    config_class = AVQConfig
    base_model_prefix = "avq"
    main_input_name = "input_values"
    _supports_sdpa = True
    # Some parts tensor by tensor: their clocks and switches are no floats.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = [
        "quantizer.codebook",
        "quantizer.code_sum",
        "quantizer.code_count",
        "components.analysis",
        "components.synthesis",
        "components.shapes",
        "components.shapes_back",
        "components.regions",
        "token_maps",
        "token_maps_back",
        "read_code",
        "projection",
        "text_moments.mean",
        "text_moments.whitening",
        "text_moments.covariance",
    ]

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            strength = 0.01 if isinstance(module, Correction) else 1.0
            init.normal_(module.weight, std=strength / math.sqrt(module.in_features))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, RegionMaps):
            init.normal_(module.frequencies)
            init.normal_(module.weight, std=0.1)
        elif isinstance(module, (PatchComponents, Deal)):
            module.begin()
        elif isinstance(module, LatentTransformer):
            init.normal_(module.latent_embedding, std=0.5)
            init.normal_(module.patch_embedding, std=0.5)
            depth = max(1, len(module.blocks))
            for block in module.blocks:
                for layer in (block.attention_out, block.down):
                    init.normal_(layer.weight, std=1.0 / math.sqrt(2 * depth * layer.in_features))
        elif isinstance(module, TextProjection):
            init.zeros_(module.text_mean)
            init.ones_(module.text_scale)
            init.zeros_(module.code_mean)
            init.constant_(module.code_scale, math.sqrt(len(module.code_mean)))
            init.normal_(module.down.weight, std=0.1 / math.sqrt(module.down.in_features))
        elif isinstance(module, TextMoments):
            init.zeros_(module.mean)
            init.eye_(module.whitening)
            init.eye_(module.covariance)
            init.zeros_(module.fitted)
        elif isinstance(module, AVQCodebook):
            for buffer in (module.codebook, module.code_sum, module.code_count, module.updates):
                init.zeros_(buffer)
            init.zeros_(module.initialized)


class AVQModel(TextSpace, ComponentStart, AVQPreTrainedModel):
    """Adversarial vector-quantised autoencoder of parcellated fMRI.

    Tricks used, one line each:

    * a region is known by its MNI coordinates: maps over the brain are linear in random Fourier
      features of them (Rahimi & Recht 2007), so one checkpoint reads any parcellation;
    * a linear path takes each patch apart into spatial x temporal components and deals them out to
      the tokens, so that each needs the same bits (transform coding, Goyal 2001); it starts in
      closed form, from covariances of training windows;
    * transformer blocks correct what a linear codec of single patches cannot know; they run on the
      dealt components, never on the regions;
    * codes are low-dimensional unit vectors in an EMA codebook with k-means start and revival;
    * the projection P to the language model's embedding space lies *before* the decoder, so an
      alignment that costs information costs reconstruction, visibly;
    * a domain classifier with gradient reversal (Ganin & Lempitsky 2015) pulls P(code) to where
      text embeddings lie; the reversed gradient reaches P and, straight through the codebook, the
      encoder; two critics in closed form (moments, energy distance) take the same way, because a
      trained classifier that has won has no gradient left to reverse.

    Follows the codec models of transformers (DAC, Encodec, Mimi) in its methods: `encode`,
    `decode`, `forward`.
    """

    def __init__(self, config: AVQConfig):
        super().__init__(config)
        width = config.hidden_size
        count = config.patch_length * config.num_components
        latent = config.token_layout == "latent"
        cards = config.code_dim - 1 if latent else -(-count // config.num_latents)
        self.components = PatchComponents(config)
        self.deal = Deal(config.num_latents, cards, count)
        self.encoder_in = nn.Linear(cards, width)
        self.encoder = LatentTransformer(config, config.encoder_layers)
        self.encoder_out = Correction(width, cards)
        if not latent:
            sizes = (config.position_features, config.position_wavelength, config.num_components)
            self.ranks = Deal(config.code_dim - 1, config.num_components, count)
            self.token_maps, self.token_maps_back = RegionMaps(*sizes), RegionMaps(*sizes)
        self.quantizer = AVQCodebook(
            config.num_codes,
            config.code_dim,
            config.ema_decay,
            config.revival_threshold,
            config.revival_interval,
            config.code_gradient,
            config.codebook_start_step,
            config.start_noise,
            config.code_branches,
        )
        self.projection = TextProjection(config)
        self.read_code = nn.Linear(config.text_width, config.code_dim - 1)
        self.decoder_in = nn.Linear(cards, width)
        self.decoder = LatentTransformer(config, config.decoder_layers)
        self.decoder_out = Correction(width, cards)
        self.classifier = DomainClassifier(config)
        self.text_moments = TextMoments(config)
        self.post_init()

    # ------------------------------------------------------------------ the two halves

    def encode(
        self,
        input_values,
        region_coordinates=None,
        region_mask=None,
        time_mask=None,
        codes_only: bool = False,
    ) -> AVQEncoderOutput:
        """Codes of windows.

        Parameters
        ----------
        input_values : float32, shape (batch, time, regions)
            z-scored series, `sampling_interval` seconds apart; time is a multiple of
            `patch_length`, at most `window_length`.
        region_coordinates : float32, shape (batch or 1, regions, 3), mm MNI, optional
            Default: those of the training atlas, when the number of regions agrees.
        region_mask : bool, shape (batch, regions), optional
        time_mask : bool, shape (batch, time), optional
        codes_only : bool
            Leave `quantized` and `text_embeds` out (None): P is not computed at all.

        Returns
        -------
        AVQEncoderOutput

        Raises
        ------
        ConfigurationError
            The shapes do not fit the configuration, values that no mask covers are not finite, or
            the codebook was never started.
        """
        self._check_started()
        inputs = self._prepare(input_values, region_coordinates, region_mask, time_mask)
        latents, token_mask = self._encode(*inputs)
        if codes_only:
            return AVQEncoderOutput(codes=self.quantizer.encode(latents), token_mask=token_mask)
        output = self.quantizer(latents, token_mask, update=False)
        return AVQEncoderOutput(
            codes=output.codes,
            quantized=output.quantized,
            text_embeds=self._project(output),
            token_mask=token_mask,
        )

    def decode(self, codes, region_coordinates=None, code_coordinates=None) -> AVQDecoderOutput:
        """Region series of codes.

        Parameters
        ----------
        codes : int64, shape (batch, tokens)
        region_coordinates : float32, shape (batch or 1, regions, 3), mm MNI, optional
            Where to decode: any parcellation. Default: the training atlas.
        code_coordinates : float32, shape (batch or 1, regions, 3), mm MNI, optional
            `grid` layout only: the regions that the codes belong to. Default: `region_coordinates`.

        Raises
        ------
        ConfigurationError
            Codes out of range, a number of tokens that is no whole number of patches, or a codebook
            that was never started.
        """
        self._check_started()
        if codes.dtype.is_floating_point or codes.dim() != 2:
            raise ConfigurationError(
                f"codes must be integers of shape (batch, tokens), found {codes.dtype} "
                f"{tuple(codes.shape)}."
            )
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.config.num_codes):
            raise ConfigurationError(
                f"codes must lie in 0..{self.config.num_codes - 1}, found "
                f"{int(codes.min())}..{int(codes.max())}. Were they made with another codebook?"
            )
        coordinates = self._coordinates(region_coordinates, None)
        source = (
            coordinates if code_coordinates is None else self._coordinates(code_coordinates, None)
        )
        text_embeds = F.embedding(codes, self.project_codebook())
        return AVQDecoderOutput(reconstruction=self._decode(text_embeds, coordinates, source))

    def forward(
        self,
        input_values,
        region_coordinates=None,
        region_mask=None,
        time_mask=None,
        text_embeddings=None,
        reversal: float = 1.0,
    ) -> AVQOutput:
        """Encode, quantise, project, decode; with the losses of training.

        Parameters
        ----------
        input_values, region_coordinates, region_mask, time_mask
            As in `encode`.
        text_embeddings : float32, shape (tokens, text_width), optional
            Input embeddings of real text from the language model; switches the domain classifier
            on.
        reversal : float
            Strength of the gradient reversal, `losses_avq.reversal_strength(progress)`; 0 cuts the
            branch.
        """
        values, coordinates, region_mask, time_mask = self._prepare(
            input_values, region_coordinates, region_mask, time_mask
        )
        starts = self.training and self.config.codebook_start_step is not None
        if starts and not bool(self.components.started):
            batch = {"input_values": values, "region_coordinates": coordinates}
            batch |= {"region_mask": region_mask, "time_mask": time_mask}
            with exactly(values):
                self.start_components([batch])
        latents, token_mask = self._encode(values, coordinates, region_mask, time_mask)
        quantized = self.quantizer(latents, token_mask)
        text_embeds = self._project(quantized)
        decoded = self._decode(text_embeds, coordinates, coordinates)

        config, mask = self.config, time_mask[:, :, None] & region_mask[:, None, :]
        parts = {
            "reconstruction_loss": reconstruction_loss(decoded, values, mask),
            "commitment_loss": quantized.commitment_loss,
        }
        loss = parts["reconstruction_loss"] + config.commitment_weight * quantized.commitment_loss
        if config.spectrum_weight:
            parts["spectrum_loss"] = spectrum_loss(decoded, values, mask)
            loss = loss + config.spectrum_weight * parts["spectrum_loss"]
        if config.connectivity_weight:
            parts["connectivity_loss"] = connectivity_loss(decoded, values, mask)
            loss = loss + config.connectivity_weight * parts["connectivity_loss"]
        if text_embeddings is not None:
            # Thinned before P, which is the dearest layer where tokens are many.
            seen = thin(token_mask.flatten().nonzero()[:, 0], CRITIC_TOKENS)
            alignment = self.alignment_losses(
                self._seen_by_critics(
                    quantized.quantized.flatten(0, 1)[seen], text_embeds.flatten(0, 1)[seen]
                ),
                text_embeddings,
                reversal,
            )
            loss = loss + self.weighted_alignment(alignment)
            parts |= alignment
            if config.neighbour_weight and bool(self.quantizer.initialized):
                parts["neighbour_loss"] = self.neighbour_loss(quantized.codes[token_mask])
                loss = loss + config.neighbour_weight * parts["neighbour_loss"]
        return AVQOutput(
            loss=loss,
            reconstruction=decoded,
            codes=quantized.codes,
            text_embeds=text_embeds,
            perplexity=quantized.perplexity,
            usage=quantized.usage,
            **parts,
        )

    # ------------------------------------------------------------------ codebook

    @torch.no_grad()
    def start_codebook(self, batches, seed: int = 0, vectors=None) -> None:
        """k-means start from `batches`, keyword inputs of `encode`; ends alike on every process.

        `vectors` (vectors, code_dim), where given, are clustered instead.
        """
        if vectors is None:
            parts = []
            for batch in batches:
                latents, token_mask = self._encode(*self._prepare(**batch))
                parts.append(F.normalize(latents.float(), dim=-1)[token_mask])
            vectors = torch.cat(parts)
        self.quantizer.start(vectors, seed=seed)

    def codebook_fingerprint(self) -> str:
        """sha256 of codebook and projection, hex; travels with codes: no other decodes them."""
        # Of what is stored, not of P(codebook): another machine computes that with other last bits.
        stored = [self.quantizer.codebook, *self.projection.state_dict().values()]
        return tensor_sha256(torch.cat([tensor.detach().float().flatten() for tensor in stored]))

    # ------------------------------------------------------------------ inside

    def _check_started(self):
        if not bool(self.quantizer.initialized):
            raise ConfigurationError(
                "The codebook of this AVQModel was never started, so its codes mean nothing. Train "
                "it first (`cortexicon train avq CONFIG`, or a Trainer for more than "
                f"codebook_start_step = {self.config.codebook_start_step} training forwards) or "
                "load a trained checkpoint."
            )

    def _coordinates(self, coordinates, regions):
        coordinates = checked_coordinates(coordinates, self.config, regions)
        return coordinates.to(self.projection.text_mean)

    def _prepare(self, input_values, region_coordinates=None, region_mask=None, time_mask=None):
        config = self.config
        if input_values.dim() != 3:
            raise ConfigurationError(
                "input_values must have shape (batch, time, regions), found "
                f"{tuple(input_values.shape)}."
            )
        batch, time, regions = input_values.shape
        if time % config.patch_length or not 0 < time <= config.window_length:
            raise ConfigurationError(
                f"input_values hold {time} samples a window; expected a multiple of patch_length = "
                f"{config.patch_length}, at most window_length = {config.window_length}. "
                "AVQFeatureExtractor cuts such windows."
            )
        coordinates = self._coordinates(region_coordinates, regions)
        if coordinates.shape[0] not in (1, batch):
            raise ConfigurationError(
                f"region_coordinates hold {coordinates.shape[0]} rows for {batch} windows; "
                "expected one row for all or one for each."
            )
        device = input_values.device
        region_mask = whole_mask(region_mask, "region_mask", batch, regions, device)
        time_mask = whole_mask(time_mask, "time_mask", batch, time, device)
        present = time_mask[:, :, None] & region_mask[:, None, :]
        # Chosen, not multiplied: a masked NaN times 0 is NaN.
        values = torch.where(present, input_values.float(), 0.0)
        # The sum first, because it is quick; finite values can overflow it.
        if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
            bad = ~torch.isfinite(values).flatten(1).all(1)
            raise ConfigurationError(
                f"input_values hold NaN or infinite values in rows {bad.nonzero()[:, 0].tolist()} "
                "of the batch. Mask those regions (region_mask) or leave those scans out."
            )
        return values, coordinates, region_mask, time_mask

    def _encode(self, values, coordinates, region_mask, time_mask):
        """Unnormalised code vectors (batch, tokens, code_dim) and token mask (batch, tokens)."""
        patch = self.config.patch_length
        patches = values.unflatten(1, (-1, patch))  # (batch, patches, patch_length, regions)
        patch_mask = time_mask.unflatten(1, (-1, patch)).any(-1)
        # (batch, patches, latents, cards)
        dealt = self.deal(self.components(patches, coordinates, region_mask))
        hidden = self.encoder_in(dealt.to(self.encoder_in.weight.dtype))
        dealt = dealt + self.encoder_out(self.encoder(hidden, patch_mask)).float()
        token_mask = patch_mask[:, :, None].expand(dealt.shape[:-1])
        if self.config.token_layout == "grid":
            ranked = self.ranks(self.deal.inverse(dealt))  # (batch, patches, ranks, maps)
            with exactly(ranked):
                maps = self.token_maps(coordinates).transpose(1, 2)  # (batch or 1, maps, regions)
                turned = multiply_shared(ranked.flatten(1, 2), maps).unflatten(1, ranked.shape[1:3])
                dealt = turned.transpose(2, 3)  # (batch, patches, regions, ranks)
            token_mask = patch_mask[:, :, None] & region_mask[:, None, :]
        anchor = torch.full_like(dealt[..., :1], self.config.code_anchor)
        return torch.cat([dealt, anchor], -1).flatten(1, 2), token_mask.flatten(1)

    def _project(self, output):
        """P of the quantised codes, (batch, tokens, text_width)."""
        if self.training or not bool(self.quantizer.initialized):
            return self.projection(output.quantized)
        # A row of the projected table, not P of a batch: the bits must not depend on who shares
        # the batch.
        return F.embedding(output.codes, self.project_codebook())

    def _decode(self, text_embeds, coordinates, code_coordinates):
        """Series (batch, time, regions) at `coordinates` from (batch, tokens, text_width)."""
        config = self.config
        grid = config.token_layout == "grid"
        per_patch = code_coordinates.shape[1] if grid else config.num_latents
        tokens = text_embeds.shape[1]
        if tokens % per_patch or not 0 < tokens // per_patch <= config.num_patches:
            raise ConfigurationError(
                f"{tokens} tokens a window do not fit: expected {per_patch} tokens for each of at "
                f"most {config.num_patches} patches."
            )
        # Whitened: text has a few directions of large variance, and codes would drown in them.
        whitened = self.text_moments(self.projection.standardize(text_embeds))
        with exactly(whitened):
            dealt = self.read_code(whitened).unflatten(1, (-1, per_patch))
            if grid:
                # (batch, patches, ranks, maps)
                ranked = dealt.transpose(2, 3) @ self.token_maps_back(code_coordinates)[:, None]
                scale = self.components.regions / per_patch
                dealt = self.deal(self.ranks.inverse(ranked * scale))
        patch_mask = torch.ones(dealt.shape[:2], dtype=torch.bool, device=dealt.device)
        hidden = self.decoder(self.decoder_in(dealt.to(self.decoder_in.weight.dtype)), patch_mask)
        dealt = dealt + self.decoder_out(hidden).float()
        patches = self.components.inverse(self.deal.inverse(dealt), coordinates)
        return patches.flatten(1, 2).float()


AVQConfig.register_for_auto_class()
AVQModel.register_for_auto_class("AutoModel")
