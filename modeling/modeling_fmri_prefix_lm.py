"""A language model whose prompt begins with projected continuous features of a scan."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init

from .configuration_avq import ConfigurationError
from .configuration_fmri_prefix_lm import FMRIPrefixLMConfig


class FeatureProjector(nn.Module):
    """Features (batch, features, feature_width) to embeddings (batch, prefix, hidden).

    The output has the scale of the language model's own embeddings, whatever the features' is.
    """

    def __init__(self, config):
        super().__init__()
        width, hidden = config.feature_width, config.projector_hidden_size
        self.heads = config.projector_heads
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, config.hidden_size)
        self.norm_out = nn.LayerNorm(config.hidden_size)
        self.queries = None
        if config.prefix_tokens:
            self.queries = nn.Parameter(torch.zeros(config.prefix_tokens, hidden))
            self.keys, self.values = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, features):
        x = F.gelu(self.up(self.norm(features.to(self.up.weight.dtype))))
        if self.queries is not None:
            batch, _, hidden = x.shape
            split = (batch, -1, self.heads, hidden // self.heads)
            q = self.queries.expand(batch, -1, -1).reshape(split).transpose(1, 2)
            k = self.keys(x).view(split).transpose(1, 2)
            v = self.values(x).view(split).transpose(1, 2)
            pooled = F.scaled_dot_product_attention(q, k, v)  # (batch, heads, prefix, head_dim)
            x = pooled.transpose(1, 2).flatten(2)
        return self.norm_out(self.down(x))


class FMRIPrefixLM(PreTrainedModel):
    """A projector, and any causal language model that reads what it gives before the text.

    The encoder of the features is no part of it: it is frozen, so its features of a cohort are
    computed once. `config.encoder` says which kind they are of.
    """

    config: FMRIPrefixLMConfig
    config_class = FMRIPrefixLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: FMRIPrefixLMConfig):
        super().__init__(config)
        if config.projector_hidden_size % config.projector_heads:
            raise ConfigurationError(
                "FMRIPrefixLMConfig.projector_hidden_size must be a multiple of projector_heads, "
                f"found {config.projector_hidden_size} and {config.projector_heads}."
            )
        self.projector = FeatureProjector(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = 0.02
            if isinstance(module, nn.Linear):
                std = 1.0 / math.sqrt(module.in_features)
            init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, FeatureProjector) and module.queries is not None:
            init.normal_(module.queries)

    @classmethod
    @torch.no_grad()
    def from_language_model(cls, lm, **config_values):
        """Put an untrained projector before `lm`, whose weights are kept.

        Parameters
        ----------
        lm : PreTrainedModel
            Any causal language model.
        **config_values
            Further fields of `FMRIPrefixLMConfig`.
        """
        model = cls(FMRIPrefixLMConfig(text_config=lm.config.to_dict(), **config_values))
        model.language_model.load_state_dict(lm.state_dict())
        table = lm.get_input_embeddings().weight
        model.projector.norm_out.weight.fill_(float(table.std()))
        model.projector.norm_out.bias.copy_(table.mean(0))
        return model

    def forward(self, input_ids=None, features=None, attention_mask=None, **kwargs):
        """The language model's forward pass over prefix and text.

        Parameters
        ----------
        input_ids : int64, shape (batch, sequence)
            The text alone.
        features : float, shape (batch, features, feature_width), optional
            None: no prefix, the control that sees the question alone.
        attention_mask : int64, shape (batch, sequence), optional
            Of the text.

        Returns
        -------
        CausalLMOutputWithPast
            Logits of prefix and text, (batch, prefix + sequence, vocabulary), unless
            `logits_to_keep` says otherwise.
        """
        embeds = self.language_model.get_input_embeddings()(input_ids)
        if features is not None:
            prefix = self.projector(features).to(embeds.dtype)
            embeds = torch.cat([prefix, embeds], 1)
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, (prefix.shape[1], 0), value=1)
        return self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.language_model.set_output_embeddings(value)


FMRIPrefixLM.register_for_auto_class("AutoModel")
