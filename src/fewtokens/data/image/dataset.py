"""Map-style data set of pictures that are decoded and cropped to one size in the worker."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from fewtokens.data import seeding
from fewtokens.data.image.folders import ClassFolders, UnreadablePictureError
from fewtokens.data.skipped import Skipped
from fewtokens.data.unreadable import MAX_TRIES, UnreadableInARowError, candidates
from fewtokens.errors import FewtokensError


class Pictures(NamedTuple):
    """A batch as a worker sends it.

    Attributes:
        images: uint8 pixels, shape (B, 3, S, S).
        targets: Class numbers (B,), or probabilities (B, classes).
        skipped: The pictures that could not be read.
    """

    images: UInt8[Tensor, "b 3 s s"]
    targets: Int64[Tensor, " b"] | Float[Tensor, "b classes"]
    skipped: list[Skipped]


class PictureDataset(Dataset):
    """Pictures from files or shards, read a batch at a time with `__getitems__`, as uint8.

    In training, a picture that cannot be read is replaced by another one, chosen at random, if possible of its class;
    the choice depends on (seed, epoch, index) only. In evaluation it is an error.

    Args:
        files: The pictures.
        targets: Class number of each.
        decode: Called as `decode(content, name)`.
        transform: Returns a uint8 tensor (3, side, side). May draw from torch's global generator, which is seeded here
            with (seed, epoch, index) and restored afterwards, so that the draws do not depend on the number of workers.
        side: Side of the result in pixels.
        part: "train", "val" or "test".
        seed: The run's seed.
        several: Classes of each picture, filled up with -1, if it may have several. Targets are then probabilities.
        classes: Number of classes of these targets.
    """

    def __init__(
        self,
        files: ClassFolders,
        targets: Int64[Tensor, " n"],
        decode: Callable[..., Any],
        transform: Callable[..., Tensor],
        side: int,
        part: str = "test",
        seed: int = 0,
        several: Int64[Tensor, "n k"] | None = None,
        classes: int = 0,
    ) -> None:
        self.several, self.classes = several, classes
        self.files, self.targets, self.side, self.part, self.seed = files, targets, side, part, seed
        self.decode, self.transform = decode, transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, stamp: int) -> tuple[UInt8[Tensor, "3 h w"], int]:
        """Return picture `stamp % len(self)` with the augmentation of epoch `stamp // len(self)` (`TrainSampler`)."""
        epoch, index = divmod(stamp, len(self))
        picture = self.decode(self.files.read(index), self.files.path(index))
        before = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(seeding.mix(seeding.IMAGE, self.seed, epoch, index))
            return self.transform(picture), int(self.targets[index])
        finally:
            torch.set_rng_state(before)

    def __getitems__(self, stamps: list[int]) -> Pictures | FewtokensError:
        """Return a batch, or the error for `Loader` to raise."""
        images = empty_batch(len(stamps), 3, self.side, self.side)
        indices, skipped = list[int](), list[Skipped]()
        try:
            for image, stamp in zip(images, stamps, strict=True):
                indices.append(self._read(image, *divmod(stamp, len(self)), skipped))
        except FewtokensError as error:
            return error
        return Pictures(images, self._targets(torch.tensor(indices)), skipped)

    def _read(self, image: UInt8[Tensor, "3 s s"], epoch: int, index: int, skipped: list[Skipped]) -> int:
        """Write picture `index` or one that replaces it to `image`, and return the index of the one that was used."""
        for candidate in candidates(self.targets.numpy(), self.seed, epoch, index):
            try:
                image.copy_(self[epoch * len(self) + candidate][0])
                return candidate
            except UnreadablePictureError as error:
                if self.part != "train":
                    raise
                skipped.append(Skipped(self.part, error.path, error.reason))
        raise UnreadableInARowError(
            skipped[-min(MAX_TRIES, len(self)) :], "pictures", "Replace or remove the unreadable pictures"
        )

    def _targets(self, indices: Int64[Tensor, " b"]) -> Int64[Tensor, " b"] | Float[Tensor, "b classes"]:
        if self.several is None:
            return self.targets[indices]
        chosen = self.several[indices]
        marks = torch.zeros(len(indices), self.classes + 1).scatter_(1, chosen % (self.classes + 1), 1.0)
        return marks[:, :-1] / marks[:, :-1].sum(dim=1, keepdim=True)


class RandomCropFlip:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip, without the time that their dispatch takes.

    Args:
        size: Side of the result in pixels.
        min_scale: Smallest share of the picture that a crop covers.
        interpolation: "bilinear" or "bicubic".
        flip: Probability of the flip.
    """

    def __init__(self, size: int, min_scale: float, interpolation: str, flip: float) -> None:
        self.mode, self.flip = v2.InterpolationMode(interpolation), flip
        self.crop = v2.RandomResizedCrop(size, (min_scale, 1.0), interpolation=self.mode, antialias=True)

    def __call__(self, picture: UInt8[Tensor, "3 h w"]) -> UInt8[Tensor, "3 s s"]:
        """Crop and flip with draws from torch's global generator."""
        box = self.crop.make_params([picture])
        done = functional.resized_crop_image(
            picture, **box, size=self.crop.size, interpolation=self.mode, antialias=True
        )
        return done.flip(-1) if torch.rand(1) < self.flip else done


def empty_batch(*shape: int) -> UInt8[Tensor, "..."]:
    """Return an uninitialized uint8 tensor; in a worker in shared memory, where it is sent from without a copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own default_collate does
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
