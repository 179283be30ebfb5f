"""Configuration of the masked autoencoder of region x patch tokens."""

from transformers import PreTrainedConfig

from .configuration_avq import ConfigurationError, refuse_unknown_keys

_INTEGERS = (
    "window_length",
    "patch_length",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "decoder_hidden_size",
    "decoder_intermediate_size",
    "decoder_num_hidden_layers",
    "decoder_num_attention_heads",
    "position_features",
)


class FMRIMAEConfig(PreTrainedConfig):
    """What an `FMRIMAEModel` is made of.

    Parameters
    ----------
    sampling_interval : float
        Seconds between samples.
    window_length, patch_length : int
        Samples of a window and of a patch; the first is a multiple of the second.
    hidden_size, intermediate_size, num_hidden_layers, num_attention_heads : int
        Of the encoder.
    decoder_hidden_size, decoder_intermediate_size, decoder_num_hidden_layers,
    decoder_num_attention_heads : int
        Of the decoder, which is there for training only.
    mask_ratio : float
        Share of tokens that are hidden in training.
    position : {"fourier", "linear"}
        A region's coordinates enter through random Fourier features, or through one linear layer.
    position_features : int
        Sines, and as many cosines, of "fourier".
    position_wavelength : float
        Their scale, mm.
    block : {"transformer", "nystrom"}
        Pre-norm transformer blocks, or `NystromformerLayer`s of transformers, as BrainLM has them.
    nystrom : dict, optional
        Settings of those (num_landmarks, segment_means_seq_len, conv_kernel_size, dropout...).
    layer_norm_eps : float
    tanh_output : bool
        Whether the decoder's output passes through tanh.
    atlas, region_labels, region_coordinates : str, list of str, list (regions, 3) in mm, optional
        Of the parcellation that it was trained on; any other may be given to the model instead.
    pooling : {"mean", "regions", "similarity"}
        What the heads read: the mean of all tokens, or of each region's, or how alike two regions'
        tokens are, for all pairs.
    targets : list of dict, optional
        What the heads were fitted for: `name`, `kind` ("number" or "class"), `minimum` and
        `maximum` or `classes`.

    Raises
    ------
    ConfigurationError
        A value out of range, or an unknown key.
    """

    model_type = "fmri_mae"

    sampling_interval: float = 2.0
    window_length: int = 80
    patch_length: int = 20
    hidden_size: int = 128
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    decoder_hidden_size: int = 64
    decoder_intermediate_size: int = 256
    decoder_num_hidden_layers: int = 1
    decoder_num_attention_heads: int = 4
    mask_ratio: float = 0.75
    position: str = "fourier"
    position_features: int = 64
    position_wavelength: float = 60.0
    block: str = "transformer"
    nystrom: dict | None = None
    layer_norm_eps: float = 1e-5
    tanh_output: bool = False
    atlas: str | None = None
    region_labels: list | None = None
    region_coordinates: list | None = None
    pooling: str = "mean"
    targets: list | None = None

    def __post_init__(self, **kwargs):
        refuse_unknown_keys(type(self).__name__, kwargs, set(self.__dict__))
        super().__post_init__(**kwargs)
        for name in _INTEGERS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(
                    f"FMRIMAEConfig.{name} must be an integer >= 1, found {value!r}."
                )
        if self.window_length % self.patch_length:
            raise ConfigurationError(
                f"FMRIMAEConfig.window_length must be a multiple of patch_length, found "
                f"{self.window_length} and {self.patch_length}."
            )
        for size, heads in (
            ("hidden_size", "num_attention_heads"),
            ("decoder_hidden_size", "decoder_num_attention_heads"),
        ):
            if getattr(self, size) % getattr(self, heads):
                raise ConfigurationError(
                    f"FMRIMAEConfig.{size} must be a multiple of {heads}, found "
                    f"{getattr(self, size)} and {getattr(self, heads)}."
                )
        if not 0.0 <= self.mask_ratio < 1.0:
            raise ConfigurationError(
                f"FMRIMAEConfig.mask_ratio must be at least 0 and below 1, found {self.mask_ratio}."
            )
        for name, allowed in (
            ("position", ("fourier", "linear")),
            ("block", ("transformer", "nystrom")),
            ("pooling", ("mean", "regions", "similarity")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigurationError(
                    f"FMRIMAEConfig.{name} must be one of {', '.join(allowed)}, found "
                    f"{getattr(self, name)!r}."
                )

    @property
    def num_patches(self) -> int:
        """Patches of a window."""
        return self.window_length // self.patch_length

    @property
    def feature_width(self) -> int:
        """Numbers of one scan that the heads read."""
        if self.pooling == "mean":
            return self.hidden_size
        regions = len(self.region_coordinates or ())
        if self.pooling == "similarity":
            return regions * (regions - 1) // 2
        return self.hidden_size * regions


FMRIMAEConfig.register_for_auto_class()
