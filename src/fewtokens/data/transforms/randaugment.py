"""RandAugment (Cubuk et al., arXiv:1909.13719) for whole batches, with torchvision's operations and magnitudes."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Int64, Shaped, UInt8
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from fewtokens.data.transforms.host import cpu_generator, to_device
from fewtokens.errors import FewtokensError, check

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


def _sharpen(images: UInt8[Tensor, "b c h w"], factor: float) -> UInt8[Tensor, "b c h w"]:
    # The results of torchvision's adjust_sharpness, which copies its kernel to the device with a synchronization, and
    # whose convolution is 2 to 7 times as slow on a CPU.
    if min(images.shape[-2:]) <= 2:
        return images
    pixels = images.float()
    inner = pixels[..., 1:-1, 1:-1]
    rows = pixels[..., :-2, :] + pixels[..., 1:-1, :] + pixels[..., 2:, :]
    blurred = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    blurred.add_(inner, alpha=4).div_(13).round_()
    inner.add_(blurred.sub_(inner), alpha=1 - factor)
    return pixels.clamp_(0, 255).to(torch.uint8)


# (operation on (images, magnitude), greatest magnitude, whether the sign is random). Magnitudes are linear in the bins.
# Translation is a share of the side; posterizing removes bits; solarizing lowers the threshold from 255.
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
    "Sharpness": (lambda x, m: _sharpen(x, 1.0 + m), 0.9, True),
    "Posterize": (lambda x, m: functional.posterize(x, bits=8 - round(m)), 4.0, False),
    "Solarize": (lambda x, m: functional.solarize(x, threshold=255.0 * (1.0 - m)), 1.0, False),
    "AutoContrast": (lambda x, m: functional.autocontrast(x), 0.0, False),
    "Equalize": (lambda x, m: functional.equalize(x), 0.0, False),
}
_GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


class RandAugment:
    """Applies `num_ops` random operations of one magnitude to every image.

    Operations and signs are drawn per image or clip. Images with the same draw form a group, and each group is changed
    by one call. The draws are made on the CPU, since grouping by draws on a GPU would wait for it dozens of times.

    Args:
        num_ops: Number of operations in a row; 0 changes nothing.
        magnitude: Strength, 0 to 30.

    Raises:
        FewtokensError: A setting is out of range, or, when called, the images are not uint8, or not gray
            or RGB.
    """

    def __init__(self, num_ops: int = 2, magnitude: int = 9) -> None:
        check(num_ops >= 0, "RandAugment.num_ops", "an int >= 0", num_ops)
        expected = f"an int from 0 to {_BINS - 1}"
        check(0 <= magnitude < _BINS, "RandAugment.magnitude", expected, magnitude)
        self.num_ops = num_ops
        self._draws: list[tuple[str, float]] = []  # what a draw stands for: the operation and its signed magnitude
        for name, (_, greatest, signed) in _OPERATIONS.items():
            strength = float(torch.linspace(0.0, greatest, _BINS)[magnitude])
            self._draws += [(name, strength), (name, -strength if signed else strength)]
        self._sources: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __call__(self, images: Shaped[Tensor, "b *t c h w"], generator: torch.Generator) -> UInt8[Tensor, "b *t c h w"]:
        """Augment a batch with `num_ops` random operations per image."""
        if images.dtype != torch.uint8:
            raise FewtokensError(
                f"RandAugment needs uint8 images, got {images.dtype}. Move it before Resize in `data.train_transforms`."
            )
        if images.shape[-3] not in (1, 3):
            raise FewtokensError(
                f"RandAugment needs 1 or 3 channels, got {images.shape[-3]}. Remove it from `data.train_transforms`."
            )
        cpu = cpu_generator(generator)
        for _ in range(self.num_ops):
            images = self._apply(images, torch.randint(len(self._draws), images.shape[:1], generator=cpu))
        return images

    def _apply(self, images: Tensor, draws: Int64[Tensor, " b"]) -> Tensor:
        order = draws.argsort(stable=True)
        there, back = to_device(torch.stack([order, order.argsort()]), images.device)
        found, sizes = draws.unique(return_counts=True)
        groups = images.index_select(0, there).split(sizes.tolist())
        changed = [self._operate(group, draw) for draw, group in zip(found.tolist(), groups, strict=True)]
        return torch.cat(changed).index_select(0, back)

    def _operate(self, images: Tensor, draw: int) -> Tensor:
        name, magnitude = self._draws[draw]
        if name in _GEOMETRIC:
            return self._move(images, draw)
        return _OPERATIONS[name][0](images.flatten(0, -4), magnitude).view(images.shape)

    def _move(self, images: Tensor, draw: int) -> Tensor:
        """Move the pixels of a group by one gather, twice as fast as torchvision's sampling on a grid."""
        source, inside = self._source(draw, images.shape[-2], images.shape[-1], images.device)
        pixels = images.flatten(-2)
        return pixels.gather(-1, source.expand_as(pixels)).mul_(inside).view(images.shape)

    def _source(
        self, draw: int, h: int, w: int, device: torch.device
    ) -> tuple[Int64[Tensor, "pixels"], UInt8[Tensor, "pixels"]]:
        """Return where each pixel of the result comes from, and 0 if that is outside of the image, else 1.

        Both are found by letting torchvision move an image of pixel numbers, once, and then kept on the device.
        """
        key = (draw, h, w, device)
        if key not in self._sources:
            name, magnitude = self._draws[draw]
            # 0 stands for what lies outside. Float32 counts exactly up to 2**24 pixels.
            numbers = torch.arange(1, h * w + 1, dtype=torch.float32).view(1, 1, h, w)
            moved = _OPERATIONS[name][0](numbers, magnitude).flatten().long()
            source, inside = (moved - 1).clamp(min=0), (moved > 0).to(torch.uint8)
            self._sources[key] = to_device(source, device), to_device(inside, device)
        return self._sources[key]
