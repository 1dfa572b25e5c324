"""The pipeline from a batch of stored images to the input of the model."""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn

from fewtokens.errors import check

Transform = Callable[[Tensor, torch.Generator], Tensor]


class Pipeline(nn.Module):
    """Applies transforms to a batch, converts it to float, normalizes it, and applies transforms of normalized images.

    Args:
        transforms: Called as `transform(images, generator)` on images on the scale 0 to 255, uint8 or float. Those with
            a true attribute `on_normalized` are called last, on the normalized floats.
        mean: Mean per channel, on the scale 0 to 1.
        std: Standard deviation per channel, on the scale 0 to 1.

    Raises:
        FewtokensError: `mean` and `std` differ in length, or a std is not positive.
    """

    factor: Tensor
    offset: Tensor

    def __init__(self, transforms: Iterable[Transform], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        check(len(std) == len(mean), "data.std", f"one number per channel, {len(mean)} as in `data.mean`", list(std))
        check(all(x > 0 for x in std), "data.std", "numbers > 0, on the scale 0 to 1", list(std))
        transforms = list(transforms)
        names = "data.train_transforms and data.eval_transforms"
        check(all(map(callable, transforms)), names, "lists of transforms, each with a _target_", transforms)
        self.before = [t for t in transforms if not getattr(t, "on_normalized", False)]
        self.after = [t for t in transforms if getattr(t, "on_normalized", False)]
        scale = torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
        shift = torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1)
        self.register_buffer("factor", (1 / (255 * scale)).float(), persistent=False)
        self.register_buffer("offset", (-shift / scale).float(), persistent=False)

    def forward(
        self, images: Shaped[Tensor, "b *t c h w"], generator: torch.Generator
    ) -> Float[Tensor, "b *t c h2 w2"]:
        """Augment and normalize a batch of stored images or clips, uint8 or float on the scale 0 to 255."""
        for transform in self.before:
            images = transform(images, generator)
        if self.factor.device != images.device:
            self.to(images.device)
        # A copy that is changed in place: on a CPU, allocating a second large result costs as much as the arithmetic.
        images = (
            images.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            .mul_(self.factor)
            .add_(self.offset)
        )
        for transform in self.after:
            images = transform(images, generator)
        return images

    def undo(self, images: Float[Tensor, "*b c h w"]) -> UInt8[Tensor, "*b c h w"]:
        """Convert normalized images back to uint8 pictures on the CPU."""
        pictures = (images.cpu() - self.offset.cpu()) / self.factor.cpu()
        return pictures.round().clamp(0, 255).to(torch.uint8)
