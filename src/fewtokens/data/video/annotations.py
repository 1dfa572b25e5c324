"""Official annotations, which name videos by an id, and the one way from any list to a `Listing`."""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from fewtokens.data.image import folders
from fewtokens.data.video import lists
from fewtokens.data.video.lists import LAYOUT, VIDEOS, Entry, Lines, Listing, Named
from fewtokens.errors import FewtokensError


def listing(root: Path, source: str, *, several: bool = False, classes: Sequence[str] | None = None) -> Listing:
    """The videos that a source names.

    Args:
        root: Folder that paths are below and that videos of official annotations are searched in.
        source: Below `root` or absolute: a folder with a folder per class; a list of lines `path label`,
            `path label start end` or, with `several`, `path label label ...`, or with a header line; Kinetics' csv
            (label, youtube_id, time_start, time_end) or json; Charades' csv (id, actions); AViD's json (file to class).
        several: Whether a video may have any number of classes.
        classes: Names in the order of their numbers. None: the names of the source, sorted (blanks and underscores are
            the same).

    Raises:
        FewtokensError: If the source is missing or does not fit; it names the line.
    """
    path = root / source
    named, by_id = _named(path, root, several)
    numbers = {_key(name): number for number, name in enumerate(classes or names(named))}
    entries = [Entry(v.path, tuple(_number(x, numbers, v, path) for x in v.labels), v.start, v.end) for v in named]
    if not by_id:
        return Listing(entries, [])
    files = Files(root)
    located = [(entry, files.locate(entry)) for entry in entries]
    there = [found for _, found in located if found is not None]
    return Listing(there, [entry for entry, found in located if found is None])


def names(named: Sequence[Named]) -> list[str]:
    """The class names in a list, sorted; empty if it has numbers."""
    return sorted({_key(label) for video in named for label in video.labels if isinstance(label, str)})


def class_names(root: Path, source: str, several: bool) -> list[str]:
    """The class names of a source, sorted; of class folders without a look into them."""
    path = root / source
    if path.is_dir():
        return sorted(map(_key, folders.class_names(path)))
    return names(_named(path, root, several)[0])


def read_classes(path: Path) -> list[str]:
    """Class names in the order of their numbers: lines, csv with the columns id and name, or json (list, or name: id).

    Raises:
        FewtokensError: The file is missing, or numbers are not 0, 1, 2 ...
    """
    if path.suffix.lower() == ".json":
        content = _json(path)
        if not isinstance(content, list | dict):
            raise _unfit(path, content)
        pairs = list(enumerate(content)) if isinstance(content, list) else [(i, name) for name, i in content.items()]
    else:
        lines = lists.read_lines(path)
        if lists.header(lines) == ["id", "name"]:
            pairs = [(row["id"], row["name"]) for _, row in lists.columns(lines)]
        else:
            pairs = [(i, line) for i, (_, line) in enumerate(lines.numbered)]
    by_number = {int(number): str(name) for number, name in pairs if str(number).strip().isdecimal()}
    if sorted(by_number) != list(range(len(pairs))):
        raise FewtokensError(
            "A file of classes numbers them 0, 1, 2 ...",
            expected="names line by line, a csv with the columns id and name, or json",
            got=f"{path} with {len(by_number)} numbers for {len(pairs)} names",
            fix="mend the file that data.classes names",
        )
    return [by_number[number] for number in range(len(pairs))]


class Files:
    """The videos below a folder by the names of their files, found by one walk: a question each would take hours."""

    def __init__(self, root: Path) -> None:
        self.by_stem: dict[str | None, list[str]] = defaultdict(list)
        for folder, inner, files in os.walk(root, followlinks=True):
            inner.sort()
            for name in sorted(files):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in VIDEOS:
                    self.by_stem[stem].append(os.path.relpath(os.path.join(folder, name), root))

    def locate(self, entry: Entry) -> Entry | None:
        """The entry with the path of its file: of the stretch, as `<id>_<start>_<end>`, or of the whole video."""
        stem = os.path.splitext(entry.path)[0] if entry.path.lower().endswith(VIDEOS) else entry.path
        start, end = entry.start, entry.end
        cut = None if start is None or end is None else f"{stem}_{round(start):06d}_{round(end):06d}"
        if cut in self.by_stem:
            return Entry(self.by_stem[cut][0], entry.labels)
        whole = self.by_stem.get(stem)
        return entry._replace(path=whole[0]) if whole else None


def _named(path: Path, root: Path, several: bool) -> tuple[list[Named], bool]:
    """What a source says, and whether it names videos by their ids."""
    named, by_id = _read(path, root, several)
    if several:  # AViD marks a video without any action by this name
        named = [video._replace(labels=tuple(x for x in video.labels if x != "none")) for video in named]
    return named, by_id


def _read(path: Path, root: Path, several: bool) -> tuple[list[Named], bool]:
    if path.is_dir():
        return lists.class_folders(path, root), False
    try:
        stat = path.stat()
    except OSError:
        return _parsed(path, several, 0, 0)  # which says what is wrong
    return _parsed(path, several, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1)  # asked for its class names, then for its videos; size and time notice a changed one
def _parsed(path: Path, several: bool, size: int, changed: int) -> tuple[list[Named], bool]:
    if path.suffix.lower() == ".json":
        return _of_json(path), True
    lines = lists.read_lines(path)
    header = set(lists.header(lines))
    if {"youtube_id", "label"} <= header:
        return _of_kinetics(lines), True
    if {"id", "actions"} <= header:
        return _of_charades(lines), True
    if {"path", "label"} <= header:
        return lists.with_header(lines), False
    return lists.without_header(lines, several), False


def _of_kinetics(lines: Lines) -> list[Named]:
    named = []
    for number, row in lists.columns(lines):
        stretch = lists.stretch(lines, number, row.get("time_start", ""), row.get("time_end", ""))
        named.append(Named(row["youtube_id"], (row["label"],), *stretch))
    return named


def _of_charades(lines: Lines) -> list[Named]:
    named = []
    for number, row in lists.columns(lines):
        actions = [action.split()[0] for action in row["actions"].split(";") if action.strip()]
        if not all(action[0] == "c" and action[1:].isdecimal() for action in actions):
            raise lines.bad(number, "actions such as c092 11.90 21.20;c147 0.00 12.60", row["actions"])
        named.append(Named(row["id"], tuple(dict.fromkeys(int(action[1:]) for action in actions))))
    return named


def _of_json(path: Path) -> list[Named]:
    content = _json(path)
    if not isinstance(content, dict):
        raise _unfit(path, type(content).__name__)
    return [_json_entry(path, str(key), value) for key, value in content.items()]


def _json_entry(path: Path, key: str, value: Any) -> Named:
    start = end = None
    if isinstance(value, dict):
        notes = value.get("annotations", value)
        if not isinstance(notes, dict):
            raise _unfit(path, f"{key}: {value}")
        start, end = _segment(path, key, notes.get("segment"))
        value = notes.get("label", notes.get("labels"))
    labels = [value] if isinstance(value, str | int) else value
    if not isinstance(labels, list) or not all(isinstance(label, str | int) for label in labels):
        raise _unfit(path, f"{key}: {value}")
    return Named(key, tuple(dict.fromkeys(labels)), start, end)


def _segment(path: Path, key: str, seconds: Any) -> tuple[float | None, float | None]:
    try:
        start, end = map(float, seconds) if seconds else (None, None)
    except (TypeError, ValueError) as error:
        raise _unfit(path, f"{key}: segment {seconds}") from error
    return start, end


def _json(path: Path) -> Any:
    try:
        return json.loads("\n".join(line for _, line in lists.read_lines(path).numbered))
    except ValueError as error:
        raise _unfit(path, str(error)) from error


def _unfit(path: Path, got: object) -> FewtokensError:
    return FewtokensError(
        "A json file says the class of every video",
        expected='{"a.mp4": "archery"}, {"a.mp4": ["archery", "riding"]} or Kinetics\' own annotations',
        got=f"{got} in {path}",
        fix=LAYOUT,
    )


def _key(name: str) -> str:
    return name.strip().strip('"').replace("_", " ")


def _number(label: lists.Label, numbers: dict[str, int], video: Named, path: Path) -> int:
    if isinstance(label, int):
        return label
    if (number := numbers.get(_key(label))) is None:
        raise FewtokensError(
            "Every class of a list is known",
            expected=f"one of {len(numbers)} names, such as {next(iter(numbers), 'none')!r}",
            got=f"{label!r} of {video.path} in {path}",
            fix="mend the name, or give all names in their order: data.classes=<file>",
        )
    return number
