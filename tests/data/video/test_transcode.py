"""Copies show the same frames at the same times, upright, and every decoder finds them by number."""

import resource
import shutil
from pathlib import Path

import av
import numpy as np
import pytest

import videos
from fewtokens.data.video import container, decoders, transcode
from fewtokens.data.video.reader import Reader
from fewtokens.data.video.records import UnreadableError, VideoInfo
from fewtokens.errors import FewtokensError

KINDS = {
    "h264": ("mp4", {}),
    "sound, 10 bits": ("mkv", {"sound": True, "pix_fmt": "yuv420p10le"}),
    "one key frame": ("mp4", {"options": {"x264-params": "bframes=3:keyint=250"}}),
    "odd size, 4:4:4": ("mkv", {"pix_fmt": "yuv444p", "size": (65, 49)}),
    "turned left": ("mov", {"rotation": 90}),
    "turned right": ("mp4", {"rotation": -90}),
    "upside down": ("mp4", {"rotation": 180}),
    "variable rate": ("mp4", {"times": [i * i // 4 + i for i in range(30)]}),
    "avi": ("avi", {"codec": "mpeg4", "options": {"bf": "2"}}),
    "transport stream": ("ts", {}),
    "vp9": ("webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}),
    "full range": ("mkv", {"codec": "mjpeg", "options": {}, "pix_fmt": "yuvj420p"}),
}


def examine(path: Path | str, target: Path | str | None, **more: object) -> VideoInfo:
    wanted = {"start": None, "end": None, "short_side": None, "key_frames": 12} | more
    return transcode.examine(str(path), None if target is None else str(target), **wanted)


def shown(path: Path) -> list[int]:
    """Return the number that each frame shows, and check that it is upright."""
    frames = decoders.read(str(path), range(container.video_info(str(path)).frames))
    assert all(videos.upright(frame) for frame in frames)
    return [videos.number(frame) for frame in frames]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_show_the_same_frames_at_the_same_times(kind: str, tmp_path: Path) -> None:
    suffix, arguments = KINDS[kind]
    source, target = videos.write(tmp_path / f"a.{suffix}", **arguments), tmp_path / "copy.mp4"
    before = container.packet_index(str(source))
    assert examine(source, None) == before.info
    made = examine(source, target)
    after = container.packet_index(str(target))
    assert made == after.info
    assert (made.frames, made.access) == (30, "any")
    assert (made.width, made.height) == (before.info.width // 2 * 2, before.info.height // 2 * 2)
    assert shown(target) == list(range(30))
    if len(before.times):
        times = [(index.times - index.times[0]) * index.unit for index in (before, after)]
        assert np.abs(times[0] - times[1]).max() < 2e-3
        # At a variable rate the duration of the last frame is lost, which changes the average a little.
        assert made.fps == pytest.approx(before.info.fps, rel=0.1 if kind == "variable rate" else 0.01)
        assert made.seconds == pytest.approx(before.info.seconds, rel=0.01)
    frames = [decoders.read(str(path), [4, 20], short_side=48).astype(int) for path in (source, target)]
    assert abs(frames[0].mean((0, 2, 3)) - frames[1].mean((0, 2, 3))).max() < 2.5, "the colors differ"


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("size", [(64, 48), (98, 50)], ids=str)
def test_copies_of_rotated_files_are_as_bright_as_the_original(
    rotation: int, size: tuple[int, int], tmp_path: Path
) -> None:
    source = videos.write(tmp_path / "a.mp4", 8, rotation=rotation, size=size)
    examine(source, tmp_path / "copy.mp4")
    frames = [decoders.read(str(path), range(8)).astype(float) for path in (source, tmp_path / "copy.mp4")]
    assert abs((frames[0] - frames[1]).mean()) < 0.2  # of 255; by way of RGB it was 0.7
    assert abs(frames[0] - frames[1]).mean() < 1.2


@pytest.mark.parametrize(("key_frames", "short_side"), [(1, 24), (5, 256), (12, None)])
def test_key_frames_have_the_distance_of_the_setting_and_nothing_is_enlarged(
    key_frames: int, short_side: int | None, tmp_path: Path
) -> None:
    source = videos.write(tmp_path / "a.mp4", options={"x264-params": "keyint=250"}, size=(98, 64), sound=True)
    made = examine(source, tmp_path / "b.mp4", key_frames=key_frames, short_side=short_side)
    assert (made.width, made.height) == ((36, 24) if short_side == 24 else (98, 64))
    times = container.packet_index(str(tmp_path / "b.mp4")).times.tolist()
    assert container.packet_index(str(tmp_path / "b.mp4")).keys == times[::key_frames]
    with av.open(str(tmp_path / "b.mp4")) as file:
        assert [stream.type for stream in file.streams] == ["video"]


def test_copies_of_sections_have_their_frames(tmp_path: Path) -> None:
    source = videos.write(tmp_path / "a.mp4", rate=10)
    assert examine(source, tmp_path / "b.mp4", start=1.0, end=2.0).frames == 10
    assert shown(tmp_path / "b.mp4") == list(range(10, 20))
    cut = videos.cut(source, tmp_path / "cut.mp4", 7)
    assert examine(cut, tmp_path / "c.mp4", start=None, end=1.0).frames == 10
    assert shown(tmp_path / "c.mp4") == list(range(7, 17))
    with pytest.raises(UnreadableError, match="no frame from 4"):
        examine(source, tmp_path / "d.mp4", start=4.0)
    assert not (tmp_path / "d.mp4").exists()


@pytest.mark.parametrize("name", ["bad.mp4", "cut.mp4"])
def test_damaged_files_leave_no_copy(name: str, tmp_path: Path) -> None:
    content = videos.write(tmp_path / "a.mkv", count=60).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    reader = Reader("pyav")
    with pytest.raises(UnreadableError):
        reader.examine(
            str(tmp_path / name), str(tmp_path / "b.mp4"), start=None, end=None, short_side=None, key_frames=12
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mkv", "bad.mp4", "cut.mp4"]


def test_originals_are_never_overwritten(tmp_path: Path) -> None:
    source = videos.write(tmp_path / "a.mp4")
    (tmp_path / "link.mp4").hardlink_to(source)
    content, reader = source.read_bytes(), Reader("pyav")
    for target in (source, tmp_path / "x" / ".." / "a.mp4", tmp_path / "link.mp4"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(FewtokensError, match=r"copy .* would overwrite its original"):
            reader.examine(str(source), str(target), start=None, end=None, short_side=24, key_frames=12)
    assert source.read_bytes() == content


def test_a_folder_that_cannot_be_written_is_not_a_damaged_file(tmp_path: Path) -> None:
    source, reader = videos.write(tmp_path / "a.mp4"), Reader("pyav")
    (tmp_path / "folder.mp4").mkdir()
    targets = [tmp_path / "absent" / "b.mp4", source / "b.mp4", tmp_path / "folder.mp4"]
    targets += [Path("/dev/full/b.mp4"), Path("/proc/b.mp4")]
    for target in targets:
        with pytest.raises(FewtokensError, match="Cannot write") as caught:
            reader.examine(str(source), str(target), start=None, end=None, short_side=None, key_frames=12)
        assert not isinstance(caught.value, UnreadableError)


def test_a_full_disk_is_not_a_damaged_file(tmp_path: Path) -> None:
    source = videos.write(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").symlink_to("/dev/full")
    with pytest.raises(FewtokensError, match="No space left") as caught:
        examine(source, tmp_path / "b.mp4")
    assert not isinstance(caught.value, UnreadableError)


def test_a_disk_that_becomes_full_leaves_no_incomplete_copy(tmp_path: Path) -> None:
    source, folder = videos.write_noise(tmp_path / "a.mp4"), tmp_path / "copies"
    folder.mkdir()
    reader, before = Reader("pyav"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (source.stat().st_size // 2, before[1]))
    try:  # the decoder process inherits the limit
        with pytest.raises(FewtokensError, match=r"Cannot write .*: File too large\. Free some space") as caught:
            reader.examine(str(source), str(folder / "a.mp4"), start=None, end=None, short_side=None, key_frames=12)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not isinstance(caught.value, UnreadableError)
    assert not list(folder.iterdir())


def test_a_wrong_time_is_noticed(tmp_path: Path) -> None:
    path = videos.write(tmp_path / "a.webm", 40, codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"})
    content = bytearray(path.read_bytes())
    place = content.rindex(bytes([0xA3]), 0, len(content) - 100)  # a block: its size, the track, then its time
    width = 8 - content[place + 1].bit_length() + 1
    assert content[place + 1 + width] == 0x81
    content[place + 2 + width] ^= 2  # 512 ms
    path.write_bytes(content)
    with pytest.raises(UnreadableError, match="wrong time"):
        examine(path, None)


@pytest.mark.parametrize("name", ["ä漢🎬.mp4", "a:b,[c].mp4", "http:x.mp4", "%d.mp4", "\udcff.mp4"])
def test_names_may_be_anything(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.move(videos.write(tmp_path / "a.mp4"), tmp_path / name)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    reader = Reader("pyav")
    found = reader.examine(name, f"out/{name}", start=None, end=None, short_side=None, key_frames=12)
    assert reader.video_info(f"out/{name}") == found
    assert found.frames == 30
