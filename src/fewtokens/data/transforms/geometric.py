"""Random crops, flips and resizing of whole batches on the device, with independent draws per image or clip.

A transform is called as `transform(images, generator)` with images (B, C, H, W) or clips (B, T, C, H, W), whose frames
are all treated alike. Pixels are on the scale 0 to 255, uint8 (as long as possible: a quarter of the memory traffic) or
float. All randomness comes from the generator, and no transform waits for the device.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional

from fewtokens.errors import FewtokensError, check, check_choice

Images = Shaped[Tensor, "b *t c h w"]
Cropped = Shaped[Tensor, "b *t c s s"]


def crop(images: Images, top: Int[Tensor, " b"], left: Int[Tensor, " b"], size: int) -> Cropped:
    """Cut a square of `size` pixels out of every image, each at its own position, without a loop.

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
    largest = min(images.shape[-2:])
    if not 1 <= size <= largest:
        raise FewtokensError(
            f"`{name}.size` must be an int from 1 to {largest}, the side of the images, got {size}. Change it, or put "
            f"Resize before {name}."
        )


class RandomCrop:
    """Cuts a window out at a random position.

    Args:
        size: Side of the window in pixels.
        per_batch: Draw one position for the whole batch, as RandomCrop of Keras up to 2.7 does.
    """

    def __init__(self, size: int, per_batch: bool = False) -> None:
        self.size, self.per_batch = size, per_batch

    def __call__(self, images: Images, generator: torch.Generator) -> Cropped:
        """Cut the windows.

        Raises:
            FewtokensError: The images are smaller than the window.
        """
        _check_window(self.size, images, "RandomCrop")
        draws = 1 if self.per_batch else images.shape[0]
        top, left = (
            torch.randint(side - self.size + 1, (draws,), generator=generator, device=images.device)
            for side in images.shape[-2:]
        )
        return crop(images, top.expand(images.shape[0]), left.expand(images.shape[0]), self.size)


class PadCrop:
    """Pads square images on all sides and cuts a window of the old size out at a random position.

    Args:
        padding: Pixels on each side; 0 changes nothing.
        mode: "constant" pads with black, "reflect" mirrors at the border pixel.
    """

    def __init__(self, padding: int, mode: str = "constant") -> None:
        check(padding >= 0, "PadCrop.padding", "an int >= 0", padding)
        check_choice("PadCrop.mode", mode, ("constant", "reflect"))
        self.padding, self.mode = padding, mode

    def __call__(self, images: Images, generator: torch.Generator) -> Images:
        """Shift every image by a random whole number of pixels, at most `padding`, in both directions."""
        padded = self._mirror(images) if self.mode == "reflect" else functional.pad(images, (self.padding,) * 4)
        return RandomCrop(images.shape[-1])(padded, generator)

    def _mirror(self, images: Tensor) -> Tensor:  # torch's own reflection padding does not support uint8
        for dim in (-2, -1):
            side = images.shape[dim]
            position = torch.arange(-self.padding, side + self.padding, device=images.device).abs()
            images = images.index_select(dim, side - 1 - (side - 1 - position).abs())
        return images


class RandomFlip:
    """Mirrors each image left to right with probability `p`."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, images: Images, generator: torch.Generator) -> Images:
        """Mirror a random part of the images."""
        mirrored = torch.rand(images.shape[0], generator=generator, device=images.device) < self.p
        position = torch.arange(images.shape[0], device=images.device)
        # Copying whole images is three times as fast as torch.where, which works pixel by pixel.
        return torch.cat([images, images.flip(-1)]).index_select(0, position + images.shape[0] * mirrored)


class Resize:
    """Scales to a square, with half-pixel centers and without antialiasing, as `tf.image.resize` does.

    Args:
        size: Side of the result in pixels.
        interpolation: "bilinear", "bicubic" or "nearest-exact".
    """

    def __init__(self, size: int, interpolation: str = "bilinear") -> None:
        check_choice("Resize.interpolation", interpolation, ("bilinear", "bicubic", "nearest-exact"))
        self.size, self.interpolation = size, interpolation

    def __call__(self, images: Images, generator: torch.Generator) -> Float[Tensor, "b *t c s s"]:
        """Scale the images. The result is float, on the scale 0 to 255; nothing is drawn."""
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
        """Cut the windows; nothing is drawn.

        Raises:
            FewtokensError: The images are smaller than the window.
        """
        _check_window(self.size, images, "CenterCrop")
        top, left = ((side - self.size) // 2 for side in images.shape[-2:])
        return images[..., top : top + self.size, left : left + self.size]
