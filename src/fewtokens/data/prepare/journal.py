"""The journal of a prepare run: one line per examined file, so that a run that was killed can continue."""

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewtokens.data.video.records import VideoInfo
from fewtokens.errors import FewtokensError, write_error

Section = tuple[float | None, float | None]  # start and end in seconds; None: the beginning or the end of the file
_VERSION = 2  # increase with every change of the lines


@dataclass(frozen=True)
class FileResult:
    """The result of examining one file.

    Attributes:
        state: Size in bytes and modification time in ns of the original; None if it could not be opened.
        limit: Time limit in seconds under which the file was examined.
        sections: First frame and number of frames of each listed section, or the reason why it has none.
        copied: The section that the copy consists of; None if there is no copy.
        info: Properties of the copy or, without copies, of the original; None if the file is skipped.
        bytes: Size of the same file; of the original if the file is skipped.
        sha256: Checksum of the same file; "" if it could not be read or checksums are disabled.
        reason: Why the file is skipped; None if it is not.
    """

    state: tuple[int, int] | None
    limit: float
    sections: dict[Section, tuple[int, int] | str]
    copied: Section | None
    info: VideoInfo | None
    bytes: int
    sha256: str
    reason: str | None


class Journal:
    """The results by path, kept in a file of JSON lines that is locked as long as this object is open.

    Args:
        file: The journal. It is created if it does not exist.
        settings: The settings on which the results depend.
        again: Discard the results in the file.

    Raises:
        FewtokensError: The file cannot be written, another process has it open, or it does not fit the settings.
    """

    def __init__(self, file: Path, settings: dict[str, Any], again: bool = False) -> None:
        self.path, self.results = file, dict[str, FileResult]()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Open as long as this object, for the lock; without a buffer, which would fail again on close.
            self._file = open(file, "a+b", buffering=0)  # noqa: SIM115
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FewtokensError(
                f"Another `prepare` process is writing {file}. Wait for it, stop it, or choose another --write."
            ) from error
        except OSError as error:
            raise write_error(file, error) from error
        if again:
            self._file.truncate(0)
        self._load(settings)

    def add(self, path: str, result: FileResult) -> None:
        """Append the result of a file."""
        sections = [[*section, value] for section, value in result.sections.items()]
        self._append({"path": path, **asdict(result), "sections": sections})
        self.results[path] = result

    def close(self) -> None:
        """Close the file and release the lock."""
        self._file.close()

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        try:
            while line:  # a write can end early, for example when the disk becomes full
                line = line[self._file.write(line) :]
        except OSError as error:
            raise write_error(self.path, error) from error

    def _load(self, settings: dict[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        complete = content[: content.rfind(b"\n") + 1]  # the last line is incomplete if the writer was killed
        self._file.truncate(len(complete))
        if not complete:
            self._append({"version": _VERSION, "settings": settings})
            return
        try:
            head, *records = map(json.loads, complete.splitlines())
            if head.get("version") != _VERSION:
                raise ValueError(head)
            started = dict(head["settings"])
            self.results |= {record.pop("path"): _result(**record) for record in records}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._error("it was written by another version of fewtokens, or is damaged") from error
        if started != settings:
            differ = [name for name in settings | started if started.get(name) != settings.get(name)]
            old, new = ({name: values.get(name) for name in differ} for values in (started, settings))
            raise self._error(f"it was started with {old}, and the settings are now {new}")

    def _error(self, reason: str) -> FewtokensError:
        self.close()
        return FewtokensError(
            f"Cannot continue from the journal {self.path}: {reason}. "
            "Choose another --write, or add --again to examine all files from scratch."
        )


def file_state(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Return the size in bytes and the modification time in ns of a file; None if it cannot be opened."""
    try:
        found = os.stat(path)
        return (found.st_size, found.st_mtime_ns) if os.access(path, os.R_OK) else None
    except (OSError, ValueError):  # ValueError: a null character in the name
        return None


def _result(
    sections: list[list[Any]], state: list[int] | None, copied: list[float | None] | None, info: Any, **values: Any
) -> FileResult:
    frames = {(start, end): tuple(at) if isinstance(at, list) else at for start, end, at in sections}
    known = None if info is None else VideoInfo(**info)
    return FileResult(state and tuple(state), sections=frames, copied=copied and tuple(copied), info=known, **values)  # type: ignore
