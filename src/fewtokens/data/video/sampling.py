"""Which frames and which window of a video a model gets: one random clip in training, fixed views in evaluation.

The views are scenic's (Arnab et al., arXiv:2103.15691, and the readers of DMVR): `tests/golden/vivit_multiview.npz`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, UInt8

from fewtokens.data.video.records import VideoInfo
from fewtokens.errors import FewtokensError

Window = Int64[np.ndarray, " t"]


@dataclass(frozen=True)
class Plan:
    """What to read of one video.

    Attributes:
        windows: Frame numbers of every clip.
        short_side: Of the frames, in pixels; None leaves them as they are.
        corners: Top and left of every crop. A view is a crop of a clip: the first crop of all clips, the second, ...
        side: Of the crops, in pixels.
    """

    windows: list[Window]
    short_side: int | None
    corners: list[tuple[int, int]]
    side: int

    def needed(self) -> Window:
        """All frames, sorted, each once."""
        return np.unique(np.concatenate(self.windows))

    def cut(self, frames: UInt8[np.ndarray, "n 3 h w"], out: UInt8[np.ndarray, "v t s s 3"]) -> None:
        """Puts the views of the `needed` frames into `out`, row by row: the channels are the last axis in memory."""
        needed, rows = self.needed(), frames.transpose(0, 2, 3, 1)
        views = ((corner, window) for corner in self.corners for window in self.windows)
        for view, ((top, left), window) in zip(out, views, strict=True):
            for target, place in zip(view, np.searchsorted(needed, window), strict=True):
                target[:] = rows[place, top : top + self.side, left : left + self.side]


class RandomClip:
    """One clip from anywhere, scaled by a random factor and cropped anywhere (training).

    Args:
        frames: Of a clip.
        stride: Distance between them, in frames of the video.
        side: Of the crop, in pixels.
        short_side: Of the frames before the random factor; None leaves them as they are.
        jitter: Smallest and largest factor. The decoder scales anyhow, so that this costs nothing.

    Raises:
        FewtokensError: A crop would not fit into the smallest frames, or frames that are not scaled were to vary.
    """

    views = 1

    def __init__(
        self,
        frames: int,
        stride: int,
        side: int,
        short_side: int | None = None,
        jitter: Sequence[int | float] = (1.0, 1.0),
    ) -> None:
        smallest = None if short_side is None else round(short_side * jitter[0])
        if len(jitter) != 2 or not 0 < jitter[0] <= jitter[1] or (short_side is None and tuple(jitter) != (1, 1)):
            raise FewtokensError(
                "data.scale_jitter is a range of factors on data.resize",
                expected="[smallest, largest], or [1, 1] where data.resize is null",
                got=list(jitter),
                fix="set data.scale_jitter=[0.9,1.33] data.resize=256",
            )
        _check_fits(side, smallest)
        self.frames, self.stride, self.side, self.short_side, self.jitter = frames, stride, side, short_side, jitter

    def plan(self, info: VideoInfo, draws: torch.Generator) -> Plan:
        """Draws offset, factor and place."""
        offset, scale, top, left = torch.rand(4, generator=draws, dtype=torch.float64).tolist()
        start = int(offset * max(1, info.frames - (self.frames - 1) * self.stride))
        low, high = self.jitter
        short = None if self.short_side is None else round(self.short_side * (low + scale * (high - low)))
        width, height = info.size(short)
        _check_window(self.side, width, height)
        corner = (int(top * (height - self.side + 1)), int(left * (width - self.side + 1)))
        return Plan([_window(start, info.frames, self.frames, self.stride)], short, [corner], self.side)


class FixedViews:
    """Clips at equal distances, each cropped at fixed places along the longer side (evaluation).

    Args:
        frames: Of a clip.
        stride: Distance between them, in frames of the video.
        side: Of the crops, in pixels.
        short_side: Of the frames; None leaves them as they are.
        clips: 1 is the centre.
        crops: 1 (the centre) or 3 (one end, the centre, the other end).
    """

    def __init__(
        self, frames: int, stride: int, side: int, short_side: int | None = None, clips: int = 1, crops: int = 1
    ) -> None:
        if clips < 1 or crops not in (1, 3):
            raise FewtokensError(
                "data.views is the number of clips and of crops",
                expected="[clips, crops] with at least 1 clip and 1 or 3 crops",
                got=[clips, crops],
                fix="set data.views=[4,3], or [1,1] for the centre alone",
            )
        _check_fits(side, short_side)
        self.frames, self.stride, self.side, self.short_side = frames, stride, side, short_side
        self.clips, self.crops, self.views = clips, crops, clips * crops

    def plan(self, info: VideoInfo, draws: torch.Generator) -> Plan:
        """The same for every call; draws nothing."""
        width, height = info.size(self.short_side)
        _check_window(self.side, width, height)
        starts = offsets(info.frames, self.frames * self.stride, self.clips)
        windows = [_window(start, info.frames, self.frames, self.stride) for start in starts]
        return Plan(windows, self.short_side, corners(height, width, self.side, self.crops), self.side)


Sampling = RandomClip | FixedViews


def offsets(length: int, covered: int, clips: int) -> list[int]:
    """First frames of clips that cover `covered` frames each: equally spaced from the beginning on; one is centred."""
    free = max(0, length - covered)
    return [free // 2] if clips == 1 else [i * free // (clips - 1) for i in range(clips)]


def corners(height: int, width: int, side: int, crops: int) -> list[tuple[int, int]]:
    """Top and left of crops: in the centre, or at the ends and the centre of the longer side."""
    tall = height > width
    centre = math.ceil((height - side) / 2), math.ceil((width - side) / 2)
    if crops == 1:
        return [centre]
    if tall:
        return [(0, centre[1]), centre, (height - side, centre[1])]
    return [(centre[0], 0), centre, (centre[0], width - side)]


def _window(start: int, length: int, frames: int, stride: int) -> Window:
    return (start + stride * np.arange(frames)) % length  # a short video begins again


def _check_fits(side: int, short_side: int | None) -> None:
    if short_side is not None and short_side < side:
        raise FewtokensError(
            "A crop of data.image_size fits into the scaled frames",
            expected=f"a shorter side of at least {side} pixels",
            got=f"{short_side} pixels (data.resize, times the smallest of data.scale_jitter in training)",
            fix="set a larger data.resize, a smaller data.image_size, or a narrower data.scale_jitter",
        )


def _check_window(side: int, width: int, height: int) -> None:
    if min(width, height) < side:  # frames as they are stored
        raise FewtokensError(
            "A crop of data.image_size fits into the frames",
            expected=f"frames of at least {side} x {side} pixels",
            got=f"{width} x {height} pixels",
            fix=f"set data.resize={side}, or a smaller data.image_size",
        )
