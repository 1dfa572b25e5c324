"""Pictures in tar shards of WebDataset's layout, and the index of offsets by which they are read in any order.

A folder of shards holds `*.tar`, whose members are `<key>.<picture suffix>` and `<key>.cls` (the number of the class),
`classes.txt` with the names of the classes in the order of their numbers, and `index.safetensors`.
`python -m fewtokens.data.shard` writes all of them, or only the index of shards from elsewhere.
"""

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from jaxtyping import Int64, UInt8
from safetensors.numpy import save
from torch import Tensor

from fewtokens.data.image.folders import PICTURES, ClassFolders, UnreadablePictureError
from fewtokens.errors import FewtokensError, first_line, listed
from fewtokens.files import replace_file

INDEX, CLASSES = "index.safetensors", "classes.txt"
_VERSION = "1"  # increase with every change of the index
_OPEN_FILES = 256  # per process; the usual limit is 1024
_BLOCK = tarfile.BLOCKSIZE


class Sample(NamedTuple):
    """A picture in a tar file: its name and class, and where its bytes are."""

    name: str
    label: int
    offset: int
    size: int


class Shard(NamedTuple):
    """A tar file: its name, size in bytes and sha256 (of shards from elsewhere, its modification time instead)."""

    name: str
    size: int
    state: str


@dataclass(frozen=True)
class Shards(ClassFolders):
    """The pictures of one part of a data set in tar files. The order is that of the folders they were made from.

    Attributes:
        spans: Number of the shard, offset and size in bytes of each picture.
        shards: The tar files in `root`.
    """

    spans: Int64[np.ndarray, "n 3"]
    shards: Sequence[Shard]

    def path(self, index: int) -> Path:
        """Return the name of picture `index` for messages: the tar file, and the name of the original file."""
        return self.root / self.shards[self.spans[index, 0]].name / os.fsdecode(self.files[index])

    def read(self, index: int) -> UInt8[Tensor, " bytes"]:
        """Return the content of picture `index`.

        Raises:
            UnreadablePictureError: The tar file is missing, unreadable or too short.
        """
        number, offset, size = self.spans[index].tolist()
        try:
            return torch.from_numpy(_read(self.root / self.shards[number].name, self.shards[number], offset, size))
        except OSError as error:
            raise UnreadablePictureError(str(self.path(index)), error.strerror or str(error)) from error

    def take(self, indices: Int64[Tensor, " k"]) -> "Shards":
        """Return the pictures with these indices."""
        chosen = indices.numpy()
        return replace(self, files=self.files[chosen], targets=self.targets[indices], spans=self.spans[chosen])

    def check(self) -> None:
        """Compare the index with the sizes of the tar files and with the first and last header of each.

        Raises:
            FewtokensError: A tar file is missing, truncated, not in the index or another one than it describes.
        """
        added = sorted({path.name for path in self.root.glob("*.tar")} - {shard.name for shard in self.shards})
        if added:
            raise FewtokensError(
                f"The folder {self.root} has tar files that its {INDEX} does not know: {listed(added)}. Remove them, "
                f"or index the folder again: python -m fewtokens.data.shard --index {self.root}"
            )
        order = np.lexsort((self.spans[:, 1], self.spans[:, 0]))
        ends = np.searchsorted(self.spans[order, 0], np.arange(len(self.shards) + 1))
        for shard, first, end in zip(self.shards, ends, ends[1:], strict=False):
            path = self.root / shard.name
            try:
                found = path.stat().st_size
                problem = f"has {found} bytes in place of {shard.size}" if found != shard.size else ""
                for _, offset, size in self.spans[order[[first, end - 1]]].tolist() if first < end else ():
                    if (
                        not problem
                        and tarfile.TarInfo.frombuf(
                            _read(path, shard, offset - _BLOCK, _BLOCK).tobytes(), "utf-8", "replace"
                        ).size
                        != size
                    ):
                        problem = f"has no picture of {size} bytes at {offset}"
            except (OSError, tarfile.HeaderError) as error:
                problem = f"cannot be used ({getattr(error, 'strerror', None) or error})"
            if problem:
                raise FewtokensError(
                    f"The shard {path} {problem}, so that it does not fit {INDEX} in its folder. Replace it with an "
                    f"intact copy, or index the folder again: python -m fewtokens.data.shard --index {self.root}"
                )


@lru_cache(_OPEN_FILES)
def _opened(path: Path, shard: Shard) -> FileIO:  # the state in `shard` tells a file that was written again
    return FileIO(path)


def _read(path: Path, shard: Shard, offset: int, size: int) -> UInt8[np.ndarray, " size"]:
    # Unlike seek and read, this can be used by processes that share the file.
    content = bytearray(os.pread(_opened(path, shard).fileno(), size, offset))
    if len(content) != size:
        raise OSError("the tar file is truncated")
    return np.frombuffer(content, np.uint8)


def load(root: Path) -> Shards:
    """Read the index of a folder of shards, and check that it fits them.

    Raises:
        FewtokensError: There is no intact index, or it does not fit.
    """
    with _opened_index(root) as (file, metadata):
        names, targets, spans = (file.get_tensor(name) for name in ("names", "targets", "spans"))
        classes, shards = json.loads(metadata["classes"]), [Shard(*values) for values in json.loads(metadata["shards"])]
        count = len(targets)
        if (names.ndim, len(names), targets.shape, spans.shape) != (2, count, (count,), (count, 3)):
            raise ValueError("its tensors do not fit together")
        for column, limit in ((targets, len(classes)), (spans[:, 0], len(shards))):
            if count == 0 or column.min() < 0 or column.max() >= limit:
                raise ValueError("it has numbers out of range")
        files = names.view(f"S{names.shape[1]}")[:, 0]
        found = Shards(root, classes, files, torch.from_numpy(targets), spans, shards)
    found.check()
    return found


def class_names(root: Path) -> list[str]:
    """Return the names of the classes in the index of a folder of shards.

    Raises:
        FewtokensError: There is no intact index.
    """
    with _opened_index(root) as (_, metadata):
        return list(json.loads(metadata["classes"]))


@contextmanager
def _opened_index(root: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """Return a context with the index of a folder of shards and its metadata, in which errors are those of the index.

    Raises:
        FewtokensError: There is no intact index.
    """
    try:
        with safetensors.safe_open(root / INDEX, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("version") != _VERSION:
                raise ValueError("it was written by another version")
            yield file, metadata
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        missing = not (root / INDEX).exists()
        problem = "has no index" if missing else f"has an index that cannot be read ({first_line(error)})"
        raise FewtokensError(
            f"The folder of shards {root} {problem}. Write it with: python -m fewtokens.data.shard --index {root}"
        ) from error


def read_classes(path: Path) -> list[str]:
    """Return the names in a `classes.txt`. They may have any characters but line feeds."""
    return [name.removesuffix("\r") for name in os.fsdecode(path.read_bytes()).removesuffix("\n").split("\n")]


def save_index(root: Path, classes: Sequence[str], shards: Sequence[tuple[Shard, Sequence[Sample]]]) -> None:
    """Write the index of a folder of shards, with the pictures sorted by class and name.

    Raises:
        FewtokensError: There is no picture, or the index cannot be written.
    """
    rows = sorted((s.label, s.name, k, s.offset, s.size) for k, (_, samples) in enumerate(shards) for s in samples)
    if not rows:
        raise FewtokensError(
            f"There is no picture in the tar files of {root}; expected members <key>{PICTURES[0]} and <key>.cls."
        )
    names = np.array([os.fsencode(name) for _, name, *_ in rows])
    tensors = {
        "names": names.view(np.uint8).reshape(len(rows), -1),
        "targets": np.array([row[0] for row in rows]),
        "spans": np.array([row[2:] for row in rows]),
    }
    lists = {"classes": list(classes), "shards": [shard for shard, _ in shards]}
    with replace_file(root / INDEX, "wb") as file:
        file.write(save(tensors, {"version": _VERSION} | {name: json.dumps(x) for name, x in lists.items()}))


def scan_tar(path: Path) -> tuple[Shard, list[Sample]]:
    """Find the pictures of a tar file and their classes.

    Raises:
        FewtokensError: The file is incomplete or no tar file, or pictures and classes do not belong together.
    """
    pictures, labels = dict[str, tuple[str, int, int]](), dict[str, int]()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                key, _, suffix = base.partition(".")  # WebDataset's rule: a key ends at the first dot of the base name
                key, is_picture = f"{folder}/{key}", f".{suffix.lower()}".endswith(PICTURES)
                if member.isdir() or not (is_picture or suffix == "cls"):
                    continue
                if not member.isreg() or key in (pictures if is_picture else labels):
                    raise ValueError(f"{member.name} is {'no file' if not member.isreg() else 'there twice'}")
                if is_picture:
                    pictures[key] = member.name, member.offset_data, member.size
                else:
                    labels[key] = _label(tar, member)
            _check_end(path, tar.offset)
        state = path.stat()
        if alone := labels.keys() ^ pictures.keys():
            raise ValueError(f"{min(alone)} has {'no class' if min(alone) in pictures else 'no picture'}")
        found = [Sample(name, labels[key], *span) for key, (name, *span) in pictures.items()]
    except (OSError, tarfile.TarError, ValueError) as error:
        raise FewtokensError(
            f"Cannot index {path}: {first_line(error)}. Expected a complete tar file with members <key>{PICTURES[0]} "
            "and <key>.cls, which holds the number of the class. Replace it with an intact copy, or remove it."
        ) from error
    return Shard(path.name, state.st_size, str(state.st_mtime_ns)), found


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    file = tar.extractfile(member)
    label = int(file.read()) if file else -1
    if label < 0:
        raise ValueError(f"{member.name} is no number >= 0")
    return label


def _check_end(path: Path, end: int) -> None:
    """Raise an error if there are other bytes than zeros behind the last member, where tarfile stops silently."""
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read(64 * _BLOCK)
    if len(rest) < _BLOCK:
        raise ValueError("it is truncated")
    if rest.strip(b"\0"):
        raise ValueError(f"it is damaged at byte {end}, or several files one after the other")
