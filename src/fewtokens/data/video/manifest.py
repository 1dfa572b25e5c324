"""The list of a data set's videos with all that was found out about them, as one csv file.

`python -m fewtokens.data.prepare` writes it; training and evaluation read no other list and count no frame anew.
"""

import csv
import io
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, get_args

from fewtokens.data.video.records import Access, VideoInfo
from fewtokens.errors import FewtokensError, write_error

HEADER = "path,labels,start,end,frames,width,height,fps,seconds,access,first,count,bytes,sha256,reason"
COLUMNS = HEADER.split(",")
_FACTS = slice(COLUMNS.index("frames"), COLUMNS.index("first"))
_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # file names can be any bytes


@dataclass(frozen=True)
class ManifestRow:
    """One video.

    Attributes:
        path: Below the manifest's root, or absolute. Of a refused video: as its list names it.
        labels: Class numbers; one for classification.
        start: Second of the file from which on it counts; None for its beginning.
        end: The same for the end.
        facts: Of the file; None if it is refused.
        first: Number of the first frame that counts.
        count: How many frames count; 0 if it is refused.
        bytes: Of the file.
        sha256: Of the file; "" if it could not be read, or was not asked for.
        reason: Why it is refused; None if it is good.
    """

    path: str
    labels: tuple[int, ...]
    start: float | None
    end: float | None
    facts: VideoInfo | None
    first: int
    count: int
    bytes: int
    sha256: str
    reason: str | None


def read(file: Path) -> list[ManifestRow]:
    """All rows, in order.

    Raises:
        FewtokensError: The file is absent, no manifest, or torn; it names the line.
    """
    try:
        with open(file, **_TEXT) as source:
            text = source.read()
    except OSError as error:
        raise _broken(file, 1, "a manifest", error.strerror) from error
    if not text.endswith("\n"):
        raise _broken(file, text.count("\n") + 1, "a line break at the end", "the last line is torn")
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[ManifestRow] = []
    try:
        header = next(lines)
        if header != COLUMNS:
            raise _broken(file, 1, f"the header {HEADER}", ",".join(header))
        rows.extend(_parsed(cells) for cells in lines)
    except (csv.Error, ValueError, StopIteration) as error:
        if isinstance(error, FewtokensError):
            raise
        raise _broken(file, lines.line_num, "a row of a manifest", error) from error
    return rows


def write(file: Path, rows: Iterable[ManifestRow]) -> None:
    """Writes all rows at once: whoever looks sees the file as it was or the whole new one.

    Raises:
        FewtokensError: The file cannot be written.
    """
    part = file.with_name(file.name + ".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "w", **_TEXT) as target:
            writer = csv.writer(target, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(map(_cells, rows))
        os.replace(part, file)
    except OSError as error:
        raise write_error(file, error) from error


def _cells(row: ManifestRow) -> list[object]:
    facts = ("",) * len(COLUMNS[_FACTS]) if row.facts is None else astuple(row.facts)
    ends = ["" if second is None else second for second in (row.start, row.end)]
    labels = ";".join(map(str, row.labels))
    return [row.path, labels, *ends, *facts, row.first, row.count, row.bytes, row.sha256, row.reason or ""]


def _parsed(cells: list[str]) -> ManifestRow:
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{len(cells)} cells instead of {len(COLUMNS)}")
    of = _Cells(zip(COLUMNS, cells, strict=True))
    start, end = (None if of[name] == "" else of.number(name, _seconds) for name in ("start", "end"))
    labels, first, count = of.number("labels", _naturals), of.number("first", _natural), of.number("count", _natural)
    facts, reason = _facts(of) if any(cells[_FACTS]) else None, of["reason"] or None
    if not of["path"]:
        raise ValueError("there is no path")
    if (facts is None) == (reason is None):
        raise ValueError(f"its reason to be refused is {reason}, and what is known of its frames {facts}")
    if first + count > (facts.frames if facts else 0) or (facts and not count):
        raise ValueError(f"{count} frames from {first} on count of {facts.frames if facts else 0}")
    return ManifestRow(
        of["path"], labels, start, end, facts, first, count, of.number("bytes", _natural), of["sha256"], reason
    )


def _facts(of: "_Cells") -> VideoInfo:
    access: Any = of["access"]
    if access not in get_args(Access):
        raise ValueError(f"access is {access!r}, not one of {', '.join(get_args(Access))}")
    frames, width, height = (of.number(name, _natural) for name in ("frames", "width", "height"))
    return VideoInfo(frames, width, height, of.number("fps", _seconds), of.number("seconds", _seconds), access)


class _Cells(dict[str, str]):
    def number(self, name: str, kind: Callable[[str], Any]) -> Any:
        try:
            return kind(self[name])
        except ValueError:
            raise ValueError(f"{name} is {self[name]!r}") from None


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(text)
    return int(text)


def _naturals(text: str) -> tuple[int, ...]:
    return tuple(map(_natural, text.split(";"))) if text else ()


def _seconds(text: str) -> float:
    if not math.isfinite(number := float(text)) or number < 0:
        raise ValueError(text)
    return number


def _broken(file: Path, line: int, expected: str, got: object) -> FewtokensError:
    return FewtokensError(
        f"A manifest can be read: {file}, line {line}",
        expected=expected,
        got=got,
        fix="write it anew: python -m fewtokens.data.prepare --help",
    )
