"""3-Augment of DeiT III (Touvron et al., arXiv:2204.07118) for whole batches."""

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor
from torch.nn import functional

from fewtokens.data.transforms.host import cpu_generator, to_device
from fewtokens.errors import FewtokensError, check

_LUMA = (0.299, 0.587, 0.114)
_REACH = 6  # pixels on each side that a blur sees: three times the largest standard deviation


class ThreeAugment:
    """Makes every image gray, solarizes it or blurs it, one of the three, and then jitters its color.

    Brightness, contrast and saturation are those of torchvision's ColorJitter. Their order is not random here: it only
    matters where values are clipped, which happens once, at the end. Frames of a clip are treated alike.

    Args:
        jitter: Factors on brightness, contrast and saturation lie between 1 - jitter and 1 + jitter.
        sigma: Smallest and largest standard deviation of the blur in pixels; at most 2.

    Raises:
        FewtokensError: A setting is out of range, or, when called, the images do not have three channels.
    """

    def __init__(self, jitter: float = 0.3, sigma: tuple[float, float] = (0.1, 2.0)) -> None:
        check(0 <= jitter <= 1, "ThreeAugment.jitter", "a float in [0, 1]", jitter)
        low, high = sigma
        check(0 < low <= high <= 2, "ThreeAugment.sigma", "two floats, 0 < low <= high <= 2", list(sigma))
        self.jitter, self.sigma = jitter, (low, high)

    def __call__(self, images: Shaped[Tensor, "b *t c h w"], generator: torch.Generator) -> UInt8[Tensor, "b *t c h w"]:
        """Change every image, or all frames of a clip alike."""
        if images.shape[-3] != 3:
            raise FewtokensError(
                f"ThreeAugment needs 3 channels, got {images.shape[-3]}. Remove it from `data.train_transforms`."
            )
        pixels = (images.flatten(1, -4) if images.ndim > 4 else images[:, None]).float()
        rand = torch.rand(5, len(images), generator=cpu_generator(generator))
        kind, factors = (3 * rand[0]).long(), 1 + (2 * rand[1:4] - 1) * self.jitter
        sigma = self.sigma[0] + rand[4] * (self.sigma[1] - self.sigma[0])
        order = kind.argsort(stable=True)
        sizes = torch.bincount(kind, minlength=3).tolist()
        there, back, sigma = (to_device(x, images.device) for x in (order, order.argsort(), sigma[order]))
        gray, solar, soft = pixels.index_select(0, there).split(sizes)
        changed = [_gray(gray).expand_as(gray), torch.where(solar >= 128, 255 - solar, solar)]
        changed.append(_blur(soft, sigma[len(sigma) - len(soft) :]))
        pixels = torch.cat(changed).index_select(0, back)
        brightness, contrast, saturation = (x.view(-1, 1, 1, 1, 1) for x in to_device(factors, images.device))
        pixels = pixels * brightness
        pixels = _mix(pixels, _gray(pixels).mean((1, 3, 4), keepdim=True), contrast)
        pixels = _mix(pixels, _gray(pixels), saturation)
        return pixels.round_().clamp_(0, 255).to(torch.uint8).view(images.shape)


def _mix(pixels: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return factor * pixels + (1 - factor) * other


def _gray(pixels: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b t 1 h w"]:
    red, green, blue = pixels.split(1, dim=2)
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def _blur(pixels: Float[Tensor, "b t c h w"], sigma: Float[Tensor, " b"]) -> Float[Tensor, "b t c h w"]:
    """Blur every image with its own Gaussian, first along rows, then along columns; borders are repeated."""
    b, t, c, h, w = pixels.shape
    if b == 0:
        return pixels
    offsets = torch.arange(-_REACH, _REACH + 1, device=pixels.device)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(t * c, dim=0)
    padded = functional.pad(pixels.reshape(1, b * t * c, h, w), (_REACH,) * 4, mode="replicate")
    for shape in ((-1, 1, 1, 2 * _REACH + 1), (-1, 1, 2 * _REACH + 1, 1)):
        padded = functional.conv2d(padded, kernel.view(shape), groups=b * t * c)
    return padded.view(b, t, c, h, w)
