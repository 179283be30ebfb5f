"""Configuration of a language model that reads continuous features of a scan as its prefix."""

from typing import ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_avq import ConfigurationError, refuse_unknown_keys


class FMRIPrefixLMConfig(PreTrainedConfig):
    """A language model's configuration, and what features come before its text.

    Parameters
    ----------
    text_config : PreTrainedConfig or dict
        The language model.
    encoder : {"avq", "mae", "vision"}
        Where the features come from: AVQ's encoder before quantisation, the masked autoencoder, or
        the visual half of a vision-language model over the scan drawn as an image.
    feature_width : int
        Numbers of one feature.
    prefix_tokens : int
        Embeddings that the features are pooled to by learned queries; 0: one for each feature.
    projector_hidden_size : int
    projector_heads : int
        Of the pooling attention.
    windows_per_scan : int
        Prompts, each with another window, whose answers are pooled to one per scan.
    targets : list of dict, optional
        As in `AVQLMConfig`.

    Raises
    ------
    ConfigurationError
        A value out of range, or an unknown key.
    """

    model_type = "fmri_prefix_lm"
    sub_configs_defaults: ClassVar[dict] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="gpt2"),
    }

    text_config: dict | PreTrainedConfig | None = None
    encoder: str = "avq"
    feature_width: int = 128
    prefix_tokens: int = 0
    projector_hidden_size: int = 256
    projector_heads: int = 4
    windows_per_scan: int = 1
    targets: list | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        refuse_unknown_keys(type(self).__name__, kwargs, set(self.__dict__))
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        if self.encoder not in ("avq", "mae", "vision"):
            raise ConfigurationError(
                "FMRIPrefixLMConfig.encoder must be one of avq, mae, vision, found "
                f"{self.encoder!r}."
            )
        for name, lowest in (
            ("feature_width", 1),
            ("prefix_tokens", 0),
            ("projector_hidden_size", 1),
            ("projector_heads", 1),
            ("windows_per_scan", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ConfigurationError(
                    f"FMRIPrefixLMConfig.{name} must be an integer >= {lowest}, found {value!r}."
                )

    @property
    def vocab_size(self) -> int:
        """Size of the language model's vocabulary."""
        return self.text_config.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the language model."""
        return self.text_config.hidden_size

    def get_text_config(self, decoder=None, encoder=None):
        """The language model's configuration; `generate` reads sizes of its cache from it."""
        return self.text_config.get_text_config(decoder=decoder, encoder=encoder)


FMRIPrefixLMConfig.register_for_auto_class()
