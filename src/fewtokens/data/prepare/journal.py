"""What was found out about files, a line per file as it comes: a run that was killed goes on where it stopped."""

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewtokens.data.video.records import VideoInfo
from fewtokens.errors import FewtokensError, write_error

Span = tuple[float | None, float | None]  # seconds


@dataclass(frozen=True)
class Found:
    """What examining one file gave.

    Attributes:
        state: Size and time of change of the original; None if it could not be opened.
        limit: Seconds after which it would have been given up.
        spans: The stretches that were asked for: first frame and how many, or why there are none.
        copied: The stretch that its copy consists of; None if there is no copy.
        info: Properties of the file that is to be read: the copy, if there is one; None if it is refused.
        bytes: Of that file; of the original if it is refused.
        sha256: The same; "" if it could not be read or was not asked for.
        reason: Why it is refused; None if it is good.
    """

    state: tuple[int, int] | None
    limit: float
    spans: dict[Span, tuple[int, int] | str]
    copied: Span | None
    info: VideoInfo | None
    bytes: int
    sha256: str
    reason: str | None


class Journal:
    """A file of json lines, kept open and locked: two processes cannot write one.

    Args:
        file: Made if there is none.
        settings: What the results depend on.
        again: Whether to begin anew.

    Raises:
        FewtokensError: Another process has it open, it was begun with other settings, or cannot be written.
    """

    def __init__(self, file: Path, settings: dict[str, Any], again: bool = False) -> None:
        self.name, self.found = file, dict[str, Found]()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(file, "a+b")  # noqa: SIM115  # open as long as this object, for the lock
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FewtokensError(
                "One process at a time writes a manifest",
                expected=f"that nothing else has {file} open",
                got="another prepare that runs",
                fix="wait for it, stop it, or write another manifest",
            ) from error
        except OSError as error:
            raise write_error(file, error) from error
        if again:
            self._file.truncate(0)
        self._load(settings)

    def add(self, path: str, found: Found) -> None:
        """Keeps what was found out about a file."""
        spans = [[*span, value] for span, value in found.spans.items()]
        self._append({"path": path, **asdict(found), "spans": spans})
        self.found[path] = found

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()

    def _append(self, record: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise write_error(self.name, error) from error

    def _load(self, settings: dict[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]  # a killed writer leaves half a line
        self._file.truncate(len(whole))
        if not whole:
            self._append({"settings": settings})
            return
        try:
            head, *records = map(json.loads, whole.splitlines())
            before = head["settings"]
            self.found |= {record.pop("path"): _found(**record) for record in records}
        except (ValueError, KeyError, TypeError) as error:
            raise self._unfit("lines as prepare writes them", error) from error
        if before != settings:
            differ = [name for name in settings if before.get(name) != settings[name]] or sorted(before)
            got, expected = ({name: them.get(name) for name in differ} for them in (settings, before))
            raise self._unfit(f"the settings with which it was begun, {expected}", got)

    def _unfit(self, expected: object, got: object) -> FewtokensError:
        self.close()
        fix = "use them, write another manifest, or add --again to examine all files anew"
        return FewtokensError(f"A manifest goes on from its journal {self.name}", expected=expected, got=got, fix=fix)


def state(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Size and time of change of a file that can be opened."""
    try:
        found = os.stat(path)
        return (found.st_size, found.st_mtime_ns) if os.access(path, os.R_OK) else None
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return None


def _found(
    spans: list[list[Any]], state: list[int] | None, copied: list[float | None] | None, info: Any, **more: Any
) -> Found:
    stretches = {(start, end): tuple(at) if isinstance(at, list) else at for start, end, at in spans}
    found = None if info is None else VideoInfo(**info)
    return Found(state and tuple(state), spans=stretches, copied=copied and tuple(copied), info=found, **more)  # type: ignore
