"""Embedding of clips: tubelets, boxes of frames, rows and columns, become tokens.

Arnab et al., "ViViT: A Video Vision Transformer", ICCV 2021 (arXiv 2103.15691), section 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from fewtokens.errors import FewtokensError, check

Size = int | Sequence[int]


@dataclass(frozen=True)
class Tubelets:
    """The division of a clip into tubelets. Every side has a name, since papers and code order them differently.

    Args:
        clip_frames: Number of frames of a clip.
        image_size: Height and width of a frame in pixels, or one number for both.
        channels: Number of channels of a frame.
        frames: Number of frames that a tubelet spans; 1 embeds every frame on its own.
        height: Height of a tubelet in pixels.
        width: Width of a tubelet in pixels.
        sampled_frames: Use only this many frames of the clip, see `uniform_frames`; None for all. With `frames=1` this
            is the paper's "uniform frame sampling".

    Raises:
        FewtokensError: The tubelets do not tile the clip.
    """

    clip_frames: int
    image_size: Size
    channels: int = 3
    frames: int = 2
    height: int = 16
    width: int = 16
    sampled_frames: int | None = None

    def __post_init__(self) -> None:
        check(self.clip_frames >= 1, "data.frames", "an int >= 1", self.clip_frames)
        sampled = self.sampled_frames
        check(sampled is None or sampled >= 1, "backbone.tubelets.sampled_frames", "an int >= 1 or null", sampled)
        clip, tubelet = (len(self.indices), *self.sides), (self.frames, self.height, self.width)
        if min(tubelet) < 1 or any(side < part or side % part for side, part in zip(clip, tubelet, strict=True)):
            raise FewtokensError(
                "Tubelets of {} frames of {}x{} pixels do not tile {} frames of {}x{}. ".format(*tubelet, *clip)
                + "Set backbone.tubelets.frames, .height and .width to divisors, or data.frames and data.image_size."
            )

    @property
    def sides(self) -> tuple[int, int]:
        """Return (height, width) of a frame in pixels."""
        return pair(self.image_size)

    @property
    def indices(self) -> list[int]:
        """Return the indices of the frames that are embedded."""
        sampled = self.clip_frames if self.sampled_frames is None else self.sampled_frames
        return uniform_frames(self.clip_frames, sampled)

    @property
    def steps(self) -> int:
        """Return the number T of time steps."""
        return len(self.indices) // self.frames

    @property
    def grid(self) -> tuple[int, int]:
        """Return the grid (H, W) of tubelets within a time step."""
        return self.sides[0] // self.height, self.sides[1] // self.width

    def central_frames(self, clips: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c steps h w"]:
        """Return the middle frame of every time step, which the central-frame initialization uses."""
        return clips[:, :, self.indices[self.frames // 2 :: self.frames]]


class TubeletEmbed(nn.Module):
    """A convolution whose kernel size and stride are one tubelet: timm's `embed_layer` for clips.

    Args:
        tubelets: How clips are cut.
        per_step: Return every time step as a sample of its own.
        embed_dim: Width C of the tokens.
        bias: Whether the convolution has a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.
        timm_options: Further keyword arguments of timm's patch embedding. They describe images, which `tubelets`
            replaces, and are ignored.

    Raises:
        ValueError: timm was asked for images of any size or for a norm, which do not exist here.
    """

    def __init__(
        self,
        tubelets: Tubelets,
        per_step: bool,
        *,
        embed_dim: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **timm_options: Any,
    ) -> None:
        super().__init__()
        if timm_options.get("dynamic_img_pad") or timm_options.keys() & {"strict_img_size", "norm_layer"}:
            raise ValueError("clips have a fixed size and no embedding norm: no dynamic_img_*, no embed_norm_layer")
        self.tubelets, self.per_step = tubelets, per_step
        self.img_size, self.grid_size = tubelets.sides, tubelets.grid
        self.patch_size = (tubelets.height, tubelets.width)
        self.num_patches = tubelets.grid[0] * tubelets.grid[1] * (1 if per_step else tubelets.steps)
        window = (tubelets.frames, *self.patch_size)
        self.proj = nn.Conv3d(
            tubelets.channels, embed_dim, window, stride=window, bias=bias, device=device, dtype=dtype
        )
        sampled = None if len(tubelets.indices) == tubelets.clip_frames else torch.tensor(tubelets.indices)
        self.indices: Tensor | None
        self.register_buffer("indices", sampled, persistent=False)

    def forward(self, clips: Float[Tensor, "b c *t h w"]) -> Float[Tensor, "bt n d"]:
        """Embed clips (B, channels, frames, H, W) as tokens (B, T*N, C), or (B*T, N, C) if `per_step`.

        Tokens are ordered by time, row and column. An image (B, channels, H, W) is a clip with one frame.
        """
        clips = clips[:, :, None] if clips.ndim == 4 else clips
        clips = clips if self.indices is None else clips.index_select(2, self.indices)
        # A convolution without overlap is a matrix product. Written as one, it took a seventh of the time in bfloat16
        # on a CPU (forward and backward), and the same time in float32.
        frames, height, width = self.proj.kernel_size
        boxes = clips.unflatten(4, (-1, width)).unflatten(3, (-1, height)).unflatten(2, (-1, frames))
        boxes = boxes.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # (B, T, H, W, channels and pixels of a tubelet)
        x = F.linear(boxes, self.proj.weight.flatten(1), self.proj.bias)
        return x.flatten(0, 1).flatten(1, 2) if self.per_step else x.flatten(1, 3)


class Pixels(nn.Module):
    """Use every pixel as a token: timm's `embed_layer` for features that are already embedded.

    Args:
        img_size: Height and width in pixels.
        timm_options: Further keyword arguments of timm's patch embedding, ignored.
    """

    def __init__(self, img_size: tuple[int, int], **timm_options: Any) -> None:
        super().__init__()
        self.img_size = self.grid_size = img_size
        self.num_patches = img_size[0] * img_size[1]

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
        """Flatten (B, C, H, W) to tokens (B, H*W, C)."""
        return images.flatten(2).transpose(1, 2)


def uniform_frames(total: int, count: int) -> list[int]:
    """Return the indices of `count` evenly spaced frames out of `total`; all frames if there are at most `count`.

    Frame i = 1 .. count is round(i * total / (count + 1)), in exact arithmetic, with halves rounded to the even number.
    Scenic's `sample_frames_uniformly` computes the same in floating point and often returns one frame too many (for 2
    of 8 or 32 frames, and for 5 of 16).
    """
    if count >= total:
        return list(range(total))
    return [round(Fraction(i * total, count + 1)) for i in range(1, count + 1)]


def resample_positions(
    table: Float[Tensor, "1 n c"], prefix: int, old: tuple[int, int, int], new: tuple[int, int, int]
) -> Float[Tensor, "1 m c"]:
    """Return learned positions for another number of time steps or another grid.

    The grid is resampled within each time step (bicubic, by timm), and then every position linearly along time. Both
    take the old and the new positions as parts of the same area and the same time.

    Args:
        table: Positions of class and register tokens, and then of the patches by time, row and column.
        prefix: Number of class and register positions P, which are not changed.
        old: Time steps, rows and columns (T, H, W) of the table, with n = P + T * H * W.
        new: The same of the result.
    """
    if old == new:
        return table
    first, patches = table[:, :prefix], table[:, prefix:].unflatten(1, (old[0], -1))
    if old[1:] != new[1:]:
        steps = [resample_abs_pos_embed(step, list(new[1:]), list(old[1:]), 0) for step in patches.unbind(1)]
        patches = torch.stack(steps, dim=1)
    if old[0] != new[0]:
        along_time = patches[0].flatten(1).T[None]  # (1, H*W*C, T)
        along_time = F.interpolate(along_time.float(), new[0], mode="linear", align_corners=False)
        patches = along_time[0].T.unflatten(1, patches.shape[2:])[None].to(table)
    return torch.cat([first, patches.flatten(1, 2)], dim=1)


def sincos_positions(grid: tuple[int, int], dim: int) -> Float[Tensor, "1 n c"]:
    """Return fixed positions of a grid (H, W): sines and cosines of column and row, with frequencies from 1 to 1e-4.

    MoCo v3, and "Better plain ViT baselines for ImageNet-1k" (Beyer et al. 2022), as in google-research/big_vision.

    Raises:
        FewtokensError: The width is no multiple of 4, or only 4.
    """
    check(dim % 4 == 0 and dim > 4, "backbone.dim", "a multiple of 4 above 4 with backbone.positions=sincos2d", dim)
    frequencies = 10_000.0 ** -(torch.arange(dim // 4) / (dim // 4 - 1))
    rows, columns = torch.meshgrid(*(torch.arange(side).float() for side in grid), indexing="ij")
    angles = [part.flatten()[:, None] * frequencies for part in (columns, rows)]
    return torch.cat([wave for part in angles for wave in (part.sin(), part.cos())], dim=1)[None]


def pair(size: Size) -> tuple[int, int]:
    """Return (height, width) of a size given as one number or two."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
