"""How a pretrained model wants its images: read from timm, since a wrong normalisation costs accuracy in silence."""

from collections.abc import Sequence
from dataclasses import dataclass

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg

_CROP_SHARE = 0.875


@dataclass(frozen=True)
class Preprocessing:
    """Normalisation and the geometry of evaluation.

    Attributes:
        mean: Mean per channel, scale 0 to 1.
        std: Standard deviation per channel, scale 0 to 1.
        crop_pct: Share of the scaled image that the crop keeps.
        interpolation: "bilinear" or "bicubic".
        crop_mode: timm's "center", "squash" or "border".
    """

    mean: Sequence[float]
    std: Sequence[float]
    crop_pct: float
    interpolation: str
    crop_mode: str = "center"


def preprocessing(
    preset: str | None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> Preprocessing:
    """What is given explicitly; else what timm records for the pretrained model; else ImageNet's usual values.

    Args:
        preset: Name of a timm model, with or without a tag; names that timm does not know count as none, since a
            backbone's name is passed on whether it is timm's or not.
        mean: Mean per channel.
        std: Standard deviation per channel.
        crop_pct: Share of the scaled image that the crop keeps.
        interpolation: "bilinear" or "bicubic".
    """
    try:
        known = get_pretrained_cfg(preset) if preset else None
    except RuntimeError:  # a known model with an unknown tag
        known = None
    return Preprocessing(
        mean=mean or (known.mean if known else IMAGENET_DEFAULT_MEAN),
        std=std or (known.std if known else IMAGENET_DEFAULT_STD),
        crop_pct=crop_pct or (known.crop_pct if known else None) or _CROP_SHARE,
        interpolation=interpolation or (known.interpolation if known else "bicubic"),
        crop_mode=(known.crop_mode if known else None) or "center",
    )
