"""Configuration of the connectivity stream: a person's connectivity matrix as a few codes."""

import math

from transformers import PreTrainedConfig

from .configuration_avq import ConfigurationError, _is_point, refuse_unknown_keys


class AVQConnectomeConfig(PreTrainedConfig):
    """Sizes, codebook, text space and loss weights of an `AVQConnectomeModel`.

    Parameters
    ----------
    num_tokens : int
        Codes that one matrix becomes, whatever the parcellation.
    num_codes : int
        Size of the codebook; an `AVQConfig.num_connectivity_codes` reserves as many ids.
    code_dim : int
        Width of a code: so many components less one are quantised as one vector.
    code_anchor : float
        Length of the constant beside a token's components, in lengths of the loudest token; the
        larger, the closer cosine lookup is to Euclidean, and the finer float32 has to tell codes.
    num_maps : int
        Maps over the brain that stand on both sides of a matrix.
    num_coordinates : int
        Pairs of maps that are kept, those of the largest variance.
    num_directions : int
        Room for patterns of connections that are coded more finely than they vary, such as those
        that tell age: `AVQConnectomeModel.start_components`.
    num_pattern_coordinates : int
        Coordinates beside the pairs of maps, each for what one of those patterns weighs outside the
        kept pairs; as many as there are patterns, and nothing of them is lost before the codes.
    emphasis : float
        How many times as loud they are made before they are coded.
    position_features : int
        Random Fourier features that maps are linear in.
    position_wavelength : float
        Their wavelength in mm: how fast a map may change between regions.
    position_ridge : float
        Share of a matrix that maps need not explain, where a parcellation asks for more than they
        can say.
    text_width : int
        Width of the language model's input embeddings, the space that P maps codes into.
    text_model_id, text_table_sha256 : str or None
        The language model whose embedding table is the text domain, and its fingerprint.
    atlas : str or None
        Identifier of the parcellation the model was started with.
    region_labels : list of str or None
        Its labels in the order of rows and columns.
    region_coordinates : list of [x, y, z] or None
        Its centroids in mm, MNI; used by `encode` and `decode` when none are given.

    The other fields mean what they mean in `AVQConfig`.

    Raises
    ------
    ConfigurationError
        A value out of range, or an unknown key (the nearest known one is named).
    """

    model_type = "avq_connectome"

    atlas: str | None = None
    region_labels: list | None = None
    region_coordinates: list | None = None
    # tokens
    num_tokens: int = 64
    num_codes: int = 8192
    code_dim: int = 14
    code_anchor: float | int = 4.0
    # the linear path
    num_maps: int = 200
    num_coordinates: int = 1500
    num_directions: int = 8
    num_pattern_coordinates: int = 0
    emphasis: float | int = 7.0
    position_features: int = 256
    position_wavelength: float | int = 100.0
    position_ridge: float | int = 1e-3
    # the codebook
    ema_decay: float | int = 0.99
    revival_threshold: float | int = 0.1
    revival_interval: int = 20
    code_gradient: str = "straight_through"
    # text space and adversary
    text_width: int = 256
    text_model_id: str | None = None
    text_table_sha256: str | None = None
    projection_hidden_size: int = 256
    classifier_hidden_size: int = 256
    # weights of the loss
    commitment_weight: float | int = 0.1
    domain_weight: float | int = 0.0
    moment_weight: float | int = 0.0
    energy_weight: float | int = 0.0
    neighbour_weight: float | int = 0.0
    domain_gradient: str = "both"
    encoder_share: float | int = 1.0

    def __post_init__(self, **kwargs):
        refuse_unknown_keys(type(self).__name__, kwargs, set(self.__dict__))
        super().__post_init__(**kwargs)
        self._check()

    def _check(self):
        for name in (
            "num_tokens",
            "num_codes",
            "num_maps",
            "num_coordinates",
            "num_directions",
            "position_features",
            "revival_interval",
            "text_width",
            "projection_hidden_size",
            "classifier_hidden_size",
        ):
            self._check_integer(name, 1)
        self._check_integer("code_dim", 2)
        self._check_integer("num_pattern_coordinates", 0)
        for name in (
            "commitment_weight",
            "domain_weight",
            "moment_weight",
            "energy_weight",
            "neighbour_weight",
            "encoder_share",
            "revival_threshold",
        ):
            self._check_number(name, 0.0, math.inf)
        self._check_number("emphasis", 1.0, 1e3)
        self._check_number("code_anchor", 0.1, 1e3)
        self._check_number("position_wavelength", 1.0, 1e4)
        self._check_number("position_ridge", 1e-6, 1.0)
        self._check_number("ema_decay", 0.0, 0.999999)
        pairs = self.num_maps * (self.num_maps + 1) // 2
        if self.num_coordinates > pairs:
            raise ConfigurationError(
                f"AVQConnectomeConfig.num_coordinates ({self.num_coordinates}) must not exceed the "
                f"{pairs} pairs of num_maps = {self.num_maps}. Set it to {pairs} or less."
            )
        if self.num_directions > self.num_coordinates:
            raise ConfigurationError(
                f"AVQConnectomeConfig.num_directions ({self.num_directions}) must not exceed "
                f"num_coordinates ({self.num_coordinates})."
            )
        if self.code_gradient not in ("straight_through", "rotation"):
            raise ConfigurationError(
                "AVQConnectomeConfig.code_gradient must be 'straight_through' or 'rotation', found "
                f"{self.code_gradient!r}."
            )
        reached = ("both", "projection", "encoder", "none")
        if self.domain_gradient not in reached:
            raise ConfigurationError(
                f"AVQConnectomeConfig.domain_gradient must be one of {', '.join(reached)}, found "
                f"{self.domain_gradient!r}."
            )
        coordinates, labels = self.region_coordinates, self.region_labels
        if coordinates is None:
            return
        if not coordinates or not all(_is_point(row) for row in coordinates):
            raise ConfigurationError(
                "AVQConnectomeConfig.region_coordinates must be finite [x, y, z] rows in mm, one "
                "per region."
            )
        if labels is not None and len(labels) != len(coordinates):
            raise ConfigurationError(
                f"AVQConnectomeConfig: {len(labels)} region_labels but {len(coordinates)} "
                "region_coordinates; expected one row per label."
            )

    def _check_integer(self, name, low):
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigurationError(
                f"AVQConnectomeConfig.{name} must be an integer >= {low}, found {value!r}."
            )

    def _check_number(self, name, low, high):
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            raise ConfigurationError(
                f"AVQConnectomeConfig.{name} must be a number from {low} to {high}, found "
                f"{value!r}."
            )

    @property
    def num_components(self) -> int:
        """Components that the tokens have room for."""
        return self.num_tokens * (self.code_dim - 1)
