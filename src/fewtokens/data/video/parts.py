"""The videos of a part of a data set: from a list or a manifest, with numbered classes, and with those skipped."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fewtokens.data.image import folders
from fewtokens.data.skipped import Skipped
from fewtokens.data.video import annotations, manifest
from fewtokens.data.video.annotations import SOURCES_HELP, VIDEO_SUFFIXES
from fewtokens.data.video.manifest import ManifestRow
from fewtokens.data.video.records import Video
from fewtokens.errors import FewtokensError, listed


def read_part(
    root: Path,
    source: str,
    part: str,
    num_classes: int,
    *,
    multilabel: bool = False,
    classes: Sequence[str] | None = None,
) -> tuple[Sequence[Video | ManifestRow], list[Skipped]]:
    """Read the manifest or the list of a part.

    Args:
        root: Folder that contains the videos.
        source: Manifest, or any list that `list_videos` reads; relative to the root or absolute.
        part: "train", "val" or "test", for the records of skipped videos.
        num_classes: Number of classes; all class numbers must be below it.
        multilabel: Whether a video may have any number of classes.
        classes: All class names in the order of their numbers; see `list_videos`.

    Returns:
        The videos, as rows if they come from a manifest, and the listed videos that are skipped from the start.

    Raises:
        FewtokensError: The source cannot be read, labels are invalid, or no video remains.
    """
    path, rows = root / source, list[ManifestRow]()
    if is_manifest(path):
        rows = manifest.read(path)
        videos = [row.video for row in rows if row.reason is None]
        skipped = [Skipped(part, r.video.path, f"skipped by the manifest: {r.reason}") for r in rows if r.reason]
    else:
        videos, missing = list_videos(root, source, multilabel=multilabel, classes=classes)
        skipped = [Skipped(part, video.path, "there is no such file") for video in missing]
    _check_labels(path, videos, num_classes, multilabel)
    if not videos:
        example = f", such as {skipped[0].path}: {skipped[0].reason}" if skipped else ""
        reason = f"no video that can be used, and {len(skipped)} that are skipped{example}"
        raise FewtokensError(f"{path} lists {reason}. Check `data.root`, which is {root}. {SOURCES_HELP}.")
    return [row for row in rows if row.reason is None] or videos, skipped


def list_videos(
    root: Path, source: str, *, multilabel: bool = False, classes: Sequence[str] | None = None
) -> tuple[list[Video], list[Video]]:
    """Read a list in any format except a manifest, number the classes, and find the files of official annotations.

    Args:
        root: Folder to which paths are relative, and in which the videos of official annotations are searched.
        source: List, relative to `root` or absolute: a folder with one folder per class; lines `path label`,
            `path label start end` or, with `multilabel`, `path label label ...`; csv with a header line; csv or json of
            Kinetics (label, youtube_id, time_start, time_end); csv of Charades (id, actions); json of AViD (file to
            class).
        multilabel: Whether a video may have any number of classes.
        classes: All class names in the order of their numbers. None: the names in the list, sorted. Blanks and
            underscores in names are the same.

    Returns:
        The videos with class numbers, and those of official annotations whose files do not exist, with their ids as
        paths.

    Raises:
        FewtokensError: The source is missing, has no known format, or names an unknown class.
    """
    path = root / source
    videos, by_id = annotations.parse(path, root, multilabel)
    numbers = {_normalized(name): number for number, name in enumerate(classes or _names(videos))}
    videos = [video._replace(labels=tuple(_number(x, numbers, video, path) for x in video.labels)) for video in videos]
    if not by_id:
        return videos, []
    files = _Files(root)
    found = [files.find(video) for video in videos]
    present = [video for video in found if video is not None]
    return present, [video for video, file in zip(videos, found, strict=True) if file is None]


def class_names(root: Path, source: str, multilabel: bool) -> list[str]:
    """Return the class names of a list in the order of their numbers; an empty list if classes are numbers.

    Those of class folders are found without opening the folders, and those of a manifest stand in its summary.
    """
    path = root / source
    if path.is_dir():
        return sorted(map(_normalized, folders.class_names(path)))
    if is_manifest(path):
        return manifest.class_names(path)
    return _names(annotations.parse(path, root, multilabel)[0])


def ordered_class_names(
    root: Path, file: str | None, sources: Iterable[str | None], num_classes: int, multilabel: bool
) -> list[str]:
    """Return all class names in the order of their numbers; an empty list if classes are numbers.

    Args:
        root: Folder that contains the videos.
        file: File of class names (`data.classes`). None: the names of the first of `sources` that exists, sorted; those
            of a manifest stand in its summary.
        sources: Lists of videos, relative to the root or absolute.
        num_classes: Number of classes that is expected.
        multilabel: Whether a video may have any number of classes.

    Raises:
        FewtokensError: The number of names differs from `num_classes`.
    """
    named = [s for s in sources if s is not None and (root / s).exists()]
    named = [s for s in named if not is_manifest(root / s) or manifest.class_names(root / s)]
    if file is not None:
        names, origin = read_classes(root / file), root / file
    elif named:
        names, origin = class_names(root, named[0], multilabel), root / named[0]
    else:
        return []
    if names and len(names) != num_classes:
        raise FewtokensError(
            f"`data.num_classes` is {num_classes}, but {origin} has {len(names)} class names. Set "
            f"data.num_classes={len(names)}, or list all names in their order in a file: data.classes=<file>."
        )
    return names


def check_same_classes(root: Path, sources: Mapping[str, str | None], names: Sequence[str]) -> None:
    """Raise an error if a manifest was written with other class names, since its labels would be wrong.

    A manifest contains class numbers, in the order of the names that `prepare` knew, which its summary lists. If there
    is no summary, or if the list had numbers, there is nothing to compare.

    Args:
        root: Folder that contains the videos.
        sources: The list of each part, relative to the root or absolute.
        names: All class names in the order of their numbers.

    Raises:
        FewtokensError: The names of a manifest differ.
    """
    expected = [*map(_normalized, names)]
    for part, source in sources.items():
        path = root / (source or "")
        found = [*map(_normalized, manifest.class_names(path))] if source is not None and is_manifest(path) else []
        if found and expected and found != expected:
            missing, more = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
            lacks = [f"lacks {listed(missing)}"] if missing else []
            lacks += [f"has {listed(more)}, which the others lack"] if more else []
            raise FewtokensError(
                f"The manifest {path} of the {part} part numbers {len(found)} classes differently from the "
                f"{len(expected)} classes of this data set: it {' and '.join(lacks) or 'has another order'}. Write the "
                "manifests of all parts again with the same `python -m fewtokens.data.prepare --classes <file>`, where "
                "the file names all classes."
            )


def read_classes(path: Path) -> list[str]:
    """Read class names in the order of their numbers: one per line, csv with id and name, or json (list or name: id).

    Raises:
        FewtokensError: The file cannot be read, or the numbers are not 0, 1, 2 ...
    """
    if path.suffix.lower() == ".json":
        content = annotations.read_json(path)
        if not isinstance(content, list | dict):
            raise FewtokensError(f"{path} must be a json list of class names or map names to numbers, got {content}.")
        pairs = list(enumerate(content)) if isinstance(content, list) else [(i, name) for name, i in content.items()]
    else:
        lines = annotations.read_lines(path)
        if annotations.header_fields(lines) == ["id", "name"]:
            pairs = [(row["id"], row["name"]) for _, row in annotations.read_rows(lines)]
        else:
            pairs = [(i, line) for i, (_, line) in enumerate(lines.numbered)]
    by_number = {int(number): str(name) for number, name in pairs if str(number).strip().isdecimal()}
    if sorted(by_number) != list(range(len(pairs))):
        raise FewtokensError(
            f"The classes in {path} must be numbered 0, 1, 2 ..., got {len(by_number)} numbers for {len(pairs)} names. "
            "Correct the file that `data.classes` names: one name per line, csv with the columns id and name, or json."
        )
    return [by_number[number] for number in range(len(pairs))]


def is_manifest(path: Path) -> bool:
    """Return whether a file was written by `python -m fewtokens.data.prepare`."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.readline().rstrip() == manifest.HEADER.encode()


class _Files:
    """The video files below a folder by name. One walk finds them all; a look-up per video would take hours."""

    def __init__(self, root: Path) -> None:
        self.by_stem: dict[str | None, list[str]] = defaultdict(list)
        for folder, subfolders, files in os.walk(root, followlinks=True):
            subfolders.sort()
            for name in sorted(files):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in VIDEO_SUFFIXES:
                    self.by_stem[stem].append(os.path.relpath(os.path.join(folder, name), root))

    def find(self, video: Video) -> Video | None:
        """Return the video with the path of its file, which holds the section (`<id>_<start>_<end>`) or everything."""
        stem = os.path.splitext(video.path)[0] if video.path.lower().endswith(VIDEO_SUFFIXES) else video.path
        start, end = video.start, video.end
        section = None if start is None or end is None else f"{stem}_{round(start):06d}_{round(end):06d}"
        if section in self.by_stem:
            return Video(self.by_stem[section][0], video.labels)
        paths = self.by_stem.get(stem)
        return video._replace(path=paths[0]) if paths else None


def _names(videos: Sequence[Video]) -> list[str]:
    return sorted({_normalized(label) for video in videos for label in video.labels if isinstance(label, str)})


def _normalized(name: str) -> str:
    return name.strip().strip('"').replace("_", " ")


def _number(label: int | str, numbers: dict[str, int], video: Video, path: Path) -> int:
    if isinstance(label, int):
        return label
    if (number := numbers.get(_normalized(label))) is None:
        raise FewtokensError(
            f"{path} gives the unknown class {label!r} to {video.path}. Known are {len(numbers)} names, such as "
            f"{next(iter(numbers), 'none')!r}. Correct the name, or list all names in order: data.classes=<file>."
        )
    return number


def _check_labels(path: Path, videos: Sequence[Video], num_classes: int, multilabel: bool) -> None:
    for video in videos:
        if not multilabel and len(video.labels) != 1:
            raise FewtokensError(
                f"{path} gives {len(video.labels)} labels to {video.path}, but a video has exactly one class. For "
                "several, set data.multilabel=true task=multilabel."
            )
        if (largest := max(map(int, video.labels), default=0)) >= num_classes:
            raise FewtokensError(
                f"{path} gives the class {largest} to {video.path}, but classes must be numbers below "
                f"data.num_classes={num_classes}. Correct the list or `data.num_classes`."
            )
