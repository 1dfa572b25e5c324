"""ImageNet (ILSVRC 2012), or other pictures of any size, from class folders, tar shards or lists."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NotRequired, TypedDict, Unpack

import torch
from jaxtyping import Int64
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor

from fewtokens.data.datamodule import Common, Loader, Part
from fewtokens.data.image import folders, lists, shards
from fewtokens.data.image.dataset import PictureDataset, Pictures, RandomCropFlip
from fewtokens.data.unreadable import ReplacingDataModule
from fewtokens.errors import FewtokensError, check, check_choice, listed

_ILSVRC_CLASSES = 1000
_BACKENDS = {"pil": folders.decode_pil, "torchvision": folders.decode_tensor}
_SUBSET = ("share", "classes")
_CROPPING: dict[str, Any] = {  # of `Cropping`
    "image_backend": "pil",
    "preset": None,
    "crop_pct": None,
    "interpolation": None,
    "min_scale": 0.08,
    "flip": 0.5,
}


class Cropping(Common):
    """Settings of the crops; `ImageNet` explains them."""

    image_backend: NotRequired[str]
    preset: NotRequired[str | None]
    crop_pct: NotRequired[float | None]
    interpolation: NotRequired[str | None]
    min_scale: NotRequired[float]
    flip: NotRequired[float]


class Subset(TypedDict, total=False):
    """A part of the pictures: `share` of each class in training, drawn with `seed`, and the first `classes`."""

    share: float
    classes: int | None
    seed: int


class ImageNet(ReplacingDataModule):
    """ImageNet, or pictures of any size, from class folders, tar shards, or folders with a file of labels.

    Training uses torchvision's decoder, and a random resized crop and flip in the worker. Evaluation uses timm's
    preprocessing: scale the shorter side to `image_size / crop_pct`, crop the center. The folder of `train` is needed
    for fitting only. Shards and the folders they were made from give the same batches.

    With `num_classes=1000`, wnids and numbers get their true indices, also if some are missing, so that pretrained
    heads fit. Other classes are numbered in the sorted order of the training part.

    Args:
        root: Folder to which the other paths are relative.
        parts: Folder of each part (`train`, `val`, `test`): class folders, tar shards, a Hugging Face image folder with
            metadata.csv or metadata.jsonl, or a flat folder with the labels in `labels`.
        labels: File with the labels of flat folders, see `fewtokens.data.image.lists.read_folder`.
        real_labels: ReaL labels (real.json) that replace those of the test part. A prediction is right if it is one of
            them, and pictures without any are left out.
        subset: See `Subset`; None: all pictures.
        max_broken: Largest share of the training pictures that may be unreadable, from 0 to 1. They are replaced by
            others of their class, and `skipped` lists them. In evaluation an unreadable picture is an error.
        **settings: See `DataModule`. `mean` and `std` None: the preset's, or ImageNet's. And:
            image_backend: Decoder and scaler of evaluation: "pil", as for published numbers, or "torchvision", which is
            faster. preset: Name of a timm model; its pretrained weights determine mean, std, crop_pct and interpolation
            where these are None; names that timm does not know are ignored. crop_pct: Share of the scaled image that
            evaluation keeps; None: the preset's, or 0.875. interpolation: "bilinear" or "bicubic"; None: the preset's,
            or bicubic. min_scale: Smallest share of the picture that a training crop covers. flip: Probability of a
            horizontal flip in training.

    Raises:
        FewtokensError: The data are missing or unreadable, or do not fit the settings.
    """

    stamped: ClassVar[bool] = True
    noun: ClassVar[str] = "pictures"

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        parts: Mapping[str, str] | None = None,
        labels: str | None = None,
        real_labels: str | None = None,
        subset: Subset | None = None,
        max_broken: float = 0.01,
        **settings: Unpack[Cropping],
    ) -> None:
        given: dict[str, Any] = dict(settings)
        crops = {name: given.pop(name, default) for name, default in _CROPPING.items()}
        _check_cropping(crops)
        known = preprocessing(crops["preset"], crops["crop_pct"], crops["interpolation"])
        given["mean"], given["std"] = given.get("mean") or known["mean"], given.get("std") or known["std"]
        super().__init__(**given)
        self.root, self.decode = Path(root).expanduser(), _BACKENDS[crops["image_backend"]]
        self.parts = {"train": "train", "val": "val", "test": "val", **(parts or {})}
        self.labels, self.real_labels, self.max_broken = labels, real_labels, max_broken
        self.subset: Subset = {"share": 1.0, "classes": None, "seed": 0, **(subset or {})}  # type: ignore[typeddict-item]
        self._check_parts()
        self.train_crop = RandomCropFlip(self.image_size, crops["min_scale"], known["interpolation"], crops["flip"])
        geometry = {name: known[name] for name in ("crop_pct", "interpolation", "crop_mode")}
        self.eval_crop = create_transform((3, self.image_size, self.image_size), normalize=False, **geometry)
        self.description = f"the pictures at {self.root}"
        self._parts: dict[Part, PictureDataset] = {}

    def _check_parts(self) -> None:
        unknown, share, classes = sorted(set(self.parts) - {"train", "val", "test"}), *map(self.subset.get, _SUBSET)
        self._check_max_broken()
        check(not unknown, "data.parts", "a mapping with the keys train, val and test only", unknown)
        check(isinstance(share, float | int) and 0 < share <= 1, "data.subset.share", "a number in (0, 1]", share)
        right = classes is None or (isinstance(classes, int) and classes >= 1)
        check(right, "data.subset.classes", "an int >= 1 or null", classes)
        seed = self.subset["seed"]
        check(isinstance(seed, int) and seed >= 0, "data.subset.seed", "an int >= 0", seed)

    def setup(self, stage: str | None = None) -> None:
        """List the pictures and compare the classes with the settings. Only fitting needs the training part."""
        stages: dict[str, tuple[Part, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        every: tuple[Part, ...] = ("train", "val", "test") if self.folder("train").is_dir() else ("val", "test")
        for part in stages.get(stage or "", every):
            if part not in self._parts:
                self._parts[part] = self._read(part)
                self.verify(part)
            if part != "train" and self.parts["val"] == self.parts["test"] and self.real_labels is None:
                self._parts["val"] = self._parts["test"] = self._parts[part]

    def dataset(self, part: Part) -> PictureDataset | None:
        """Return the pictures of a part."""
        return self._parts.get(part)

    def receive(self, part: Part | None, batch: Pictures) -> tuple[Tensor, Tensor]:
        """Note the training pictures that were replaced, and return images and targets."""
        self.note(part or "test", batch.skipped)
        return batch.images, batch.targets

    def measured_dataloader(self) -> Loader:
        """Return a loader of the test samples, also in runs without a test."""
        self.setup("test")
        return self.test_dataloader()

    def folder(self, part: Part) -> Path:
        """Return the folder of a part. Without `val`, it is one of the names that Hugging Face uses."""
        found = self.root / self.parts[part]
        others = [self.root / name for name in ("validation", "valid", "test")] if self.parts[part] == "val" else []
        return next((path for path in (found, *others) if path.is_dir()), found)

    def _read(self, part: Part) -> PictureDataset:
        files = self._subset(self._list(part), part)
        targets, several = self._numbers(files)[files.targets], None
        if part == "test" and self.real_labels is not None:
            several = lists.real_labels(self.root / self.real_labels, map(os.fsdecode, files.files), self.num_classes)
            kept = (several[:, 0] >= 0).nonzero().flatten()
            check(len(kept) > 0, "data.real_labels", "a file with labels of some of the pictures", self.real_labels)
            files, targets, several = files.take(kept), targets[kept], several[kept]
        training = part == "train"
        decode, crop = (folders.decode_tensor, self.train_crop) if training else (self.decode, self.eval_crop)
        return PictureDataset(files, targets, decode, crop, self.image_size, part, self.seed, several, self.num_classes)

    def _list(self, part: Part) -> folders.ClassFolders:
        root = self.folder(part)
        split = "train" if part == "train" else "val"
        return list_pictures(
            root,
            None if self.labels is None else self.root / self.labels,
            f"Store the pictures as {root}/n01440764/*.JPEG: get ILSVRC2012_img_{split}.tar from "
            "https://image-net.org (free account) and unpack it, for example with torchvision.datasets.ImageNet. For "
            "pictures without class folders, set data.labels to a file with their labels",
        )

    def _subset(self, files: folders.ClassFolders, part: Part) -> folders.ClassFolders:
        share = self.subset["share"] if part == "train" else 1.0
        if share == 1 and self.subset["classes"] is None:
            return files
        return files.subset(share, self.subset["classes"], self.subset["seed"])

    def _numbers(self, files: folders.ClassFolders) -> Int64[Tensor, " k"]:
        """Return the number of each class of a part, and keep the names of all classes."""
        info, names = ImageNetInfo(), files.classes
        wnids = {wnid: index for index, wnid in enumerate(info.label_names())}
        numbers = {str(index): index for index in range(_ILSVRC_CLASSES)}
        unknown = [name for name in names if name not in wnids]
        if self.num_classes == _ILSVRC_CLASSES and (not unknown or numbers.keys() >= set(names)):
            self.class_names = [info.index_to_description(index) for index in range(_ILSVRC_CLASSES)]
            return torch.tensor([(numbers if unknown else wnids)[name] for name in names])
        every = self._training_classes() or names
        if set(names) <= set(every):
            names = every
        elif len(every) == self.num_classes:
            other = listed(sorted(set(names) - set(every)))
            raise FewtokensError(
                f"The classes of {files.root} must be those of {self.folder('train')}, which has no {other}. Rename "
                "the folders, or set `data.parts`."
            )
        if len(names) == self.num_classes:
            self.class_names = [info.label_name_to_description(x) if x in wnids else x for x in names]
            return torch.tensor([names.index(name) for name in files.classes])
        hint = f" ({unknown[0]} is no class of ILSVRC)" if unknown else ""
        raise FewtokensError(
            f"`data.num_classes` must be the number of class folders in {files.root}, or 1000 if all of them are "
            f"classes of ILSVRC; got {self.num_classes} with {len(names)} folders{hint}. Set "
            f"data.num_classes={len(names)}, or complete the folders."
        )

    def _training_classes(self) -> list[str]:
        """Return the names of the classes of the training part, which number those of all parts; empty without it."""
        if "train" in self._parts:
            return self._parts["train"].files.classes
        return class_names(self.folder("train"))[: self.subset["classes"]]


def _check_cropping(given: Mapping[str, Any]) -> None:
    crop_pct, min_scale, flip = given["crop_pct"], given["min_scale"], given["flip"]
    check_choice("data.image_backend", given["image_backend"], _BACKENDS)
    check_choice("data.interpolation", given["interpolation"], ("bilinear", "bicubic", None))
    check(crop_pct is None or 0 < crop_pct <= 1, "data.crop_pct", "a float in (0, 1] or null", crop_pct)
    check(0 < min_scale <= 1, "data.min_scale", "a float in (0, 1]", min_scale)
    check(0 <= flip <= 1, "data.flip", "a float in [0, 1]", flip)


def list_pictures(root: Path, labels: Path | None, advice: str) -> folders.ClassFolders:
    """List the pictures of a part.

    Args:
        root: Folder of the part: tar shards, Hugging Face image folder with metadata, class folders, or flat folder.
        labels: File with the labels of a flat folder.
        advice: Sentence without its period for error messages: how the data should be stored, or where to get them.

    Raises:
        FewtokensError: There are no pictures, or the shards have no index that fits.
    """
    nested = folders.class_names(root) if root.is_dir() else []
    if (root / shards.INDEX).exists():
        return shards.load(root)
    for name in lists.METADATA:
        if (root / name).exists():
            return lists.read_folder(root, root / name)
    # Tar files beside class folders or pictures are those of ILSVRC from which they were unpacked.
    has_tar = next(root.glob("*.tar"), None) is not None
    if labels is not None and not nested and (lists.has_pictures(root) or not has_tar) and root.is_dir():
        return lists.read_folder(root, labels)
    if not nested and has_tar:
        return shards.load(root)
    return folders.scan_cached(root, advice)


def class_names(root: Path) -> list[str]:
    """Return the names of the classes of a part in the order of their numbers, without listing its pictures."""
    if (root / shards.INDEX).exists():
        return shards.class_names(root)
    for name in lists.METADATA:
        if (root / name).exists():
            return lists.read_folder(root, root / name).classes
    return folders.class_names(root) if root.is_dir() else []


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
