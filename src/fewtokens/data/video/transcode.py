"""Decoding of whole video files, to check every frame and to write a copy that is fast to sample from."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import av
import av.error
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorRange

from fewtokens.data.video import container, decoders
from fewtokens.data.video.container import PacketIndex
from fewtokens.data.video.records import UnreadableError, VideoInfo
from fewtokens.errors import FewtokensError, write_error

# One thread, since each process works on its own file. Even so x264 was seen to encode a frame differently now and then
# (in 5 of 2,590 copies of one small file), so a copy that is made again can have another checksum.
_X264 = {"preset": "fast", "crf": "20", "threads": "1", "a53cc": "0"}
# Errors that say something about the folder of the copy and nothing about the video.
_FOLDER_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.ENOENT,
    errno.ENOTDIR,
}
_UNSPECIFIED = 2  # code of an unspecified matrix between YUV and RGB


def examine(
    path: str, target: str | None, *, start: float | None, end: float | None, short_side: int | None, key_frames: int
) -> VideoInfo:
    """Decode every frame of a file and, in the same pass, write a copy of a section of it.

    The copy is H.264 in MP4 without sound, upright, with even width and height and closed groups of pictures. Its
    frames keep the times of the original.

    Args:
        path: The file.
        target: Path of the copy, which is overwritten if it exists; None for no copy.
        start: Second at which the copy starts; None for the beginning of the file.
        end: Second at which the copy ends; None for the end of the file.
        short_side: Shorter side of the copy in pixels. A smaller original keeps its size; None keeps it always.
        key_frames: Number of frames from one key frame of the copy to the next.

    Returns:
        The properties of the copy, or of the file if there is no copy.

    Raises:
        UnreadableError: The file is damaged, or has no frame in the section.
        FewtokensError: The copy cannot be written.
    """
    first, count = container.frame_range(path, start, end)
    index = container.packet_index(path)
    if target is None:
        for _ in decoders.decode_all(path):
            pass
        return index.info
    with _translated_errors(path, target):
        _write_copy(path, index, range(first, first + count), target, _copy_size(index.info, short_side), key_frames)
    for _ in decoders.decode_all(target):
        pass
    info = container.video_info(target)
    if info.frames != count or info.access != "any":
        raise UnreadableError(path, f"its copy has {info.frames} frames instead of {count}, access {info.access}")
    return info


def _copy_size(info: VideoInfo, short_side: int | None) -> tuple[int, int]:
    """Return the even width and height of a copy, as displayed."""
    smaller = short_side is not None and short_side < min(info.width, info.height)
    width, height = info.size(short_side) if smaller else (info.width, info.height)
    return max(2, width // 2 * 2), max(2, height // 2 * 2)


def _write_copy(
    path: str, index: PacketIndex, wanted: range, target: str, size: tuple[int, int], key_frames: int
) -> None:
    """Encode the frames with the numbers `wanted`. The frames outside are decoded too, to check them."""
    fps = Fraction(index.info.fps).limit_denominator(1001)
    has_times = len(index.times) > 0
    unit = Fraction(index.unit).limit_denominator(1 << 30) if has_times else 1 / fps
    with av.open(f"file:{target}", "w", format="mp4", options={"movflags": "faststart", "fflags": "bitexact"}) as file:
        stream: Any = None
        for number, frame in enumerate(decoders.decode_all(path)):
            if number not in wanted:
                continue
            if stream is None:
                stream = _add_stream(file, frame, size, fps, unit, key_frames)
            time = int(index.times[number] - index.times[wanted[0]]) if has_times else number - wanted[0]
            file.mux(stream.encode(_converted(frame, size, time, unit)))
        file.mux(stream.encode())


def _add_stream(
    file: Any, frame: av.VideoFrame, size: tuple[int, int], fps: Fraction, unit: Fraction, key_frames: int
) -> Any:
    options = {**_X264, "x264-params": f"keyint={key_frames}:open-gop=0"}
    stream = file.add_stream("libx264", rate=fps, options=options)
    stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
    context = stream.codec_context
    context.time_base = stream.time_base = unit
    context.colorspace, context.color_range = _matrix(frame), ColorRange.MPEG
    context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc
    return stream


def _converted(frame: av.VideoFrame, size: tuple[int, int], time: int, unit: Fraction) -> av.VideoFrame:
    """Return a frame as the encoder needs it: upright, scaled, YUV 4:2:0 in limited range."""
    quarters, matrix = container.quarter_turns(frame), _matrix(frame)
    stored = size[::-1] if quarters % 2 else size
    frame = frame.reformat(*stored, "yuv420p", None, matrix, "BICUBIC", dst_color_range=ColorRange.MPEG, threads=1)
    if quarters:
        frame = _rotated(frame, quarters)
    frame.pts, frame.time_base = time, unit
    frame.pict_type = PictureType.NONE  # otherwise the encoder would repeat the picture types of the original
    return frame


def _rotated(frame: av.VideoFrame, quarters: int) -> av.VideoFrame:
    """Rotate the planes of a YUV 4:2:0 frame by quarter turns, counterclockwise.

    A detour through RGB would round down twice, and the copy would be one gray level darker than the original.
    """
    array = frame.to_ndarray()  # the rows of the luma plane, then both chroma planes without padding
    luma, chroma = array[: frame.height], array[frame.height :].reshape(2, frame.height // 2, frame.width // 2)
    luma, chroma = np.rot90(luma, quarters), np.rot90(chroma, quarters, axes=(1, 2))
    array = np.concatenate([luma, chroma.reshape(-1, luma.shape[1])])
    return av.VideoFrame.from_ndarray(array, format="yuv420p")


def _matrix(frame: av.VideoFrame) -> int:
    return frame.colorspace or _UNSPECIFIED  # 0 is the code of RGB, and the copy is YUV


@contextmanager
def _translated_errors(path: str, target: str) -> Iterator[None]:
    """Turn all errors of writing a copy into a FewtokensError if they concern its folder, else an UnreadableError."""
    try:
        yield
    except FewtokensError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FOLDER_ERRORS:
            raise write_error(target, error) from error
        raise UnreadableError(path, f"no copy can be made of it: {error}") from error
