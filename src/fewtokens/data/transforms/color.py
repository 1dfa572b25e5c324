"""Random colors for whole batches: one affine map of the color space per image or clip."""

import math

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from fewtokens.data.transforms.host import cpu_generator, to_device
from fewtokens.errors import FewtokensError, check

_LUMA = (0.299, 0.587, 0.114)
# From red, green and blue to luma and two color axes (YIQ, as in NTSC), in which the hue is an angle.
_YIQ = torch.tensor([_LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)], dtype=torch.float64)
_RGB = _YIQ.inverse()


class ColorJitter:
    """Changes brightness, saturation, hue and contrast of random images or clips, and makes some of them gray.

    All four are affine, so that a clip costs one multiplication of its pixels by a 3 x 3 matrix. The matrices are
    computed on the CPU. The defaults are those of scenic's ViViT on Kinetics (probabilities as in its configs;
    strengths from memory of DMVR, not verified).

    Args:
        brightness: Largest value added or subtracted, as a share of white.
        contrast: Factors on the distance from the mean color of the clip lie between 1 - contrast and 1 + contrast.
        saturation: The same for the distance from gray.
        hue: Largest rotation, as a share of the color circle.
        p: Probability of a change.
        gray: Probability of losing all color, independent of the others.

    Raises:
        FewtokensError: A setting is out of range, or, when called, the images do not have three channels.
    """

    def __init__(
        self,
        brightness: float = 32 / 255,
        contrast: float = 0.4,
        saturation: float = 0.4,
        hue: float = 0.2,
        p: float = 0.8,
        gray: float = 0.1,
    ) -> None:
        shares = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "p": p, "gray": gray}
        for name, share in shares.items():
            check(0 <= share <= 1, f"ColorJitter.{name}", "a float in [0, 1]", share)
        check(0 <= hue <= 0.5, "ColorJitter.hue", "a float in [0, 0.5]", hue)
        self.strengths, self.p, self.gray = (brightness, contrast, saturation, hue), p, gray

    def __call__(self, images: Shaped[Tensor, "b *t c h w"], generator: torch.Generator) -> UInt8[Tensor, "b *t c h w"]:
        """Change the colors of every image, or of all frames of a clip alike."""
        if images.shape[-3] != 3:
            raise FewtokensError(
                f"ColorJitter needs 3 channels, got {images.shape[-3]}. Remove it from `data.train_transforms`."
            )
        pixels = (images.flatten(1, -4) if images.ndim > 4 else images[:, None]).float()
        matrix, factor, shift = (to_device(x, images.device) for x in self._draw(len(images), generator))
        mean = torch.einsum("bij,bj->bi", matrix, pixels.mean((1, 3, 4)))
        offset = (1 - factor) * mean + shift
        mapped = torch.einsum("bij,btjhw->btihw", factor[..., None] * matrix, pixels) + offset[:, None, :, None, None]
        return mapped.round_().clamp_(0, 255).to(torch.uint8).view(images.shape)

    def _draw(
        self, b: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "b 3 3"], Float[Tensor, "b 1"], Float[Tensor, "b 1"]]:
        """Return the matrix A, the contrast f and the brightness s of x -> A (f x + (1 - f) mean(x)) + s.

        Brightness comes first, then saturation and hue, then contrast, around the mean that the clip has by then, and
        gray last. Still s is only added: it is the same for all channels, and all the matrices map gray to itself.
        """
        rand = torch.rand(6, b, generator=cpu_generator(generator)).double()
        changed = (rand[4] < self.p).double()
        shift, contrast, saturation, hue = ((2 * rand[i] - 1) * s * changed for i, s in enumerate(self.strengths))
        gray = _scale_saturation(1 - (rand[5] < self.gray).double())
        matrix = gray @ _rotate_hue(hue) @ _scale_saturation(1 + saturation)
        return matrix.float(), (1 + contrast)[:, None].float(), (255 * shift)[:, None].float()


def _rotate_hue(turn: Float[Tensor, " b"]) -> Float[Tensor, "b 3 3"]:
    cos, sin = (2 * math.pi * turn).cos(), (2 * math.pi * turn).sin()
    one, zero = torch.ones_like(cos), torch.zeros_like(cos)
    rotation = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
    return _RGB @ rotation @ _YIQ


def _scale_saturation(factor: Float[Tensor, " b"]) -> Float[Tensor, "b 3 3"]:
    """Return the matrix that scales the distance from gray: 0 makes gray, 1 changes nothing."""
    gray = _YIQ[0].expand(3, 3)
    return factor[:, None, None] * (torch.eye(3, dtype=torch.float64) - gray) + gray
