"""Index of the packets in a video file: how many frames it has, when they are shown, and where decoding can start."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import av
import av.error
import numpy as np
from jaxtyping import Int64

from fewtokens.data.video.records import UnreadableError, VideoInfo
from fewtokens.errors import FewtokensError

# Other protocols and formats open further files or addresses that a file names (concat, hls, sdp), or draw text (tty).
_SAFE = {"protocol_whitelist": "file", "format_whitelist": "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"}
_PLAIN = ("h264", "hevc", "vp9")  # codecs for which all decoders were measured to return the same frames
_NO_TIME = -(1 << 63)
_ROUNDING = 0.0005  # seconds: times in lists are rounded, and 1/30 s is no multiple of a container's time unit


@dataclass(frozen=True)
class PacketIndex:
    """The packets of a video file.

    Attributes:
        info: Properties of the file.
        times: Times at which the frames are shown, in units of the stream, sorted. Empty if the file has no reliable
            times, so that frames can only be counted.
        keys: Times of the frames at which decoding can start, sorted.
        unit: Unit of `times` and `keys`, in seconds.
        missing: Number of frames that the header announces and the file does not contain.
    """

    info: VideoInfo
    times: Int64[np.ndarray, " n"]
    keys: list[int]
    unit: float
    missing: int


class _Packet(NamedTuple):
    time: int
    key: bool
    cut_off: bool  # by an edit list: it is decoded, since other frames refer to it, but not shown


def packet_index(path: str) -> PacketIndex:
    """Read all packets of a file and decode its first frame.

    Raises:
        UnreadableError: The number of frames cannot be determined.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UnreadableError(path, error.strerror or "no such file") from error
    if not stat.st_size:
        raise UnreadableError(path, "the file is empty")
    return _read_index(path, stat.st_size, stat.st_mtime_ns)


def video_info(path: str) -> VideoInfo:
    """Return the properties of a file.

    Raises:
        UnreadableError: The number of frames cannot be determined.
    """
    return packet_index(path).info


def frame_range(path: str, start: float | None, end: float | None) -> tuple[int, int]:
    """Return the number of the first frame in a section of a file, and the number of frames in it.

    Args:
        path: The file.
        start: Second at which the section starts; None for the beginning.
        end: Second at which the section ends; a frame shown at this time is not part of it. None for the end.

    Raises:
        UnreadableError: The section contains no frame.
    """
    index = packet_index(path)
    timed = len(index.times) > 0
    seconds = (index.times - index.times[0]) * index.unit if timed else np.arange(index.info.frames) / index.info.fps
    first, stop = np.searchsorted(seconds, np.array([start or 0.0, np.inf if end is None else end]) - _ROUNDING)
    if first >= stop:
        raise UnreadableError(path, f"no frame from {start} s to {end} s: it lasts {index.info.seconds:.2f} s")
    return int(first), int(stop - first)


@contextmanager
def open_video(path: str) -> Iterator[tuple[Any, Any]]:
    """Open a file and return its container and its main video stream. Errors inside become `UnreadableError`."""
    try:
        with av.open(f"file:{path}", options=_SAFE) as container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic or not stream.codec_context:
                raise ValueError("it contains no video that can be decoded")
            stream.codec_context.thread_type = "NONE"  # one process per core decodes, so threads would only compete
            yield container, stream
    except FewtokensError:
        raise
    except av.error.ArgumentError as error:
        raise UnreadableError(path, f"no container of a supported kind ({_SAFE['format_whitelist']})") from error
    except (av.error.FFmpegError, OSError, ValueError, IndexError, RuntimeError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, av.error.InvalidDataError) and _ends_before_moov(path):
            reason = "incomplete download: no index (moov atom)"
        raise UnreadableError(path, reason) from error


def quarter_turns(frame: av.VideoFrame) -> int:
    """Return the number of counterclockwise quarter turns by which a frame must be rotated for display.

    Raises:
        ValueError: The rotation in the metadata is not a multiple of 90 degrees.
    """
    if frame.rotation % 90:
        raise ValueError(f"its display rotation is {frame.rotation} degrees, which is no multiple of 90")
    return frame.rotation // 90 % 4


# A file's index is needed several times in a row: for its properties, then for its frames. `size` and `changed` detect
# a file that was replaced.
@lru_cache(maxsize=1)
def _read_index(path: str, size: int, changed: int) -> PacketIndex:
    with open_video(path) as (container, stream):
        packets, first, closed = _read_packets(container, stream)
        if first is None or not packets:
            raise ValueError("no frame can be decoded")
        sideways = quarter_turns(first) % 2
        width, height = (first.height, first.width) if sideways else (first.width, first.height)
        fps, unit = float(stream.average_rate or stream.guessed_rate or 1), float(stream.time_base)
        codec, kind = stream.codec_context.codec.canonical_name, container.format.name
        missing, simple = _missing_frames(container, stream, packets, fps), _is_simple(container, first)
    times = sorted(packet.time for packet in packets if not packet.cut_off)
    # The times in AVI and transport streams are not reliable, and other files may lack or repeat them. Frames before
    # the first key frame are announced but cannot be decoded. In all these files frames must be counted.
    indexed = kind.startswith(("mov", "matroska")) and packets[0].key and _NO_TIME not in (p.time for p in packets)
    if not indexed or not times or len(set(times)) < len(times):
        return _count_frames(path, width, height, fps, missing)
    plain = closed and simple and len(times) == len(packets) and codec in _PLAIN
    seconds = (times[-1] - times[0]) * unit + 1 / fps
    info = VideoInfo(len(times), width, height, fps, seconds, "any" if plain else "pyav")
    keys = sorted(packet.time for packet in packets if packet.key)
    return PacketIndex(info, np.array(times, np.int64), keys, unit, missing)


def _read_packets(container: Any, stream: Any) -> tuple[list[_Packet], av.VideoFrame | None, bool]:
    """Return all packets, the first frame, and whether every group of pictures is closed."""
    packets: list[_Packet] = []
    first, closed, context = None, True, stream.codec_context
    for packet in container.demux(stream):
        if first is None:
            first = next(iter(packet.decode()), None)
        if packet.size:  # the last packet has no data and ends the stream
            time = _NO_TIME if packet.pts is None else packet.pts
            packets.append(_Packet(time, packet.is_keyframe, packet.is_discard))
            closed = closed and (not packet.is_keyframe or _starts_closed_group(packet, context))
    return packets, first, closed


def _is_simple(container: Any, first: av.VideoFrame) -> bool:
    """Return whether a file has one video stream of progressive frames with 8 bits.

    From interlaced frames and from more than 8 bits the decoders make different colors.
    """
    eight = all(component.bits == 8 for component in first.format.components)
    return eight and not first.interlaced_frame and len(container.streams.video) == 1


def _missing_frames(container: Any, stream: Any, packets: list[_Packet], fps: float) -> int:
    """Return how many frames the header announces beyond those in the file, as in a download that broke off."""
    if stream.frames:
        return max(0, stream.frames - len(packets))
    # Matroska announces no number of frames but usually durations: that of the stream as a tag hours:minutes:seconds,
    # and that of the whole file, which may be the duration of the audio.
    parts, tolerance = stream.metadata.get("DURATION", "").split(":"), 0.1
    if len(parts) == 3:
        announced = int(parts[0]) * 3600 + int(parts[1]) * 60 + float(parts[2])
    else:
        announced, tolerance = (container.duration or 0) * 1e-6 if len(container.streams) == 1 else 0.0, 0.5
    times = [packet.time for packet in packets]
    absent = announced - (max(times) - min(times)) * float(stream.time_base) - 1 / fps
    return round(absent * fps) if absent > tolerance else 0


def _count_frames(path: str, width: int, height: int, fps: float, missing: int) -> PacketIndex:
    with open_video(path) as (container, stream):
        count = sum(1 for _ in container.decode(stream))
    info = VideoInfo(count, width, height, fps, count / fps, "sequential")
    return PacketIndex(info, np.empty(0, np.int64), [], 1.0, missing)


def _starts_closed_group(packet: av.Packet, context: Any) -> bool:
    """Return whether no frame after a key frame refers to one before it. decord miscounts frames where one does.

    The function looks for an IDR unit in H.264 (type 5) and HEVC (types 19 and 20), following the lengths of the units
    in MP4 and Matroska.
    """
    codec, header = context.codec.canonical_name, context.extradata
    if codec not in ("h264", "hevc"):
        return True
    where = 4 if codec == "h264" else 21
    if not header or len(header) <= where or header[0] != 1:  # units are separated by start codes, not by lengths
        return False
    prefix, data, place = (header[where] & 3) + 1, bytes(packet), 0
    while place + prefix < len(data):
        unit = data[place + prefix]
        if (unit & 31) == 5 if codec == "h264" else (unit >> 1 & 63) in (19, 20):
            return True
        place += prefix + int.from_bytes(data[place : place + prefix])
    return False


def _ends_before_moov(path: str) -> bool:
    """Return whether an MP4 file ends with its media data (mdat) and lacks the index (moov) that often follows it."""
    boxes, place = [b""], 0
    with open(path, "rb") as file:
        while len(boxes) < 1000 and len(header := file.read(16)) >= 8:  # a damaged file can contain any number of boxes
            length = int.from_bytes(header[:4])
            boxes.append(header[4:8])
            place += int.from_bytes(header[8:]) if length == 1 else length
            if length in range(2, 8) or not length:  # 0: the box extends to the end of the file
                break
            file.seek(place)
    return boxes[-1] == b"mdat" and b"moov" not in boxes
