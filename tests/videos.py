"""Small generated videos. Every frame shows its own number, so that a test can tell which frame it got."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

WIDTH, HEIGHT, BITS = 64, 48, 8
X264 = {"preset": "ultrafast", "crf": "18"}


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Draw a number in bits as white and black fields in the upper half, and a red mark at the lower left."""
    image = np.full((height, width, 3), 60, np.uint8)
    for bit in range(BITS):
        left, right = bit * width // BITS, (bit + 1) * width // BITS
        image[: height // 2, left:right] = 235 if number >> bit & 1 else 20
    image[height // 2 :, : width // 2] = (200, 30, 30)
    return image


def number(frame: np.ndarray) -> int:
    """Return the number that a frame (3, H, W) shows."""
    upper = frame[:, : frame.shape[1] // 2].mean((0, 1))
    fields = [float(part[len(part) // 4 : -len(part) // 4].mean()) for part in np.array_split(upper, BITS)]
    return sum(1 << bit for bit, light in enumerate(fields) if light > 128)


def upright(frame: np.ndarray) -> bool:
    """Return whether the red mark is at the lower left of a frame (3, H, W), and nowhere else."""
    h, w = frame.shape[1] // 2, frame.shape[2] // 2
    red = frame[0].astype(int) - frame[1]
    corners = [red[:h, :w], red[:h, w:], red[h:, :w], red[h:, w:]]
    return [bool(corner.mean() > 60) for corner in corners] == [False, False, True, False]


def write(
    path: Path,
    count: int = 30,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    *,
    pix_fmt: str = "yuv420p",
    rate: int = 30,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    sound: bool = False,
    first: int = 0,
) -> Path:
    """Write a video of `count` numbered frames, shown at `times` (in 1/rate s; None: one after the other)."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=rate, options=X264 if options is None else options)
        stream.width, stream.height, stream.pix_fmt = size[0], size[1], pix_fmt
        stream.codec_context.time_base = Fraction(1, rate)
        if rotation:
            stream.set_display_rotation(rotation)
        audio = file.add_stream("aac", rate=8000) if sound else None
        for index in range(count):
            shown = size[::-1] if rotation % 180 else size
            stored = np.rot90(picture(first + index, *shown), -rotation // 90)  # as a rotated camera stores it
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(stored), format="rgb24")
            frame.pts, frame.time_base = times[index] if times else index, Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if audio is not None:
            _hum(file, audio)
    return path


def write_noise(path: Path, count: int = 30) -> Path:
    """Write a video of random pixels, which cannot be compressed to a few bytes."""
    noise = np.random.default_rng(0)
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=30, options=X264)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for _ in range(count):
            pixels = noise.integers(0, 256, (120, 160, 3), dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """Write a file with audio and no video."""
    with av.open(str(path), "w") as file:
        _hum(file, file.add_stream("aac", rate=8000))
    return path


def write_folders(root: Path, count: int = 40, size: tuple[int, int] = (48, 48)) -> Path:
    """Write four training and three validation videos in two classes; train/b/1 and val/b/0 are cut off."""
    for name in ("train/a/0", "train/a/1", "train/b/0", "train/b/1", "val/a/0", "val/b/0", "val/b/1"):
        path = root / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, count, size=size)
        if name in ("train/b/1", "val/b/0"):
            path.write_bytes(path.read_bytes()[:900])
    return root


def cut(source: Path, target: Path, frames: int) -> Path:
    """Copy a file without its first frames and without encoding: an edit list hides them, as in many clips."""
    with av.open(str(source)) as old, av.open(str(target), "w", options={"avoid_negative_ts": "disabled"}) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.dts is None:
                continue
            step = int(1 / (stream.average_rate * stream.time_base)) * frames
            packet.pts, packet.dts, packet.stream = packet.pts - step, packet.dts - step, copy
            new.mux(packet)
    return target


def two_streams(target: Path, small: int = 20, large: int = 25) -> Path:
    """Write two video streams to one file, numbered from 0 and from 100. The second has more pixels."""
    with av.open(str(target), "w") as file:
        streams: list[Any] = []
        for size in ((WIDTH, HEIGHT), (2 * WIDTH, 2 * HEIGHT)):
            stream: Any = file.add_stream("libx264", rate=30, options=X264)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            streams.append((stream, size))
        for (stream, size), count, first in zip(streams, (small, large), (0, 100), strict=True):
            for index in range(count):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture(first + index, *size), format="rgb24")))
            file.mux(stream.encode())
    return target


def _hum(file: Any, stream: Any) -> None:
    for _ in range(20):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
    file.mux(stream.encode())
