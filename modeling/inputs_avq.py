"""What the codecs are given: checks of coordinates and masks, and matrices of connectivity."""

import torch
import torch.nn.functional as F

from .configuration_avq import ConfigurationError

_LARGEST_CORRELATION = 0.999999


def checked_coordinates(coordinates, config, regions: int | None) -> torch.Tensor:
    """Coordinates (batch or 1, regions, 3) in mm: those given, or those that `config` stores.

    Parameters
    ----------
    coordinates : float, shape (batch or 1, regions, 3) or (regions, 3), or None
    config : AVQConfig
    regions : int or None
        The number of regions there must be; None where any will do.

    Raises
    ------
    ConfigurationError
        None are given and none stored, shape or number of regions do not fit, or NaN.
    """
    if coordinates is None:
        if config.region_coordinates is None:
            raise ConfigurationError(
                "region_coordinates are needed: this checkpoint stores none of its own. Pass "
                "(1, regions, 3) in mm, MNI."
            )
        coordinates = torch.tensor(config.region_coordinates, dtype=torch.float32)[None]
        if regions is not None and coordinates.shape[1] != regions:
            raise ConfigurationError(
                f"input_values have {regions} regions, the checkpoint's atlas {config.atlas!r} has "
                f"{coordinates.shape[1]}. Pass region_coordinates of the atlas that the input is "
                "in."
            )
    if coordinates.dim() == 2:
        coordinates = coordinates[None]
    fits = coordinates.dim() == 3 and coordinates.shape[2] == 3
    if not fits or (regions is not None and coordinates.shape[1] != regions):
        raise ConfigurationError(
            f"region_coordinates must have shape (batch or 1, {regions or 'regions'}, 3) in mm, "
            f"found {tuple(coordinates.shape)}."
        )
    if not bool(torch.isfinite(coordinates).all()):
        raise ConfigurationError("region_coordinates hold NaN or infinite values.")
    return coordinates


def whole_mask(mask, name: str, batch: int, length: int, device) -> torch.Tensor:
    """`mask` as bool, shape (batch, length); all true when None, the same for all when one row.

    Raises
    ------
    ConfigurationError
        Another shape.
    """
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if mask.dim() != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != length:
        raise ConfigurationError(
            f"{name} must have shape ({batch}, {length}) like input_values, found "
            f"{tuple(mask.shape)}."
        )
    return mask.bool().expand(batch, -1)


def fisher_z_matrices(series, region_mask=None):
    """Fisher-z correlation matrices of scans, in float64 inside.

    Parameters
    ----------
    series : float, shape (batch, time, regions)
    region_mask : bool, shape (batch, regions), optional
        Regions that count; those that do not vary never do.

    Returns
    -------
    matrices : float32, shape (batch, regions, regions)
        The diagonal and missing regions 0.
    region_mask : bool, shape (batch, regions)
    """
    series = series.double()
    mask = whole_mask(region_mask, "region_mask", len(series), series.shape[2], series.device)
    series = torch.where(mask[:, None], series, torch.zeros_like(series))
    mask = mask & (series.amax(1) > series.amin(1)) & torch.isfinite(series).all(1)
    centred = (series - series.mean(1, keepdim=True)).masked_fill(~mask[:, None], 0.0)
    scaled = F.normalize(centred, dim=1)
    correlation = (scaled.transpose(1, 2) @ scaled).clamp(
        -_LARGEST_CORRELATION, _LARGEST_CORRELATION
    )
    outside = ~(mask[:, :, None] & mask[:, None, :])
    outside |= torch.eye(series.shape[2], dtype=torch.bool, device=series.device)
    return torch.atanh(correlation).masked_fill(outside, 0.0).float(), mask
