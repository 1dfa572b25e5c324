"""From the list of a data set to its manifest: every file examined, copied if asked for, what is left out named."""

import json
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

from fewtokens.data.prepare.examine import Settings, Task, examined
from fewtokens.data.prepare.journal import Found, Journal
from fewtokens.data.video import manifest
from fewtokens.data.video.manifest import ManifestRow
from fewtokens.data.video.reader import PARTIAL_SUFFIX
from fewtokens.data.video.records import Video
from fewtokens.errors import FewtokensError, write_error


def prepare(
    entries: Sequence[Video],
    root: Path,
    file: Path,
    settings: Settings,
    *,
    about: Mapping[str, Any] | None = None,
    again: bool = False,
    watch: Callable[[int, int, int], None] = lambda good, refused, files: None,
) -> dict[str, Any]:
    """Examines what is listed and writes the manifest, its summary (.summary.json) and, as it goes, its .journal.

    Args:
        entries: The list.
        root: Folder of the files.
        file: The manifest, .csv. Its rows are in the order of the list.
        settings: How to examine.
        about: More for the summary.
        again: Whether to examine anew what has not changed.
        watch: Is told, file by file, how many are good, how many refused, and how many there are.

    Returns:
        The summary.

    Raises:
        FewtokensError: Something cannot be written, or the manifest was begun with other settings.
    """
    if file.suffix != ".csv":
        raise FewtokensError("A manifest is a csv file", expected="a name that ends in .csv", got=file, fix="rename it")
    log = file.with_suffix(".journal")
    if file.exists() and not log.exists() and not again:
        raise FewtokensError(
            "No file is overwritten that prepare did not write",
            expected=f"no {file} yet, or its journal beside it",
            got="a file without journal",
            fix="choose another name, or add --again",
        )
    tasks = tasks_of(entries, root, settings.copies)
    kept = {"copies": settings.copies is not None, "short_side": settings.short_side}
    kept |= {"key_frames": settings.key_frames, "checksum": settings.checksum}
    with closing(Journal(log, kept, again)) as journal:
        if settings.copies is not None:
            _sweep(settings.copies)
        _examine(tasks, journal, settings, watch)
        rows = [_row(entry, tasks[_key(entry)], journal.found[_key(entry)], settings.copies) for entry in entries]
        manifest.write(file, rows)
        settled = {"settings": kept | {"limit": settings.limit}, **(about or {})}
        summary = _summary(rows, tasks, journal.found) | settled | _made()
        beside = file.with_suffix(".summary.json")  # not .json, which official annotations are called
        try:
            beside.write_text(json.dumps(summary, indent=2) + "\n")
        except OSError as error:
            raise write_error(beside, error) from error
    return summary


def tasks_of(entries: Iterable[Video], root: Path, copies: Path | None) -> dict[str, Task]:
    """The files that are listed, by path, each once; one that is listed once is copied without what does not count.

    Raises:
        FewtokensError: Two copies would have the same name, or a copy that of an original.
    """
    spans: dict[str, dict[tuple[float | None, float | None], None]] = {}
    for entry in entries:
        spans.setdefault(_key(entry), {})[entry.start, entry.end] = None
    tasks, owners = {}, {os.path.realpath(root / path): f"the original {path}" for path in spans} if copies else {}
    for path, stretches in spans.items():
        source, copied, copy = str(root / path), None, None
        if copies is not None:
            copied = next(iter(stretches)) if len(stretches) == 1 else (None, None)
            copy = str(copies / _name(path, root, *copied))
            if (owner := owners.setdefault(os.path.realpath(copy), path)) is not path:
                raise FewtokensError(
                    "Every copy has a name of its own, and none that of an original",
                    expected=f"that {copy} is free for {path}",
                    got=f"it is that of {owner}",
                    fix="name another folder for the copies, or rename one of the files",
                )
        tasks[path] = Task(path, source, frozenset(stretches), copy, copied)
    return tasks


def _examine(
    tasks: dict[str, Task], journal: Journal, settings: Settings, watch: Callable[[int, int, int], None]
) -> None:
    left = [task for path, task in tasks.items() if not task.known(journal.found.get(path), settings.limit)]
    open_ = {task.path for task in left}
    counts = Counter(journal.found[path].reason is None for path in tasks if path not in open_)
    watch(counts[True], counts[False], len(tasks))
    with closing(examined(left, settings)) as results:
        for task, found in results:
            journal.add(task.path, found)
            counts[found.reason is None] += 1
            watch(counts[True], counts[False], len(tasks))


def _key(entry: Video) -> str:
    return os.path.normpath(entry.path)


def _name(path: str, root: Path, start: float | None, end: float | None) -> PurePath:
    """Where below their folder a copy goes: as the original below its root, or below /."""
    whole = Path(os.path.normpath(root.absolute() / path))
    base = Path(os.path.normpath(root.absolute()))
    below = whole.relative_to(base if whole.is_relative_to(base) else whole.anchor)
    if (start, end) != (None, None):
        ends = ["" if second is None else f"{second:g}" for second in (start, end)]
        below = below.with_name(f"{below.name}_{'_'.join(ends)}")
    return below if below.suffix == ".mp4" else below.with_name(below.name + ".mp4")


def _row(entry: Video, task: Task, found: Found, copies: Path | None) -> ManifestRow:
    span = (entry.start, entry.end)
    content = (found.bytes, found.sha256)
    at = found.reason if found.reason is not None else found.spans[span]
    if isinstance(at, str):
        return ManifestRow(entry, None, 0, 0, *content, at)
    if copies is None or task.copy is None:
        return ManifestRow(entry, found.info, *at, *content, None)
    path = Path(task.copy).relative_to(copies).as_posix()
    left = (None, None) if span == found.copied else span
    return ManifestRow(Video(path, entry.labels, *left), found.info, *at, *content, None)


def _sweep(copies: Path) -> None:
    """Removes copies that a killed process left half done."""
    for part in copies.rglob(f".*{PARTIAL_SUFFIX}"):
        part.unlink(missing_ok=True)


def _summary(rows: list[ManifestRow], tasks: dict[str, Task], found: dict[str, Found]) -> dict[str, Any]:
    good = [row for row in rows if row.info is not None and row.reason is None]
    reasons = Counter(re.sub(r"\d+(\.\d+)?", "N", row.reason) for row in rows if row.reason is not None)
    files = [(found[path].state, found[path].bytes) for path in tasks if found[path].reason is None]
    return {
        "videos": len(rows),
        "good": len(good),
        "refused": len(rows) - len(good),
        "refused_by_reason": dict(reasons.most_common()),
        "hours": sum(row.count / row.info.fps for row in good if row.info) / 3600,
        "files": len(files),
        "bytes_before": sum(state[0] for state, _ in files if state),
        "bytes_after": sum(size for _, size in files),
    }


def _made() -> dict[str, Any]:
    names = ("fewtokens", "av")
    versions = {"python": platform.python_version()} | {name: version(name) for name in names}
    return {"versions": versions, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
