"""scikit-learn's handwritten digits: 1797 pictures of 8 x 8 pixels, which are part of the package."""

from typing import Unpack

import torch
from sklearn.datasets import load_digits

from fewtokens.data import seeding
from fewtokens.data.datamodule import Common, Part
from fewtokens.data.image.in_memory import InMemory, Samples, hold_out
from fewtokens.data.transforms.geometric import Resize
from fewtokens.errors import check


class Digits(InMemory):
    """1297 training, 200 validation and 300 test images, stratified (source: scikit-learn's `load_digits`).

    Args:
        side: Height and width in pixels to which the pictures are enlarged or reduced once, when they are read, by
            bicubic interpolation.
        split_seed: Chooses the parts. Independent of the run's seed.
        **common: See `DataModule`. `channels` may be 1, or more to repeat the gray value.

    Raises:
        FewtokensError: A setting is out of range.
    """

    class_names = tuple("0123456789")

    def __init__(self, *, side: int = 8, split_seed: int = 0, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        check(side >= 1, "data.side", "an int >= 1", side)
        self.side, self.split_seed = side, split_seed
        self.description = f"digits (scikit-learn, {side} x {side})"

    def read(self) -> dict[Part, Samples]:
        """Read the pictures, scale their 17 gray values to 0 to 255, and scale them to the side."""
        bunch = load_digits()
        images = torch.from_numpy(bunch.images * (255 / 16))[:, None].float()
        images = Resize(self.side, "bicubic")(images, seeding.generator(0)).round().clamp(0, 255).to(torch.uint8)
        images = images.repeat(1, self.channels, 1, 1)
        rest, test = hold_out(Samples(images, torch.from_numpy(bunch.target).long()), 300, self.split_seed)
        train, val = hold_out(rest, 200, self.split_seed)
        return {"train": train, "val": val, "test": test}
