"""Examination of the files of a data set in several threads, each with its own decoder process."""

import hashlib
import os
import queue
import stat
import threading
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewtokens.data.prepare.journal import FileResult, Section, file_state
from fewtokens.data.video.reader import Reader
from fewtokens.data.video.records import UnreadableError, VideoInfo
from fewtokens.errors import write_error


@dataclass(frozen=True)
class PrepareSettings:
    """Settings of the examination and copying of files.

    Attributes:
        copies: Folder for the copies; None for no copies.
        short_side: Shorter side of the copies in pixels; None keeps that of the originals.
        key_frames: Number of frames from one key frame of a copy to the next.
        checksum: Whether to compute checksums.
        limit: Time limit per file in seconds.
        workers: Number of threads, each with its own process.
    """

    copies: Path | None = None
    short_side: int | None = None
    key_frames: int = 12
    checksum: bool = True
    limit: float = 600.0
    workers: int = 1

    def recorded(self) -> dict[str, Any]:
        """Return the settings on which the results depend."""
        names = ("short_side", "key_frames", "checksum")
        return {"copies": self.copies is not None} | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class FileTask:
    """A file to examine.

    Attributes:
        path: Path as listed, normalized.
        source: Path of the original, absolute or relative to the working directory.
        sections: The listed sections of the file.
        copy: Path of the copy; None for no copy.
        copied: The section that the copy consists of; None for no copy.
    """

    path: str
    source: str
    sections: frozenset[Section]
    copy: str | None
    copied: Section | None

    def is_done(self, result: FileResult | None, limit: float) -> bool:
        """Return whether `result` is still valid, and a new time limit in seconds would not change it."""
        if result is None or result.state != file_state(self.source) or result.copied != self.copied:
            return False
        if result.reason is not None and result.reason.startswith("timed out"):
            return limit <= result.limit
        if result.reason is not None:  # a process that was killed, for lack of memory, says nothing about the file
            return not result.reason.startswith("the decoder process was killed")
        complete = self.copy is None or (os.path.exists(self.copy) and os.stat(self.copy).st_size == result.bytes)
        return complete and self.sections <= result.sections.keys()


_Todo = queue.SimpleQueue[FileTask | None]
_Done = queue.SimpleQueue[tuple[FileTask, FileResult] | BaseException | None]


def examine_files(tasks: Iterable[FileTask], settings: PrepareSettings) -> Generator[tuple[FileTask, FileResult]]:
    """Yield the result of each file as soon as it is known. Close the generator to stop early.

    Raises:
        FewtokensError: A copy cannot be written.
    """
    todo, done, stopping = _Todo(), _Done(), threading.Event()
    for task in (*tasks, *[None] * settings.workers):
        todo.put(task)
    readers = [Reader("pyav", settings.limit) for _ in range(settings.workers)]
    threads = [
        threading.Thread(target=_work, args=(todo, done, stopping, reader, settings), daemon=True) for reader in readers
    ]
    try:
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            match done.get():
                case None:
                    running -= 1
                case BaseException() as error:
                    raise error
                case result:
                    yield result
    finally:
        stopping.set()
        for thread, reader in zip(threads, readers, strict=True):
            while thread.is_alive():
                reader.process.interrupt()
                thread.join(0.05)


def _work(todo: _Todo, done: _Done, stopping: threading.Event, reader: Reader, settings: PrepareSettings) -> None:
    """Examine files until None is next; put the results, an error if there is one, and at last None into `done`."""
    try:
        while (task := todo.get()) is not None:
            result = examine_file(task, reader, settings)
            if stopping.is_set():  # the process was interrupted, so the result says nothing about the file
                break
            done.put((task, result))
    except BaseException as error:
        done.put(error)
    finally:
        reader.close()
        done.put(None)


def examine_file(task: FileTask, reader: Reader, settings: PrepareSettings) -> FileResult:
    """Decode a file, write its copy, and return everything that the manifest needs to know about it."""
    state = file_state(task.source)
    info: VideoInfo | None = None
    sections: dict[Section, tuple[int, int] | str] = {}
    try:
        _check_is_file(task.source)
        info = _decode(task, reader, settings)
        reason, final = None, task.copy or task.source
    except UnreadableError as error:
        reason, final = error.reason, task.source
    if info is not None:
        sections = {section: _frames(reader, final, section) for section in task.sections if section != task.copied}
        if task.copied is not None:
            sections[task.copied] = (0, info.frames)
    size, sha256 = _size_and_checksum(final, settings.checksum) if state else (0, "")
    return FileResult(state, settings.limit, sections, task.copied, info, size, sha256, reason)


def _check_is_file(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise UnreadableError(path, getattr(error, "strerror", None) or str(error)) from error
    if not stat.S_ISREG(mode):  # opening a pipe would block until another process writes into it
        raise UnreadableError(path, "it is not a file")


def _decode(task: FileTask, reader: Reader, settings: PrepareSettings) -> VideoInfo:
    start, end = task.copied or (None, None)
    if task.copy is not None:
        try:
            os.makedirs(os.path.dirname(task.copy), exist_ok=True)
        except OSError as error:
            raise write_error(task.copy, error) from error
    return reader.examine(
        task.source,
        task.copy,
        start=start,
        end=end,
        short_side=settings.short_side,
        key_frames=settings.key_frames,
    )


def _frames(reader: Reader, path: str, section: Section) -> tuple[int, int] | str:
    """Return the first frame of a section and its number of frames, or the reason why it has none."""
    try:
        return reader.frame_range(path, *section)
    except UnreadableError as error:
        return error.reason


def _size_and_checksum(path: str, checksum: bool) -> tuple[int, str]:
    try:
        size = os.stat(path).st_size
        if not checksum or not os.path.isfile(path):
            return size, ""
        with open(path, "rb") as file:
            return size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return 0, ""
