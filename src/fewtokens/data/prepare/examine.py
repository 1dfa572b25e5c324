"""The files of a data set, one after the other in several threads, each of which has a process that decodes for it."""

import hashlib
import os
import queue
import stat
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fewtokens.data.prepare.journal import Found, Span, state
from fewtokens.data.video.reader import Reader
from fewtokens.data.video.records import UnreadableError, VideoInfo
from fewtokens.errors import write_error


@dataclass(frozen=True)
class Settings:
    """How files are examined.

    Attributes:
        copies: Folder for copies; None for no copies.
        short_side: Of the copies; None as it is.
        key_frames: Frames from one key frame of a copy to the next.
        checksum: Whether to compute it.
        limit: Seconds after which a file is given up.
        workers: Threads, each with a process.
    """

    copies: Path | None = None
    short_side: int | None = None
    key_frames: int = 12
    checksum: bool = True
    limit: float = 600.0
    workers: int = 1


@dataclass(frozen=True)
class Task:
    """One file.

    Attributes:
        path: As the list names it.
        source: Where it is.
        spans: The stretches of it that are listed.
        copy: Where its copy goes.
        copied: What its copy consists of.
    """

    path: str
    source: str
    spans: frozenset[Span]
    copy: str | None
    copied: Span | None

    def known(self, found: Found | None, limit: float) -> bool:
        """Whether nothing has changed since this was found out."""
        if found is None or found.state != state(self.source) or found.copied != self.copied:
            return False
        if found.reason is not None:
            return not found.reason.startswith("timed out") or limit <= found.limit
        whole = self.copy is None or (os.path.exists(self.copy) and os.stat(self.copy).st_size == found.bytes)
        return whole and self.spans <= found.spans.keys()


def examined(tasks: Iterable[Task], settings: Settings) -> Generator[tuple[Task, Found]]:
    """What was found out about each file, as it comes; whoever stops listening should close this generator.

    Raises:
        FewtokensError: A copy cannot be written.
    """
    todo, stopping = _Shared(tasks), threading.Event()
    done: queue.SimpleQueue[tuple[Task, Found] | BaseException | None] = queue.SimpleQueue()
    readers = [Reader("pyav", settings.limit) for _ in range(settings.workers)]

    def work(reader: Reader) -> None:
        try:
            for task in todo:
                found = examine(task, reader, settings)
                if stopping.is_set():  # then the process was ended, and what is known of the file is nothing
                    break
                done.put((task, found))
        except BaseException as error:
            done.put(error)
        finally:
            reader.close()
            done.put(None)

    threads = [threading.Thread(target=work, args=(reader,), daemon=True) for reader in readers]
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


def examine(task: Task, reader: Reader, settings: Settings) -> Found:
    """Everything about one file."""
    before = state(task.source)
    info: VideoInfo | None = None
    spans: dict[Span, tuple[int, int] | str] = {}
    try:
        _check(task.source)
        info = _whole(task, reader, settings)
        reason, final = None, task.copy or task.source
    except UnreadableError as error:
        reason, final = error.reason, task.source
    if info is not None:
        spans = {span: _span(reader, final, *span) for span in task.spans if span != task.copied}
    spans |= {task.copied: (0, info.frames)} if info and task.copied else {}
    size, digest = _content(final, settings.checksum) if before else (0, "")
    return Found(before, settings.limit, spans, task.copied, info, size, digest, reason)


class _Shared:
    """Tasks for several threads."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks, self._lock = iter(tasks), threading.Lock()

    def __iter__(self) -> Iterator[Task]:
        return self

    def __next__(self) -> Task:
        with self._lock:
            return next(self._tasks)


def _check(path: str) -> None:
    try:
        kind = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise UnreadableError(path, getattr(error, "strerror", None) or str(error)) from error
    if not stat.S_ISREG(kind):  # to open a pipe would wait for somebody to write into it
        raise UnreadableError(path, "it is no file")


def _whole(task: Task, reader: Reader, settings: Settings) -> VideoInfo:
    start, end = task.copied or (None, None)
    if task.copy is not None:
        try:
            os.makedirs(os.path.dirname(task.copy), exist_ok=True)
        except OSError as error:
            raise write_error(task.copy, error) from error
    shape = {"short_side": settings.short_side, "key_frames": settings.key_frames}
    return reader.examine(task.source, task.copy, start=start, end=end, **shape)  # type: ignore[arg-type]


def _span(reader: Reader, path: str, start: float | None, end: float | None) -> tuple[int, int] | str:
    try:
        return reader.frame_range(path, start, end)
    except UnreadableError as error:
        return error.reason


def _content(path: str, checksum: bool) -> tuple[int, str]:
    try:
        size = os.stat(path).st_size
        if not checksum or not os.path.isfile(path):
            return size, ""
        with open(path, "rb") as file:
            return size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return 0, ""
