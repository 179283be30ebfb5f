"""What of an `AVQModel` concerns the language model's text space: P, and critics of alignment."""

import hashlib

import torch

from .configuration_avq import AVQConfig, ConfigurationError
from .layers_avq import DomainClassifier, TextMoments, TextProjection
from .losses_avq import (
    domain_loss,
    energy_loss,
    moment_loss,
    neighbour_loss,
    reverse_gradient,
    thin,
)
from .quantization_avq import AVQCodebook


class TextSpace:
    """Methods of `AVQModel` on its parts `projection`, `classifier`, `text_moments`."""

    config: AVQConfig
    projection: TextProjection
    classifier: DomainClassifier
    text_moments: TextMoments
    quantizer: AVQCodebook

    def project_codebook(self) -> torch.Tensor:
        """P(codebook), float32 (num_codes, text_width): the LLM's rows of codes, bit for bit."""
        return self.projection(self.quantizer.codebook)

    @torch.no_grad()
    def set_text_space(
        self,
        table: torch.Tensor,
        model_id: str | None = None,
        share: torch.Tensor | None = None,
    ) -> None:
        """Take mean, scale and identity of the text domain from `table` (tokens, text_width).

        With `share` (tokens,), the tokens' frequencies in real text, summing to 1, P also starts at
        the mean and along the leading directions of text as it is met.
        """
        if table.dim() != 2 or table.shape[1] != self.config.text_width:
            raise ConfigurationError(
                f"The text table must have text_width = {self.config.text_width} columns, found "
                f"shape {tuple(table.shape)}. Set text_width in the config, or choose another "
                "language model."
            )
        table = table.detach().float()
        self.projection.text_mean.copy_(table.mean(0))
        self.projection.text_scale.copy_((table - table.mean(0)).std())
        self.config.text_model_id = model_id
        self.config.text_table_sha256 = tensor_sha256(table)
        if share is not None:
            self.text_moments.fit(self.projection.standardize(table), share)
            self.projection.start_at(self.text_moments.mean, self.text_moments.axes())

    def classify(self, embeddings):
        """Logits (...) of the domain classifier for embeddings (..., width); positive = text."""
        return self._classify(self.projection.standardize(embeddings))

    def _classify(self, standardized):
        return self.classifier(self.text_moments(standardized))

    def alignment_losses(self, code_embeddings, text_embeddings, reversal: float = 1.0) -> dict:
        """What tells P(codes) (codes, width) from embeddings of real text (tokens, width).

        `domain_loss` and `domain_accuracy` of the trained classifier, whose gradient reaches the
        codes reversed; and, where their weights are not 0, two critics in closed form, which codes
        simply descend: `moment_loss` and `energy_loss`. The larger side is thinned evenly, but
        for the moments, which take all codes.
        """
        rows = min(len(code_embeddings), len(text_embeddings))
        every = self.projection.standardize(code_embeddings)
        codes = thin(every, rows)
        text = self.projection.standardize(thin(text_embeddings, rows).detach())
        losses = {}
        losses["domain_loss"], losses["domain_accuracy"] = domain_loss(
            self._classify(reverse_gradient(codes, reversal)), self._classify(text)
        )
        # They follow the schedule of the reversal, so that the codec finds its feet first.
        if self.config.moment_weight:
            losses["moment_loss"] = moment_loss(
                self.text_moments(reverse_gradient(every, -abs(reversal))),
                self.text_moments.covariance,
            )
        if self.config.energy_weight:
            few = reverse_gradient(thin(codes, 512), -abs(reversal))
            losses["energy_loss"] = energy_loss(few, thin(text, 512))
        return losses

    def weighted_alignment(self, losses) -> torch.Tensor:
        """Sum of the `alignment_losses` in a mapping, each by its weight in the configuration."""
        config = self.config
        weights = {
            "domain_loss": config.domain_weight,
            "moment_loss": config.moment_weight,
            "energy_loss": config.energy_weight,
        }
        terms = [weight * losses[name] for name, weight in weights.items() if name in losses]
        return torch.stack(terms).sum()

    def neighbour_loss(self, codes, most: int = 768):
        """How far P moves the neighbours of the codes that a batch holds; reaches P alone."""
        codes = thin(self.quantizer.codebook[codes.unique()], most)
        return neighbour_loss(codes, self.projection.standardize(self.projection(codes)))

    def _seen_by_critics(self, quantized, text_embeds):
        """P(codes) with gradients to those parts alone that `domain_gradient` names."""
        reached, share = self.config.domain_gradient, self.config.encoder_share
        if reached == "none":
            return text_embeds.detach()
        if reached == "projection":
            return self.projection(quantized.detach())
        quantized = reverse_gradient(quantized, -share)
        if reached == "both":
            return self.projection(quantized)
        frozen = {key: value.detach() for key, value in self.projection.named_parameters()}
        return torch.func.functional_call(self.projection, frozen, (quantized,))


def tensor_sha256(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's float32 bytes, hex."""
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()
