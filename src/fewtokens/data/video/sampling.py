"""Choice of the frames and crops of a video: one random clip in training, fixed views in evaluation.

The fixed views are those of scenic (Arnab et al., arXiv:2103.15691, and the readers of DMVR), which
`tests/golden/vivit_multiview.npz` holds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, UInt8

from fewtokens.data.video.records import VideoInfo
from fewtokens.errors import FewtokensError, check, check_choice

Window = Int64[np.ndarray, " t"]


@dataclass(frozen=True)
class Plan:
    """The views to read from one video. A view is a crop of a clip: the first crop of all clips, then the second, ...

    Attributes:
        windows: Frame numbers of each clip.
        short_side: Length in pixels to which the shorter side of the frames is scaled; None to leave it.
        corners: Top and left of each crop, in pixels.
        side: Side of the crops in pixels.
    """

    windows: list[Window]
    short_side: int | None
    corners: list[tuple[int, int]]
    side: int

    def needed(self) -> Window:
        """Return the numbers of all frames, sorted and without repetitions."""
        return np.unique(np.concatenate(self.windows))

    def cut(self, frames: UInt8[np.ndarray, "n 3 h w"], out: UInt8[np.ndarray, "v t s s 3"]) -> None:
        """Write the views to `out`, given the `needed` frames. The channels must be the last axis in memory."""
        needed, rows = self.needed(), frames.transpose(0, 2, 3, 1)
        views = ((corner, window) for corner in self.corners for window in self.windows)
        for view, ((top, left), window) in zip(out, views, strict=True):
            for target, place in zip(view, np.searchsorted(needed, window), strict=True):
                target[:] = rows[place, top : top + self.side, left : left + self.side]


class RandomClip:
    """Samples one clip at a random position, scaled by a random factor and cropped at a random place (training).

    Args:
        frames: Number of frames in a clip.
        stride: Distance between them, in frames of the video.
        side: Side of the crop in pixels.
        short_side: Shorter side of the frames in pixels before the random factor; None to leave the frames as stored.
        jitter: Smallest and largest factor. It costs no time, as the decoder scales anyway.

    Raises:
        FewtokensError: The crop does not fit into the smallest frames, or `jitter` is invalid or has no size to act on.
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
        is_range = len(jitter) == 2 and 0 < jitter[0] <= jitter[1]
        check(is_range, "data.scale_jitter", "[smallest, largest] with 0 < smallest <= largest", list(jitter))
        if short_side is None and tuple(jitter) != (1, 1):
            raise FewtokensError(
                f"`data.scale_jitter` must be [1, 1] if `data.resize` is null, got {list(jitter)}, as it multiplies "
                "`data.resize`. Set data.resize=256, for example."
            )
        _check_fits(side, None if short_side is None else round(short_side * jitter[0]))
        self.frames, self.stride, self.side, self.short_side, self.jitter = frames, stride, side, short_side, jitter

    def plan(self, info: VideoInfo, draws: torch.Generator) -> Plan:
        """Draw the position of the clip, the factor, and the place of the crop.

        Raises:
            FewtokensError: The frames are smaller than the crop.
        """
        offset, scale, top, left = torch.rand(4, generator=draws, dtype=torch.float64).tolist()
        start = int(offset * max(1, info.frames - (self.frames - 1) * self.stride))
        low, high = self.jitter
        short = None if self.short_side is None else round(self.short_side * (low + scale * (high - low)))
        width, height = info.size(short)
        _check_frame_size(self.side, width, height)
        corner = (int(top * (height - self.side + 1)), int(left * (width - self.side + 1)))
        return Plan([_window(start, info.frames, self.frames, self.stride)], short, [corner], self.side)


class FixedViews:
    """Samples clips at equal distances, each cropped at fixed places along the longer side (evaluation).

    Args:
        frames: Number of frames in a clip.
        stride: Distance between them, in frames of the video.
        side: Side of the crops in pixels.
        short_side: Shorter side of the frames in pixels; None to leave the frames as stored.
        clips: Number of clips. A single one is at the center.
        crops: 1 (the center) or 3 (one end, the center, the other end).

    Raises:
        FewtokensError: A crop does not fit into the frames, or there are no clips, or neither 1 nor 3 crops.
    """

    def __init__(
        self, frames: int, stride: int, side: int, short_side: int | None = None, clips: int = 1, crops: int = 1
    ) -> None:
        check(clips >= 1, "data.views[0]", "a number of clips >= 1", clips)
        check_choice("data.views[1]", crops, (1, 3))
        _check_fits(side, short_side)
        self.frames, self.stride, self.side, self.short_side = frames, stride, side, short_side
        self.clips, self.crops, self.views = clips, crops, clips * crops

    def plan(self, info: VideoInfo, draws: torch.Generator) -> Plan:
        """Return the views, which are the same in every call. Nothing is drawn.

        Raises:
            FewtokensError: The frames are smaller than the crops.
        """
        width, height = info.size(self.short_side)
        _check_frame_size(self.side, width, height)
        starts = offsets(info.frames, self.frames * self.stride, self.clips)
        windows = [_window(start, info.frames, self.frames, self.stride) for start in starts]
        return Plan(windows, self.short_side, corners(height, width, self.side, self.crops), self.side)


Sampling = RandomClip | FixedViews


def offsets(length: int, covered: int, clips: int) -> list[int]:
    """Return the first frames of clips that cover `covered` frames each: equally spaced from frame 0; one centered."""
    free = max(0, length - covered)
    return [free // 2] if clips == 1 else [i * free // (clips - 1) for i in range(clips)]


def corners(height: int, width: int, side: int, crops: int) -> list[tuple[int, int]]:
    """Return top and left of the crops: at the center, or at both ends and the center of the longer side."""
    center = math.ceil((height - side) / 2), math.ceil((width - side) / 2)
    if crops == 1:
        return [center]
    if height > width:
        return [(0, center[1]), center, (height - side, center[1])]
    return [(center[0], 0), center, (center[0], width - side)]


def _window(start: int, length: int, frames: int, stride: int) -> Window:
    return (start + stride * np.arange(frames)) % length  # a video that is too short is repeated


def _check_fits(side: int, short_side: int | None) -> None:
    if short_side is not None and short_side < side:
        raise FewtokensError(
            f"`data.image_size` must be at most the shorter side of the scaled frames, got {side} and {short_side} "
            "pixels. The latter is data.resize, in training times the smallest factor of data.scale_jitter."
        )


def _check_frame_size(side: int, width: int, height: int) -> None:
    if min(width, height) < side:  # possible only if frames are not scaled
        raise FewtokensError(
            f"A crop of data.image_size={side} does not fit into frames of {width} x {height} pixels. Set "
            f"data.resize={side} or a smaller `data.image_size`."
        )
