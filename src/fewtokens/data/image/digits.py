"""scikit-learn's handwritten digits: 1797 pictures of 8 x 8 pixels, which are part of the package."""

from typing import Unpack

import torch
from sklearn.datasets import load_digits

from fewtokens.data.datamodule import Common, Part
from fewtokens.data.image.in_memory import InMemory, Samples, hold_out


class Digits(InMemory):
    """1297 training, 200 validation and 300 test images, stratified (source: scikit-learn's `load_digits`).

    Args:
        split_seed: Chooses the parts. Independent of the run's seed.
        **common: See `DataModule`. `channels` may be 1, or more to repeat the gray value.
    """

    class_names = tuple("0123456789")

    def __init__(self, *, split_seed: int = 0, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        self.split_seed = split_seed
        self.description = "digits (scikit-learn, 8 x 8)"

    def read(self) -> dict[Part, Samples]:
        """Read the pictures and scale their 17 gray values to 0 to 255."""
        bunch = load_digits()
        images = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)
        images = images[:, None].repeat(1, self.channels, 1, 1)
        rest, test = hold_out(Samples(images, torch.from_numpy(bunch.target).long()), 300, self.split_seed)
        train, val = hold_out(rest, 200, self.split_seed)
        return {"train": train, "val": val, "test": test}
