"""Lists of videos in all supported formats, and the videos of a part."""

import json
from pathlib import Path

import pytest

from fewtokens.data.skipped import Skipped
from fewtokens.data.video import manifest, parts
from fewtokens.data.video.parts import list_videos, read_classes
from fewtokens.data.video.records import Video, VideoInfo
from fewtokens.errors import FewtokensError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def listed(root: Path, text: str, **settings) -> list[Video]:
    (root / "list.txt").write_text(text)
    return list_videos(root, "list.txt", **settings)[0]


def test_class_folders_count_every_kind_of_video_and_nothing_else(tmp_path: Path) -> None:
    touch(tmp_path, "train/b_c/2.MKV", "train/b_c/1.mp4", "train/a/x.webm", "train/a/notes.txt", "train/.hidden/1.mp4")
    found, missing = list_videos(tmp_path, "train")
    assert missing == []
    assert found == [
        Video("train/a/x.webm", (0,)),
        Video("train/b_c/1.mp4", (1,)),
        Video("train/b_c/2.MKV", (1,)),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "a b/c,d.mp4 7",
        "a b/c,d.mp4\t7",
        '"a b/c,d.mp4",7',
        'path,label\n"a b/c,d.mp4",7',
        'LABEL, path\n7, "a b/c,d.mp4"',
    ],
)
def test_a_path_may_contain_blanks_and_commas(tmp_path: Path, line: str) -> None:
    assert listed(tmp_path, f"\n{line}\n\n") == [Video("a b/c,d.mp4", (7,))]


@pytest.mark.parametrize(
    "line", ["x/1 2.mp4 7 0.5 10", "x/1 2.mp4,7,0.5,10", "path,label,start,end\nx/1 2.mp4,7,0.5,10"]
)
def test_start_and_end(tmp_path: Path, line: str) -> None:
    assert listed(tmp_path, line) == [Video("x/1 2.mp4", (7,), 0.5, 10.0)]


def test_start_alone_needs_a_header(tmp_path: Path) -> None:
    assert listed(tmp_path, "path,label,start\na.mp4,7,0.5\nb.mp4,6,") == [
        Video("a.mp4", (7,), 0.5),
        Video("b.mp4", (6,)),
    ]


@pytest.mark.parametrize("text", ["a.mp4 3 5\nb.mp4 1", "a.mp4,3,5\nb.mp4,1", "path,label\na.mp4,3;5\nb.mp4,1"])
def test_several_labels(tmp_path: Path, text: str) -> None:
    assert listed(tmp_path, text, multilabel=True) == [Video("a.mp4", (3, 5)), Video("b.mp4", (1,))]


def test_no_label_is_none_of_several(tmp_path: Path) -> None:
    assert listed(tmp_path, "path,label\na.mp4,", multilabel=True) == [Video("a.mp4", ())]


def test_names_are_numbered_in_their_order_or_as_given(tmp_path: Path) -> None:
    text = "b.mp4,riding a_bike\na.mp4,archery\n"
    assert listed(tmp_path, text) == [Video("b.mp4", (1,)), Video("a.mp4", (0,))]
    assert listed(tmp_path, text, classes=["riding a bike", "x", "archery"]) == [
        Video("b.mp4", (0,)),
        Video("a.mp4", (2,)),
    ]
    with pytest.raises(FewtokensError, match="archery"):
        listed(tmp_path, text, classes=["riding a bike"])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a.mp4 1\nb.mp4", 2),
        ("a.mp4 1 2", 1),
        ("5", 1),
        ("a.mp4 1 5 2", 1),
        ("a.mp4 1 -5 2", 1),
        ("path,label,start,end\na.mp4,1,x,2", 2),
        ("path,label\na.mp4,1\n\nb.mp4,1,2", 4),
        ("path,label\n,1", 2),
        ("id,actions\nAB,c09x 1 2", 2),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path: Path, text: str, line: int) -> None:
    with pytest.raises(FewtokensError, match=f"line {line} of .*list.txt"):
        listed(tmp_path, text)


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"\0\1\2",
        b"x" * 200_000,
        b"[1, 2]",
        b'{"a.mp4": 1.5}',
        b"{",
        b'{"a": {"annotations": [{"label": "x"}]}}',
        b'{"a": {"label": "x", "segment": [1]}}',
        b'{"a": {"label": "x", "segment": ["one", 2]}}',
    ],
)
def test_what_is_no_list_is_refused(tmp_path: Path, content: bytes | None) -> None:
    name = "list.json" if content and content[0] in b"[{" else "list.txt"
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FewtokensError, match=name):
        list_videos(tmp_path, name)


def test_the_official_csv_finds_its_files_and_says_which_are_not_there(tmp_path: Path) -> None:
    touch(tmp_path, "videos/air_drumming/-3B32lodo2M_000059_000069.mp4", "elsewhere/_dbcJuKJQNs.mkv")
    (tmp_path / "val.csv").write_text(
        "label,youtube_id,time_start,time_end,split,is_cc\n"
        "air drumming,-3B32lodo2M,59,69,val,0\n"
        "abseiling,_dbcJuKJQNs,40,50,val,0\n"
        "abseiling,gone,1,11,val,0\n"
    )
    found, missing = list_videos(tmp_path, "val.csv")
    assert found == [
        Video("videos/air_drumming/-3B32lodo2M_000059_000069.mp4", (1,)),  # the file contains only the section
        Video("elsewhere/_dbcJuKJQNs.mkv", (0,), 40.0, 50.0),
    ]
    assert missing == [Video("gone", (0,), 1.0, 11.0)]


def test_kinetics_json(tmp_path: Path) -> None:
    touch(tmp_path, "a_000001_000011.mp4")
    notes = {"annotations": {"label": "abseiling", "segment": [1.0, 11.0]}, "subset": "val", "url": "x"}
    (tmp_path / "val.json").write_text(json.dumps({"a": notes}))
    assert list_videos(tmp_path, "val.json")[0] == [Video("a_000001_000011.mp4", (0,))]


def test_charades(tmp_path: Path) -> None:
    touch(tmp_path, "v/46GP8.mp4", "v/N11GT.mp4")
    (tmp_path / "train.csv").write_text(
        "id,subject,actions,length\n"
        '46GP8,HR43,"c092 11.90 21.20;c147 0.00 12.60;c092 25.00 26.00",24.83\n'
        "N11GT,0KZ7,,18.0\n"
    )
    assert list_videos(tmp_path, "train.csv", multilabel=True)[0] == [
        Video("v/46GP8.mp4", (92, 147)),
        Video("v/N11GT.mp4", ()),
    ]


def test_avid(tmp_path: Path) -> None:
    touch(tmp_path, "x/aa.mp4", "x/bb.mp4", "x/cc.mp4")
    (tmp_path / "one.json").write_text('{"aa.mp4": "tap dancing", "bb.mp4": "none", "cc.mp4": "archery"}')
    assert [video.labels for video in list_videos(tmp_path, "one.json")[0]] == [(2,), (1,), (0,)]
    assert [video.labels for video in list_videos(tmp_path, "one.json", multilabel=True)[0]] == [(1,), (), (0,)]
    (tmp_path / "many.json").write_text('{"aa.mp4": ["tap dancing", "archery"], "bb.mp4": []}')
    assert [video.labels for video in list_videos(tmp_path, "many.json", multilabel=True)[0]] == [(1, 0), ()]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"\\"air drumming\\"": 1, "abseiling": "0"}'),
        ("b.json", '["abseiling", "air drumming"]'),
        ("c.txt", "abseiling\nair drumming\n"),
        ("d.csv", "id,name\n1,air drumming\n0,abseiling\n"),
    ],
)
def test_files_of_class_names(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert [key.strip('"') for key in read_classes(tmp_path / name)] == ["abseiling", "air drumming"]


@pytest.mark.parametrize("text", ['{"a": 0, "b": 2}', '{"a": 0, "b": 0}', '{"a": "x"}', "5"])
def test_gaps_in_the_numbers_of_classes_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(FewtokensError, match=r"c\.json"):
        read_classes(tmp_path / "c.json")


def test_a_manifest_has_the_properties_of_files_and_the_skipped_videos(tmp_path: Path) -> None:
    info = VideoInfo(300, 340, 256, 29.97, 10.01, "any")
    good = manifest.ManifestRow(Video("a.mp4", (3,), 1.0, 2.0), info, 30, 30, 1234, "ab", None)
    bad = manifest.ManifestRow(Video("b.mp4", (3,)), None, 0, 0, 7, "", "the file is empty")
    manifest.write(tmp_path / "train.csv", [good, bad])
    videos, skipped = parts.read_part(tmp_path, "train.csv", "train", 4)
    assert videos == [good]
    assert skipped == [Skipped("train", "b.mp4", "skipped by the manifest: the file is empty")]


@pytest.mark.parametrize(("label", "classes", "several"), [("3", 3, False), ("1;2", 5, False), ("9;1", 9, True)])
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, label: str, classes: int, several: bool) -> None:
    (tmp_path / "list.csv").write_text(f"path,label\na.mp4,{label}\n")
    with pytest.raises(FewtokensError, match=r"a\.mp4"):
        parts.read_part(tmp_path, "list.csv", "val", classes, multilabel=several)


def test_the_number_of_names_is_compared(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.mp4", "train/b/1.mp4", "val/b/1.mp4")
    order = ["train", "val"]
    # The names of the training part, although the validation part has only one of them.
    assert parts.ordered_class_names(tmp_path, None, order, 2, False) == ["a", "b"]
    with pytest.raises(FewtokensError, match=r"data\.classes"):
        parts.ordered_class_names(tmp_path, None, order, 400, False)
    (tmp_path / "names.txt").write_text("b\na\nc\n")
    assert parts.ordered_class_names(tmp_path, "names.txt", order, 3, False) == ["b", "a", "c"]


def test_folders_have_paths_below_the_root_also_if_it_is_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "set/train/a/1.mp4", "elsewhere/a/2.mp4")
    monkeypatch.chdir(tmp_path)
    for source in ("train", str(tmp_path / "set" / "train")):
        assert list_videos(Path("set"), source)[0] == [Video("train/a/1.mp4", (0,))]
    assert list_videos(Path("set"), "../elsewhere")[0] == [Video("../elsewhere/a/2.mp4", (0,))]
    assert list_videos(Path("set"), str(tmp_path / "elsewhere"))[0] == [
        Video(str(tmp_path / "elsewhere/a/2.mp4"), (0,))
    ]
    assert parts.ordered_class_names(Path("set"), None, ["train"], 1, False) == ["a"]
