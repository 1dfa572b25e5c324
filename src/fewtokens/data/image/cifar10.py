"""CIFAR-10, from the official archive or from class folders."""

import os
from pathlib import Path
from typing import Unpack

import torch

from fewtokens.data.datamodule import Common, Part
from fewtokens.data.image import archive, folders
from fewtokens.data.image.cache import Tensors, cached
from fewtokens.data.image.in_memory import InMemory, Samples, check_held_out, hold_out
from fewtokens.errors import FewtokensError

_CACHE = ".fewtokens-cache.safetensors"


class Cifar10(InMemory):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images of 32 x 32 pixels in ten classes.

    What lies in `root` decides the source, in this order: `cifar-10-binary.tar.gz`, `cifar-10-python.tar.gz` (both only
    with the published checksum), class folders `train/<class>/*` and `test/<class>/*` (any pictures of one size).
    The attribute `description` says which it was. The decoded images are kept in a cache file in `root`.

    Args:
        root: Folder of the data.
        val_images: Training images held out for validation; 0 trains on all and gives no validation loader.
        split: "stratified" holds out every class by its share; "tail" holds out the last images in the archive's order,
            the split that Keras' `validation_split` makes.
        split_seed: Chooses the stratified part; independent of the run's seed.
        download: Fetch the binary archive if `root` holds no source.
        **common: See `DataModule`.

    Raises:
        FewtokensError: If the data are missing, broken, or other than the settings say.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        val_images: int = 10_000,
        split: str = "stratified",
        split_seed: int = 0,
        download: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(**common)
        self.root, self.download = Path(root).expanduser(), download
        self.val_images, self.split, self.split_seed = val_images, split, split_seed
        if split not in ("stratified", "tail"):
            raise FewtokensError(
                "Unknown data.split", expected="stratified or tail", got=split, fix="set data.split=stratified"
            )
        check_held_out(val_images, 50_000 if val_images < 0 else val_images + 1)  # the upper end is known after reading
        source = self._find()
        if isinstance(source, Path):
            self._check_classes([e.name for e in os.scandir(source / "train") if e.is_dir()])
        self._describe(source)

    def read(self) -> dict[Part, Samples]:
        """Finds the source, decodes it or reads the cache, and splits the training images."""
        source = self._find()
        if source is None and self.download:
            archive.download(archive.BINARY, self.root)
            source = archive.BINARY
        if source is None:
            raise FewtokensError(
                "CIFAR-10 is read from data.root",
                expected=f"{archive.BINARY.name}, or folders train/<class>/* and test/<class>/*",
                got=f"neither in {self.root}" if self.root.is_dir() else f"no folder {self.root}",
                fix=self._layout(),
            )
        self._describe(source)
        tensors = self._from_folders(source) if isinstance(source, Path) else self._from_archive(source)
        train = Samples(tensors["train.images"], tensors["train.targets"])
        test = Samples(tensors["test.images"], tensors["test.targets"])
        return self._split(train, tail_known=not isinstance(source, Path)) | {"test": test}

    def _layout(self) -> str:
        return (
            f"set data.download=true, or get {archive.BINARY.url} and put it into {self.root}, "
            f"or lay pictures out as {self.root}/train/<class>/*.png and {self.root}/test/<class>/*.png"
        )

    def _find(self) -> archive.Archive | Path | None:
        for candidate in (archive.BINARY, archive.PYTHON):
            if (self.root / candidate.name).is_file():
                return candidate
        return self.root if (self.root / "train").is_dir() else None

    def _describe(self, source: archive.Archive | Path | None) -> None:
        folder = isinstance(source, Path)
        self.description = f"CIFAR-10 (class folders at {self.root})" if folder else "CIFAR-10 (official archive)"

    def _check_classes(self, classes: list[str]) -> None:
        if len(classes) != self.num_classes:
            raise FewtokensError(
                f"data.num_classes is the number of class folders in {self.root / 'train'}",
                expected=f"{self.num_classes} folders",
                got=f"{len(classes)} folders",
                fix=f"complete the folders, or set data.num_classes={len(classes)}",
            )

    def _from_archive(self, source: archive.Archive) -> Tensors:
        path = self.root / source.name
        stat = path.stat()

        def build() -> Tensors:
            parts = source.samples(path)
            return {
                f"{part}.{name}": tensor
                for part, pair in parts.items()
                for name, tensor in zip(("images", "targets"), pair, strict=True)
            }

        return cached(self.root / _CACHE, f"{source.name} {source.md5} {stat.st_size} {stat.st_mtime_ns}", build)

    def _from_folders(self, root: Path) -> Tensors:
        parts = {part: folders.scan(root / part, self._layout()) for part in ("train", "test")}
        self._check_classes(parts["train"].classes)
        if parts["train"].classes != parts["test"].classes:
            different = sorted(set(parts["train"].classes) ^ set(parts["test"].classes))
            raise FewtokensError(
                "Training and test folders hold the same classes",
                expected=f"the same folders in {root / 'train'} and {root / 'test'}",
                got=f"only in one of them: {', '.join(different)}",
                fix="add or remove these folders",
            )

        def build() -> Tensors:
            images = {f"{part}.images": folders.decode_all(found) for part, found in parts.items()}
            return images | {f"{part}.targets": found.targets for part, found in parts.items()}

        key = " ".join(found.fingerprint() for found in parts.values())
        return cached(root / _CACHE, key, build)

    def _split(self, train: Samples, tail_known: bool) -> dict[Part, Samples]:
        check_held_out(self.val_images, len(train.targets))
        if self.val_images == 0:
            return {"train": train}
        if self.split == "stratified":
            rest, held = hold_out(train, self.val_images, self.split_seed)
            return {"train": rest, "val": held}
        if not tail_known:
            raise FewtokensError(
                "data.split=tail needs the order of the official archive, which class folders have lost",
                expected=f"{archive.BINARY.name} in {self.root}",
                got="class folders",
                fix="set data.split=stratified, or put the archive into data.root",
            )
        cut = len(train.targets) - self.val_images
        return {"train": train.take(torch.arange(cut)), "val": train.take(torch.arange(cut, len(train.targets)))}
