"""The AVQ autoencoder: fMRI windows to codes and back, through a language model's text space."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .alignment_avq import TextSpace, tensor_sha256
from .configuration_avq import AVQConfig, ConfigurationError
from .inputs_avq import checked_coordinates, whole_mask
from .layers_avq import (
    DomainClassifier,
    LatentsToRegions,
    LatentTransformer,
    RegionPositions,
    RegionsToLatents,
    TextMoments,
    TextProjection,
)
from .losses_avq import (
    connectivity_loss,
    reconstruction_loss,
    spectrum_loss,
)
from .outputs_avq import AVQDecoderOutput, AVQEncoderOutput, AVQOutput
from .quantization_avq import AVQCodebook


class AVQPreTrainedModel(PreTrainedModel):
    """Initialisation and what loading a checkpoint needs to know."""

    config: AVQConfig
    config_class = AVQConfig
    base_model_prefix = "avq"
    main_input_name = "input_values"
    _supports_sdpa = True
    # The codebook's tensors by name: its clock and its switch are no floats.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = [
        "quantizer.codebook",
        "quantizer.code_sum",
        "quantizer.code_count",
        "positions",
        "projection",
        "text_moments",
    ]

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=1.0 / math.sqrt(module.in_features))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, RegionPositions):
            init.normal_(module.frequencies)
        elif isinstance(module, LatentsToRegions):
            init.zeros_(module.bias)
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
            init.normal_(module.down.weight, std=0.1 / math.sqrt(module.down.in_features))
        elif isinstance(module, TextMoments):
            init.zeros_(module.mean)
            init.eye_(module.whitening)
            init.eye_(module.covariance)
        elif isinstance(module, AVQCodebook):
            for buffer in (module.codebook, module.code_sum, module.code_count, module.updates):
                init.zeros_(buffer)
            init.zeros_(module.initialized)


class AVQModel(TextSpace, AVQPreTrainedModel):
    """Adversarial vector-quantised autoencoder of parcellated fMRI.

    Tricks used, one line each:

    * a region is known by its MNI coordinates (Fourier features), so one checkpoint reads any
      parcellation;
    * regions are mixed into a few latents, and read back, by weights of positions alone;
    * all transformer blocks run on the latents, never on the regions;
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
        width, patch = config.hidden_size, config.patch_length
        self.positions = RegionPositions(config)
        self.regions_to_latents = RegionsToLatents(config, patch)
        self.encoder = LatentTransformer(config, config.encoder_layers)
        self.to_code = nn.Linear(width, config.code_dim)
        self.quantizer = AVQCodebook(
            config.num_codes,
            config.code_dim,
            config.ema_decay,
            config.revival_threshold,
            config.revival_interval,
            config.code_gradient,
            config.codebook_start_step,
            config.start_noise,
        )
        self.projection = TextProjection(config)
        self.from_text = nn.Linear(config.text_width, width)
        self.decoder = LatentTransformer(config, config.decoder_layers)
        self.latents_to_regions = LatentsToRegions(config, patch)
        self.classifier = DomainClassifier(config)
        self.text_moments = TextMoments(config)
        if config.token_layout == "grid":
            self.patch_to_code = nn.Linear(patch, config.code_dim)
            self.latents_to_code = LatentsToRegions(config, config.code_dim)
            self.tokens_to_latents = RegionsToLatents(config, width)
            self.token_to_patch = nn.Linear(width, patch)
        self.post_init()

    # ------------------------------------------------------------------ the two halves

    def encode(
        self, input_values, region_coordinates=None, region_mask=None, time_mask=None
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
            alignment = self.alignment_losses(
                self._seen_by_critics(quantized.quantized, text_embeds)[token_mask],
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
        # Filled, not multiplied: a masked NaN times 0 is NaN.
        values = input_values.float().masked_fill(~present, 0.0)
        bad = ~torch.isfinite(values).all(2).all(1)
        if bool(bad.any()):
            raise ConfigurationError(
                f"input_values hold NaN or infinite values in rows {bad.nonzero()[:, 0].tolist()} "
                "of the batch. Mask those regions (region_mask) or leave those scans out."
            )
        return values, coordinates, region_mask, time_mask

    def _positions(self, coordinates):
        """Positions (batch or 1, regions, hidden) of float32 precision, in the blocks' dtype."""
        return self.positions(coordinates).to(self.to_code.weight.dtype)

    def _encode(self, values, coordinates, region_mask, time_mask):
        """Unnormalised code vectors (batch, tokens, code_dim) and token mask (batch, tokens)."""
        patch = self.config.patch_length
        patches = values.view(values.shape[0], -1, patch, values.shape[2])
        patches = patches.to(self.to_code.weight.dtype)  # (batch, patches, patch_length, regions)
        patch_mask = time_mask.view(time_mask.shape[0], -1, self.config.patch_length).any(-1)
        positions = self._positions(coordinates)
        latents = self.regions_to_latents(patches, positions, region_mask)
        latents = self.encoder(latents, patch_mask)  # (batch, patches, latents, hidden)
        if self.config.token_layout == "latent":
            vectors = self.to_code(latents)
            token_mask = patch_mask[:, :, None].expand(vectors.shape[:-1])
        else:
            own = self.patch_to_code(patches.transpose(2, 3))
            vectors = own + self.latents_to_code(latents, positions).transpose(2, 3)
            token_mask = patch_mask[:, :, None] & region_mask[:, None, :]
        return vectors.flatten(1, 2), token_mask.flatten(1)

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
        batch, tokens = text_embeds.shape[:2]
        if tokens % per_patch or not 0 < tokens // per_patch <= config.num_patches:
            raise ConfigurationError(
                f"{tokens} tokens a window do not fit: expected {per_patch} tokens for each of at "
                f"most {config.num_patches} patches."
            )
        # Whitened: text has a few directions of large variance, and codes would drown in them.
        whitened = self.text_moments(self.projection.standardize(text_embeds))
        hidden = self.from_text(whitened.to(self.from_text.weight.dtype))
        hidden = hidden.view(batch, -1, per_patch, config.hidden_size)
        patch_mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        positions = self._positions(coordinates)
        latents = hidden
        if grid:
            same = coordinates is code_coordinates
            source = positions if same else self._positions(code_coordinates)
            everywhere = torch.ones(batch, per_patch, dtype=torch.bool, device=hidden.device)
            latents = self.tokens_to_latents(hidden.transpose(2, 3), source, everywhere)
        latents = self.decoder(latents, patch_mask)
        # (batch, patches, patch_length, regions)
        patches = self.latents_to_regions(latents, positions)
        if grid:
            own = self.token_to_patch(hidden).transpose(2, 3)
            if not same:
                # Another parcellation: each target region takes its neighbours' own patches by
                # 10 mm Gaussian weights.
                squared = torch.cdist(coordinates, code_coordinates).square()
                own = torch.einsum(
                    "brs,bpls->bplr", torch.softmax(-squared / 200.0, -1).expand(batch, -1, -1), own
                )
            patches = patches + own
        return patches.flatten(1, 2).float()


AVQConfig.register_for_auto_class()
AVQModel.register_for_auto_class("AutoModel")
