"""All decoders return the right frames from every kind of file; errors name the files that cannot be read."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import videos
from fewtokens.data.video import container, decoders, records
from fewtokens.data.video.records import UnreadableError
from fewtokens.errors import FewtokensError

GROUPS = "bframes=3:keyint=10:min-keyint=10:scenecut=0"
# kind: (suffix, arguments of videos.write, `VideoInfo.access`)
KINDS = {
    "h264": ("mp4", {"options": {"x264-params": GROUPS}}, "any"),
    "one key frame": ("mp4", {"options": {"x264-params": "bframes=3:keyint=250"}}, "any"),
    "10 bits": ("mp4", {"pix_fmt": "yuv420p10le"}, "pyav"),
    "4:4:4, odd size": ("mkv", {"pix_fmt": "yuv444p", "size": (65, 49)}, "any"),
    "with sound": ("mp4", {"sound": True}, "any"),
    "variable rate": ("mp4", {"times": [i * i // 4 + i for i in range(30)]}, "any"),
    "turned left": ("mov", {"rotation": 90}, "any"),
    "turned right": ("mp4", {"rotation": -90}, "any"),
    "upside down": ("mp4", {"rotation": 180}, "any"),
    "vp9": ("webm", {"codec": "libvpx-vp9", "options": {"g": "10", "deadline": "realtime", "cpu-used": "8"}}, "any"),
    "hevc": ("mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none:open-gop=0:keyint=10"}}, "any"),
    "vp8": ("webm", {"codec": "libvpx", "options": {"g": "10", "deadline": "realtime", "cpu-used": "8"}}, "pyav"),
    "mjpeg": ("mp4", {"codec": "mjpeg", "options": {}, "pix_fmt": "yuvj420p"}, "pyav"),
    "open groups": ("mp4", {"options": {"x264-params": f"{GROUPS}:open-gop=1"}}, "pyav"),
    "open groups, hevc": ("mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=10"}}, "pyav"),
    "no whole key frames": ("mp4", {"options": {"x264-params": "intra-refresh=1:keyint=10"}}, "pyav"),
    "interlaced": ("mp4", {"options": {"flags": "+ildct+ilme", "x264-params": "tff=1"}}, "pyav"),
    "mpeg-4 part 2": ("mp4", {"codec": "mpeg4", "options": {"bf": "2", "g": "10"}}, "pyav"),
    "avi": ("avi", {"codec": "mpeg4", "options": {"bf": "2", "g": "10"}}, "sequential"),
    "transport stream": ("ts", {"options": {"x264-params": GROUPS}}, "sequential"),
}


def make(kind: str, folder: Path) -> str:
    suffix, arguments, _ = KINDS[kind]
    return str(videos.write(folder / f"clip.{suffix}", **arguments))


def numbers(path: str, indices: list[int], decoder: str, short_side: int | None = None) -> list[int]:
    frames = decoders.read(path, indices, decoder, short_side=short_side)
    assert all(videos.upright(frame) for frame in frames)
    return [videos.number(frame) for frame in frames]


@pytest.mark.parametrize("kind", KINDS)
def test_every_decoder_gives_the_frames_that_were_asked_for(kind: str, decoder: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path)
    found = container.video_info(path)
    assert (found.frames, found.access) == (30, KINDS[kind][2])
    shape = (found.height, found.width)
    for indices in (list(range(30)), [29], [0, 29], list(range(3, 30, 2)), [27, 5, 5, 0, 27], [25, 26, 2, 3]):
        assert numbers(path, indices, decoder) == indices
        assert numbers(path, indices, decoder, short_side=36) == indices
    frames = decoders.read(path, [7, 8], decoder)
    assert frames.shape == (2, 3, *shape)
    assert frames.dtype == np.uint8
    assert np.array_equal(frames, decoders.read(path, [7, 8], "pyav"))


@pytest.mark.parametrize("frames", [1, 7, 12, 20])
@pytest.mark.parametrize("params", ["bframes=3:keyint=10", "bframes=0:keyint=250"])
def test_frames_before_the_edit_list_do_not_count(frames: int, params: str, decoder: str, tmp_path: Path) -> None:
    source = videos.write(tmp_path / "whole.mp4", options={"x264-params": params})
    path = str(videos.cut(source, tmp_path / "cut.mp4", frames))
    found = container.video_info(path)
    assert found.frames == 30 - frames
    assert found.access == ("any" if params.endswith("10") and frames == 20 else "pyav"), "whole groups are cut off"
    assert numbers(path, list(range(found.frames)), decoder) == list(range(frames, 30))
    assert numbers(path, [found.frames - 1, 0], decoder) == [29, frames]
    with pytest.raises(FewtokensError, match=f"must be from 0 to {found.frames - 1}"):
        decoders.read(path, [found.frames], decoder)


def test_all_decoders_choose_the_same_of_several_videos(decoder: str, tmp_path: Path) -> None:
    path = str(videos.two_streams(tmp_path / "two.mp4"))
    found = container.video_info(path)
    first = 100 if found.width > videos.WIDTH else 0
    assert numbers(path, [0, found.frames - 1], decoder) == [first, first + found.frames - 1]


def test_the_short_side_is_scaled_and_the_long_one_rounded_down(decoder: str, tmp_path: Path) -> None:
    wide = str(videos.write(tmp_path / "wide.mp4", size=(340, 256), count=2))
    tall = str(videos.write(tmp_path / "tall.mp4", size=(340, 256), count=2, rotation=90))
    assert decoders.read(wide, [0], decoder, short_side=224).shape == (1, 3, 224, 297)
    assert decoders.read(tall, [0], decoder, short_side=100).shape == (1, 3, 132, 100)
    scaled = decoders.read(tall, [0, 1], decoder, short_side=100).astype(int)
    assert np.abs(scaled - decoders.read(tall, [0, 1], "pyav", short_side=100)).mean() < 2.5


def test_frames_go_to_memory_that_is_given(tmp_path: Path) -> None:
    given = np.zeros((3, 48, 64, 3), np.uint8)
    path = str(videos.write(tmp_path / "a.mp4"))
    for indices in ([1, 2, 3], [3, 1, 1]):
        frames = decoders.read(path, indices, allocate=lambda shape: given)
        assert np.shares_memory(frames, given)
        assert [videos.number(frame) for frame in frames] == indices


def test_spans_are_by_the_times_at_which_frames_are_shown(tmp_path: Path) -> None:
    path = str(videos.write(tmp_path / "a.mp4", rate=10))
    assert container.frame_range(path, None, None) == (0, 30)
    assert container.frame_range(path, 1.0, 2.0) == (10, 10)
    assert container.frame_range(path, 2.85, 9.0) == (29, 1)
    assert container.frame_range(path, 0.99999, 1.09999) == (10, 1)  # rounded times of a list
    path = str(videos.write(tmp_path / "b.mp4", rate=10, times=[i * 2 if i < 10 else i + 10 for i in range(30)]))
    assert container.frame_range(path, 1.0, 2.1) == (5, 6)
    path = str(videos.write(tmp_path / "c.avi", rate=10, codec="mpeg4", options={}))
    assert container.frame_range(path, 1.0, 2.0) == (10, 10)
    with pytest.raises(UnreadableError, match=r"it lasts 3\.00 s"):
        container.frame_range(path, 5.0, 6.0)


def test_video_info_has_size_rate_and_length(tmp_path: Path) -> None:
    found = container.video_info(str(videos.write(tmp_path / "a.mp4", rate=25, count=50)))
    assert (found.frames, found.width, found.height, found.fps) == (50, 64, 48, 25.0)
    assert found.seconds == pytest.approx(2.0)
    one = container.video_info(str(videos.write(tmp_path / "one.mp4", count=1)))
    assert (one.frames, one.access) == (1, "any")


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = videos.write(tmp_path / "a.mp4", count=10)
    assert container.video_info(str(path)).frames == 10
    videos.write(path, count=12)
    assert container.video_info(str(path)).frames == 12


def damaged(kind: str, folder: Path) -> Path:
    whole = videos.write(folder / "whole.mp4", sound=kind == "sound only").read_bytes()
    content = {"empty": b"", "zeros": bytes(5000), "text": b"no video\n" * 50, "header only": whole[:40]}
    path = folder / "bad.mp4"
    if kind == "sound only":
        return videos.write_sound(path)
    if kind == "absent":
        return path
    if kind == "a list of files":  # FFmpeg would open the file that it names
        content[kind] = b"ffconcat version 1.0\nfile whole.mp4\n"
    if kind == "a playlist":
        content[kind] = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nwhole.mp4\n"
    if kind == "a picture":
        shutil.copy(Path(__file__).parents[3] / "docs" / "pictures" / "token_maps.png", path)
        return path
    path.write_bytes(content[kind])
    return path


BAD = ["empty", "zeros", "text", "header only", "sound only", "absent", "a list of files", "a playlist", "a picture"]


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_video_is_refused_with_its_name(kind: str, tmp_path: Path) -> None:
    path = damaged(kind, tmp_path)
    with pytest.raises(UnreadableError, match=str(path)) as caught:
        container.video_info(str(path))
    assert caught.value.reason
    assert "\n" not in str(caught.value)


def test_text_with_its_own_suffix_is_no_video_either(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("FFmpeg draws text files, if asked to\n" * 20)
    with pytest.raises(UnreadableError, match="no container of a supported kind"):
        container.video_info(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("streamed", [False, True])
def test_an_mp4_file_that_ends_before_its_index_is_called_an_incomplete_download(
    streamed: bool, tmp_path: Path
) -> None:
    path = videos.write(tmp_path / "a.mp4", count=60)
    content = bytearray(path.read_bytes())
    place = content.index(b"mdat")
    if streamed:  # a writer that was killed leaves the length of the media data open
        content[place - 4 : place] = bytes(4)
    for size in (place + 8, place + 500, content.index(b"moov") - 4):
        path.write_bytes(content[:size])
        with pytest.raises(UnreadableError) as caught:
            container.video_info(str(path))
        assert caught.value.reason == "incomplete download: no index (moov atom)"


def test_a_damaged_index_is_no_incomplete_download(tmp_path: Path) -> None:
    content = videos.write(tmp_path / "a.mp4", count=60).read_bytes()
    for name, bad in {"a": content.replace(b"moov", b"ioov"), "b": content[: content.index(b"moov") + 20]}.items():
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(UnreadableError, match=r"Invalid data|no video that can be decoded"):
            container.video_info(str(tmp_path / name))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize("share", [0.4, 0.8])
def test_a_file_that_breaks_off_is_noticed(suffix: str, share: float, tmp_path: Path) -> None:
    path = videos.write(tmp_path / f"a.{suffix}", count=120, codec="mpeg4" if suffix == "avi" else "libx264")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UnreadableError):
        list(decoders.decode_all(str(path)))


@pytest.mark.parametrize("seed", range(5))
def test_flipped_bits_are_noticed_and_no_damaged_frame_is_read(seed: int, tmp_path: Path) -> None:
    path = videos.write(tmp_path / "a.mp4", count=60, options={"x264-params": GROUPS, "crf": "1"})
    content, rng = bytearray(path.read_bytes()), np.random.default_rng(seed)
    begin = content.index(b"mdat") + 2000
    for place in rng.integers(begin, begin + (len(content) - begin) // 2, 40):
        content[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    with pytest.raises(UnreadableError, match=r"damaged|Invalid data|can be decoded"):
        list(decoders.decode_all(str(path)))
    with pytest.raises(UnreadableError):
        decoders.read(str(path), range(60))


def test_whole_files_pass_the_strict_reading(tmp_path: Path) -> None:
    for kind in KINDS:
        found = list(decoders.decode_all(make(kind, tmp_path)))
        assert len(found) == 30


def test_unknown_and_missing_decoders_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FewtokensError, match="'decord' or 'torchcodec' or 'pyav'"):
        records.require_decoder("opencv")
    monkeypatch.setattr(records, "find_spec", lambda name: None if name == "torchcodec" else True)
    records.require_decoder("pyav")
    with pytest.raises(FewtokensError, match=r"pip install torchcodec==.*apt-get install ffmpeg.*data\.decoder=pyav"):
        records.require_decoder("torchcodec")
    monkeypatch.setattr(records, "find_spec", lambda name: None)
    with pytest.raises(FewtokensError, match="pip install av=="):
        records.require_decoder("decord")


def test_a_decoder_that_does_not_load_is_no_bad_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(name: str) -> None:
        raise RuntimeError("Could not load libtorchcodec. Likely causes:\n...")

    monkeypatch.setattr(decoders.importlib, "import_module", fails)
    with pytest.raises(FewtokensError, match="Could not load") as caught:
        decoders.read(str(videos.write(tmp_path / "a.mp4")), [0], "torchcodec")
    assert not isinstance(caught.value, UnreadableError)
