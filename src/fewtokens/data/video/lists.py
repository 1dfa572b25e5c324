"""Which videos a part of a data set has, and their classes: class folders, lists of paths, official annotations."""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fewtokens.data.image import folders
from fewtokens.errors import FewtokensError

VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv")
LAYOUT = "name a folder with one folder per class, a list `path label`, an official csv or json, or a manifest"
Label = int | str


class Entry(NamedTuple):
    """A video, or a stretch of one: its path below the root, its class numbers, and the seconds that count."""

    path: str
    labels: tuple[int, ...]
    start: float | None = None
    end: float | None = None


class Named(NamedTuple):
    """An entry as a list has it: classes are numbers or names."""

    path: str
    labels: tuple[Label, ...]
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Listing:
    """The videos of a part.

    Attributes:
        entries: The videos.
        absent: Those that official annotations name and that are not there, with the names that they should have.
    """

    entries: list[Entry]
    absent: list[Entry]


class Lines(NamedTuple):
    """A list file: its path, its lines that are not empty, and the number of each."""

    path: Path
    numbered: list[tuple[int, str]]

    def bad(self, number: int, expected: str, got: object) -> FewtokensError:
        """The error for a line."""
        return FewtokensError(
            "Every line of a list names a video and its class",
            expected=expected,
            got=f"{got} in line {number} of {self.path}",
            fix="mend the line; a header line with the columns path, label, start and end is the plainest list",
        )


def class_folders(folder: Path, root: Path) -> list[Named]:
    """The videos in class folders below `folder`, with paths below `root` or, if they are not there, absolute."""
    found, whole = folders.scan(folder, LAYOUT, VIDEOS), root.absolute()
    paths = (found.path(index).absolute() for index in range(len(found.files)))
    names = (found.classes[target] for target in found.targets.tolist())
    return [
        Named(str(path.relative_to(whole) if path.is_relative_to(whole) else path), (name,))
        for path, name in zip(paths, names, strict=True)
    ]


def read_lines(path: Path) -> Lines:
    """The lines of a text file; a FewtokensError if it is none."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise FewtokensError(
            "The videos of a part are listed in a file or lie in a folder",
            expected="a file that can be read",
            got=f"{path}: {error.strerror}",
            fix=LAYOUT,
        ) from error
    if "\0" in text:
        raise FewtokensError(
            "A list is a text file", expected="lines of text", got=f"{path}, which is none", fix=LAYOUT
        )
    return Lines(path, [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()])


def columns(lines: Lines) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a csv file with a header line, by column name, with their line numbers."""
    names = header(lines)
    rows = csv.DictReader((line for _, line in lines.numbered[1:]), names, "", "", skipinitialspace=True)
    for row in rows:
        number = lines.numbered[rows.line_num][0]
        if "" in row:
            raise lines.bad(number, f"{len(names)} fields, as in the header", list(row.values()))
        yield number, {name: value.strip() for name, value in row.items()}


def header(lines: Lines) -> list[str]:
    """The fields of the first line, in lower case; they are column names if the file has a header."""
    first = lines.numbered[0][1] if lines.numbered else ""
    return [name.strip().lower() for name in next(csv.reader([first], skipinitialspace=True), [])]


def with_header(lines: Lines) -> list[Named]:
    """A csv file with the columns path and label, and perhaps start and end in seconds; several labels: 3;5."""
    found = []
    for number, row in columns(lines):
        if not row["path"]:
            raise lines.bad(number, "a path", row)
        labels = tuple(_label(part) for part in row["label"].split(";") if part.strip())
        found.append(Named(row["path"], labels, *stretch(lines, number, row.get("start", ""), row.get("end", ""))))
    return found


def without_header(lines: Lines, several: bool) -> list[Named]:
    """Lines `path label`, `path label start end` or, with several labels a video, `path label label ...`.

    Fields are separated by commas or blanks, as in SlowFast and mmaction2; a path may contain blanks.
    """
    return [_positional(lines, number, line, several) for number, line in lines.numbered]


def _positional(lines: Lines, number: int, line: str, several: bool) -> Named:
    words = line.split()
    count = next((i for i, word in enumerate(reversed(words)) if not _is_number(word)), len(words) - 1)
    fields = [field.strip() for field in next(csv.reader([line]))]
    path, *rest = fields if len(fields) > 1 and (not count or _is_number(fields[-1])) else line.rsplit(None, count)
    if not path or not rest or (not several and len(rest) not in (1, 3)):
        expected = "path label label ..." if several else "path label, or path label start end"
        raise lines.bad(number, expected, repr(line))
    labels, seconds = (rest, []) if several else (rest[:1], rest[1:])
    return Named(path, tuple(map(_label, labels)), *stretch(lines, number, *seconds))


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _label(text: str) -> Label:
    text = text.strip()
    return int(text) if text.isdecimal() else text


def stretch(lines: Lines, number: int, start: str = "", end: str = "") -> tuple[float | None, float | None]:
    """Seconds, each of which may be left out."""
    if not all(_is_number(text) for text in (start, end) if text):
        raise lines.bad(number, "start and end in seconds", f"{start!r} and {end!r}")
    first, last = (float(text) if text else None for text in (start, end))
    if (first or 0.0) < 0 or (last is not None and last <= (first or 0.0)):
        raise lines.bad(number, "a start of at least 0 s and an end after it", f"{start!r} and {end!r}")
    return first, last
