"""The manifest of a data set: one csv file that lists its videos with everything that is known about their files.

`python -m fewtokens.data.prepare` writes it. Training and evaluation on a manifest read no other list and examine no
file again.
"""

import csv
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, get_args

from fewtokens.data.video.records import Access, Video, VideoInfo
from fewtokens.errors import FewtokensError
from fewtokens.files import read_record, replace_file

HEADER = "path,labels,start,end,frames,width,height,fps,seconds,access,first,count,bytes,sha256,reason"
COLUMNS = HEADER.split(",")
_INFO = slice(COLUMNS.index("frames"), COLUMNS.index("first"))


@dataclass(frozen=True)
class ManifestRow:
    """A video with what is known about its file, or with the reason why it is skipped.

    Attributes:
        video: The video, with class numbers. The path of a skipped video is as listed.
        info: Properties of the file; None if the video is skipped.
        first: Number of the first frame of the section.
        count: Number of frames in the section; 0 if the video is skipped.
        bytes: Size of the file.
        sha256: Checksum of the file; "" if the file could not be read or checksums were disabled.
        reason: Why the video is skipped; None if it is not.
    """

    video: Video
    info: VideoInfo | None
    first: int
    count: int
    bytes: int
    sha256: str
    reason: str | None


def read(file: Path) -> list[ManifestRow]:
    """Read all rows in order.

    Raises:
        FewtokensError: The file is missing, is not a manifest, or is damaged. The message names the line.
    """
    try:
        with open(file, encoding="utf-8", errors="surrogateescape", newline="") as source:
            text = source.read()
    except OSError as error:
        raise _error(file, 1, error.strerror) from error
    if not text.endswith("\n"):
        raise _error(file, text.count("\n") + 1, "the last line is incomplete")
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[ManifestRow] = []
    try:
        header = next(lines)
        if header != COLUMNS:
            raise ValueError(f"expected the header {HEADER}, got {','.join(header)}")
        rows.extend(_parse(cells) for cells in lines)
    except (csv.Error, ValueError, StopIteration) as error:
        raise _error(file, lines.line_num, error) from error
    return rows


def write(file: Path, rows: Iterable[ManifestRow]) -> None:
    """Write all rows at once: another process sees either the old file or the complete new one.

    Raises:
        FewtokensError: The file cannot be written.
    """
    with replace_file(file, newline="", errors="surrogateescape") as target:  # file names can be any bytes
        writer = csv.writer(target, lineterminator="\n")
        quoting = csv.writer(target, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(COLUMNS)
        for row in rows:
            # csv.writer does not quote a carriage return that is not in its line terminator, and then csv.reader
            # takes it for the end of the line.
            returns = "\r" in row.video.path or "\r" in (row.reason or "")
            (quoting if returns else writer).writerow(_cells(row))


def summary_file(file: Path) -> Path:
    """Return the summary of a manifest: `<its name without .csv>.summary.json`, beside it."""
    return file.with_suffix(".summary.json")  # .json alone is the suffix of official annotations


def class_names(file: Path) -> list[str]:
    """Return the class names of a manifest in the order of their numbers, from its summary.

    The list is empty if there is no summary, or if the classes had no names.
    """
    names = read_record(summary_file(file)).get("classes")
    return list(map(str, names)) if isinstance(names, list) else []


def _cells(row: ManifestRow) -> list[object]:
    path, labels, start, end = row.video
    info = ("",) * len(COLUMNS[_INFO]) if row.info is None else astuple(row.info)
    section = ["" if second is None else second for second in (start, end)]
    content = (row.first, row.count, row.bytes, row.sha256, row.reason or "")
    return [path, ";".join(map(str, labels)), *section, *info, *content]


def _parse(cells: list[str]) -> ManifestRow:
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{len(cells)} cells instead of {len(COLUMNS)}")
    row = _Cells(zip(COLUMNS, cells, strict=True))
    start, end = (None if row[name] == "" else row.number(name, _positive) for name in ("start", "end"))
    video = Video(row["path"], row.number("labels", _naturals), start, end)
    info, reason = _info(row) if any(cells[_INFO]) else None, row["reason"] or None
    first, count, size = (row.number(name, _natural) for name in ("first", "count", "bytes"))
    if not video.path:
        raise ValueError("the path is empty")
    if (info is None) == (reason is None):
        raise ValueError(f"a row has either a reason or the properties of the file, got {reason} and {info}")
    if first + count > (info.frames if info else 0) or (info and not count):
        raise ValueError(f"{count} frames from frame {first} are not a section of {info.frames if info else 0} frames")
    return ManifestRow(video, info, first, count, size, row["sha256"], reason)


def _info(row: "_Cells") -> VideoInfo:
    access: Any = row["access"]
    if access not in get_args(Access):
        raise ValueError(f"access is {access!r}, not one of {', '.join(get_args(Access))}")
    frames, width, height = (row.number(name, _natural) for name in ("frames", "width", "height"))
    return VideoInfo(frames, width, height, row.number("fps", _positive), row.number("seconds", _positive), access)


class _Cells(dict[str, str]):
    """The cells of a row by column, with errors that name the column."""

    def number(self, name: str, parse: Callable[[str], Any]) -> Any:
        """Parse a cell."""
        try:
            return parse(self[name])
        except ValueError:
            raise ValueError(f"{name} is {self[name]!r}") from None


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(text)
    return int(text)


def _naturals(text: str) -> tuple[int, ...]:
    return tuple(map(_natural, text.split(";"))) if text else ()


def _positive(text: str) -> float:
    if not math.isfinite(number := float(text)) or number < 0:
        raise ValueError(text)
    return number


def _error(file: Path, line: int, problem: object) -> FewtokensError:
    return FewtokensError(
        f"Cannot read the manifest {file}, line {line}: {problem}. "
        "Write it again with `python -m fewtokens.data.prepare`."
    )
