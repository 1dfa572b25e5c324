"""Whole video files: whether every frame can be decoded, and a copy in which every decoder finds frames fast."""

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

# One thread: a process per core works on a file of its own. Even so x264 was seen to code a frame otherwise now and
# then (in 5 of 2,590 copies of one small file), so that a copy made again can have another checksum.
_X264 = {"preset": "fast", "crf": "20", "threads": "1", "a53cc": "0"}
_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOENT, errno.ENOTDIR}
_UNSPECIFIED = 2  # of the matrix that makes RGB of a video's colours


def examine(
    path: str, target: str | None, *, start: float | None, end: float | None, short_side: int | None, key_frames: int
) -> VideoInfo:
    """Decodes every frame of a file and, in the same pass, writes a part of it anew.

    The copy is H.264 in MP4 without sound, upright, of even width and height, in closed groups of pictures; its frames
    keep their times.

    Args:
        path: The file.
        target: Where the copy goes; None for no copy. What is there is overwritten.
        start: First second of the copy; None for the beginning.
        end: The same for its end.
        short_side: Scale the shorter side of the copy down to so many pixels; None, or more than it has: as it is.
        key_frames: Frames from one key frame to the next.

    Returns:
        The properties of the file that is to be read: the copy, if there is one.

    Raises:
        UnreadableError: Something is wrong with the file.
        FewtokensError: The copy cannot be written.
    """
    first, count = container.frame_range(path, start, end)
    found = container.packet_index(path)
    if target is None:
        for _ in decoders.decode_all(path):
            pass
        return found.info
    wanted = range(first, first + count)
    with _writing(target, path):
        _encode(path, found, wanted, target, _size(found.info, short_side), key_frames)
    for _ in decoders.decode_all(target):
        pass
    made = container.video_info(target)
    if made.frames != count or made.access != "any":
        raise UnreadableError(path, f"its copy has {made.frames} frames instead of {count}, access {made.access}")
    return made


def _size(info: VideoInfo, short_side: int | None) -> tuple[int, int]:
    smaller = short_side is not None and short_side < min(info.width, info.height)
    width, height = info.size(short_side) if smaller else (info.width, info.height)
    return max(2, width // 2 * 2), max(2, height // 2 * 2)


def _encode(path: str, found: PacketIndex, wanted: range, target: str, size: tuple[int, int], key_frames: int) -> None:
    rate = Fraction(found.info.fps).limit_denominator(1001)
    unit = Fraction(found.unit).limit_denominator(1 << 30) if len(found.times) else 1 / rate
    with av.open(f"file:{target}", "w", format="mp4", options={"movflags": "faststart", "fflags": "bitexact"}) as file:
        stream: Any = None
        for index, frame in enumerate(decoders.decode_all(path)):
            if index not in wanted:
                continue
            if stream is None:
                stream = _stream(file, frame, size, rate, unit, key_frames)
            shown = int(found.times[index] - found.times[wanted[0]]) if len(found.times) else index - wanted[0]
            file.mux(stream.encode(_prepared(frame, size, shown, unit)))
        file.mux(stream.encode())


def _stream(file: Any, frame: av.VideoFrame, size: tuple[int, int], rate: Fraction, unit: Fraction, keys: int) -> Any:
    options = {**_X264, "x264-params": f"keyint={keys}:open-gop=0"}
    stream = file.add_stream("libx264", rate=rate, options=options)
    stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
    context = stream.codec_context
    context.time_base = stream.time_base = unit
    context.colorspace, context.color_range = _matrix(frame), ColorRange.MPEG
    context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc
    return stream


def _prepared(frame: av.VideoFrame, size: tuple[int, int], shown: int, unit: Fraction) -> av.VideoFrame:
    matrix = _matrix(frame)
    if container.quarter_turns(frame):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(decoders.to_rgb(frame, *size)), format="rgb24")
    limited = ColorRange.MPEG
    frame = frame.reformat(*size, "yuv420p", None, matrix, "BICUBIC", dst_color_range=limited, threads=1)
    frame.pts, frame.time_base = shown, unit
    frame.pict_type = PictureType.NONE  # or the encoder would repeat the types of the original
    return frame


def _matrix(frame: av.VideoFrame) -> int:
    return frame.colorspace or _UNSPECIFIED  # 0 is that of RGB, which the copy is not


@contextmanager
def _writing(target: str, path: str) -> Iterator[None]:
    try:
        yield
    except FewtokensError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _PLACE:
            raise write_error(target, error) from error
        raise UnreadableError(path, f"no copy can be made of it: {error}") from error
