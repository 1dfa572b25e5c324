"""From a batch of stored images to what the model sees."""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn

from fewtokens.errors import FewtokensError

Transform = Callable[[Tensor, torch.Generator], Tensor]


class Pipeline(nn.Module):
    """Applies transforms to a batch, converts it to float, normalises it, and applies what acts on normalised images.

    Args:
        transforms: Called as `transform(images, generator)` on images of the scale 0 to 255, uint8 or float; those with
            a true attribute `on_normalised` are called last, on the normalised floats.
        mean: Mean per channel, on the scale 0 to 1.
        std: Standard deviation per channel, on the scale 0 to 1.

    Raises:
        FewtokensError: If mean and std differ in length, or a std is not positive.
    """

    factor: Tensor
    offset: Tensor

    def __init__(self, transforms: Iterable[Transform], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std, default=0.0) <= 0:
            raise FewtokensError(
                "Normalisation needs one mean and one positive standard deviation per channel",
                expected=f"{len(mean)} positive numbers as data.std",
                got=list(std),
                fix="set data.mean and data.std to lists with one number per channel, on the scale 0 to 1",
            )
        transforms = list(transforms)
        self.before = [t for t in transforms if not getattr(t, "on_normalised", False)]
        self.after = [t for t in transforms if getattr(t, "on_normalised", False)]
        scale = torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
        shift = torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1)
        self.register_buffer("factor", (1 / (255 * scale)).float(), persistent=False)
        self.register_buffer("offset", (-shift / scale).float(), persistent=False)

    def forward(
        self, images: Shaped[Tensor, "b *t c h w"], generator: torch.Generator
    ) -> Float[Tensor, "b *t c h2 w2"]:
        """Turns stored images or clips, uint8 or float on the scale 0 to 255, into normalised ones."""
        for transform in self.before:
            images = transform(images, generator)
        if self.factor.device != images.device:
            self.to(images.device)
        # A copy, changed in place: on a CPU a second large result costs as much as the arithmetic.
        images = (
            images.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            .mul_(self.factor)
            .add_(self.offset)
        )
        for transform in self.after:
            images = transform(images, generator)
        return images

    def undo(self, images: Float[Tensor, "*b c h w"]) -> UInt8[Tensor, "*b c h w"]:
        """Turns normalised images back into pictures."""
        pictures = (images.cpu() - self.offset.cpu()) / self.factor.cpu()
        return pictures.round().clamp(0, 255).to(torch.uint8)
