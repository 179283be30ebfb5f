"""Scans in a prompt: their codes or features, where they stand, and what they decode to."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .configuration_avq import ConfigurationError

# Inputs that belong to the scan; the language model itself knows none of them.
SCAN_INPUTS = (
    "input_values",
    "region_coordinates",
    "region_mask",
    "time_mask",
    "connectivity",
    "connectivity_mask",
    "fmri_latents",
    "connectivity_latents",
)
# What of the scan is to be placed; the others describe it.
_PLACED = ("input_values", "connectivity", "fmri_latents", "connectivity_latents")


class ScanInputs:
    """What `AVQLMForConditionalGeneration` does with scans before its language model sees them."""

    config: Any
    avq: Any
    connectome: Any
    summary: Any
    get_input_embeddings: Callable

    def block(self, stream: str = "fmri") -> tuple[int, int]:
        """First id and number of codes of a stream, "fmri" (dynamics) or "fc" (connectivity).

        Raises
        ------
        ConfigurationError
            No such stream, or a model without the connectivity stream.
        """
        if stream == "fmri":
            return self.config.fmri_offset, self.config.avq_config.num_codes
        if stream != "fc":
            raise ConfigurationError(f"stream must be 'fmri' or 'fc', found {stream!r}.")
        if self.connectome is None:
            raise ConfigurationError(
                "This model was built without the connectivity stream. Give an AVQConnectomeModel "
                "to from_avq_and_lm, or leave connectivity out of the prompt."
            )
        return self.config.connectivity_offset, self.config.connectome_config.num_codes

    @torch.no_grad()
    def get_fmri_tokens(
        self, values, region_coordinates=None, region_mask=None, time_mask=None, stream="fmri"
    ):
        """Ids of a scan's codes, int64 (windows or scans, tokens).

        Parameters
        ----------
        values : float32
            Of stream "fmri" windows (windows, time, regions), z-scored; of stream "fc" matrices
            (scans, regions, regions), Fisher z.
        region_coordinates, region_mask, time_mask
            As in `AVQModel.encode`; "fc" has no `time_mask`.
        stream : {"fmri", "fc"}
        """
        offset, _ = self.block(stream)
        if stream == "fc":
            return self.connectome.encode(values, region_coordinates, region_mask).codes + offset
        encoded = self.avq.encode(
            values, region_coordinates, region_mask, time_mask, codes_only=True
        )
        return encoded.codes + offset

    @torch.no_grad()
    def get_fmri_latents(
        self, values, region_coordinates=None, region_mask=None, time_mask=None, stream="fmri"
    ):
        """Vectors before quantisation, float32 (windows or scans, tokens, code_dim).

        Arguments as in `get_fmri_tokens`. What a scan is read by where `fmri_input` is "features";
        they need no gradient, so training computes them once.
        """
        self.block(stream)  # refuses what there is none of
        if stream == "fc":
            return self.connectome.encode(values, region_coordinates, region_mask).latents.float()
        inputs = self.avq._prepare(values, region_coordinates, region_mask, time_mask)
        return self.avq._encode(*inputs)[0].float()

    def get_fmri_features(
        self, values, region_coordinates=None, region_mask=None, time_mask=None, stream="fmri"
    ):
        """Embeddings of a scan's tokens, (windows or scans, tokens, hidden); see `get_fmri_tokens`.

        Those of its codes, or continuous ones where the configuration's `fmri_input` says
        "features": P of the unit vectors before quantisation.
        """
        arguments = (values, region_coordinates, region_mask, time_mask, stream)
        if self.config.fmri_input == "codes":
            return self.get_input_embeddings()(self.get_fmri_tokens(*arguments))
        return self._embed_latents(self.get_fmri_latents(*arguments), stream)

    @torch.no_grad()
    def _embed_latents(self, latents, stream):
        codec = self.connectome if stream == "fc" else self.avq
        features = codec.projection(F.normalize(latents, dim=-1))
        return features.to(self.get_input_embeddings().weight.dtype)

    def decode_fmri_tokens(self, ids, region_coordinates=None, stream="fmri"):
        """What ids of codes, int64 (windows or scans, tokens), stand for.

        Of stream "fmri" series float32 (windows, time, regions) in z-score units, of "fc" matrices
        float32 (scans, regions, regions) of Fisher z.
        """
        codes = ids - self.block(stream)[0]
        if stream == "fc":
            return self.connectome.decode(codes, region_coordinates).matrices
        return self.avq.decode(codes, region_coordinates).reconstruction

    # ------------------------------------------------------------------ inside

    @staticmethod
    def _scan_given(scan) -> bool:
        return any(scan[name] is not None for name in _PLACED)

    def _latents_or_tokens(self, scan, stream):
        """Ids int64 or latents float32 of what `scan` holds of a stream, or None."""
        codes = self.config.fmri_input == "codes"
        latents = scan["connectivity_latents" if stream == "fc" else "fmri_latents"]
        if latents is not None:
            if codes:
                raise ConfigurationError(
                    'Latents were given to a model that reads codes (fmri_input="codes"). Put the '
                    'ids of codes into the prompt, or build the model with fmri_input="features".'
                )
            self.block(stream)
            return latents
        values = scan["connectivity" if stream == "fc" else "input_values"]
        if values is None:
            return None
        mask = scan["connectivity_mask" if stream == "fc" else "region_mask"]
        read = self.get_fmri_tokens if codes else self.get_fmri_latents
        return read(values, scan["region_coordinates"], mask, scan["time_mask"], stream)

    def _place(self, input_ids, scan, scores=None):
        """Put a scan's tokens (or features) at its placeholders: inputs of the language model."""
        config = self.config
        holes = input_ids == config.fmri_token_id
        # A placeholder after <fc> and before </fc> is one of the connectivity.
        opened = (input_ids == config.bofc_token_id).cumsum(1)
        within = opened > (input_ids == config.eofc_token_id).cumsum(1)
        codes = config.fmri_input == "codes"
        embeds = None if codes else self.get_input_embeddings()(input_ids)
        for stream, mine in (("fmri", holes & ~within), ("fc", holes & within)):
            found = self._latents_or_tokens(scan, stream)
            if found is None:
                continue
            self._check_holes(mine, found.shape[0] * found.shape[1], stream)
            if codes:
                input_ids = input_ids.masked_scatter(mine, found.to(input_ids))
                continue
            features = self._embed_latents(found, stream)
            embeds = embeds.masked_scatter(mine[..., None], features.to(embeds))
            if stream == "fc" and self.summary is not None:
                ends = self._closing_markers(input_ids)
                if len(ends) != len(found):
                    raise ConfigurationError(
                        f"The prompts close {len(ends)} scans with </fc>, {len(found)} matrices "
                        "were given. Make both with one call of the AVQProcessor."
                    )
                embeds = self._with_summaries(embeds, ends, self.summary(found, scores=scores))
        return {"input_ids": input_ids} if codes else {"inputs_embeds": embeds}

    def _check_holes(self, holes, count, stream):
        if int(holes.sum()) != count:
            what = "windows" if stream == "fmri" else "matrices"
            raise ConfigurationError(
                f"The prompts hold {int(holes.sum())} placeholders, the {what} give {count} "
                "codes. Make both with one call of the AVQProcessor."
            )

    def _closing_markers(self, input_ids):
        """Rows and columns, int64 (scans, 2), of each </fc> that ends a whole block of tokens."""
        tokens = self.config.connectome_config.num_tokens
        ends = (input_ids == self.config.eofc_token_id).nonzero()
        ends = ends[ends[:, 1] > tokens]
        opens = input_ids[ends[:, 0], ends[:, 1] - tokens - 1]
        return ends[opens == self.config.bofc_token_id]

    def _with_summaries(self, embeds, ends, summaries):
        """Embeddings (batch, sequence, hidden) with summaries (scans, hidden) added to scans.

        To every token of a scan's connectivity and both its markers; `ends` are the closing ones.
        """
        reach = torch.arange(-self.config.connectome_config.num_tokens - 1, 1, device=embeds.device)
        place = (ends[:, :1], ends[:, 1:] + reach)
        return embeds.index_put(place, summaries.to(embeds)[:, None], accumulate=True)

    def _embed_with_summaries(self, input_ids, scores=None):
        """Embeddings of ids in which whole scans stand as codes, or None where there are none."""
        ends = self._closing_markers(input_ids)
        if not len(ends):
            return None
        tokens = self.config.connectome_config.num_tokens
        reach = torch.arange(-tokens, 0, device=input_ids.device)
        first, count = self.block("fc")
        codes = input_ids[ends[:, :1], ends[:, 1:] + reach] - first
        known = (codes >= 0) & (codes < count)  # a hidden code is a placeholder
        vectors = F.embedding(codes.clamp(0, count - 1), self.connectome.quantizer.codebook)
        embeds = self.get_input_embeddings()(input_ids)
        return self._with_summaries(embeds, ends, self.summary(vectors, known, scores))
