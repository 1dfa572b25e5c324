"""ImageNet (ILSVRC 2012), or other pictures of any size, from class folders."""

import os
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from jaxtyping import Int64
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor

from fewtokens.data.datamodule import Common, DataModule, Part
from fewtokens.data.image import folders, shards
from fewtokens.data.image.dataset import PictureDataset, RandomCropFlip
from fewtokens.errors import FewtokensError, check, check_choice, listed

_ILSVRC_CLASSES = 1000
_BACKENDS = {"pil": folders.decode_pil, "torchvision": folders.decode_tensor}


class ImageNet(DataModule):
    """ImageNet from class folders `train/<wnid>/*` and `val/<wnid>/*`, or from tar shards in `train` and `val`.

    `val` is both the validation and the test part. Shards and the folders they were made from give the same batches.

    Training uses torchvision's decoder, and a random resized crop and flip in the worker. Evaluation uses timm's
    preprocessing: scale the shorter side to `image_size / crop_pct`, crop the center. `val` is enough to evaluate.
    With `num_classes=1000`, folders of some of the ILSVRC classes get their true indices, so that pretrained heads fit.
    With as many classes as folders, the folders are numbered in sorted order: those of `train`, if it is there, for
    both parts.

    Args:
        root: Folder that contains `train` and `val`.
        image_backend: Decoder and scaler of evaluation: "pil", as for published numbers, or "torchvision", which is
            faster.
        preset: Name of a timm model; its pretrained weights determine mean, std, crop_pct and interpolation where these
            are None. Names that timm does not know are ignored.
        crop_pct: Share of the scaled image that evaluation keeps; None: the preset's, or 0.875.
        interpolation: "bilinear" or "bicubic"; None: the preset's, or bicubic.
        min_scale: Smallest share of the picture that a training crop covers.
        flip: Probability of a horizontal flip in training.
        **common: See `DataModule`. `mean` and `std` None: the preset's, or ImageNet's.

    Raises:
        FewtokensError: The data are missing or unreadable, or do not fit the settings.
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
        check_choice("data.image_backend", image_backend, _BACKENDS)
        check_choice("data.interpolation", interpolation, ("bilinear", "bicubic", None))
        check(crop_pct is None or 0 < crop_pct <= 1, "data.crop_pct", "a float in (0, 1] or null", crop_pct)
        check(0 < min_scale <= 1, "data.min_scale", "a float in (0, 1]", min_scale)
        check(0 <= flip <= 1, "data.flip", "a float in [0, 1]", flip)
        known = preprocessing(preset, crop_pct, interpolation)
        common["mean"], common["std"] = common.get("mean") or known["mean"], common.get("std") or known["std"]
        super().__init__(**common)
        self.root, self.decode = Path(root).expanduser(), _BACKENDS[image_backend]
        self.train_crop = RandomCropFlip(self.image_size, min_scale, known["interpolation"], flip)
        geometry = {name: known[name] for name in ("crop_pct", "interpolation", "crop_mode")}
        self.eval_crop = create_transform((3, self.image_size, self.image_size), normalize=False, **geometry)
        self.description = f"ImageNet (class folders at {self.root})"
        self._parts: dict[Part, PictureDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        """List the pictures and compare the classes with the settings. Only fitting needs the folder `train`."""
        training = stage == "fit" or (stage is None and (self.root / "train").is_dir())
        needed: tuple[Part, ...] = ("train", "val") if training else ("val",)
        for part in needed:
            if part not in self._parts:
                self._parts[part] = self._read(part)
                self.verify(part)
        self._parts["test"] = self._parts["val"]

    def dataset(self, part: Part) -> PictureDataset | None:
        """Return the pictures of a part."""
        return self._parts.get(part)

    def _read(self, part: Part) -> PictureDataset:
        files = list_pictures(
            self.root / part,
            f"Store the pictures as {self.root}/{part}/n01440764/*.JPEG: get ILSVRC2012_img_{part}.tar from "
            "https://image-net.org (free account) and unpack it, for example with torchvision.datasets.ImageNet",
        )
        training = part == "train"
        decode, crop = (folders.decode_tensor, self.train_crop) if training else (self.decode, self.eval_crop)
        targets = self._labels(files)[files.targets]
        return PictureDataset(files, targets, decode, crop, self.image_size, self.seed)

    def _labels(self, files: folders.ClassFolders) -> Int64[Tensor, " k"]:
        info = ImageNetInfo()
        indices = {wnid: index for index, wnid in enumerate(info.label_names())}
        train = self.root / "train"
        names, folder = (folders.class_names(train) if train.is_dir() else []), train
        if not names:
            names, folder = files.classes, files.root
        found = len(names)
        if found == self.num_classes:
            if other := sorted(set(files.classes) - set(names)):
                raise FewtokensError(
                    f"{files.root} contains class folders that {train} lacks: {listed(other)}. The folders of train "
                    "number the classes of both parts. Rename or remove folders."
                )
            self.class_names = [info.label_name_to_description(x) if x in indices else x for x in names]
            return torch.tensor([names.index(name) for name in files.classes])
        unknown = [name for name in files.classes if name not in indices]
        if self.num_classes == _ILSVRC_CLASSES and not unknown:
            self.class_names = [info.index_to_description(index) for index in range(_ILSVRC_CLASSES)]
            return torch.tensor([indices[name] for name in files.classes])
        hint = f" ({unknown[0]} is no class of ILSVRC)" if unknown else ""
        raise FewtokensError(
            f"`data.num_classes` must be the number of class folders in {folder}, or 1000 if all of them are "
            f"classes of ILSVRC; got {self.num_classes} with {found} folders{hint}. Set data.num_classes={found}, or "
            "complete the folders."
        )


def list_pictures(root: Path, advice: str) -> folders.ClassFolders:
    """List the pictures of a part: in tar shards if the folder contains any, else in class folders.

    Args:
        root: Folder of the part.
        advice: Sentence without its period for error messages: how the data should be stored, or where to get them.

    Raises:
        FewtokensError: There are no pictures, or the shards have no index that fits.
    """
    if (root / shards.INDEX).exists() or next(root.glob("*.tar"), None) is not None:
        return shards.load(root)
    return folders.scan(root, advice)


def preprocessing(
    preset: str | None, crop_pct: float | None = None, interpolation: str | None = None
) -> dict[str, Any]:
    """Return timm's preprocessing of a pretrained model, since a wrong normalization costs accuracy without an error.

    Args:
        preset: Name of a timm model, with or without a tag; else ImageNet's usual values are returned. Any name of a
            backbone is allowed.
        crop_pct: Replaces that of the preset.
        interpolation: Replaces that of the preset.

    Returns:
        mean, std, crop_pct, interpolation and crop_mode.
    """
    try:
        known = get_pretrained_cfg(preset) if preset else None
    except RuntimeError:  # a known model with an unknown tag
        known = None
    return resolve_data_config(
        {"crop_pct": crop_pct, "interpolation": interpolation}, pretrained_cfg=known.to_dict() if known else {}
    )
