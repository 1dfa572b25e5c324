"""Clips of the videos of one part, decoded and cut to one size in the worker."""

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
from fewtokens.data.video.reader import Reader
from fewtokens.data.video.records import UnreadableError, VideoInfo
from fewtokens.data.video.sampling import Sampling
from fewtokens.data.video.sources import Source, Unread
from fewtokens.errors import FewtokensError

_FACTS = [("frames", int), ("width", int), ("height", int), ("fps", float), ("seconds", float), ("access", "U10")]
_KNOWN = np.dtype([("facts", _FACTS), ("first", int), ("count", int), ("bytes", int)])
_MOST_TRIES = 20  # for one sample: so many broken videos in a row are no accident


class Clips(NamedTuple):
    """A batch as a worker sends it: uint8 views (B, V, T, 3, S, S), targets (B,) or (B, classes), what was not read."""

    views: UInt8[Tensor, "b v t 3 s s"]
    targets: Int64[Tensor, "b *k"]
    unread: list[Unread]


class VideoDataset(Dataset):
    """Reads whole batches by `__getitems__`; frames lie in memory with the channels last.

    Args:
        root: Folder that paths are below.
        sources: The videos.
        sampling: Says which frames and windows.
        reader: Decodes.
        seed: The run's seed: clips are drawn by (seed, epoch, index), whatever the number of workers.
        replaces: A video that cannot be read is replaced by another of its classes, drawn by the same numbers (if there
            is none that can be read, by any other); else it is left out of its batch, which may get empty.
        classes: Number of classes of multi-hot targets; None for class numbers.
    """

    def __init__(
        self,
        root: Path,
        sources: Sequence[Source],
        sampling: Sampling,
        reader: Reader,
        *,
        seed: int = 0,
        replaces: bool = False,
        classes: int | None = None,
    ) -> None:
        self.root, self.sampling, self.reader = root, sampling, reader
        self.seed, self.replaces, self.classes = seed, replaces, classes
        # Arrays, not lists: a million Python objects would be copied into every worker, one reference count at a time.
        self._paths = np.array([os.fsencode(source.path) for source in sources])
        self._ends = np.cumsum([len(source.labels) for source in sources])
        self._labels = np.array([label for source in sources for label in source.labels], np.int64)
        seconds = [(np.nan if t is None else t) for source in sources for t in (source.start, source.end)]
        self._seconds = np.array(seconds).reshape(-1, 2)
        groups: dict[tuple[int, ...], int] = {}
        self._groups = np.array([groups.setdefault(source.labels, len(groups)) for source in sources])
        known = [(astuple(s.known.facts), *s.known[1:]) for s in sources if s.known is not None]
        self._known = np.array(known, _KNOWN) if known else None
        self._broken: dict[int, str] = {}  # seen by this worker: a file that hangs must not do so in every epoch

    def __len__(self) -> int:
        return len(self._paths)

    def sampled(self, sampling: Sampling) -> "VideoDataset":
        """The same videos, sampled otherwise."""
        other = copy.copy(self)
        other.sampling = sampling
        return other

    def path(self, index: int) -> str:
        """Of a video, below the root or absolute."""
        return os.fsdecode(self._paths[index])

    def labels(self, index: int) -> Int64[np.ndarray, " k"]:
        """Of a video."""
        return self._labels[self._ends[index - 1] if index else 0 : self._ends[index]]

    def __getitems__(self, stamps: list[int]) -> Clips | FewtokensError:
        """The videos `stamp % len(self)` as epoch `stamp // len(self)` sees them; an error stands for a batch."""
        try:
            return self._batch(stamps)
        except FewtokensError as error:
            return error

    def _batch(self, stamps: list[int]) -> Clips:
        sampling, unread, indices = self.sampling, list[Unread](), list[int]()
        shape = (sampling.views, sampling.frames, sampling.side, sampling.side, 3)
        views = torch.empty(len(stamps), *shape, dtype=torch.uint8)
        for stamp in stamps:
            epoch, index = divmod(stamp, len(self))
            for tried in self._candidates(epoch, index):
                if (reason := self._read(tried, epoch, views[len(indices)].numpy())) is None:
                    indices.append(tried)
                    break
                unread.append(Unread(self.path(tried), reason))
            else:
                if self.replaces:
                    raise _in_a_row(unread[-_MOST_TRIES:])
        return Clips(views[: len(indices)].permute(0, 1, 2, 5, 3, 4), self._targets(indices), unread)

    def _candidates(self, epoch: int, index: int) -> Iterable[int]:
        """A video and, where it may be replaced, others of its classes in the order of a draw, then any others."""
        yield index
        if not self.replaces:
            return
        draws = seeding.generator(seeding.REPLACEMENT, self.seed, epoch, index)
        others = torch.randperm(len(self), generator=draws).numpy()
        others = others[others != index]
        alike = self._groups[others] == self._groups[index]
        yield from np.concatenate([others[alike], others[~alike]])[: _MOST_TRIES - 1].tolist()

    def _read(self, index: int, epoch: int, out: UInt8[np.ndarray, "v t s s 3"]) -> str | None:
        """Puts the views of a video into `out`; else the reason why not."""
        if index in self._broken:
            return self._broken[index]
        path = os.path.join(self.root, self.path(index))
        try:
            facts, first, count = self._facts(index, path)
            plan = self.sampling.plan(replace(facts, frames=count), self._draws(epoch, index))
            plan.cut(self.reader.read(path, (plan.needed() + first).tolist(), plan.short_side, facts), out)
        except UnreadableError as error:
            self._broken[index] = error.reason
            return error.reason
        except FewtokensError as error:
            raise FewtokensError(f"{path}: {error}") from error
        return None

    def _facts(self, index: int, path: str) -> tuple[VideoInfo, int, int]:
        if self._known is not None:
            facts, first, count, size = self._known[index].item()
            try:
                now = os.path.getsize(path)
            except OSError as error:
                raise UnreadableError(path, error.strerror or "no such file") from error
            if now != size:
                raise UnreadableError(path, f"it had {size} bytes when the manifest was written, now {now}")
            return VideoInfo(*facts), first, count
        facts = self.reader.facts(path)
        start, end = (None if np.isnan(t) else float(t) for t in self._seconds[index])
        return facts, *((0, facts.frames) if start is None and end is None else self.reader.span(path, start, end))

    def _draws(self, epoch: int, index: int) -> torch.Generator:
        return seeding.generator(seeding.IMAGE, self.seed, epoch, index)

    def _targets(self, indices: list[int]) -> Int64[Tensor, "b *k"]:
        if self.classes is None:
            return torch.from_numpy(np.array([self.labels(index)[0] for index in indices], np.int64))
        targets = torch.zeros(len(indices), self.classes, dtype=torch.int64)
        for row, index in zip(targets, indices, strict=True):
            row[torch.from_numpy(self.labels(index))] = 1
        return targets


def _in_a_row(unread: list[Unread]) -> FewtokensError:
    return FewtokensError(
        "A training video that cannot be read is replaced by another",
        expected="one in a row of others that can be read",
        got=f"{len(unread)} that cannot; the last is {unread[-1].path}: {unread[-1].reason}",
        fix="find all such files with python -m fewtokens.data.prepare",
    )
