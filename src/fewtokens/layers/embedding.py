"""Tubelets: the boxes of frames, rows and columns that become the tokens of a clip.

Arnab et al., "ViViT: A Video Vision Transformer", ICCV 2021 (arXiv 2103.15691), section 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fewtokens.errors import FewtokensError

Size = int | Sequence[int]


@dataclass(frozen=True)
class Tubelets:
    """How a clip is cut, every side by its name: papers and codes order them differently.

    Args:
        clip_frames: Frames of a clip.
        image_size: Height and width of a frame, or one number for both.
        channels: Of a frame.
        frames: Frames that a tubelet spans; 1 embeds every frame by itself.
        height: Rows of pixels that it spans.
        width: Columns of pixels.
        sampled_frames: Look at so many frames of the clip only, see `uniform_frames`; None for all. With `frames` 1 it
            is the paper's "uniform frame sampling".

    Raises:
        FewtokensError: Tubelets that do not tile the clip.
    """

    clip_frames: int
    image_size: Size
    channels: int = 3
    frames: int = 2
    height: int = 16
    width: int = 16
    sampled_frames: int | None = None

    def __post_init__(self) -> None:
        if self.clip_frames < 1 or (self.sampled_frames is not None and self.sampled_frames < 1):
            raise FewtokensError(
                "A clip has frames",
                expected="at least one, and at least one of them sampled",
                got=f"{self.clip_frames} frames, of which {self.sampled_frames or 'all'} are sampled",
                fix="set data.frames and backbone.tubelets.sampled_frames",
            )
        clip, tubelet = (len(self.indices), *self.sides), (self.frames, self.height, self.width)
        if min(tubelet) < 1 or any(whole < part or whole % part for whole, part in zip(clip, tubelet, strict=True)):
            raise FewtokensError(
                "Tubelets tile the clip",
                expected="frames, height and width that divide {} frames of {}x{}".format(*clip),
                got="{} frames of {}x{}".format(*tubelet),
                fix="set backbone.tubelets.frames, .height and .width, or data.frames and data.image_size",
            )

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width) of a frame."""
        return pair(self.image_size)

    @property
    def indices(self) -> list[int]:
        """The frames of the clip that are looked at."""
        sampled = self.clip_frames if self.sampled_frames is None else self.sampled_frames
        return uniform_frames(self.clip_frames, sampled)

    @property
    def steps(self) -> int:
        """Time steps, T: tubelets one after another."""
        return len(self.indices) // self.frames

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W), tubelets within a time step."""
        return self.sides[0] // self.height, self.sides[1] // self.width

    def centres(self, clips: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c steps h w"]:
        """The middle frame of every time step, the one that the central-frame initialisation looks at."""
        return clips[:, :, self.indices[self.frames // 2 :: self.frames]]


class TubeletEmbed(nn.Module):
    """A convolution whose window and stride are one tubelet: timm's `embed_layer` for clips.

    Args:
        tubelets: How clips are cut.
        per_step: Every time step becomes a sample of its own.
        embed_dim: Width C of the tokens.
        bias: Whether the convolution has one.
        device: Where the parameters lie.
        dtype: Their type.
        of_timm: What timm says of images, and `tubelets` says for clips.

    Raises:
        ValueError: timm was asked for images of any size, or for a norm.
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
        **of_timm: Any,
    ) -> None:
        super().__init__()
        if of_timm.get("dynamic_img_pad") or of_timm.keys() & {"strict_img_size", "norm_layer"}:
            raise ValueError("clips have one size, and their embedding no norm: no dynamic_img_*, no embed_norm_layer")
        self.tubelets, self.per_step = tubelets, per_step
        self.img_size, self.grid_size = tubelets.sides, tubelets.grid
        self.patch_size = (tubelets.height, tubelets.width)
        self.num_patches = tubelets.grid[0] * tubelets.grid[1] * (1 if per_step else tubelets.steps)
        window = (tubelets.frames, *self.patch_size)
        self.proj = nn.Conv3d(
            tubelets.channels, embed_dim, window, stride=window, bias=bias, device=device, dtype=dtype
        )
        chosen = None if len(tubelets.indices) == tubelets.clip_frames else torch.tensor(tubelets.indices)
        self.indices: Tensor | None
        self.register_buffer("indices", chosen, persistent=False)

    def forward(self, clips: Float[Tensor, "b c *t h w"]) -> Float[Tensor, "bt n d"]:
        """Clips (B, channels, frames, H, W) to tokens by time, row, column (B, T*N, C), or per step (B*T, N, C).

        An image (B, channels, H, W) is a clip of one frame.
        """
        clips = clips[:, :, None] if clips.ndim == 4 else clips
        clips = clips if self.indices is None else clips.index_select(2, self.indices)
        # A convolution without overlap is a product; as one it took a seventh of the time in bfloat16 on a CPU, both
        # passes, and no more in float32.
        frames, height, width = self.proj.kernel_size
        boxes = clips.unflatten(4, (-1, width)).unflatten(3, (-1, height)).unflatten(2, (-1, frames))
        boxes = boxes.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # (B, T, H, W, channels and pixels of a tubelet)
        x = F.linear(boxes, self.proj.weight.flatten(1), self.proj.bias)
        return x.flatten(0, 1).flatten(1, 2) if self.per_step else x.flatten(1, 3)


class Pixels(nn.Module):
    """Every pixel is a token as it is: timm's `embed_layer` for what was embedded before.

    Args:
        img_size: Height and width.
        of_timm: What timm says of patches.
    """

    def __init__(self, img_size: tuple[int, int], **of_timm: Any) -> None:
        super().__init__()
        self.img_size = self.grid_size = img_size
        self.num_patches = img_size[0] * img_size[1]

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
        """(B, C, H, W) to tokens (B, H*W, C)."""
        return images.flatten(2).transpose(1, 2)


def uniform_frames(total: int, count: int) -> list[int]:
    """Indices of `count` of `total` frames, evenly spread: i * total / (count + 1), to the nearest, i = 1 .. count.

    Exact arithmetic, halves to the even number. Scenic's `sample_frames_uniformly` is the same in floating point, where
    it often gives one frame too many (of 8 or 32 frames, 2; of 16 frames, 5). All frames where there are not more.
    """
    if count >= total:
        return list(range(total))
    return [round(Fraction(i * total, count + 1)) for i in range(1, count + 1)]


def pair(size: Size) -> tuple[int, int]:
    """(height, width) of a size."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
