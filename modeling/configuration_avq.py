"""Configuration of the adversarial vector-quantised autoencoder (AVQ)."""

import difflib
import math

from transformers import PreTrainedConfig

# Keys that transformers itself writes into, or hands to, every configuration.
_FOREIGN_KEYS = {
    "_attn_implementation",
    "_attn_implementation_internal",
    "_commit_hash",
    "_name_or_path",
    "_output_attentions",
    "attn_implementation",
    "auto_map",
    "model_type",
    "name_or_path",
    "output_attentions",
    "tie_word_embeddings",
    "torch_dtype",
    "use_cache",
}


class ConfigurationError(ValueError):
    """A configuration or a checkpoint that cannot work; the text says what to change."""


def refuse_unknown_keys(config_name: str, unknown: dict, known: set[str]) -> None:
    """Raise `ConfigurationError` for keys that no field of a configuration takes."""
    for key in unknown:
        if key in _FOREIGN_KEYS:
            continue
        near = difflib.get_close_matches(key, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else " Remove it."
        raise ConfigurationError(f"{config_name} has no field {key!r}.{hint}")


def _is_point(row) -> bool:
    """Whether `row` is three finite numbers."""
    return (
        isinstance(row, (list, tuple))
        and len(row) == 3
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in row)
    )


class AVQConfig(PreTrainedConfig):
    """Sizes, token layout, codebook, text space and loss weights of an `AVQModel`.

    Parameters
    ----------
    sampling_interval : float
        Seconds between two samples of the model's input.
    window_length, patch_length : int
        Samples per window and per patch; the first is a multiple of the second.
    token_layout : {"latent", "grid"}
        `latent`: `num_latents` codes per patch, whatever the parcellation. `grid`: one code per
        region and patch.
    num_latents : int
        Latent vectors per patch that all regions are mixed into.
    num_codes : int
        Size of the dynamics codebook.
    num_connectivity_codes : int
        Size of the block of the vocabulary reserved for codes of a connectivity matrix.
    code_dim : int
        Width of a code; codes are l2-normalised.
    text_width : int
        Width of the language model's input embeddings, the space that P maps codes into.
    text_model_id, text_table_sha256 : str or None
        The language model whose embedding table is the text domain, and its fingerprint.
    atlas : str or None
        Identifier of the parcellation the model was trained on.
    region_labels : list of str or None
        Its labels in column order.
    region_coordinates : list of [x, y, z] or None
        Its centroids in mm, MNI; used by `encode` and `decode` when none are given.
    code_branches : int
        Branches of the codebook, a divisor of `num_codes`: a latent is compared with the mean of
        each branch, then with the codes of the four nearest. 1: with all codes.
    code_gradient : {"straight_through", "rotation"}
        How the gradient passes the codebook.
    codebook_start_step : int or None
        Training forwards without quantisation, after which the codebook starts by itself from a
        batch of six scans or more; None: only `AVQModel.start_codebook` starts it.
    moment_weight, energy_weight : float
        Of the two critics of the alignment that need no training.
    neighbour_weight : float
        Of the loss that keeps a code's neighbours its neighbours in text space.
    domain_gradient : {"both", "projection", "encoder", "none"}
        What the gradient of the alignment reaches: P and the encoder, one of them, or neither.
    encoder_share : float
        Strength of that gradient at the encoder, by its strength at P.
    start_noise : float
        Length of the noise that is added to unit codes in training until the codebook starts.
    code_anchor : float
        A constant that stands beside the components before they are normalised.
    revival_threshold : float
        A code is revived when its EMA count falls below this share of the mean count.

    Raises
    ------
    ConfigurationError
        A value out of range, or an unknown key (the nearest known one is named).
    """

    model_type = "avq"

    # the signal
    sampling_interval: float | int = 2.0
    window_length: int = 80
    patch_length: int = 20
    atlas: str | None = None
    region_labels: list | None = None
    region_coordinates: list | None = None
    # tokens
    token_layout: str = "latent"
    num_latents: int = 32
    num_codes: int = 8192
    num_connectivity_codes: int = 4096
    # the network
    hidden_size: int = 256
    intermediate_size: int = 768
    num_attention_heads: int = 4
    encoder_layers: int = 3
    decoder_layers: int = 3
    num_components: int = 128
    position_features: int = 256
    position_wavelength: float | int = 100.0
    dropout: float | int = 0.0
    # the codebook
    code_dim: int = 32
    code_anchor: float | int = 2.0
    code_branches: int = 1
    ema_decay: float | int = 0.99
    revival_threshold: float | int = 0.1
    revival_interval: int = 20
    code_gradient: str = "straight_through"
    codebook_start_step: int | None = 200
    start_noise: float | int = 0.0
    # text space and adversary
    text_width: int = 256
    text_model_id: str | None = None
    text_table_sha256: str | None = None
    projection_hidden_size: int = 256
    classifier_hidden_size: int = 256
    # weights of the loss
    commitment_weight: float | int = 0.1
    spectrum_weight: float | int = 0.0
    connectivity_weight: float | int = 0.0
    domain_weight: float | int = 0.05
    moment_weight: float | int = 0.0
    energy_weight: float | int = 0.0
    neighbour_weight: float | int = 0.0
    domain_gradient: str = "both"
    encoder_share: float | int = 1.0
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        # NOTE: keys that transformers writes into JSON pass; anything else unknown is a typo.
        refuse_unknown_keys(type(self).__name__, kwargs, set(self.__dict__))
        super().__post_init__(**kwargs)
        self._check()

    def _check(self):
        positive = [
            "window_length",
            "patch_length",
            "num_latents",
            "num_codes",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_components",
            "position_features",
            "code_dim",
            "code_branches",
            "text_width",
            "projection_hidden_size",
            "classifier_hidden_size",
            "revival_interval",
        ]
        for name in positive:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(
                    f"AVQConfig.{name} must be an integer >= 1, found {value!r}."
                )
        counts = ["num_connectivity_codes", "encoder_layers", "decoder_layers"]
        if self.codebook_start_step is not None:
            counts.append("codebook_start_step")
        for name in counts:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigurationError(
                    f"AVQConfig.{name} must be an integer >= 0, found {value!r}."
                )
        for name in (
            "commitment_weight",
            "spectrum_weight",
            "connectivity_weight",
            "domain_weight",
            "moment_weight",
            "energy_weight",
            "neighbour_weight",
            "start_noise",
            "encoder_share",
            "revival_threshold",
        ):
            self._check_number(name, 0.0, math.inf)
        self._check_number("sampling_interval", 1e-3, 60.0)
        self._check_number("position_wavelength", 1.0, 1e4)
        self._check_number("code_anchor", 0.0, 1e3)
        self._check_number("ema_decay", 0.0, 0.999999)
        self._check_number("dropout", 0.0, 0.999999)
        self._check_number("initializer_range", 0.0, 1.0)
        if self.window_length % self.patch_length:
            whole = max(1, self.window_length // self.patch_length) * self.patch_length
            raise ConfigurationError(
                f"AVQConfig.window_length must be a multiple of patch_length, found "
                f"{self.window_length} and {self.patch_length}. Use {whole}."
            )
        if self.code_dim < 2:
            raise ConfigurationError(
                "AVQConfig.code_dim must be an integer >= 2, found 1: one place of a code is the "
                "anchor's."
            )
        if self.num_codes % self.code_branches:
            raise ConfigurationError(
                f"AVQConfig.code_branches must divide num_codes ({self.num_codes}), found "
                f"{self.code_branches}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigurationError(
                f"AVQConfig.hidden_size ({self.hidden_size}) must be divisible by "
                f"num_attention_heads ({self.num_attention_heads})."
            )
        if self.token_layout not in ("latent", "grid"):
            raise ConfigurationError(
                f"AVQConfig.token_layout must be 'latent' or 'grid', found {self.token_layout!r}."
            )
        if self.code_gradient not in ("straight_through", "rotation"):
            raise ConfigurationError(
                "AVQConfig.code_gradient must be 'straight_through' or 'rotation', found "
                f"{self.code_gradient!r}."
            )
        reached = ("both", "projection", "encoder", "none")
        if self.domain_gradient not in reached:
            raise ConfigurationError(
                f"AVQConfig.domain_gradient must be one of {', '.join(reached)}, found "
                f"{self.domain_gradient!r}."
            )
        self._check_regions()

    def _check_number(self, name, low, high):
        value = getattr(self, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not low <= value <= high
        ):
            raise ConfigurationError(
                f"AVQConfig.{name} must be a number from {low} to {high}, found {value!r}."
            )

    def _check_regions(self):
        coordinates, labels = self.region_coordinates, self.region_labels
        if coordinates is None:
            return
        if not coordinates or not all(_is_point(row) for row in coordinates):
            raise ConfigurationError(
                "AVQConfig.region_coordinates must be finite [x, y, z] rows in mm, one per region."
            )
        if labels is not None and len(labels) != len(coordinates):
            raise ConfigurationError(
                f"AVQConfig: {len(labels)} region_labels but {len(coordinates)} "
                "region_coordinates; expected one row per label."
            )

    @property
    def num_patches(self) -> int:
        """Patches in one window."""
        return self.window_length // self.patch_length

    @property
    def tokens_per_window(self) -> int:
        """Codes that one window becomes (for `grid`: with the regions of the training atlas)."""
        if self.token_layout == "latent":
            return self.num_patches * self.num_latents
        if self.region_coordinates is None:
            raise ConfigurationError(
                "tokens_per_window of the grid layout depends on the atlas: set region_coordinates."
            )
        return self.num_patches * len(self.region_coordinates)
