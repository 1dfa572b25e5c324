"""From a list of videos to its manifest: examine each file, copy it if asked, and note why a video is skipped."""

import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

from fewtokens.data.prepare.examine import FileTask, PrepareSettings, examine_files
from fewtokens.data.prepare.journal import FileResult, Journal, Section
from fewtokens.data.video import manifest
from fewtokens.data.video.manifest import ManifestRow
from fewtokens.data.video.reader import PARTIAL_SUFFIX
from fewtokens.data.video.records import Video
from fewtokens.errors import FewtokensError
from fewtokens.files import write_json
from fewtokens.versions import version_of

Progress = Callable[[int, int, int], None]  # called with the numbers of good, skipped and all files


def prepare(
    videos: Sequence[Video],
    root: Path,
    file: Path,
    settings: PrepareSettings,
    *,
    extra: Mapping[str, Any] | None = None,
    again: bool = False,
    progress: Progress = lambda good, skipped, total: None,
) -> dict[str, Any]:
    """Examine all listed files and write the manifest, with its journal and its summary (.summary.json) beside it.

    Args:
        videos: The listed videos.
        root: Folder to which their paths are relative.
        file: The manifest, .csv. Its rows are in the order of the list.
        settings: How to examine and copy the files.
        extra: More entries for the summary.
        again: Examine all files from scratch, also those that have not changed.
        progress: Called at the start and after each file.

    Returns:
        The summary.

    Raises:
        FewtokensError: A file cannot be written, would be overwritten, or the journal was begun with other settings.
    """
    journal_file = file.with_suffix(".journal")
    _check_output(file, journal_file, again)
    tasks = file_tasks(videos, root, settings.copies)
    with closing(Journal(journal_file, settings.recorded(), again)) as journal:
        if settings.copies is not None:
            _remove_partial_copies(settings.copies)
        _examine(tasks, journal, settings, progress)
        rows = [_row(video, tasks[_key(video)], journal.results[_key(video)], settings.copies) for video in videos]
        manifest.write(file, rows)
        summary = _summary(rows, [journal.results[path] for path in tasks])
        summary |= {"settings": settings.recorded() | {"limit": settings.limit}, **(extra or {}), **_versions()}
        write_json(summary, manifest.summary_file(file))
    return summary


def file_tasks(videos: Iterable[Video], root: Path, copies: Path | None) -> dict[str, FileTask]:
    """Return a task for each listed file, by normalized path. The copy of a file with one section has only this one.

    Raises:
        FewtokensError: Two copies would have the same path, or a copy that of an original.
    """
    sections: dict[str, dict[Section, None]] = {}  # the inner dict is an ordered set
    for video in videos:
        sections.setdefault(_key(video), {})[video.start, video.end] = None
    tasks, owners = {}, {os.path.realpath(root / path): f"the original {path}" for path in sections} if copies else {}
    for path, listed in sections.items():
        copied, copy = None, None
        if copies is not None:
            copied = next(iter(listed)) if len(listed) == 1 else (None, None)
            copy = str(copies / _copy_path(path, root, *copied))
            if (owner := owners.setdefault(os.path.realpath(copy), path)) is not path:
                raise FewtokensError(
                    f"The copy of {path} would overwrite {copy}, which belongs to {owner}. "
                    "Choose another --transcode folder, or rename one of the files."
                )
        tasks[path] = FileTask(path, str(root / path), frozenset(listed), copy, copied)
    return tasks


def _check_output(file: Path, journal_file: Path, again: bool) -> None:
    if file.suffix != ".csv":
        raise FewtokensError(f"The name of the manifest must end in .csv, got {file}. Change --write.")
    if file.exists() and not journal_file.exists() and not again:
        raise FewtokensError(
            f"{file} exists without a journal, so it may be a file that `prepare` did not write. "
            "Choose another --write, or add --again to overwrite it."
        )


def _examine(tasks: dict[str, FileTask], journal: Journal, settings: PrepareSettings, progress: Progress) -> None:
    """Examine the files whose results are not in the journal, and add them."""
    todo = [task for task in tasks.values() if not task.is_done(journal.results.get(task.path), settings.limit)]
    done = tasks.keys() - {task.path for task in todo}
    counts = Counter(journal.results[path].reason is None for path in done)
    progress(counts[True], counts[False], len(tasks))
    with closing(examine_files(todo, settings)) as results:
        for task, result in results:
            journal.add(task.path, result)
            counts[result.reason is None] += 1
            progress(counts[True], counts[False], len(tasks))


def _key(video: Video) -> str:
    return os.path.normpath(video.path)


def _copy_path(path: str, root: Path, start: float | None, end: float | None) -> PurePath:
    """Return the path of a copy in its folder: that of the original below the root or, outside the root, below /."""
    original = Path(os.path.normpath(root.absolute() / path))
    base = Path(os.path.normpath(root.absolute()))
    relative = original.relative_to(base if original.is_relative_to(base) else original.anchor)
    if (start, end) != (None, None):
        seconds = ["" if second is None else f"{second:g}" for second in (start, end)]
        relative = relative.with_name(f"{relative.name}_{'_'.join(seconds)}")
    return relative if relative.suffix == ".mp4" else relative.with_name(relative.name + ".mp4")


def _row(video: Video, task: FileTask, result: FileResult, copies: Path | None) -> ManifestRow:
    section, content = (video.start, video.end), (result.bytes, result.sha256)
    frames = result.reason if result.reason is not None else result.sections[section]
    if isinstance(frames, str):
        return ManifestRow(video, None, 0, 0, *content, frames)
    if copies is not None and task.copy is not None:
        path = Path(task.copy).relative_to(copies).as_posix()
        video = Video(path, video.labels, *((None, None) if section == result.copied else section))
    return ManifestRow(video, result.info, *frames, *content, None)


def _remove_partial_copies(copies: Path) -> None:
    """Remove the incomplete copies of a process that was killed."""
    for part in copies.rglob(f".*{PARTIAL_SUFFIX}"):
        part.unlink(missing_ok=True)


def _summary(rows: list[ManifestRow], results: list[FileResult]) -> dict[str, Any]:
    good = [row for row in rows if row.info is not None]
    # Numbers in the reasons, such as frame numbers, would make nearly every reason a different one.
    reasons = Counter(re.sub(r"\d+(\.\d+)?", "N", row.reason) for row in rows if row.reason is not None)
    files = [result for result in results if result.reason is None]
    return {
        "videos": len(rows),
        "good": len(good),
        "skipped": len(rows) - len(good),
        "skipped_by_reason": dict(reasons.most_common()),
        "hours": sum(row.count / row.info.fps for row in good if row.info) / 3600,
        "files": len(files),
        "bytes_before": sum(result.state[0] for result in files if result.state),
        "bytes_after": sum(result.bytes for result in files),
    }


def _versions() -> dict[str, Any]:
    packages = {name: version_of(name) for name in ("fewtokens", "av")}
    return {"versions": {"python": platform.python_version()} | packages, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
