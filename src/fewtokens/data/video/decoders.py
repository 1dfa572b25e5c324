"""Frames of a video file by their numbers: the only file that knows the decoders.

Three can be asked, and a file gives the same frames whichever it is. They agree on plain files: H.264, HEVC or VP9 in
MP4 or Matroska, 8 bits, no fields, one video, nothing cut off, every key frame a clean break. On others decord and
torchcodec were measured to give wrong frames without a word (edit lists, MPEG-4 part 2, open groups of pictures, AVI,
transport streams), so PyAV reads those, whatever the configuration says; and it has the last word on bad files.
"""

import importlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import av
import numpy as np
from jaxtyping import Int64, UInt8

from fewtokens.data.video import container
from fewtokens.data.video.container import PacketIndex
from fewtokens.data.video.records import UnreadableError, VideoInfo, decoder_error
from fewtokens.errors import FewtokensError

Frames = UInt8[np.ndarray, "t 3 h w"]
Rows = UInt8[np.ndarray, "t h w 3"]
Numbers = Int64[np.ndarray, " n"]
_MOST_BYTES = 1 << 33  # of one clip: a damaged header can announce any size


def read(
    path: str,
    indices: Sequence[int],
    decoder: str = "pyav",
    *,
    short_side: int | None = None,
    info: VideoInfo | None = None,
    allocate: Callable[[tuple[int, ...]], Rows] | None = None,
) -> Frames:
    """Frames (T, 3, H, W) in the order of `indices`, RGB, upright; in memory the channels come last.

    Args:
        path: The file.
        indices: Frame numbers, in any order, repeated or not.
        decoder: "decord", "torchcodec" or "pyav".
        short_side: Scale the shorter side to so many pixels, bilinear, by the decoder's own scaler: scaled frames of
            two decoders differ a little (by about 1 of 255 on average), unscaled ones do not.
        info: Properties of the file, if they are known already.
        allocate: Makes the memory for the frames; None for numpy's.

    Raises:
        UnreadableError: The file is damaged, or not of a supported kind.
        FewtokensError: An index is out of range, or the decoder is not installed.
    """
    info = info or container.video_info(path)
    wanted, back = np.unique(np.asarray(indices, np.int64), return_inverse=True)
    if not len(wanted) or wanted[0] < 0 or wanted[-1] >= info.frames:
        raise FewtokensError(
            "Frames are asked for by their numbers",
            expected=f"numbers from 0 to {info.frames - 1}",
            got=list(indices),
            fix=f"count the frames of {path} anew: a manifest may be older than the file",
        )
    width, height = info.size(short_side)
    if len(back) * width * height * 3 > _MOST_BYTES:
        raise UnreadableError(path, f"{len(back)} frames of {width} x {height} pixels are too much")
    out = (allocate or _empty)((len(back), height, width, 3))
    shuffled = len(wanted) < len(back) or bool((np.diff(back) < 0).any())
    frames = _empty((len(wanted), height, width, 3)) if shuffled else out
    _fill(path, wanted, decoder, info, frames)
    if shuffled:
        np.take(frames, back, axis=0, out=out)
    return out.transpose(0, 3, 1, 2)


def decode_all(path: str) -> Iterator[av.VideoFrame]:
    """Every frame from the first to the last, as PyAV's record; nothing that is damaged is passed over.

    Raises:
        UnreadableError: As soon as something is found wrong; also if there are fewer frames than the file announces.
    """
    count, found = 0, container.packet_index(path)
    with container.open_video(path) as (source, stream):
        stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer"}
        for frame in source.decode(stream):
            if frame.is_corrupt:
                raise UnreadableError(path, f"frame {count} is damaged")
            if count < len(found.times) and frame.pts != found.times[count]:
                raise UnreadableError(path, f"frame {count} has a wrong time")
            count += 1
            yield frame
    if found.lost or count != found.info.frames:
        raise UnreadableError(path, f"{count} of {found.info.frames + found.lost} frames can be decoded")


def to_rgb(frame: av.VideoFrame, width: int, height: int) -> UInt8[np.ndarray, "h w 3"]:
    """The picture of a frame, upright, scaled to a width and a height."""
    quarters = container.quarter_turns(frame)
    wide, high = (height, width) if quarters % 2 else (width, height)
    array = frame.to_ndarray(format="rgb24", width=wide, height=high, interpolation="BILINEAR", threads=1)
    return np.rot90(array, quarters) if quarters else array


def _empty(shape: tuple[int, ...]) -> Rows:
    return np.empty(shape, np.uint8)


def _fill(path: str, wanted: Numbers, decoder: str, info: VideoInfo, out: Rows) -> None:
    if decoder != "pyav" and info.access == "any":
        package = load(decoder)
        scale = out.shape[1:3] != (info.height, info.width)
        try:
            {"decord": _decord, "torchcodec": _torchcodec}[decoder](package, path, wanted, info, scale, out)
            return
        except Exception:  # of many types, by package and version
            pass
    _pyav(path, wanted, out)


def _decord(package: Any, path: str, wanted: Numbers, info: VideoInfo, scale: bool, out: Rows) -> None:
    height, width = out.shape[1:3] if scale else (-1, -1)
    # By default it puts a neighbour in the place of a frame that cannot be decoded; the limit is a share above 0.
    reader = package.VideoReader(path, package.cpu(0), width, height, num_threads=1, fault_tol=1e-9)
    if len(reader) != info.frames:
        raise ValueError("decord counts other frames than PyAV")
    out[:] = np.from_dlpack(_Shown(reader.get_batch(wanted)))  # asnumpy would be one more copy


class _Shown:
    """An array of decord as numpy looks at it, in main memory."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **_: Any) -> Any:
        return self.array.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def _torchcodec(package: Any, path: str, wanted: Numbers, info: VideoInfo, scale: bool, out: Rows) -> None:
    resize = [package.transforms.Resize(out.shape[1:3])] if scale else None
    reader = package.decoders.VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, transforms=resize)
    if len(reader) != info.frames:
        raise ValueError("torchcodec counts other frames than PyAV")
    out[:] = reader.get_frames_at(wanted.tolist()).data.numpy()


def _pyav(path: str, wanted: Numbers, out: Rows) -> None:
    found = container.packet_index(path)
    height, width = out.shape[1:3]
    labels = (found.times[wanted] if len(found.times) else wanted).tolist()
    for seeking in (True, False):  # without, if the container's index led astray
        places = {label: place for place, label in enumerate(labels)}
        with container.open_video(path) as (source, stream):
            for label, frame in _labelled(source, stream, found, labels, seeking):
                if (place := places.pop(label, None)) is not None:
                    out[place] = to_rgb(frame, width, height)
        if not places:
            return
    raise UnreadableError(path, f"frame {wanted[min(places.values())]} of {found.info.frames} cannot be decoded")


def _labelled(
    source: Any, stream: Any, found: PacketIndex, labels: list[int], seeking: bool
) -> Iterator[tuple[int, Any]]:
    """Frames with their times or, in a file without times, their numbers: all that `labels` names and some more."""
    timed = len(found.times) > 0
    stretches = _stretches(found.keys, labels) if seeking and timed else [(found.keys[0] if timed else 0, labels[-1])]
    for number, (start, last) in enumerate(stretches):
        if timed and (number or start != found.keys[0]):
            source.seek(start, stream=stream)
        for count, frame in enumerate(source.decode(stream)):
            label = frame.pts if timed else count
            if label is None or label < start:  # refers to what came before the key frame
                continue
            if frame.is_corrupt:
                raise ValueError("damaged frames")
            yield label, frame
            if label >= last:
                break


def _stretches(keys: list[int], times: list[int]) -> list[tuple[int, int]]:
    """Key frame to begin with and last time to decode: a jump pays where a whole group of pictures is not wanted."""
    groups = [max(0, bisect_right(keys, time) - 1) for time in times]
    jumps = [i for i, (a, b) in enumerate(pairwise(groups), 1) if b - a > 1]
    return [(keys[groups[a]], times[b - 1]) for a, b in pairwise([0, *jumps, len(times)])]


def load(decoder: str) -> Any:
    """The package of decord or torchcodec; a FewtokensError that says what to install if it cannot be loaded."""
    try:
        package = importlib.import_module(decoder)
        if decoder == "decord":
            package.logging.set_level(package.logging.QUIET)
        else:
            importlib.import_module("torchcodec.decoders")
            importlib.import_module("torchcodec.transforms")
        return package
    except (ImportError, OSError, RuntimeError) as error:  # torchcodec without FFmpeg's libraries: RuntimeError
        raise decoder_error(decoder, str(error).strip().partition("\n")[0]) from error
