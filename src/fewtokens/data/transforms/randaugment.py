"""RandAugment (Cubuk et al., arXiv:1909.13719) for whole batches, with torchvision's operations and magnitudes."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from fewtokens.errors import FewtokensError

_BINS = 31


def _affine(images: Tensor, *, x: int = 0, y: int = 0, shear_x: float = 0.0, shear_y: float = 0.0) -> Tensor:
    sheared = bool(shear_x or shear_y)
    shear = [math.degrees(math.atan(shear_x)), math.degrees(math.atan(shear_y))]
    return functional.affine(
        images,
        angle=0.0,
        translate=[x, y],
        scale=1.0,
        shear=shear,
        interpolation=InterpolationMode.NEAREST,
        center=[0, 0] if sheared else None,
    )


# (operation on (images, magnitude), greatest magnitude, whether the sign is drawn); magnitudes grow linearly over bins.
# Translation is a share of the side; posterising removes bits; solarising lowers the threshold from 255.
_OPERATIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], float, bool]] = {
    "Identity": (lambda x, m: x, 0.0, False),
    "ShearX": (lambda x, m: _affine(x, shear_x=m), 0.3, True),
    "ShearY": (lambda x, m: _affine(x, shear_y=m), 0.3, True),
    "TranslateX": (lambda x, m: _affine(x, x=int(m * x.shape[-1])), 150.0 / 331.0, True),
    "TranslateY": (lambda x, m: _affine(x, y=int(m * x.shape[-2])), 150.0 / 331.0, True),
    "Rotate": (lambda x, m: functional.rotate(x, angle=m, interpolation=InterpolationMode.NEAREST), 30.0, True),
    "Brightness": (lambda x, m: functional.adjust_brightness(x, 1.0 + m), 0.9, True),
    "Color": (lambda x, m: functional.adjust_saturation(x, 1.0 + m), 0.9, True),
    "Contrast": (lambda x, m: functional.adjust_contrast(x, 1.0 + m), 0.9, True),
    "Sharpness": (lambda x, m: functional.adjust_sharpness(x, 1.0 + m), 0.9, True),
    "Posterize": (lambda x, m: functional.posterize(x, bits=8 - round(m)), 4.0, False),
    "Solarize": (lambda x, m: functional.solarize(x, threshold=255.0 * (1.0 - m)), 1.0, False),
    "AutoContrast": (lambda x, m: functional.autocontrast(x), 0.0, False),
    "Equalize": (lambda x, m: functional.equalize(x), 0.0, False),
}


class RandAugment:
    """Applies `num_ops` random operations of one magnitude to every image.

    The draws are per image or clip; those with the same draw form a group, and each group is one call of torchvision.

    Args:
        num_ops: Operations in a row; 0 changes nothing.
        magnitude: Strength, 0 to 30.

    Raises:
        FewtokensError: If a number is out of range, or, on calling, if the images are not uint8.
    """

    def __init__(self, num_ops: int = 2, magnitude: int = 9) -> None:
        if num_ops < 0 or not 0 <= magnitude < _BINS:
            raise FewtokensError(
                "RandAugment needs a number of operations and a magnitude",
                expected=f"num_ops >= 0 and 0 <= magnitude < {_BINS}",
                got=f"num_ops={num_ops}, magnitude={magnitude}",
                fix="change the RandAugment node in data.train_transforms",
            )
        self.num_ops, self.magnitude = num_ops, magnitude

    def __call__(self, images: Shaped[Tensor, "b *t c h w"], generator: torch.Generator) -> UInt8[Tensor, "b *t c h w"]:
        """Augments a batch; draws per image `num_ops` operations and signs."""
        if images.dtype != torch.uint8:
            raise FewtokensError(
                "RandAugment works on stored images",
                expected="uint8",
                got=images.dtype,
                fix="put RandAugment before Resize in data.train_transforms",
            )
        for _ in range(self.num_ops):
            draws = torch.randint(2 * len(_OPERATIONS), images.shape[:1], generator=generator, device=images.device)
            images = self._apply(images, draws)
        return images

    def _apply(self, images: Tensor, draws: Tensor) -> Tensor:
        out = torch.empty_like(images)
        for draw in draws.unique().tolist():
            members = (draws == draw).nonzero().flatten()
            operation, greatest, signed = list(_OPERATIONS.values())[draw // 2]
            magnitude = float(torch.linspace(0.0, greatest, _BINS)[self.magnitude])
            if signed and draw % 2:
                magnitude = -magnitude
            chosen = images[members]
            out[members] = operation(chosen.flatten(0, -4), magnitude).reshape(chosen.shape)
        return out
