"""CIFAR-10, from the official archive or from class folders."""

import contextlib
import http.client
import os
import socket
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Unpack

import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_url

from fewtokens.data.cache import Tensors, cached
from fewtokens.data.datamodule import Common, Part
from fewtokens.data.image import folders
from fewtokens.data.image.in_memory import InMemory, Samples, check_held_out, hold_out
from fewtokens.errors import FewtokensError, check, check_choice

_CACHE = ".fewtokens-cache.safetensors"
_PATIENCE = 20.0  # seconds until a silent server counts as unreachable
Source = Literal["extracted", "archive", "folders"]
# Of the official archive, in the order of the class numbers.
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def find_source(root: Path) -> Source | None:
    """Return what `root` contains, in this order of preference; None if it contains no CIFAR-10.

    "extracted" is the extracted archive, `cifar-10-batches-py/`; "archive" is `cifar-10-python.tar.gz`; "folders" are
    class folders.
    """
    if (root / CIFAR10.base_folder).is_dir():
        return "extracted"
    if (root / CIFAR10.filename).is_file():
        return "archive"
    return "folders" if (root / "train").is_dir() else None


class Cifar10(InMemory):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images of 32 x 32 pixels in ten classes.

    The images are read from what `find_source` finds in `root`: the official archive, verified by its published
    checksum before it is opened, or class folders `train/<class>/*` and `test/<class>/*` with any pictures of one size.
    The attribute `description` says which it was. The decoded images are kept in a cache file in `root`.

    Args:
        root: Folder of the data.
        val_images: Training images held out for validation; 0 trains on all, without validation.
        split: "stratified" holds out a random part of every class; "tail" holds out the last images in the order of the
            official archive, as the `validation_split` of Keras does.
        split_seed: Chooses the stratified part. Independent of the run's seed.
        download: Download the archive if `root` contains no intact source.
        **common: See `DataModule`.

    Raises:
        FewtokensError: The data are missing or damaged, or do not fit the settings.
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
        check_choice("data.split", split, ("stratified", "tail"))
        check(val_images >= 0, "data.val_images", "an int >= 0", val_images)  # `read` checks the upper end
        source = find_source(self.root)
        if source == "folders":
            self._check_classes(folders.class_names(self.root / "train"))
        self._describe(source)

    def read(self) -> dict[Part, Samples]:
        """Decode the images, or read the cache, and split the training images."""
        source = find_source(self.root)
        if self.download and (source is None or (source == "archive" and not self._archive_is_intact())):
            self._download()
            source = "archive"
        if source is None:
            raise FewtokensError(f"There is no CIFAR-10 in {self.root}{self._why_not()}. {self._advice()}.")
        self._describe(source)
        tensors = self._from_folders() if source == "folders" else self._from_archive(source)
        train = Samples(tensors["train.images"], tensors["train.targets"])
        test = Samples(tensors["test.images"], tensors["test.targets"])
        return self._split(train, order_known=source != "folders") | {"test": test}

    def _why_not(self) -> str:
        if not self.root.is_dir():
            return ", which does not exist"
        binary = "cifar-10-binary.tar.gz"
        return f": {binary} is not supported, only {CIFAR10.filename}" if (self.root / binary).exists() else ""

    def _advice(self) -> str:
        return (
            f"Set `data.download=true`, or save {CIFAR10.url} in {self.root}, or store pictures as "
            f"{self.root}/train/<class>/*.png and {self.root}/test/<class>/*.png"
        )

    def _describe(self, source: Source | None) -> None:
        where = f"class folders at {self.root}" if source == "folders" else "official archive"
        self.description = f"CIFAR-10 ({where})"
        self.class_names = folders.class_names(self.root / "train") if source == "folders" else CLASSES

    def _check_classes(self, classes: list[str]) -> None:
        expected = f"{len(classes)}, the number of class folders in {self.root / 'train'}"
        check(len(classes) == self.num_classes, "data.num_classes", expected, self.num_classes)

    def _archive_is_intact(self) -> bool:
        return check_integrity(self.root / CIFAR10.filename, CIFAR10.tgz_md5)

    def _download(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            # In a folder of its own, so that the archive appears complete or not at all, also with several machines.
            with tempfile.TemporaryDirectory(dir=self.root, prefix=".download-") as folder, _timeout(_PATIENCE):
                download_url(CIFAR10.url, folder, CIFAR10.filename, CIFAR10.tgz_md5)
                os.replace(Path(folder, CIFAR10.filename), self.root / CIFAR10.filename)
        except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: the checksum is wrong
            raise FewtokensError(
                f"Cannot download CIFAR-10 from {CIFAR10.url}: {error}. Try again, or save the file in {self.root}."
            ) from error

    def _from_archive(self, source: Source) -> Tensors:
        path = self.root / (CIFAR10.filename if source == "archive" else CIFAR10.base_folder)

        def build() -> Tensors:
            if source == "extracted":
                return _decode(self.root)
            if not self._archive_is_intact():
                raise RuntimeError("its checksum is not the published one")
            with tempfile.TemporaryDirectory() as folder:
                with tarfile.open(path) as archive:  # torchvision 0.26 extracts without the filter
                    archive.extractall(folder, filter="data")  # refuses members outside of the folder
                return _decode(Path(folder))

        files = [path] if source == "archive" else sorted(path.iterdir())
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        try:
            return cached(self.root / _CACHE, f"{CIFAR10.tgz_md5} {stats}", build)
        except (OSError, RuntimeError, tarfile.TarError) as error:
            raise FewtokensError(
                f"Cannot read CIFAR-10 from {path}: {error}. If it is damaged, delete it, and set `data.download=true` "
                f"or save {CIFAR10.url} in {self.root}."
            ) from error

    def _from_folders(self) -> Tensors:
        parts = {part: folders.scan(self.root / part, self._advice()) for part in ("train", "test")}
        self._check_classes(parts["train"].classes)
        different = sorted(set(parts["train"].classes) ^ set(parts["test"].classes))
        if different:
            raise FewtokensError(
                f"{self.root / 'train'} and {self.root / 'test'} must contain the same class folders, but "
                f"only one of them contains {', '.join(different)}. Add or remove folders."
            )

        def build() -> Tensors:
            images = {f"{part}.images": folders.decode_all(found) for part, found in parts.items()}
            return images | {f"{part}.targets": found.targets for part, found in parts.items()}

        return cached(self.root / _CACHE, " ".join(found.fingerprint() for found in parts.values()), build)

    def _split(self, train: Samples, order_known: bool) -> dict[Part, Samples]:
        check_held_out(self.val_images, len(train.targets))
        if self.val_images == 0:
            return {"train": train}
        if self.split == "stratified":
            rest, held = hold_out(train, self.val_images, self.split_seed)
            return {"train": rest, "val": held}
        if not order_known:
            raise FewtokensError(
                f"`data.split=tail` needs the order of the official archive, which the class folders in {self.root} "
                f"have lost. Set `data.split=stratified`, or save {CIFAR10.url} there."
            )
        cut = len(train.targets) - self.val_images
        return {"train": train.take(torch.arange(cut)), "val": train.take(torch.arange(cut, len(train.targets)))}


def _decode(root: Path) -> Tensors:
    """Read the extracted archive. torchvision compares the checksums of all files before it unpickles the first."""
    tensors = {}
    for part in ("train", "test"):
        data = CIFAR10(root, train=part == "train")
        tensors[f"{part}.images"] = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        tensors[f"{part}.targets"] = torch.tensor(data.targets)
    return tensors


@contextlib.contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Limit how long sockets wait in this block. torchvision's download has no timeout of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
