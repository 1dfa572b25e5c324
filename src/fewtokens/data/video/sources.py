"""The videos of a part as the data set takes them: from a manifest or any list, with what they leave out."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fewtokens.data.video import annotations, lists, manifest
from fewtokens.data.video.records import VideoInfo
from fewtokens.errors import FewtokensError


class Known(NamedTuple):
    """What a manifest knows of a file: its facts, the first frame that counts, how many do, its size in bytes."""

    facts: VideoInfo
    first: int
    frames: int
    size: int


class Source(NamedTuple):
    """One video: path below the root, classes, seconds that count; known for all of a manifest, and for no others."""

    path: str
    labels: tuple[int, ...]
    start: float | None = None
    end: float | None = None
    known: Known | None = None


class Unread(NamedTuple):
    """A video that is not read, and why."""

    path: str
    reason: str


class Sources(NamedTuple):
    """The videos of a part, and those that are listed and left out from the beginning."""

    videos: list[Source]
    left_out: list[Unread]


def read(
    root: Path, source: str, num_classes: int, *, several: bool = False, classes: Sequence[str] | None = None
) -> Sources:
    """Reads a manifest, or what `annotations.listing` reads.

    Args:
        root: Folder that paths are below.
        source: Below the root or absolute.
        num_classes: Compared with the classes.
        several: Whether a video may have any number of classes.
        classes: All class names in the order of their numbers.

    Raises:
        FewtokensError: The source does not fit, or nothing is left.
    """
    path = root / source
    if is_manifest(path):
        rows = manifest.read(path)
        good = [row for row in rows if row.facts is not None]
        videos = [Source(r.path, r.labels, known=Known(r.facts, r.first, r.count, r.bytes)) for r in good if r.facts]
        left_out = [Unread(row.path, f"refused by the manifest: {row.reason}") for row in rows if row.reason]
    else:
        listing = annotations.listing(root, source, several=several, classes=classes)
        videos = [Source(*entry) for entry in listing.entries]
        left_out = [Unread(entry.path, "there is no such file") for entry in listing.absent]
    if not videos:
        raise FewtokensError(
            "A part has videos",
            expected="one at least",
            got=f"none of {len(left_out)} that {path} lists" + (f"; the first: {left_out[0]}" if left_out else ""),
            fix=f"look at data.root={root}; {lists.LAYOUT}",
        )
    _check(path, videos, num_classes, several)
    return Sources(videos, left_out)


def class_names(
    root: Path, file: str | None, sources: Iterable[str | None], num_classes: int, several: bool
) -> list[str]:
    """All class names: from a file or from the first source that is there and has names; empty if classes are numbers.

    Raises:
        FewtokensError: There are not `num_classes`.
    """
    where = (source for source in sources if source is not None)
    there = next((source for source in where if (root / source).exists() and not is_manifest(root / source)), None)
    if file is not None:
        names, origin = annotations.read_classes(root / file), root / file
    elif there is not None:
        names, origin = annotations.class_names(root, there, several), root / there
    else:
        return []
    if names and len(names) != num_classes:
        raise FewtokensError(
            "data.num_classes is the number of classes",
            expected=f"{num_classes} names",
            got=f"{len(names)} in {origin}",
            fix=f"set data.num_classes={len(names)}, or give all names in their order: data.classes=<file>",
        )
    return names


def is_manifest(path: Path) -> bool:
    """Whether a file was written by `python -m fewtokens.data.prepare`."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.readline().rstrip() == manifest.HEADER.encode()


def _check(path: Path, videos: list[Source], num_classes: int, several: bool) -> None:
    for video in videos:
        if not several and len(video.labels) != 1:
            raise FewtokensError(
                "A video has one class, unless data.multilabel=true",
                expected="one label",
                got=f"{len(video.labels)} labels of {video.path} in {path}",
                fix="set data.multilabel=true task=multilabel, or mend the list",
            )
        if max(video.labels, default=0) >= num_classes:
            raise FewtokensError(
                "Classes are numbered from 0",
                expected=f"numbers below data.num_classes={num_classes}",
                got=f"{max(video.labels)} of {video.path} in {path}",
                fix="set data.num_classes, or mend the list",
            )
