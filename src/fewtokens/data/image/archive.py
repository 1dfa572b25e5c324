"""The official CIFAR-10 archives: download with resumption, checksum, and members read by their exact names."""

import hashlib
import io
import os
import pickle
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPResponse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewtokens.errors import FewtokensError

_SIDE, _CHANNELS = 32, 3
_RECORD = 1 + _CHANNELS * _SIDE * _SIDE
_SITE = "https://www.cs.toronto.edu/~kriz/"
_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
Samples = tuple[Tensor, Tensor]


def read_binary(content: bytes) -> Samples:
    """Reads records of one label byte and 3072 pixels, channel by channel."""
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    images = torch.from_numpy(records[:, 1:].reshape(-1, _CHANNELS, _SIDE, _SIDE).copy())
    return images, torch.from_numpy(records[:, 0].astype(np.int64))


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and nothing else, although the checksum has been compared before."""

    def find_class(self, module: str, name: str) -> object:
        allowed = {"_reconstruct", "ndarray", "dtype", "encode"}
        if name in allowed and module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy", "_codecs"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in CIFAR-10")


def read_python(content: bytes) -> Samples:
    """Reads a pickled dictionary of an array `data` and a list `labels`."""
    found = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    images = torch.from_numpy(np.array(found[b"data"], np.uint8).reshape(-1, _CHANNELS, _SIDE, _SIDE))
    return images, torch.tensor(found[b"labels"], dtype=torch.int64)


@dataclass(frozen=True)
class Archive:
    """One of the published files; `md5` is the published checksum, which is compared before anything is read."""

    name: str
    md5: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    read: Callable[[bytes], Samples]

    @property
    def url(self) -> str:
        """Where the file is published."""
        return _SITE + self.name

    def verify(self, path: Path) -> None:
        """Compares the checksum.

        Raises:
            FewtokensError: If the file is not the published one.
        """
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != self.md5:
            raise FewtokensError(
                f"{self.name} is read only if it is the published file",
                expected=f"md5 {self.md5}",
                got=f"md5 {found} of {path}",
                fix=f"delete it, then set data.download=true or get {self.url} by hand",
            )

    def samples(self, path: Path) -> dict[str, Samples]:
        """The parts "train" and "test" in the archive's own order; nothing is extracted to disk.

        Raises:
            FewtokensError: If the checksum is wrong, or a member is missing or not a plain file.
        """
        self.verify(path)
        with tarfile.open(path) as tar:
            return {part: self._part(tar, members) for part, members in (("train", self.train), ("test", self.test))}

    def _part(self, tar: tarfile.TarFile, members: tuple[str, ...]) -> Samples:
        pieces = [self.read(self._member(tar, name)) for name in members]
        return torch.cat([images for images, _ in pieces]), torch.cat([targets for _, targets in pieces])

    def _member(self, tar: tarfile.TarFile, name: str) -> bytes:
        member = next((m for m in tar if m.name == name and m.isreg()), None)
        file = tar.extractfile(member) if member is not None else None
        if file is None:
            raise FewtokensError(
                f"{self.name} holds the published files",
                expected=f"the plain file {name}",
                got="no such member",
                fix=f"delete the archive and get {self.url}",
            )
        return file.read()


BINARY = Archive(
    "cifar-10-binary.tar.gz",
    "c32a1d4ab5d03f1284b67883e8d87530",
    tuple(f"cifar-10-batches-bin/{name}.bin" for name in _BATCHES),
    ("cifar-10-batches-bin/test_batch.bin",),
    read_binary,
)
PYTHON = Archive(
    "cifar-10-python.tar.gz",
    "c58f30108f718f92721af3b95e74349a",
    tuple(f"cifar-10-batches-py/{name}" for name in _BATCHES),
    ("cifar-10-batches-py/test_batch",),
    read_python,
)


def download(archive: Archive, root: Path, url: str | None = None) -> Path:
    """Fetches an archive into `root`, going on with what an earlier attempt left in `<name>.part`.

    Args:
        archive: Which file.
        root: Folder for it; made if absent.
        url: Another place that serves the same file.

    Raises:
        FewtokensError: If the network or the checksum fails.
    """
    target, part = root / archive.name, root / f"{archive.name}.part"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _fetch(url or archive.url, part)
    except OSError as error:  # URLError is one
        raise FewtokensError(
            "CIFAR-10 could not be downloaded",
            expected=f"an answer from {url or archive.url}",
            got=error,
            fix=f"try again, or put {archive.name} into {root} by hand",
        ) from error
    try:
        archive.verify(part)
    except FewtokensError:
        part.unlink()  # going on with a wrong beginning never ends well
        raise
    os.replace(part, target)
    return target


def _fetch(url: str, part: Path) -> None:
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            # A server that ignores the range sends the whole file again, with another status.
            _append(answer, part, going_on=answer.status == HTTPStatus.PARTIAL_CONTENT)
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # the part is already whole
            raise


def _append(answer: HTTPResponse, part: Path, going_on: bool) -> None:
    with part.open("ab" if going_on else "wb") as file:
        shutil.copyfileobj(answer, file, 1 << 20)
