"""Manifests describe the files correctly; no file is examined twice, no result lost, no original changed."""

import hashlib
import json
import os
import resource
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import videos
from fewtokens.data.prepare import examine
from fewtokens.data.prepare.examine import FileTask, PrepareSettings
from fewtokens.data.prepare.journal import FileResult, Journal
from fewtokens.data.prepare.scan import prepare
from fewtokens.data.video import manifest
from fewtokens.data.video.manifest import ManifestRow
from fewtokens.data.video.reader import Reader
from fewtokens.data.video.records import UnreadableError, Video, VideoInfo
from fewtokens.data.video.watchdog import CallAborted, WatchedProcess
from fewtokens.errors import FewtokensError

LISTED = [Video("b.mp4", (1,)), Video("x/a.mkv", (0, 2)), Video("bad.mp4", (3,)), Video("none.mp4", (1,))]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "originals"
    (folder / "x").mkdir(parents=True)
    videos.write(folder / "b.mp4", 20, rate=10)
    videos.write(folder / "x" / "a.mkv", 12)
    (folder / "bad.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that collects the paths of the examined files."""
    paths: list[str] = []
    real = examine.examine_file

    def noting(task: FileTask, reader: Reader, settings: PrepareSettings) -> object:
        paths.append(task.path)
        return real(task, reader, settings)

    monkeypatch.setattr(examine, "examine_file", noting)
    return paths


def rows(
    listed: Iterable[Video], root: Path, settings: PrepareSettings | None = None, **more: bool
) -> list[ManifestRow]:
    file = root.parent / "out" / "list.csv"
    prepare(list(listed), root, file, settings or PrepareSettings(), **more)
    return manifest.read(file)


def stamps(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_rows_have_the_order_of_the_list_and_skipped_videos_a_reason(root: Path) -> None:
    before = stamps(root)
    good, other, bad, absent = rows(LISTED, root, PrepareSettings(workers=2))
    content = (root / "b.mp4").read_bytes()
    assert good == ManifestRow(
        Video("b.mp4", (1,)),
        VideoInfo(20, 64, 48, 10.0, 2.0, "any"),
        0,
        20,
        len(content),
        hashlib.sha256(content).hexdigest(),
        None,
    )
    assert (other.video.path, other.video.labels, other.info.frames, other.reason) == ("x/a.mkv", (0, 2), 12, None)
    assert (bad.video.path, bad.info, bad.first, bad.count, bad.bytes) == ("bad.mp4", None, 0, 0, 8)
    assert bad.reason == "Invalid data found when processing input"
    assert (absent.bytes, absent.sha256, absent.reason) == (0, "", "No such file or directory")
    summary = json.loads((root.parent / "out" / "list.summary.json").read_text())
    assert (summary["videos"], summary["good"], summary["skipped"]) == (4, 2, 2)
    assert summary["skipped_by_reason"] == {bad.reason: 1, absent.reason: 1}
    assert summary["hours"] == pytest.approx((20 / 10 + 12 / 30) / 3600)
    assert summary["bytes_before"] == summary["bytes_after"] == good.bytes + other.bytes
    assert stamps(root) == before


def test_a_package_that_is_not_installed_has_no_version(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)  # of fewtokens with PYTHONPATH=src, as `make test-oldest` has it

    monkeypatch.setattr("fewtokens.versions.version", absent)
    rows(LISTED[:1], root, PrepareSettings())
    summary = json.loads((root.parent / "out" / "list.summary.json").read_text())
    assert summary["versions"]["fewtokens"] is None


def test_sections_of_one_file_have_their_own_rows_and_it_is_examined_once(root: Path, seen: list[str]) -> None:
    sections = [(None, None), (0.5, 1.0), (1.0, None), (7.0, 8.0)]
    found = rows([Video("b.mp4", (i,), *section) for i, section in enumerate(sections)], root)
    assert seen == ["b.mp4"]
    assert [(row.video.labels, row.video.start, row.video.end) for row in found] == [
        ((i,), *section) for i, section in enumerate(sections)
    ]
    assert [(row.first, row.count) for row in found] == [(0, 20), (5, 5), (10, 10), (0, 0)]
    assert found[3].reason == "no frame from 7.0 s to 8.0 s: it lasts 2.00 s"


def test_copies_are_what_the_manifest_describes(root: Path, seen: list[str]) -> None:
    before, copies = stamps(root), root.parent / "copies"
    settings = PrepareSettings(copies, short_side=24, key_frames=4)
    listed = [*LISTED, Video("b.mp4", (5,), 1.0, 1.5), Video("x/a.mkv", (7,))]
    found = rows(listed, root, settings)
    assert [row.video.path for row in found] == ["b.mp4", "x/a.mkv.mp4", "bad.mp4", "none.mp4", "b.mp4", "x/a.mkv.mp4"]
    assert [(row.video.start, row.first, row.count) for row in found[::4]] == [(None, 0, 20), (1.0, 10, 5)], (
        "a copy of the complete file"
    )
    for row in (found[0], found[1]):
        content = (copies / row.video.path).read_bytes()
        assert (row.bytes, row.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert Reader("pyav").video_info(str(copies / row.video.path)) == row.info
        assert (row.info.width, row.info.height, row.info.access) == (32, 24, "any")
    assert stamps(root) == before
    assert sorted(p.relative_to(copies).as_posix() for p in copies.rglob("*.*")) == ["b.mp4", "x/a.mkv.mp4"]
    (copies / "b.mp4").unlink()
    seen.clear()
    again = rows(listed, root, settings)
    assert [replace(row, bytes=0, sha256="") for row in again] == [replace(row, bytes=0, sha256="") for row in found]
    assert seen == ["b.mp4"]


def test_the_copy_of_a_file_that_is_listed_once_is_only_the_section(root: Path) -> None:
    copies = root.parent / "copies"
    (row,) = rows([Video("b.mp4", (1,), 0.5, 1.0)], root, PrepareSettings(copies))
    assert (row.video.path, row.video.start, row.video.end, row.first, row.count) == (
        "b.mp4_0.5_1.mp4",
        None,
        None,
        0,
        5,
    )
    frames = Reader("pyav").read(str(copies / row.video.path), range(5))
    assert [videos.number(frame) for frame in frames] == [5, 6, 7, 8, 9]


def test_only_what_changed_is_examined_again(root: Path, seen: list[str]) -> None:
    first = rows(LISTED, root)
    assert len(seen) == 4
    seen.clear()
    assert rows(LISTED, root) == first
    assert seen == []
    videos.write(root / "bad.mp4", 3)
    videos.write(root / "none.mp4", 4)
    videos.write(root / "new.mp4", 5)
    assert [r.count for r in rows([*LISTED[::-1], Video("new.mp4", (0,))], root)] == [4, 3, 12, 20, 5]
    assert sorted(seen) == ["bad.mp4", "new.mp4", "none.mp4"]
    seen.clear()
    assert rows([Video("b.mp4", (9,))], root)[0].video.labels == (9,)
    assert rows([Video("b.mp4", (9,), 1.0, 2.0)], root)[0].count == 10
    assert seen == ["b.mp4"], "a new section"


def test_other_settings_are_an_error_unless_all_files_are_examined_again(root: Path, seen: list[str]) -> None:
    rows(LISTED[:1], root)
    with pytest.raises(
        FewtokensError, match=r"started with {'checksum': True}, and the settings are now {'checksum': False}.*--again"
    ):
        rows(LISTED[:1], root, PrepareSettings(checksum=False))
    (row,) = rows(LISTED[:1], root, PrepareSettings(checksum=False), again=True)
    assert row.sha256 == ""
    assert len(seen) == 2


def test_a_file_that_timed_out_is_tried_again_only_with_more_time(root: Path, seen: list[str]) -> None:
    videos.write(root / "long.mp4", 100, size=(640, 480))
    listed = [Video("long.mp4", (0,))]
    start = time.monotonic()
    for _ in range(2):
        assert rows(listed, root, PrepareSettings(limit=0.002))[0].reason == "timed out after 0.002 s"
    assert time.monotonic() - start < 10
    assert len(seen) == 1
    assert rows(listed, root, PrepareSettings(limit=60.0))[0].reason is None
    assert len(seen) == 2


def test_a_file_whose_process_was_killed_is_tried_again(root: Path, seen: list[str]) -> None:
    good = rows(LISTED[:1], root)
    log = root.parent / "out" / "list.journal"
    head, line = log.read_text().splitlines()
    killed = {"reason": "the decoder process was killed (SIGKILL), for example because memory ran out", "info": None}
    log.write_text(f"{head}\n{json.dumps(json.loads(line) | killed)}\n")
    assert rows(LISTED[:1], root) == good
    assert len(seen) == 2


def test_an_incomplete_line_of_the_journal_is_dropped_and_the_rest_kept(root: Path, seen: list[str]) -> None:
    first = rows(LISTED, root)
    log = root.parent / "out" / "list.journal"
    lines = log.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    log.write_bytes(b"".join(lines[:3]) + lines[3][: len(lines[3]) // 2])
    seen.clear()
    assert rows(LISTED, root) == first
    assert len(seen) == 2


OLD = '{"settings": {"copies": false, "short_side": null, "key_frames": 12, "checksum": true}}\n'
OLD_LINE = '{"path": "b.mp4", "state": [1, 2], "limit": 600.0, "spans": [], "copied": null, "facts": null}\n'


@pytest.mark.parametrize("content", ["something else\n", "[]\n", "7\n", "{}\n", OLD, OLD + OLD_LINE])
def test_a_journal_of_another_version_is_an_error(content: str, root: Path) -> None:
    journal = root.parent / "out" / "list.journal"
    journal.parent.mkdir()
    journal.write_text(content)
    with pytest.raises(FewtokensError, match=r"list\.journal: it was written by another version of fewtokens.*--again"):
        rows(LISTED, root)
    assert journal.read_text() == content
    assert len(rows(LISTED, root, again=True)) == 4


@pytest.mark.parametrize("line", ["null\n", "[1]\n", '{"path": "b.mp4"}\n'])
def test_a_journal_with_a_damaged_line_is_an_error(line: str, root: Path) -> None:
    rows(LISTED, root)
    journal = root.parent / "out" / "list.journal"
    journal.write_text(journal.read_text() + line)
    with pytest.raises(FewtokensError, match="or is damaged"):
        rows(LISTED, root)


def test_a_journal_on_a_full_disk_is_an_error_and_can_be_continued(tmp_path: Path) -> None:
    file, before = tmp_path / "list.journal", resource.getrlimit(resource.RLIMIT_FSIZE)
    result = FileResult(None, 1.0, {}, None, None, 0, "", "damaged")
    with closing(Journal(file, {})) as journal:
        journal.add("a.mp4", result)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 20, before[1]))
        try:
            with pytest.raises(FewtokensError, match=r"Cannot write .*list\.journal: File too large"):
                journal.add("b.mp4", result)
            journal.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with closing(Journal(file, {})) as journal:
        assert journal.results == {"a.mp4": result}
        journal.add("b.mp4", result)
    with closing(Journal(file, {})) as journal:
        assert journal.results == {"a.mp4": result, "b.mp4": result}


def test_a_second_process_on_one_manifest_is_an_error(root: Path) -> None:
    journal = Journal(root.parent / "list.journal", {})
    with closing(journal), pytest.raises(FewtokensError, match=r"Another `prepare` process is writing .*list\.journal"):
        prepare(LISTED, root, root.parent / "list.csv", PrepareSettings())
    prepare(LISTED[:1], root, root.parent / "b.csv", PrepareSettings())


def test_a_copy_never_overwrites_another_copy_or_an_original(root: Path) -> None:
    videos.write(root / "x" / "a.mkv.mp4", 3)
    listed = [Video("x/a.mkv", (0,)), Video("x/a.mkv.mp4", (0,))]
    before = stamps(root)
    with pytest.raises(
        FewtokensError,
        match=r"copy of x/a\.mkv\.mp4 would overwrite .*copies/x/a\.mkv\.mp4, which belongs to x/a\.mkv\.",
    ):
        rows(listed, root, PrepareSettings(root.parent / "copies"))
    with pytest.raises(FewtokensError, match=r"which belongs to the original x/a\.mkv\.mp4"):
        rows(listed[1:], root, PrepareSettings(root))
    with pytest.raises(FewtokensError, match=r"which belongs to the original b\.mp4"):
        rows(LISTED[:1], root, PrepareSettings(root / "x" / ".."))
    assert stamps(root) == before


def test_pipes_folders_and_invalid_names_are_skipped_at_once(root: Path) -> None:
    os.mkfifo(root / "pipe.mp4")
    (root / "folder.mp4").mkdir()
    found = rows([Video("pipe.mp4", (0,)), Video("folder.mp4", (0,)), Video("a" * 300, (0,)), Video("b\0", (0,))], root)
    assert [row.reason for row in found[:3]] == ["it is not a file", "it is not a file", "File name too long"]


def test_an_output_that_cannot_be_written_is_an_error(root: Path) -> None:
    with pytest.raises(FewtokensError, match="Cannot write"):
        rows(LISTED, root, PrepareSettings(root / "b.mp4" / "copies"))
    with pytest.raises(FewtokensError, match="Cannot write"):
        prepare(LISTED, root, root / "b.mp4" / "list.csv", PrepareSettings())
    (root.parent / "precious.csv").write_text("mine")
    with pytest.raises(FewtokensError, match=r"precious\.csv exists without a journal.*--again"):
        prepare(LISTED, root, root.parent / "precious.csv", PrepareSettings())
    with pytest.raises(FewtokensError, match=r"must end in \.csv, got .*a\.json"):
        prepare(LISTED, root, root.parent / "a.json", PrepareSettings())


def test_absolute_paths_and_odd_names(root: Path) -> None:
    names = [str(root.parent / "outside.mp4"), "../outside.mp4", "a,b\n.mp4", os.fsdecode(b"\xff.mp4")]
    videos.write(root.parent / "outside.mp4", 3)
    for name in names[2:]:
        (root / name).write_bytes((root / "b.mp4").read_bytes())
    assert [row.video.path for row in rows([Video(name, (0,)) for name in names], root)] == names
    copies = root.parent / "copies"
    found = rows([Video(name, (0,)) for name in names[1:]], root, PrepareSettings(copies), again=True)
    assert [row.count for row in found] == [3, 20, 20]
    assert all((copies / row.video.path).is_file() for row in found)


class Stuck(Reader):
    """A reader whose process hangs at one file while it holds the interpreter's lock."""

    def __init__(self, decoder: str, limit: float) -> None:
        super().__init__(decoder, limit)
        self.stuck = self.process, WatchedProcess("stuck", limit)

    def examine(self, path: str, *rest: object, **more: object) -> VideoInfo:
        self.process = self.stuck["hang.mp4" in path]
        if "hang.mp4" not in path:
            return super().examine(path, *rest, **more)
        try:
            return self.process.call("spin")
        except CallAborted as ended:
            raise UnreadableError(path, str(ended)) from None


@pytest.fixture
def hanging(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[Video]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setattr(examine, "Reader", Stuck)
    (root / "hang.mp4").hardlink_to(root / "b.mp4")
    return [Video("hang.mp4", (0,)), Video("b.mp4", (1,))]


def test_a_file_that_hangs_its_decoder_is_skipped_after_the_limit(hanging: list[Video], root: Path) -> None:
    start = time.monotonic()
    bad, good = rows(hanging, root, PrepareSettings(limit=1.5))
    assert (bad.reason, good.reason) == ("timed out after 1.5 s", None)
    assert time.monotonic() - start < 8


def test_closing_the_generator_ends_even_a_process_that_hangs(hanging: list[Video], root: Path) -> None:
    tasks = [FileTask(e.path, str(root / e.path), frozenset({(None, None)}), None, None) for e in hanging]
    results = examine.examine_files(tasks, PrepareSettings(workers=2))
    assert next(results)[0].path == "b.mp4"
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 3


def test_a_reader_can_be_interrupted(root: Path) -> None:
    reader = Reader("pyav")
    reader.video_info(str(root / "b.mp4"))
    reader.process.interrupt()
    with pytest.raises(UnreadableError, match="SIGKILL"):
        reader.video_info(str(root / "b.mp4"))
