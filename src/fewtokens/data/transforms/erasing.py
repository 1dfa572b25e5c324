"""Random erasing (Zhong et al., arXiv:1708.04896) for whole batches, distributed as timm's `RandomErasing`."""

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fewtokens.errors import check, check_choice

_ATTEMPTS = 10  # as in timm: an image whose ten rectangles are all too large stays as it is


class RandomErasing:
    """Overwrites a random rectangle of normalized images.

    Args:
        p: Probability per image.
        min_area: Smallest share of the image that is overwritten.
        max_area: Largest share.
        min_aspect: Smallest height / width; the largest is its inverse.
        fill: "zero", the mean color of the data, or "noise", standard normal numbers per pixel and channel.

    Raises:
        FewtokensError: A setting is out of range.
    """

    on_normalized: ClassVar[bool] = True

    def __init__(
        self, p: float, *, min_area: float = 0.02, max_area: float = 1 / 3, min_aspect: float = 0.3, fill: str = "zero"
    ) -> None:
        check(0 <= p <= 1, "RandomErasing.p", "a float in [0, 1]", p)
        check(0 < max_area <= 1, "RandomErasing.max_area", "a float in (0, 1]", max_area)
        check(0 < min_area <= max_area, "RandomErasing.min_area", f"a float in (0, max_area={max_area:g}]", min_area)
        check(0 < min_aspect <= 1, "RandomErasing.min_aspect", "a float in (0, 1]", min_aspect)
        check_choice("RandomErasing.fill", fill, ("zero", "noise"))
        self.p, self.area, self.log_aspect, self.fill = p, (min_area, max_area), -math.log(min_aspect), fill

    def __call__(self, images: Float[Tensor, "b *t c h w"], generator: torch.Generator) -> Float[Tensor, "b *t c h w"]:
        """Overwrite one rectangle in each chosen image, or the same one in all frames of a chosen clip."""
        b, *_, h, w = images.shape
        rand = torch.rand(b, _ATTEMPTS, 5, generator=generator, device=images.device)
        height, width = self._sides(rand[..., 0], rand[..., 1], h * w)
        fits = (height < h) & (width < w)
        first = fits.float().argmax(1, keepdim=True)  # the first attempt that fits
        height, width = height.gather(1, first), width.gather(1, first)
        u, v, chosen = (rand[..., i].gather(1, first) for i in (2, 3, 4))
        top, left = (u * (h - height + 1)).floor(), (v * (w - width + 1)).floor()
        y, x = torch.arange(h, device=images.device), torch.arange(w, device=images.device)
        inside = ((y >= top) & (y < top + height))[:, :, None] & ((x >= left) & (x < left + width))[:, None, :]
        inside &= (fits.any(1) & (chosen[:, 0] < self.p))[:, None, None]
        one = [1] * (images.ndim - 4)  # the frames of a clip share the rectangle and the noise
        inside = inside.view(b, *one, 1, h, w)
        if self.fill == "zero":
            return images.masked_fill(inside, 0.0)
        shape = (b, *one, *images.shape[-3:])
        noise = torch.randn(shape, generator=generator, device=images.device, dtype=images.dtype)
        return torch.where(inside, noise, images)

    def _sides(self, area: Tensor, aspect: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
        share = (self.area[0] + area * (self.area[1] - self.area[0])) * pixels
        ratio = torch.exp((2 * aspect - 1) * self.log_aspect)
        return (share * ratio).sqrt().round(), (share / ratio).sqrt().round()
