"""What the packets of a video file say: how many frames it has, when they are shown, where decoding can begin."""

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

# Others open further files or addresses that a file names (concat, hls, sdp), or take text for pictures (tty).
_SAFE = {"protocol_whitelist": "file", "format_whitelist": "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"}
_PLAIN = ("h264", "hevc", "vp9")  # codecs that the decoders were seen to agree on
_ABSENT = -(1 << 63)  # of a time
_ROUNDING = 0.0005  # seconds: times in lists are rounded, and 1/30 s is no multiple of a container's unit


@dataclass(frozen=True)
class PacketIndex:
    """A file's packets, counted.

    Attributes:
        info: Properties of the file.
        times: When the frames are shown, in the stream's unit, sorted; empty if they can only be counted.
        keys: Times of the frames at which decoding can begin, sorted.
        unit: Of times and keys, in seconds.
        lost: Frames that the header announces and the file does not hold.
    """

    info: VideoInfo
    times: Int64[np.ndarray, " n"]
    keys: list[int]
    unit: float
    lost: int


class _Packet(NamedTuple):
    time: int
    key: bool
    cut_off: bool  # by an edit list: decoded, since others refer to it, and not shown


def packet_index(path: str) -> PacketIndex:
    """Reads all packets of a file and decodes its first frame.

    Raises:
        UnreadableError: If that is not enough to know its frames.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UnreadableError(path, error.strerror or "no such file") from error
    if not stat.st_size:
        raise UnreadableError(path, "the file is empty")
    return _index(path, stat.st_size, stat.st_mtime_ns)


def video_info(path: str) -> VideoInfo:
    """What there is to know of a file; UnreadableError if its frames cannot be found."""
    return packet_index(path).info


def frame_range(path: str, start: float | None, end: float | None) -> tuple[int, int]:
    """The first frame shown at `start` seconds or later, and how many there are before `end` (None: all).

    Raises:
        UnreadableError: There is none.
    """
    found = packet_index(path)
    timed = len(found.times) > 0
    seconds = (found.times - found.times[0]) * found.unit if timed else np.arange(found.info.frames) / found.info.fps
    first, stop = np.searchsorted(seconds, np.array([start or 0.0, np.inf if end is None else end]) - _ROUNDING)
    if first >= stop:
        raise UnreadableError(path, f"no frame from {start} s to {end} s: it lasts {found.info.seconds:.2f} s")
    return int(first), int(stop - first)


@contextmanager
def open_video(path: str) -> Iterator[tuple[Any, Any]]:
    """A container and its main video stream; whatever goes wrong within becomes UnreadableError."""
    try:
        with av.open(f"file:{path}", options=_SAFE) as container:
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic or not stream.codec_context:
                raise ValueError("no video in it that can be decoded")
            stream.codec_context.thread_type = "NONE"  # one process per core decodes; threads would only fight for them
            yield container, stream
    except FewtokensError:
        raise
    except av.error.ArgumentError as error:
        raise UnreadableError(path, f"no container of a supported kind ({_SAFE['format_whitelist']})") from error
    except (av.error.FFmpegError, OSError, ValueError, IndexError, RuntimeError, MemoryError) as error:
        raise UnreadableError(path, getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def quarter_turns(frame: av.VideoFrame) -> int:
    """Quarter turns, against the clock, by which the rotation metadata say a frame is to be shown."""
    if frame.rotation % 90:
        raise ValueError(f"it is to be shown turned by {frame.rotation} degrees, which is no multiple of 90")
    return frame.rotation // 90 % 4


@lru_cache(maxsize=1)  # video_info is called, then frames of the same file; size and time notice a changed one
def _index(path: str, size: int, changed: int) -> PacketIndex:
    with open_video(path) as (container, stream):
        packets, first, clean = _walk(container, stream)
        if first is None or not packets:
            raise ValueError("no frame can be decoded")
        turned = quarter_turns(first) % 2
        width, height = (first.height, first.width) if turned else (first.width, first.height)
        fps, unit = float(stream.average_rate or stream.guessed_rate or 1), float(stream.time_base)
        codec, kind = stream.codec_context.codec.canonical_name, container.format.name
        lost, simple = _lost(container, stream, packets, fps), _simple(container, first)
    times = sorted(packet.time for packet in packets if not packet.cut_off)
    # AVI and transport streams have no times that can be relied on, others leave them out or repeat them; and frames
    # before the first key frame are announced, but cannot be decoded.
    indexed = kind.startswith(("mov", "matroska")) and packets[0].key and _ABSENT not in (p.time for p in packets)
    if not indexed or not times or len(set(times)) < len(times):
        return _counted(path, width, height, fps, lost)
    plain = clean and simple and len(times) == len(packets) and codec in _PLAIN
    seconds = (times[-1] - times[0]) * unit + 1 / fps
    info = VideoInfo(len(times), width, height, fps, seconds, "any" if plain else "pyav")
    return PacketIndex(
        info, np.array(times, np.int64), sorted(packet.time for packet in packets if packet.key), unit, lost
    )


def _walk(container: Any, stream: Any) -> tuple[list[_Packet], av.VideoFrame | None, bool]:
    """All packets; the first frame; whether every key frame is a clean break."""
    packets: list[_Packet] = []
    first, clean, context = None, True, stream.codec_context
    for packet in container.demux(stream):
        if first is None:
            first = next(iter(packet.decode()), None)
        if packet.size:  # the last one, without data, ends the stream
            time = _ABSENT if packet.pts is None else packet.pts
            packets.append(_Packet(time, packet.is_keyframe, packet.is_discard))
            clean = clean and (not packet.is_keyframe or _refreshes(packet, context))
    return packets, first, clean


def _simple(container: Any, first: av.VideoFrame) -> bool:
    """One video of whole frames with 8 bits: of fields and finer shades the decoders make different colours."""
    eight = all(component.bits == 8 for component in first.format.components)
    return eight and not first.interlaced_frame and len(container.streams.video) == 1


def _lost(container: Any, stream: Any, packets: list[_Packet], fps: float) -> int:
    """Frames that the header announces and that are not there, as in a download that broke off."""
    if stream.frames:
        return max(0, stream.frames - len(packets))
    # Matroska announces no number but, as a rule, durations: of the stream as a tag, hours:minutes:seconds, and of the
    # whole file, which may be that of the sound.
    parts, tolerance = stream.metadata.get("DURATION", "").split(":"), 0.1
    if len(parts) == 3:
        announced = int(parts[0]) * 3600 + int(parts[1]) * 60 + float(parts[2])
    else:
        announced, tolerance = (container.duration or 0) * 1e-6 if len(container.streams) == 1 else 0.0, 0.5
    times = [packet.time for packet in packets]
    absent = announced - (max(times) - min(times)) * float(stream.time_base) - 1 / fps
    return round(absent * fps) if absent > tolerance else 0


def _counted(path: str, width: int, height: int, fps: float, lost: int) -> PacketIndex:
    with open_video(path) as (container, stream):
        count = sum(1 for _ in container.decode(stream))
    return PacketIndex(
        VideoInfo(count, width, height, fps, count / fps, "sequential"), np.empty(0, np.int64), [], 1.0, lost
    )


def _refreshes(packet: av.Packet, context: Any) -> bool:
    """Whether no frame after a key frame refers to one before it; decord loses count where one does.

    Looks for an IDR unit in H.264 (type 5) and HEVC (types 19 and 20), by the lengths of the units in MP4 and Matroska.
    """
    codec, header = context.codec.canonical_name, context.extradata
    if codec not in ("h264", "hevc"):
        return True
    where = 4 if codec == "h264" else 21
    if not header or len(header) <= where or header[0] != 1:  # start codes, as in transport streams
        return False
    prefix, data, place = (header[where] & 3) + 1, bytes(packet), 0
    while place + prefix < len(data):
        unit = data[place + prefix]
        if (unit & 31) == 5 if codec == "h264" else (unit >> 1 & 63) in (19, 20):
            return True
        place += prefix + int.from_bytes(data[place : place + prefix])
    return False
