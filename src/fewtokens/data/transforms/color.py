"""Random colours for whole batches: one affine map of the colour space per image or clip."""

import math

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from fewtokens.errors import FewtokensError

_LUMA = (0.299, 0.587, 0.114)
# From red, green and blue to luma and two axes of colour (YIQ, as in NTSC), in which a hue is an angle.
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


class ColorJitter:
    """Changes brightness, saturation, hue and contrast of drawn clips, and makes some of them grey.

    All four are affine, so that a clip costs one multiplication of its pixels by a 3 x 3 matrix. The defaults are those
    of scenic's ViViT on Kinetics (probabilities as in its configs; strengths from memory of DMVR, not verified).

    Args:
        brightness: Greatest summand, as a share of white.
        contrast: Factors on the distance from the clip's mean colour lie between 1 - contrast and 1 + contrast.
        saturation: The same for the distance from grey.
        hue: Greatest turn, as a share of the circle of colours.
        p: Probability of a change.
        grey: Probability of losing all colour, drawn apart.

    Raises:
        FewtokensError: If a number is out of range, or, on calling, if there are not three channels.
    """

    def __init__(
        self,
        brightness: float = 32 / 255,
        contrast: float = 0.4,
        saturation: float = 0.4,
        hue: float = 0.2,
        p: float = 0.8,
        grey: float = 0.1,
    ) -> None:
        shares = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "p": p, "grey": grey}
        if not all(0 <= share <= 1 for share in shares.values()) or not 0 <= hue <= 0.5:
            raise FewtokensError(
                "ColorJitter needs shares",
                expected="0 to 1, and a hue of 0 to 0.5",
                got=shares | {"hue": hue},
                fix="change the ColorJitter node in data.train_transforms",
            )
        self.strengths, self.p, self.grey = (brightness, contrast, saturation, hue), p, grey

    def __call__(self, images: Shaped[Tensor, "b *t c h w"], generator: torch.Generator) -> UInt8[Tensor, "b *t c h w"]:
        """Maps the colours of every image, or of all frames of a clip alike."""
        if images.shape[-3] != 3:
            raise FewtokensError(
                "ColorJitter changes colours",
                expected="3 channels",
                got=images.shape[-3],
                fix="take ColorJitter out of data.train_transforms",
            )
        flat = images.flatten(1, -4) if images.ndim > 4 else images[:, None]
        matrix, offset = self._maps(flat, generator)
        mapped = torch.einsum("bij,btjhw->btihw", matrix, flat.float()) + offset[:, None, :, None, None]
        return mapped.round_().clamp_(0, 255).to(torch.uint8).view(images.shape)

    def _maps(self, images: Tensor, generator: torch.Generator) -> tuple[Float[Tensor, "b 3 3"], Float[Tensor, "b 3"]]:
        rand = torch.rand(6, len(images), generator=generator, device=images.device)
        changed = (rand[4] < self.p).float()
        shift, contrast, saturation, hue = ((2 * rand[i] - 1) * s * changed for i, s in enumerate(self.strengths))
        matrix = self._hue(hue) @ _towards_grey(1 + saturation)
        # Contrast last: away from the mean colour that the clip has by then.
        brighter = images.float().mean((1, 3, 4)) + 255 * shift[:, None]
        mean = (matrix @ brighter[..., None])[..., 0]
        moved = (matrix @ (255 * shift)[:, None, None].expand(-1, 3, 1))[..., 0]
        factor = (1 + contrast)[:, None]
        matrix, offset = factor[..., None] * matrix, factor * moved + (1 - factor) * mean
        grey = _towards_grey(1 - (rand[5] < self.grey).float())
        return grey @ matrix, (grey @ offset[..., None])[..., 0]

    @staticmethod
    def _hue(turn: Float[Tensor, " b"]) -> Float[Tensor, "b 3 3"]:
        yiq = torch.tensor(_YIQ, dtype=torch.float64, device="cpu")
        cos, sin = (2 * math.pi * turn).cos(), (2 * math.pi * turn).sin()
        one, zero = torch.ones_like(cos), torch.zeros_like(cos)
        rows = [one, zero, zero, zero, cos, -sin, zero, sin, cos]
        rotation = torch.stack(rows, 1).view(-1, 3, 3)
        return yiq.inverse().to(turn) @ rotation @ yiq.to(turn)


def _towards_grey(share: Float[Tensor, " b"]) -> Float[Tensor, "b 3 3"]:
    """Keeps a share of the colour; 0 is grey, 1 changes nothing, more is more colourful."""
    colour = torch.eye(3, device=share.device)
    grey = torch.tensor(_LUMA, device=share.device).expand(3, 3)
    return share[:, None, None] * (colour - grey) + grey
