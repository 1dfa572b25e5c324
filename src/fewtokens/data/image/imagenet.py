"""ImageNet (ILSVRC 2012) from class folders."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Unpack

import torch
from jaxtyping import Int64, UInt8
from timm.data import ImageNetInfo, create_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from fewtokens.data import seeding
from fewtokens.data.datamodule import Common, DataModule, Part
from fewtokens.data.image import folders
from fewtokens.data.image.preprocessing import preprocessing
from fewtokens.errors import FewtokensError

_ILSVRC_CLASSES = 1000
Batch = tuple[UInt8[Tensor, "b 3 h w"], Int64[Tensor, " b"]]


class FolderDataset(Dataset):
    """Pictures on disk, decoded and cut to one size in the worker, uint8.

    Args:
        files: The pictures.
        labels: Class index of every class folder.
        read: Reads a picture from a path.
        transform: Makes a uint8 tensor of one size of it; may draw from torch's global generator, which is seeded here
            by (seed, epoch, index), whatever the number of workers, and put back afterwards.
        seed: The run's seed.
    """

    def __init__(
        self,
        files: folders.ClassFolders,
        labels: Tensor,
        read: Callable,
        transform: Callable[..., Tensor],
        seed: int = 0,
    ) -> None:
        self.files, self.read, self.transform, self.seed = files, read, transform, seed
        self.targets = labels[files.targets]

    def __len__(self) -> int:
        return len(self.files.files)

    def __getitem__(self, stamp: int) -> tuple[UInt8[Tensor, "3 h w"], int]:
        """The picture `stamp % len(self)` as epoch `stamp // len(self)` sees it (see `TrainSampler`)."""
        epoch, index = divmod(stamp, len(self))
        picture = self.read(self.files.path(index))
        before = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(seeding.mix(seeding.IMAGE, self.seed, epoch, index))
            return self.transform(picture), int(self.targets[index])
        finally:
            torch.set_rng_state(before)

    def __getitems__(self, stamps: list[int]) -> Batch | FewtokensError:
        """A batch, or the error that `Loader` raises."""
        try:
            images, targets = zip(*map(self.__getitem__, stamps), strict=True)
        except FewtokensError as error:
            return error
        return torch.stack(images), torch.tensor(targets)


class ImageNet(DataModule):
    """ImageNet from `train/<wnid>/*` and `val/<wnid>/*`; `val` is the validation and the test part.

    Training: torchvision's decoder, random resized crop and flip in the worker. Evaluation: timm's own preprocessing
    (scale the shorter side to `image_size / crop_pct`, cut the centre). `val` alone is enough to evaluate.
    With 1000 classes, folders that hold only some of them get their true ILSVRC indices, so that pretrained heads fit;
    with as many classes as folders, the folders are numbered in sorted order.

    Args:
        root: Folder of `train` and `val`.
        image_backend: Decoder and scaler of evaluation: "pil" as for published numbers, or "torchvision", faster.
        preset: Name of a timm model whose pretrained weights say mean, std, crop_pct and interpolation; explicit
            values go before it.
        crop_pct: Share of the scaled image that evaluation keeps; None: the preset's, or 0.875.
        interpolation: "bilinear" or "bicubic"; None: the preset's, or bicubic.
        min_scale: Smallest share of the picture that a training crop covers.
        flip: Probability of mirroring in training.
        **common: See `DataModule`; `mean` and `std` None: the preset's, or ImageNet's.

    Raises:
        FewtokensError: If the data are missing, broken, or other than the settings say.
    """

    stamped: ClassVar[bool] = True

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        image_backend: str = "pil",
        preset: str | None = None,
        crop_pct: float | None = None,
        interpolation: str | None = None,
        min_scale: float = 0.08,
        flip: float = 0.5,
        **common: Unpack[Common],
    ) -> None:
        if image_backend not in ("pil", "torchvision"):
            raise FewtokensError(
                "Unknown data.image_backend", expected="pil or torchvision", got=image_backend, fix="choose one of them"
            )
        way = preprocessing(
            preset, mean=common.get("mean"), std=common.get("std"), crop_pct=crop_pct, interpolation=interpolation
        )
        common["mean"], common["std"] = way.mean, way.std
        super().__init__(**common)
        self.root, self.preprocessing = Path(root).expanduser(), way
        self.read = {"pil": folders.read_pil, "torchvision": folders.read_tensor}[image_backend]
        mode = v2.InterpolationMode(way.interpolation)
        crop = v2.RandomResizedCrop(self.image_size, (min_scale, 1.0), interpolation=mode, antialias=True)
        self.train_crop = v2.Compose([crop, v2.RandomHorizontalFlip(flip)])
        self.eval_crop = create_transform(
            (3, self.image_size, self.image_size),
            interpolation=way.interpolation,
            crop_pct=way.crop_pct,
            crop_mode=way.crop_mode,
            normalize=False,
        )
        self.description = f"ImageNet (class folders at {self.root})"
        self._parts: dict[Part, FolderDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        """Lists the pictures and compares the classes with the facts; only fitting needs the folder `train`."""
        training = stage == "fit" or (stage is None and (self.root / "train").is_dir())
        wanted: tuple[Part, ...] = ("train", "val") if training else ("val",)
        for part in wanted:
            if part not in self._parts:
                self._parts[part] = self._read(part)
                self.verify(part)
        self._parts["test"] = self._parts["val"]

    def dataset(self, part: Part) -> FolderDataset | None:
        """The pictures of a part."""
        return self._parts.get(part)

    def _read(self, part: Part) -> FolderDataset:
        files = folders.scan(
            self.root / part,
            f"lay the pictures out as {self.root}/{part}/n01440764/*.JPEG: get ILSVRC2012_img_{part}.tar from "
            "https://image-net.org (free account) and unpack it there, for example with torchvision.datasets.ImageNet",
        )
        read, crop = (folders.read_tensor, self.train_crop) if part == "train" else (self.read, self.eval_crop)
        return FolderDataset(files, self._labels(files), read, crop, self.seed)

    def _labels(self, files: folders.ClassFolders) -> Int64[Tensor, " k"]:
        if len(files.classes) == self.num_classes:
            return torch.arange(self.num_classes)
        indices = {wnid: index for index, wnid in enumerate(ImageNetInfo().label_names())}
        unknown = [name for name in files.classes if name not in indices]
        if self.num_classes == _ILSVRC_CLASSES and not unknown:
            return torch.tensor([indices[name] for name in files.classes])
        raise FewtokensError(
            f"data.num_classes is the number of class folders in {files.root}, or 1000 if they are some of ILSVRC's",
            expected=f"{self.num_classes} folders",
            got=f"{len(files.classes)} folders" + (f", among them {unknown[0]}" if unknown else ""),
            fix=f"complete the folders, or set data.num_classes={len(files.classes)}",
        )
