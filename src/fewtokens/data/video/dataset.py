"""Map-style dataset of one part: clips that are decoded and cropped to one size in the worker."""

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from fewtokens.data import seeding
from fewtokens.data.skipped import Skipped
from fewtokens.data.unreadable import MAX_TRIES, UnreadableInARowError, candidates
from fewtokens.data.video.manifest import ManifestRow
from fewtokens.data.video.reader import Reader
from fewtokens.data.video.records import UnreadableError, Video, VideoInfo
from fewtokens.data.video.sampling import Sampling
from fewtokens.errors import FewtokensError

_INFO = [("frames", int), ("width", int), ("height", int), ("fps", float), ("seconds", float), ("access", "U10")]
_ROW = np.dtype([("info", _INFO), ("first", int), ("count", int), ("bytes", int)])


class Clips(NamedTuple):
    """A batch as a worker sends it.

    Attributes:
        views: uint8 pixels, shape (B, V, T, 3, S, S).
        targets: Class numbers (B,), or 0 and 1 per class (B, classes).
        skipped: The videos that could not be read.
    """

    views: UInt8[Tensor, "b v t 3 s s"]
    targets: Int64[Tensor, "b *k"]
    skipped: list[Skipped]


class VideoDataset(Dataset):
    """Reads whole batches with `__getitems__`. In memory the channels are the last axis of the frames.

    In training, a video that cannot be read is replaced by another one of the same classes, chosen at random, or of any
    classes if none of those can be read; the choice depends on (seed, epoch, index) only. In evaluation it is dropped
    from its batch, which may become empty.

    Args:
        root: Folder to which paths are relative.
        videos: The videos. With manifest rows, no file is examined again.
        sampling: Chooses the frames and the crops.
        reader: Decodes the frames.
        part: "train", "val" or "test".
        seed: Seed of the run. Clips depend on (seed, epoch, index), not on the number of workers.
        classes: Number of classes of multi-hot targets; None for class numbers.
    """

    def __init__(
        self,
        root: Path,
        videos: Sequence[Video | ManifestRow],
        sampling: Sampling,
        reader: Reader,
        *,
        part: str = "test",
        seed: int = 0,
        classes: int | None = None,
    ) -> None:
        self.root, self.sampling, self.reader = root, sampling, reader
        self.part, self.seed, self.classes = part, seed, classes
        rows = [row for row in videos if isinstance(row, ManifestRow)]
        listed = [video.video if isinstance(video, ManifestRow) else video for video in videos]
        # Arrays, not lists: worker processes would copy a million Python objects, as reading one changes its reference
        # count.
        self._paths = np.array([os.fsencode(video.path) for video in listed])
        self._ends = np.cumsum([len(video.labels) for video in listed])
        self._labels = np.array([label for video in listed for label in video.labels], np.int64)
        seconds = [(np.nan if t is None else t) for video in listed for t in (video.start, video.end)]
        self._seconds = np.array(seconds).reshape(-1, 2)
        groups: dict[tuple[int | str, ...], int] = {}
        self._groups = np.array([groups.setdefault(video.labels, len(groups)) for video in listed])
        known = [(astuple(r.info), r.first, r.count, r.bytes) for r in rows if r.info is not None]
        self._rows = np.array(known, _ROW) if known else None
        self._unreadable: dict[int, str] = {}  # per worker: a file that times out must not do so in every epoch

    def __len__(self) -> int:
        return len(self._paths)

    def with_sampling(self, sampling: Sampling) -> "VideoDataset":
        """Return a dataset of the same videos with another sampling."""
        other = copy.copy(self)
        other.sampling = sampling
        return other

    def path(self, index: int) -> str:
        """Return the path of video `index`, relative to the root or absolute."""
        return os.fsdecode(self._paths[index])

    def labels(self, index: int) -> Int64[np.ndarray, " k"]:
        """Return the class numbers of video `index`."""
        return self._labels[self._ends[index - 1] if index else 0 : self._ends[index]]

    def __getitems__(self, stamps: list[int]) -> Clips | FewtokensError:
        """Return clips of the videos `stamp % len(self)` for epoch `stamp // len(self)`.

        An error is returned instead of raised; the loader raises it (see `Loader`).
        """
        try:
            return self._batch(stamps)
        except FewtokensError as error:
            return error

    def _batch(self, stamps: list[int]) -> Clips:
        sampling, skipped, indices = self.sampling, list[Skipped](), list[int]()
        shape = (sampling.views, sampling.frames, sampling.side, sampling.side, 3)
        views = torch.empty(len(stamps), *shape, dtype=torch.uint8)
        for stamp in stamps:
            epoch, index = divmod(stamp, len(self))
            for candidate in self._candidates(epoch, index):
                if (reason := self._read(candidate, epoch, views[len(indices)].numpy())) is None:
                    indices.append(candidate)
                    break
                skipped.append(Skipped(self.part, self.path(candidate), reason))
            else:
                if self.part == "train":
                    raise UnreadableInARowError(
                        skipped[-MAX_TRIES:],
                        "videos",
                        "Find all unreadable files with `python -m fewtokens.data.prepare`",
                    )
        return Clips(views[: len(indices)].permute(0, 1, 2, 5, 3, 4), self._targets(indices), skipped)

    def _candidates(self, epoch: int, index: int) -> Iterable[int]:
        """Yield a video and, in training, others in random order: first those with the same classes, then the rest."""
        if self.part != "train":
            yield index
            return
        yield from candidates(self._groups, self.seed, epoch, index)

    def _read(self, index: int, epoch: int, out: UInt8[np.ndarray, "v t s s 3"]) -> str | None:
        """Write the views of a video to `out`; return the reason if it cannot be read."""
        if index in self._unreadable:
            return self._unreadable[index]
        path = os.path.join(self.root, self.path(index))
        try:
            info, first, count = self._info(index, path)
            plan = self.sampling.plan(replace(info, frames=count), self._draws(epoch, index))
            plan.cut(self.reader.read(path, (plan.needed() + first).tolist(), plan.short_side, info), out)
        except UnreadableError as error:
            self._unreadable[index] = error.reason
            return error.reason
        except FewtokensError as error:
            raise FewtokensError(f"{path}: {error}") from error
        return None

    def _info(self, index: int, path: str) -> tuple[VideoInfo, int, int]:
        """Return the properties of a file, the first frame of the section, and the number of its frames."""
        if self._rows is not None:
            info, first, count, size = self._rows[index].item()
            try:
                now = os.path.getsize(path)
            except OSError as error:
                raise UnreadableError(path, error.strerror or "no such file") from error
            if now != size:
                raise UnreadableError(path, f"it had {size} bytes when the manifest was written, now {now}")
            return VideoInfo(*info), first, count
        found = self.reader.video_info(path)
        start, end = (None if np.isnan(t) else float(t) for t in self._seconds[index])
        if start is None and end is None:
            return found, 0, found.frames
        return found, *self.reader.frame_range(path, start, end)

    def _draws(self, epoch: int, index: int) -> torch.Generator:
        return seeding.generator(seeding.IMAGE, self.seed, epoch, index)

    def _targets(self, indices: list[int]) -> Int64[Tensor, "b *k"]:
        if self.classes is None:
            return torch.from_numpy(np.array([self.labels(index)[0] for index in indices], np.int64))
        targets = torch.zeros(len(indices), self.classes, dtype=torch.int64)
        for row, index in zip(targets, indices, strict=True):
            row[torch.from_numpy(self.labels(index))] = 1
        return targets
