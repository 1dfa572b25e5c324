"""Decoding of video frames by number. No other module calls a decoder.

There are three decoders, and a file yields the same frames with each of them. They agree on plain files: H.264, HEVC or
VP9 in MP4 or Matroska, 8 bits, progressive, one video stream, no edit list that cuts frames off, closed groups of
pictures. On other files decord and torchcodec were measured to return wrong frames without an error (edit lists, MPEG-4
part 2, open groups of pictures, AVI, transport streams). PyAV therefore reads those whatever the configuration says,
and it also reads files on which another decoder fails.
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
from fewtokens.errors import FewtokensError, first_line

Frames = UInt8[np.ndarray, "t 3 h w"]
Rows = UInt8[np.ndarray, "t h w 3"]
Numbers = Int64[np.ndarray, " n"]
_MAX_BYTES = 1 << 33  # of one clip: a damaged header can announce any size


def read(
    path: str,
    indices: Sequence[int],
    decoder: str = "pyav",
    *,
    short_side: int | None = None,
    info: VideoInfo | None = None,
    allocate: Callable[[tuple[int, ...]], Rows] | None = None,
) -> Frames:
    """Decode frames by number.

    Args:
        path: The file.
        indices: Frame numbers in any order, with or without repetitions.
        decoder: "decord", "torchcodec" or "pyav".
        short_side: Length in pixels to which the shorter side is scaled (bilinear), by the scaler of the decoder.
            Scaled frames of two decoders differ slightly (by about 1 of 255 on average), unscaled frames do not.
        info: Properties of the file; None to determine them.
        allocate: Function that returns memory of a shape for the frames; None for `numpy.empty`.

    Returns:
        RGB frames (T, 3, H, W) in the order of `indices`, upright. In memory the channels are the last axis.

    Raises:
        UnreadableError: The file is damaged or of an unsupported kind.
        FewtokensError: An index is out of range, or the decoder is not installed.
    """
    info = info or container.video_info(path)
    _check_frame_numbers(path, indices, info)
    wanted, back = np.unique(np.asarray(indices, np.int64), return_inverse=True)
    width, height = info.size(short_side)
    if len(back) * width * height * 3 > _MAX_BYTES:
        raise UnreadableError(path, f"{len(back)} frames of {width} x {height} pixels exceed {_MAX_BYTES >> 30} GiB")
    out = (allocate or _empty)((len(back), height, width, 3))
    shuffled = len(wanted) < len(back) or bool((np.diff(back) < 0).any())
    frames = _empty((len(wanted), height, width, 3)) if shuffled else out
    _fill(path, wanted, decoder, info, frames)
    if shuffled:
        np.take(frames, back, axis=0, out=out)
    return out.transpose(0, 3, 1, 2)


def decode_all(path: str) -> Iterator[av.VideoFrame]:
    """Yield every frame of a file, and check all of them.

    Raises:
        UnreadableError: A frame is damaged or is shown at a wrong time, or there are fewer frames than the file
            announces.
    """
    count, index = 0, container.packet_index(path)
    with container.open_video(path) as (source, stream):
        stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer"}
        for frame in source.decode(stream):
            if frame.is_corrupt:
                raise UnreadableError(path, f"frame {count} is damaged")
            if count < len(index.times) and frame.pts != index.times[count]:
                raise UnreadableError(path, f"frame {count} has a wrong time")
            count += 1
            yield frame
    if index.missing or count != index.info.frames:
        raise UnreadableError(path, f"{count} of {index.info.frames + index.missing} frames can be decoded")


def to_rgb(frame: av.VideoFrame, width: int, height: int) -> UInt8[np.ndarray, "h w 3"]:
    """Convert a frame to RGB, rotate it upright, and scale it to a width and a height."""
    quarters = container.quarter_turns(frame)
    stored = (height, width) if quarters % 2 else (width, height)
    array = frame.to_ndarray(format="rgb24", width=stored[0], height=stored[1], interpolation="BILINEAR", threads=1)
    return np.rot90(array, quarters) if quarters else array


def load(decoder: str) -> Any:
    """Import the package of decord or torchcodec.

    Raises:
        FewtokensError: The package cannot be loaded. The message says what to install.
    """
    try:
        package = importlib.import_module(decoder)
        if decoder == "decord":
            package.logging.set_level(package.logging.QUIET)
        else:
            importlib.import_module("torchcodec.decoders")
            importlib.import_module("torchcodec.transforms")
        return package
    except (ImportError, OSError, RuntimeError) as error:  # torchcodec without FFmpeg's libraries: RuntimeError
        raise decoder_error(decoder, first_line(error)) from error


def _check_frame_numbers(path: str, indices: Sequence[int], info: VideoInfo) -> None:
    if not len(indices) or min(indices) < 0 or max(indices) >= info.frames:
        raise FewtokensError(
            f"Frame numbers of {path} must be from 0 to {info.frames - 1}, got {list(indices)}. If a manifest lists "
            "this file, write the manifest again."
        )


def _empty(shape: tuple[int, ...]) -> Rows:
    return np.empty(shape, np.uint8)


def _fill(path: str, wanted: Numbers, decoder: str, info: VideoInfo, out: Rows) -> None:
    """Decode the frames `wanted`, sorted and unique, into `out`."""
    if decoder != "pyav" and info.access == "any":
        package = load(decoder)
        scale = out.shape[1:3] != (info.height, info.width)
        try:
            {"decord": _decord, "torchcodec": _torchcodec}[decoder](package, path, wanted, info, scale, out)
            return
        except Exception:  # its type depends on the package and its version
            pass
    _pyav(path, wanted, out)


def _decord(package: Any, path: str, wanted: Numbers, info: VideoInfo, scale: bool, out: Rows) -> None:
    height, width = out.shape[1:3] if scale else (-1, -1)
    # By default decord replaces a frame that it cannot decode by a neighbor; the limit is a share and must be above 0.
    reader = package.VideoReader(path, package.cpu(0), width, height, num_threads=1, fault_tol=1e-9)
    if len(reader) != info.frames:
        raise ValueError("decord counts other frames than PyAV")
    out[:] = np.from_dlpack(_HostArray(reader.get_batch(wanted)))  # asnumpy would copy once more


class _HostArray:
    """An array of decord with the DLPack methods that numpy needs."""

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
    index = container.packet_index(path)
    height, width = out.shape[1:3]
    labels = (index.times[wanted] if len(index.times) else wanted).tolist()
    for seek in (True, False):  # the second pass is for files whose seek table is wrong
        rows = {label: row for row, label in enumerate(labels)}
        with container.open_video(path) as (source, stream):
            for label, frame in _labeled_frames(source, stream, index, labels, seek):
                if (row := rows.pop(label, None)) is not None:
                    out[row] = to_rgb(frame, width, height)
        if not rows:
            return
    raise UnreadableError(path, f"frame {wanted[min(rows.values())]} of {index.info.frames} cannot be decoded")


def _labeled_frames(
    source: Any, stream: Any, index: PacketIndex, labels: list[int], seek: bool
) -> Iterator[tuple[int, Any]]:
    """Yield all frames that `labels` names, and some others, each with its label.

    The label of a frame is its time or, in a file without times, its number.
    """
    timed = len(index.times) > 0
    sections = _sections(index.keys, labels) if seek and timed else [(index.keys[0] if timed else 0, labels[-1])]
    for number, (start, last) in enumerate(sections):
        if timed and (number or start != index.keys[0]):
            source.seek(start, stream=stream)
        for count, frame in enumerate(source.decode(stream)):
            label = frame.pts if timed else count
            if label is None or label < start:  # a frame that refers to those before the key frame
                continue
            if frame.is_corrupt:
                raise ValueError("damaged frames")
            yield label, frame
            if label >= last:
                break


def _sections(keys: list[int], times: list[int]) -> list[tuple[int, int]]:
    """Return the sections to decode, each from the time of a key frame to the time of the last wanted frame.

    Seeking pays only if it skips at least one whole group of pictures.
    """
    groups = [max(0, bisect_right(keys, time) - 1) for time in times]
    jumps = [i for i, (a, b) in enumerate(pairwise(groups), 1) if b - a > 1]
    return [(keys[groups[a]], times[b - 1]) for a, b in pairwise([0, *jumps, len(times)])]
