"""Parsers for lists of videos: class folders, text lists, and the annotation files of Kinetics, Charades and AViD.

Every parser returns `Video`s with their labels as written: class numbers or class names.
"""

import csv
import json
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from fewtokens.data.image import folders
from fewtokens.data.video.records import Video
from fewtokens.errors import FewtokensError

VIDEO_SUFFIXES = (
    ".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv",
)  # fmt: skip
SOURCES_HELP = "Name a folder with one folder per class, a list `path label`, an official csv or json, or a manifest"


class Lines(NamedTuple):
    """The lines of a list that are not empty, with their line numbers."""

    path: Path
    numbered: list[tuple[int, str]]

    def error(self, number: int, expected: str, got: object) -> FewtokensError:
        """Return the error for a line that cannot be parsed."""
        return FewtokensError(
            f"Invalid line {number} of {self.path}: expected {expected}, got {got}. "
            "The simplest list has a header line with the columns path, label, start and end."
        )


def parse(path: Path, root: Path, multilabel: bool) -> tuple[list[Video], bool]:
    """Read a list of videos in any of the supported formats.

    Args:
        path: Folder of class folders, or list file.
        root: Folder to which the paths of class folders are made relative.
        multilabel: Whether a video may have any number of classes.

    Returns:
        The videos, and whether they are named by ids instead of paths.

    Raises:
        FewtokensError: The file is missing or has no known format. The message names the line.
    """
    if path.is_dir():
        return _class_folders(path, root), False
    try:
        stat = path.stat()
        version = (stat.st_size, stat.st_mtime_ns)
    except OSError:
        version = (0, 0)  # reading the file raises the error
    videos, by_id = _parse_file(path, multilabel, version)
    if multilabel:  # AViD marks a video without any action by the name "none"
        videos = [video._replace(labels=tuple(x for x in video.labels if x != "none")) for video in videos]
    return videos, by_id


@lru_cache(maxsize=1)  # a list is read for its class names and then for its videos; `version` detects a changed file
def _parse_file(path: Path, multilabel: bool, version: tuple[int, int]) -> tuple[list[Video], bool]:
    if path.suffix.lower() == ".json":
        return _parse_json(path), True
    lines = read_lines(path)
    header = set(header_fields(lines))
    if {"youtube_id", "label"} <= header:
        return _parse_kinetics(lines), True
    if {"id", "actions"} <= header:
        return _parse_charades(lines), True
    if {"path", "label"} <= header:
        return _parse_with_header(lines), False
    return [_parse_line(lines, number, line, multilabel) for number, line in lines.numbered], False


def read_lines(path: Path) -> Lines:
    """Read the lines of a text file.

    Raises:
        FewtokensError: The file cannot be read, is not a text file, or has lines that are too long for a list.
    """
    lines = _read_text(path).split("\n")
    if (longest := max(map(len, lines))) > csv.field_size_limit():
        raise FewtokensError(f"{path} is not a list, as it has a line of {longest} characters. {SOURCES_HELP}.")
    return Lines(path, [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()])


def read_rows(lines: Lines) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows below the header line as {column: value}, with their line numbers."""
    names = header_fields(lines)
    rows = csv.DictReader((line for _, line in lines.numbered[1:]), names, "", "", skipinitialspace=True)
    for row in rows:
        number = lines.numbered[rows.line_num][0]
        if "" in row:
            raise lines.error(number, f"{len(names)} fields as in the header", list(row.values()))
        yield number, {name: value.strip() for name, value in row.items()}


def header_fields(lines: Lines) -> list[str]:
    """Return the fields of the first line in lower case. They are column names if the file has a header."""
    first = lines.numbered[0][1] if lines.numbered else ""
    return [name.strip().lower() for name in next(csv.reader([first], skipinitialspace=True), [])]


def read_json(path: Path) -> Any:
    """Read a json file.

    Raises:
        FewtokensError: The file cannot be read or is not json.
    """
    try:
        return json.loads(_read_text(path))
    except ValueError as error:
        raise json_error(path, error) from error


def json_error(path: Path, got: object) -> FewtokensError:
    """Return the error for a json file of another structure."""
    return FewtokensError(
        f'{path} must map videos to classes, as {{"a.mp4": "archery"}}, {{"a.mp4": ["archery", "riding"]}} or the '
        f"annotations of Kinetics, got {got}. {SOURCES_HELP}."
    )


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise FewtokensError(f"Cannot read the list {path}: {error.strerror}. {SOURCES_HELP}.") from error
    if "\0" in text:
        raise FewtokensError(f"The list {path} is not a text file. {SOURCES_HELP}.")
    return text


def _class_folders(folder: Path, root: Path) -> list[Video]:
    """Return the videos in class folders. Their paths are relative to `root` if they are below it, else absolute."""
    found, base = folders.scan(folder, SOURCES_HELP, VIDEO_SUFFIXES), root.absolute()
    paths = (found.path(index).absolute() for index in range(len(found.files)))
    names = (found.classes[target] for target in found.targets.tolist())
    return [
        Video(str(path.relative_to(base) if path.is_relative_to(base) else path), (name,))
        for path, name in zip(paths, names, strict=True)
    ]


def _parse_with_header(lines: Lines) -> list[Video]:
    """Parse csv with the columns path and label, and optionally start and end in seconds; several labels as 3;5."""
    videos = []
    for number, row in read_rows(lines):
        if not row["path"]:
            raise lines.error(number, "a path", row)
        labels = tuple(_label(part) for part in row["label"].split(";") if part.strip())
        videos.append(Video(row["path"], labels, *_section(lines, number, row.get("start", ""), row.get("end", ""))))
    return videos


def _parse_line(lines: Lines, number: int, line: str, multilabel: bool) -> Video:
    """Parse `path label`, `path label start end` or, with several labels per video, `path label label ...`.

    Fields are separated by commas or blanks, as in SlowFast and MMAction2. A path may contain blanks.
    """
    words = line.split()
    count = next((i for i, word in enumerate(reversed(words)) if not _is_number(word)), len(words) - 1)
    fields = [field.strip() for field in next(csv.reader([line]))]
    path, *rest = fields if len(fields) > 1 and (not count or _is_number(fields[-1])) else line.rsplit(None, count)
    if not path or not rest or (not multilabel and len(rest) not in (1, 3)):
        expected = "`path label label ...`" if multilabel else "`path label` or `path label start end`"
        raise lines.error(number, expected, repr(line))
    labels, seconds = (rest, []) if multilabel else (rest[:1], rest[1:])
    return Video(path, tuple(map(_label, labels)), *_section(lines, number, *seconds))


def _parse_kinetics(lines: Lines) -> list[Video]:
    videos = []
    for number, row in read_rows(lines):
        section = _section(lines, number, row.get("time_start", ""), row.get("time_end", ""))
        videos.append(Video(row["youtube_id"], (row["label"],), *section))
    return videos


def _parse_charades(lines: Lines) -> list[Video]:
    videos = []
    for number, row in read_rows(lines):
        actions = [action.split()[0] for action in row["actions"].split(";") if action.strip()]
        if not all(action[0] == "c" and action[1:].isdecimal() for action in actions):
            raise lines.error(number, "actions such as `c092 11.90 21.20;c147 0.00 12.60`", row["actions"])
        videos.append(Video(row["id"], tuple(dict.fromkeys(int(action[1:]) for action in actions))))
    return videos


def _parse_json(path: Path) -> list[Video]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise json_error(path, f"a {type(content).__name__}")
    return [_parse_json_entry(path, str(key), value) for key, value in content.items()]


def _parse_json_entry(path: Path, key: str, value: Any) -> Video:
    start = end = None
    if isinstance(value, dict):
        notes = value.get("annotations", value)
        if not isinstance(notes, dict):
            raise json_error(path, f"{key}: {value}")
        try:
            start, end = map(float, notes.get("segment") or ()) if notes.get("segment") else (None, None)
        except (TypeError, ValueError) as error:
            raise json_error(path, f"{key}: segment {notes['segment']}") from error
        value = notes.get("label", notes.get("labels"))
    labels = [value] if isinstance(value, str | int) else value
    if not isinstance(labels, list) or not all(isinstance(label, str | int) for label in labels):
        raise json_error(path, f"{key}: {value}")
    return Video(key, tuple(dict.fromkeys(labels)), start, end)


def _label(text: str) -> int | str:
    text = text.strip()
    return int(text) if text.isdecimal() else text


def _section(lines: Lines, number: int, start: str = "", end: str = "") -> tuple[float | None, float | None]:
    """Parse start and end in seconds, each of which may be empty."""
    got = f"{start!r} and {end!r}"
    if not all(_is_number(text) for text in (start, end) if text):
        raise lines.error(number, "start and end in seconds", got)
    first, last = (float(text) if text else None for text in (start, end))
    if (first or 0.0) < 0 or (last is not None and last <= (first or 0.0)):
        raise lines.error(number, "a start of at least 0 s and an end after it", got)
    return first, last


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False
