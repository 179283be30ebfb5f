"""Configuration of the language model that reads and writes AVQ codes."""

from typing import ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_avq import AVQConfig, ConfigurationError, refuse_unknown_keys
from .configuration_avq_connectome import AVQConnectomeConfig

# Fields that are integers, and the least they may be.
_INTEGERS = {
    "summary_patterns": 0,
    "windows_per_prompt": 0,
    "prompts_per_scan": 1,
    "fmri_offset": 0,
    "connectivity_offset": 0,
    "fmri_token_id": 0,
    "bof_token_id": 0,
    "eof_token_id": 0,
    "sep_token_id": 0,
    "bofc_token_id": 0,
    "eofc_token_id": 0,
}


class AVQLMConfig(PreTrainedConfig):
    """An `AVQConfig`, a language model's configuration, and where in the vocabulary codes lie.

    Parameters
    ----------
    avq_config : AVQConfig or dict
    text_config : PreTrainedConfig or dict
        The language model, already of the size of the shared vocabulary.
    connectome_config : AVQConnectomeConfig or dict, optional
        The second stream: a scan's connectivity as codes of the connectivity block. None: the model
        knows the dynamics alone.
    fmri_offset, connectivity_offset : int
        Ids of code 0 of the dynamics block and of the connectivity block; both are contiguous.
    fmri_token_id : int
        Placeholder that one code replaces, of the stream whose markers it stands between.
    bof_token_id, eof_token_id, sep_token_id : int
        `<fmri>`, `</fmri>` and the separator between windows.
    bofc_token_id, eofc_token_id : int
        `<fc>` and `</fc>`, around the connectivity codes.
    fmri_input : {"codes", "features"}
        Whether a scan enters as tokens of the vocabulary or as continuous projected features.
    summary_patterns : int
        Fitted patterns whose scores are added to the tokens of a scan's connectivity
        (`ScanSummary`); 0: none. Needs a `connectome_config`.
    answer_heads : bool
        Whether every target also has a linear head on the last state (`AnswerHeads`).
    windows_per_prompt : int
        Windows that every prompt holds; the same for all scans, since scan length alone names the
        site. 0: prompts of connectivity alone.
    prompts_per_scan : int
        Prompts, each with other windows, whose answers are pooled to one per scan.
    targets : list of dict
        What the model was trained to answer. Each has `name`, `question`, `kind` ("number" or
        "class") and either `minimum` and `maximum` (integers) or `classes` (list of str), and
        `readout`, the one chosen on validation subjects: "expectation", "median", "mode" or "head"
        of a number, "options" or "head" of a class. Numbers may have an `interval` (`half_width`,
        `coverage`) from errors on validation subjects; a target that was trained with several
        wordings lists them as `paraphrases`.

    Raises
    ------
    ConfigurationError
        A value out of range, blocks that overlap, or an unknown key.
    """

    model_type = "avq_lm"
    sub_configs_defaults: ClassVar[dict] = {
        "avq_config": AVQConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="gpt2"),
        "connectome_config": SubConfigSpec(config_class=AVQConnectomeConfig, optional=True),
    }

    avq_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    connectome_config: dict | PreTrainedConfig | None = None
    fmri_offset: int = 0
    connectivity_offset: int = 0
    fmri_token_id: int = 0
    bof_token_id: int = 0
    eof_token_id: int = 0
    sep_token_id: int = 0
    bofc_token_id: int = 0
    eofc_token_id: int = 0
    fmri_input: str = "codes"
    summary_patterns: int = 0
    answer_heads: bool = False
    windows_per_prompt: int = 1
    prompts_per_scan: int = 1
    targets: list | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        refuse_unknown_keys(type(self).__name__, kwargs, set(self.__dict__))
        super().__post_init__(**kwargs)
        # Weights that the language model ties stay tied in the composite.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        if self.fmri_input not in ("codes", "features"):
            raise ConfigurationError(
                f"AVQLMConfig.fmri_input must be 'codes' or 'features', found {self.fmri_input!r}."
            )
        for name, lowest in _INTEGERS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ConfigurationError(
                    f"AVQLMConfig.{name} must be an integer >= {lowest}, found {value!r}."
                )
        if self.summary_patterns and self.connectome_config is None:
            raise ConfigurationError(
                "AVQLMConfig.summary_patterns needs a connectome_config: they are of connectivity."
            )
        if self.answer_heads and not self.targets:
            raise ConfigurationError("AVQLMConfig.answer_heads needs targets: one head for each.")
        if self.connectome_config is None and not self.windows_per_prompt:
            raise ConfigurationError(
                "AVQLMConfig.windows_per_prompt must be at least 1 without a connectome_config: "
                "prompts would hold nothing of the scan."
            )
        first, second = self.fmri_offset, self.connectivity_offset
        codes, more = self.avq_config.num_codes, self.num_connectivity_codes
        without_tokenizer = (first, second) == (0, 0)  # the default
        overlap = more and first < second + more and second < first + codes
        if overlap and not without_tokenizer:
            raise ConfigurationError(
                f"The blocks of codes overlap: {first}..{first + codes - 1} and "
                f"{second}..{second + more - 1}. Take both offsets from the AVQTokenizer."
            )

    @property
    def num_connectivity_codes(self) -> int:
        """Ids of the connectivity block: of the second stream, or those reserved for one."""
        if self.connectome_config is None:
            return self.avq_config.num_connectivity_codes
        return self.connectome_config.num_codes

    @property
    def vocab_size(self) -> int:
        """Size of the shared vocabulary."""
        return self.text_config.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the language model."""
        return self.text_config.hidden_size

    def get_text_config(self, decoder=None, encoder=None):
        """The language model's configuration; `generate` reads sizes of its cache from it."""
        return self.text_config.get_text_config(decoder=decoder, encoder=encoder)
