"""The command line of prepare: its output, its exit codes, and that a run which was killed continues."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import videos
from conftest import environment
from fewtokens.data.prepare import __main__ as prepare
from fewtokens.data.video import manifest

COMMAND = [sys.executable, "-m", "fewtokens.data.prepare"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    for name in ("down", "up"):
        (folder / name).mkdir(parents=True)
        for index in range(2):
            videos.write(folder / name / f"{index}.mp4", 8 + index)
    (folder / "up" / "2 [b].mp4").write_bytes(b"no video")
    return folder


@pytest.fixture
def many(tmp_path: Path) -> list[str]:
    """Return the arguments for a data set that takes a while."""
    folder = tmp_path / "many"
    folder.mkdir()
    one = videos.write(tmp_path / "one.mp4", 60, size=(320, 240))
    for index in range(40):
        os.link(one, folder / f"{index}.mp4")
    (tmp_path / "list.txt").write_text("".join(f"{index}.mp4 {index}\n" for index in range(40)))
    found = {"--root": folder, "--list": tmp_path / "list.txt", "--write": tmp_path / "out.csv"}
    return [*(str(word) for pair in found.items() for word in pair), "--transcode", str(tmp_path / "copies")]


def start(arguments: list[str], tmp_path: Path, files: int) -> subprocess.Popen[str]:
    """Start the command and return its process as soon as it has examined `files` files."""
    command = [*COMMAND, *arguments, "--workers", "2"]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    log = tmp_path / "out.journal"
    while not log.exists() or log.read_bytes().count(b"\n") < files + 1:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


def test_class_folders_become_a_manifest(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--root", str(root), "--list", str(root), "--write", str(tmp_path / "out.csv"), "--workers", "1"]
    assert prepare.main(arguments) == 0
    rows = manifest.read(tmp_path / "out.csv")
    assert [(row.video.path, row.video.labels, row.count) for row in rows] == [
        ("down/0.mp4", (0,), 8),
        ("down/1.mp4", (0,), 9),
        ("up/0.mp4", (1,), 8),
        ("up/1.mp4", (1,), 9),
        ("up/2 [b].mp4", (1,), 0),
    ]
    said = capsys.readouterr().out
    assert "skipped: up/2 [b].mp4: Invalid data found when processing input" in said
    assert "4 of 5 videos are good" in said
    assert json.loads((tmp_path / "out.summary.json").read_text())["classes"] == ["down", "up"]


def test_only_the_first_skipped_videos_are_printed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["up/0.mp4 0", *(f"none{index}.mp4 1" for index in range(14))]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    arguments = ["--root", str(root), "--list", str(tmp_path / "list.txt"), "--write", str(tmp_path / "out.csv")]
    assert prepare.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.count("skipped: none") == 10
    assert "and 4 more" in said
    (tmp_path / "list.txt").write_text("\n".join(lines[1:]))
    assert prepare.main(arguments) == 1
    assert "None of the 14 listed videos" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--short-side", "256"], "--short-side scales the copies.*Add --transcode"),
        (["--short-side", "2", "--transcode", "x"], "`--short-side` must be at least 16 pixels, got 2"),
        (["--workers", "0"], "`--workers` must be at least 1, got 0"),
        (["--limit", "nan"], "`--limit` must be more than 0 seconds, got nan"),
        (["--key-frames", "0"], "`--key-frames` must be at least 1, got 0"),
        (["--list", "nothing"], "Cannot read the list .*nothing"),
        (["--write", "LIST"], "--write would overwrite the list"),
        (["--write", "x.json"], r"must end in \.csv, got x\.json"),
    ],
)
def test_invalid_arguments_are_errors(
    arguments: list[str], match: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.txt").write_text("up/0.mp4 0\n")
    given = ["--root", str(root), "--list", str(tmp_path / "list.txt"), "--write", str(tmp_path / "out.csv")]
    assert prepare.main(given + [word.replace("LIST", str(tmp_path / "list.txt")) for word in arguments]) == 1
    assert re.search(match, capsys.readouterr().err)
    assert (tmp_path / "list.txt").read_text() == "up/0.mp4 0\n"


def test_a_killed_run_continues(many: list[str], tmp_path: Path) -> None:
    process = start(many, tmp_path, 4)
    process.kill()
    process.wait()
    done = (tmp_path / "out.journal").read_bytes().count(b"\n") - 1
    assert not (tmp_path / "out.csv").exists()
    assert 4 <= done < 40
    (tmp_path / "copies" / ".1-1.part.mp4").write_bytes(b"half")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "copies").glob("[0-9]*")}
    assert prepare.main(many) == 0
    again = [path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp]
    assert len(stamps) >= done
    assert len(again) <= 2, "those that were finished but not yet in the journal"
    rows = manifest.read(tmp_path / "out.csv")
    assert [(row.video.path, row.video.labels, row.count) for row in rows] == [
        (f"{i}.mp4", (i,), 60) for i in range(40)
    ]
    assert len(list((tmp_path / "copies").iterdir())) == 40


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_run_ends_at_once_without_a_traceback(number: int, many: list[str], tmp_path: Path) -> None:
    process = start(many, tmp_path, 2)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (tmp_path / "out.journal").read_bytes().count(b"\n") < 20, "of 41 lines"
    assert process.returncode == 128 + number
    assert said.strip() == "Stopped. The same command continues from here."
    assert not list((tmp_path / "copies").glob(".*"))


@pytest.mark.parametrize("space", ["copies", "journal"])
def test_a_full_disk_ends_a_run_with_a_message(space: str, tmp_path: Path) -> None:
    """Write to a file system of 320 KiB: either the copies do not fit, or a page for the journal."""
    disk, source = tmp_path / "disk", videos.write_noise(tmp_path / "0.mp4", 10)
    disk.mkdir()
    for index in range(1, 12):
        os.link(source, tmp_path / f"{index}.mp4")
    (tmp_path / "list.txt").write_text("".join(f"{index}.mp4 {index}\n" for index in range(12)))
    found = {"--root": tmp_path, "--list": tmp_path / "list.txt", "--write": disk / "out.csv"}
    copies = disk / "copies" if space == "copies" else tmp_path / "copies"
    words = [*(str(word) for pair in found.items() for word in pair), "--transcode", str(copies), "--workers", "1"]
    mount = f"mount -t tmpfs -o size=320k tmpfs {disk} || exit 77; "
    fill = "" if space == "copies" else f"head -c {316 * 1024} /dev/zero > {disk}/fill; "
    show = f"; code=$?; ls -A {disk} {copies}; exit $code"
    script = mount + fill + shlex.join([*COMMAND, *words]) + show
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    name = "copies/.*" if space == "copies" else r"out\.journal"
    message = rf"Error: Cannot write {disk}/{name}: No space left on device. Free some space or choose another path\."
    assert re.fullmatch(message, done.stderr.strip())
    assert done.returncode == 1
    assert ".part" not in done.stdout
    assert "out.csv" not in done.stdout


def test_help_shows_a_command() -> None:
    assert "python -m fewtokens.data.prepare --root" in prepare.parser().format_help()
