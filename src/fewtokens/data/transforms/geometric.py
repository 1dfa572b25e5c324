"""Augmentation of whole batches on the device; every image has its own draw, and so has every clip.

A transform is called as `transform(images, generator)` with images (B, C, H, W) or clips (B, T, C, H, W), whose frames
are all treated alike. They are on the scale 0 to 255, uint8 (as long as possible: a quarter of the memory traffic) or
float. All randomness comes from the generator.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional

from fewtokens.errors import FewtokensError

Images = Shaped[Tensor, "b *t c h w"]
Cropped = Shaped[Tensor, "b *t c s s"]


def crop(images: Images, top: Int[Tensor, " b"], left: Int[Tensor, " b"], size: int) -> Cropped:
    """Cuts a square of `size` pixels out of every image at its own place, without a loop and without a device wait.

    Every row of a window is one entry of an overlapping view of the memory, so that whole rows are copied: four times
    as fast as a gather of pixels.
    """
    h, w = images.shape[-2:]
    flat = images.contiguous().view(-1)
    windows = flat.as_strided((flat.numel() - size + 1, size), (1, 1), flat.storage_offset())
    planes = torch.arange(images[..., 0, 0].numel(), device=images.device).view(len(images), -1, 1) * (h * w)
    rows = (top[:, None] + torch.arange(size, device=images.device)) * w + left[:, None]
    return windows.index_select(0, (planes + rows[:, None]).flatten()).view(*images.shape[:-2], size, size)


def _check_window(size: int, images: Tensor, name: str) -> None:
    if not 1 <= size <= min(images.shape[-2:]):
        raise FewtokensError(
            f"{name} cuts a window out of the image",
            expected=f"a size from 1 to {min(images.shape[-2:])}",
            got=size,
            fix=f"change the size of {name}, or put a Resize before it",
        )


class RandomCrop:
    """Cuts a window at a random place.

    Args:
        size: Side of the window in pixels.
        per_batch: Draw one place for the whole batch, as RandomCrop of Keras up to 2.7 does.
    """

    def __init__(self, size: int, per_batch: bool = False) -> None:
        self.size, self.per_batch = size, per_batch

    def __call__(self, images: Images, generator: torch.Generator) -> Cropped:
        """Cuts the windows; raises a FewtokensError if the images are smaller."""
        _check_window(self.size, images, "RandomCrop")
        draws = 1 if self.per_batch else images.shape[0]
        top, left = (
            torch.randint(side - self.size + 1, (draws,), generator=generator, device=images.device)
            for side in images.shape[-2:]
        )
        return crop(images, top.expand(images.shape[0]), left.expand(images.shape[0]), self.size)


class PadCrop:
    """Pads the image on all sides and cuts a window of the old size at a random place.

    Args:
        padding: Pixels on each side; 0 changes nothing.
        mode: "constant" pads with black, "reflect" mirrors at the border pixel.
    """

    def __init__(self, padding: int, mode: str = "constant") -> None:
        if padding < 0 or mode not in ("constant", "reflect"):
            raise FewtokensError(
                "PadCrop needs a padding and a mode",
                expected="padding >= 0 and mode constant or reflect",
                got=f"padding {padding}, mode {mode}",
                fix="change the PadCrop node in data.train_transforms",
            )
        self.padding, self.mode = padding, mode

    def __call__(self, images: Images, generator: torch.Generator) -> Images:
        """Shifts every image of square format by its own whole number of pixels."""
        padded = self._mirror(images) if self.mode == "reflect" else functional.pad(images, (self.padding,) * 4)
        return RandomCrop(images.shape[-1])(padded, generator)

    def _mirror(self, images: Tensor) -> Tensor:  # torch's own reflection padding refuses uint8
        for dim in (-2, -1):
            side = images.shape[dim]
            place = torch.arange(-self.padding, side + self.padding, device=images.device).abs()
            images = images.index_select(dim, side - 1 - (side - 1 - place).abs())
        return images


class RandomFlip:
    """Mirrors left and right with probability `p`."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, images: Images, generator: torch.Generator) -> Images:
        """Mirrors every image by its own draw."""
        mirrored = torch.rand(images.shape[0], generator=generator, device=images.device) < self.p
        place = torch.arange(images.shape[0], device=images.device)
        # Copying whole images is three times as fast as torch.where, which goes pixel by pixel.
        return torch.cat([images, images.flip(-1)]).index_select(0, place + images.shape[0] * mirrored)


class Resize:
    """Scales to a square; half-pixel centres and no antialiasing, as `tf.image.resize`.

    Args:
        size: Side of the result in pixels.
        interpolation: "bilinear", "bicubic" or "nearest-exact".
    """

    def __init__(self, size: int, interpolation: str = "bilinear") -> None:
        if interpolation not in ("bilinear", "bicubic", "nearest-exact"):
            raise FewtokensError(
                "Resize knows three ways to interpolate",
                expected="bilinear, bicubic or nearest-exact",
                got=interpolation,
                fix="change the Resize node in the list of transforms",
            )
        self.size, self.interpolation = size, interpolation

    def __call__(self, images: Images, generator: torch.Generator) -> Float[Tensor, "b *t c s s"]:
        """Scales and returns floats, still on the scale 0 to 255; draws nothing."""
        corners = None if self.interpolation == "nearest-exact" else False
        scaled = functional.interpolate(
            images.float().flatten(0, -4), size=(self.size, self.size), mode=self.interpolation, align_corners=corners
        )
        return scaled.view(*images.shape[:-2], self.size, self.size)


class CenterCrop:
    """Cuts a window of `size` pixels out of the middle."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, images: Images, generator: torch.Generator) -> Cropped:
        """Cuts the windows; raises a FewtokensError if the images are smaller; draws nothing."""
        _check_window(self.size, images, "CenterCrop")
        top, left = ((side - self.size) // 2 for side in images.shape[-2:])
        return images[..., top : top + self.size, left : left + self.size]
