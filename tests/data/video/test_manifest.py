"""A manifest returns the rows that were written, with any file name, and errors name the damaged line."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from fewtokens.data.video import manifest
from fewtokens.data.video.manifest import ManifestRow
from fewtokens.data.video.records import Video, VideoInfo
from fewtokens.errors import FewtokensError

INFO = VideoInfo(300, 340, 256, 30000 / 1001, 0.1 + 0.2, "any")
GOOD = ManifestRow(Video("a/b.mp4", (3,)), INFO, 0, 300, 12345, "0" * 64, None)
ROWS = [
    GOOD,
    replace(GOOD, video=Video("a/b.mp4", (3, 5, 0), 1 / 3, 1e-7 + 2), first=10, count=51),
    replace(GOOD, video=Video("a/b.mp4", ()), sha256=""),
    ManifestRow(Video("bad.mp4", (0,), 2.0), None, 0, 0, 0, "", "no frame, or \"none\": 'x'\nat all"),
]
NAMES = [
    "a,b.mp4",
    '"a".mp4',
    "a'b;c d.mp4",
    "ä漢🎬.mp4",
    "two\nlines\r.mp4",
    "return\r.mp4",
    os.fsdecode(b"\xff\xfe.mp4"),
    "/x/y.mp4",
    " #",
]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = ROWS + [replace(GOOD, video=Video(name, (3,))) for name in NAMES]
    manifest.write(tmp_path / "new" / "a.csv", rows)
    assert manifest.read(tmp_path / "new" / "a.csv") == rows
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.csv"]


def test_the_file_is_plain(tmp_path: Path) -> None:
    manifest.write(tmp_path / "a.csv", ROWS[1:2])
    header, line = (tmp_path / "a.csv").read_text().splitlines()
    assert header == "path,labels,start,end,frames,width,height,fps,seconds,access,first,count,bytes,sha256,reason"
    assert line.startswith(
        "a/b.mp4,3;5;0,0.3333333333333333,2.0000001,300,340,256,29.97002997002997,0.30000000000000004,any,"
    )


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("path,labels", "path,label", "line 1.*the header path,labels"),
        (",any,", ",anybody,", "line 2.*access is 'anybody', not one of any, pyav, sequential"),
        (",any,", ",", "line 2.*14 cells instead of 15"),
        (",3,", ",three,", "line 2.*labels is 'three'"),
        (",300,340", ",300.5,340", r"line 2.*frames is '300\.5'"),
        (",300,340", ",30,340", "line 2.*300 frames from frame 0 are not a section of 30 frames"),
        (",0,300,", ",0,0,", "line 2.*0 frames from frame 0 are not a section"),
        (",0,300,", ",1,300,", "line 2.*300 frames from frame 1 are not a section of 300 frames"),
        ("a/b.mp4", "", "line 2.*the path is empty"),
        ("29.97002997002997", "nan", "line 2.*fps is 'nan'"),
        ("a/b.mp4", '"a/b.mp4', "line [23]: .*(quot|end of data)"),
        ("\n", "", "line 2.*the last line is incomplete"),
        (",\n", ",so\n", "line 2.*either a reason or the properties of the file, got so"),
    ],
)
def test_what_does_not_fit_is_named(old: str, new: str, match: str, tmp_path: Path) -> None:
    manifest.write(tmp_path / "a.csv", [GOOD])
    header, _, rest = (tmp_path / "a.csv").read_text().partition("\n")
    text = f"{header.replace(old, new)}\n{rest.replace(old, new)}"
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(FewtokensError, match=match) as caught:
        manifest.read(tmp_path / "a.csv")
    assert str(tmp_path / "a.csv") in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n", None])
def test_what_is_no_manifest_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.csv").write_text(content)
    with pytest.raises(FewtokensError, match=r"a\.csv, line 1"):
        manifest.read(tmp_path / "a.csv")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FewtokensError, match=r"file/a\.csv.*Free some space"):
        manifest.write(tmp_path / "file" / "a.csv", ROWS)
