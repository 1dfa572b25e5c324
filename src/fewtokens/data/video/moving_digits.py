"""moving_digits: scikit-learn's digits as real video files, written once. The class is the motion of the digit.

The digits move on a torus. Column, row, angle and scale are periodic phases, each uniform in [0, 1). A motion advances
one of them at a constant speed and leaves the others unchanged. Since u + v t modulo 1 is uniform if u is, all four
phases are uniform and independent in every frame of every motion: no single frame tells the classes apart.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import av
import av.error
import torch
import torch.nn.functional as F
from av.codec.codec import UnknownCodecError
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fewtokens.data import seeding
from fewtokens.data.datamodule import Part
from fewtokens.data.image.digits import Digits
from fewtokens.data.image.in_memory import Samples
from fewtokens.data.video.datamodule import ClipSettings, Videos
from fewtokens.errors import FewtokensError, check

log = logging.getLogger(__name__)

PARTS: tuple[Part, ...] = ("train", "val", "test")
# The phase that a motion advances, and its direction, in the order of the class folders, which is by name.
MOTIONS = {
    "clockwise": (2, 1),
    "counterclockwise": (2, -1),
    "down": (1, 1),
    "grow": (3, 1),
    "left": (0, -1),
    "right": (0, 1),
    "shrink": (3, -1),
    "up": (1, -1),
}
SIDE = 32  # pixels of a frame
_SPEED = (0.05, 0.1)  # periods per frame: 1.6 to 3.2 pixels, 18 to 36 degrees, 6 to 12 % of the size
_SMALLEST, _LARGEST = 10.0, 30.0  # side of the drawn picture in pixels; the digit fills about two thirds of it
_STAMP = "moving_digits.json"
_VERSION = 1  # increase with every change to what is written
# Lossless, so that a decoded frame depends only on its own picture: compression artifacts would reveal the motion.
_CODEC, _X264 = "libx264", {"preset": "ultrafast", "qp": "0", "threads": "1"}
_FPS, _CHUNK = 8, 64  # frames per second; number of videos that are drawn together


@dataclass(frozen=True)
class Recipe:
    """The parameters of the data set.

    Attributes:
        video_frames: Number of frames in each video.
        copies: Number of videos per digit. Each has its own random motion, speed and start.
    """

    video_frames: int = 16
    copies: int = 2

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check(value >= 1, f"data.{name}", "an int >= 1", value)

    @property
    def folder(self) -> str:
        """Return the name of the folder, which is unique to the recipe and the version."""
        return f"v{_VERSION}-{self.video_frames}-frames-{self.copies}-copies"


class MovingDigits(Videos):
    """The moving_digits data set: 2594 training, 400 validation and 600 test videos of 32 x 32 pixels in 8 classes.

    The counts are those of the default recipe. The training videos show the training digits of `Digits`, the others
    its validation and test digits.

    Args:
        root: Folder that holds a subfolder for each recipe. The videos are written once, by one process per machine.
        video_frames: See `Recipe`.
        copies: See `Recipe`.
        **settings: See `Videos`.

    Raises:
        FewtokensError: A setting is out of range.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        video_frames: int = 16,
        copies: int = 2,
        **settings: Unpack[ClipSettings],
    ) -> None:
        self.recipe, self.base = Recipe(video_frames, copies), Path(root).expanduser()
        parts: dict[str, str | None] = {part: part for part in PARTS}
        super().__init__(root=str(self.base / self.recipe.folder), parts=parts, **settings)
        self.description = f"moving_digits (written to {self.root})"

    def prepare_data(self) -> None:
        """Write the videos if they do not exist."""
        write_once(self.base, self.recipe)

    def setup(self, stage: str | None = None) -> None:
        """List the videos, and write them first if `prepare_data` was not called."""
        self.prepare_data()
        super().setup(stage)


def write_once(root: Path, recipe: Recipe) -> Path:
    """Return the folder below `root` with `<part>/<class>/<number>.mp4`, and write it first if it does not exist.

    The folder appears complete or not at all, also if the process is killed or several processes write it at once.

    Raises:
        FewtokensError: The folder cannot be written, or its files have changed since.
    """
    folder = root / recipe.folder
    if not folder.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            _write(folder, recipe)
        except (OSError, av.error.FFmpegError, UnknownCodecError) as error:
            raise FewtokensError(
                f"Cannot write the moving_digits videos (H.264, about 24 MB) to {root}: {error}. Set `data.root` to a "
                "writable folder. If the codec is missing, run `pip install av==18.1.0`, which includes x264."
            ) from error
    _check_unchanged(folder, recipe)
    return folder


def _write(folder: Path, recipe: Recipe) -> None:
    log.info("Writing the videos of moving_digits to %s", folder)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        for part, samples in Digits(num_classes=10, image_size=8, channels=1, batch_size=1).read().items():
            _write_part(building / part, samples, recipe, PARTS.index(part))
        (building / _STAMP).write_text(json.dumps(asdict(recipe) | {"files": _fingerprint(building)}))
        building.chmod(0o755)  # mkdtemp denies access to all other users, who may share the data
        try:
            building.rename(folder)
        except OSError:
            if not folder.exists():
                raise  # if it exists, another process was faster and has written the same videos
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_part(folder: Path, samples: Samples, recipe: Recipe, number: int) -> None:
    generator = seeding.generator(seeding.SPLIT, _VERSION, recipe.copies, number)
    digits = samples.images[:, 0].repeat_interleave(recipe.copies, dim=0)
    labels = (torch.arange(len(digits)) % len(MOTIONS))[torch.randperm(len(digits), generator=generator)]
    phases = sample_phases(labels, recipe.video_frames, generator)
    names = list(MOTIONS)
    for name in names:
        (folder / name).mkdir(parents=True)
    for start in range(0, len(digits), _CHUNK):
        videos = render(digits[start : start + _CHUNK], phases[start : start + _CHUNK])
        for index, video in enumerate(videos, start):
            encode(folder / names[labels[index]] / f"{index:05d}.mp4", video)


def sample_phases(labels: Int[Tensor, " n"], frames: int, generator: torch.Generator) -> Float[Tensor, "n t 4"]:
    """Sample a start and a speed for each video and return the phases (column, row, angle, scale) of its frames.

    Args:
        labels: Motions, as indices into `MOTIONS`.
        frames: Number of frames in each video.
        generator: Source of the random numbers.
    """
    directions = torch.zeros(len(MOTIONS), 4, dtype=torch.float64)
    for row, (phase, direction) in zip(directions, MOTIONS.values(), strict=True):
        row[phase] = direction
    start = torch.rand(len(labels), 1, 4, generator=generator, dtype=torch.float64)
    speed = torch.empty(len(labels), 1, 1, dtype=torch.float64).uniform_(*_SPEED, generator=generator)
    return (start + speed * directions[labels][:, None] * torch.arange(frames)[:, None]) % 1


def render(pictures: UInt8[Tensor, "n h w"], phases: Float[Tensor, "n t 4"]) -> UInt8[Tensor, "n t 32 32"]:
    """Draw each picture with its phases on black, with bilinear interpolation and periodic borders."""
    column, row, angle, scale = (phase[..., None, None] for phase in phases.unbind(-1))
    centers = torch.arange(SIDE) + 0.5
    across, down = _periodic(centers[None, :] - column * SIDE), _periodic(centers[:, None] - row * SIDE)
    cosine, sine = (2 * math.pi * angle).cos(), (2 * math.pi * angle).sin()
    half = 0.5 * _SMALLEST * (_LARGEST / _SMALLEST) ** scale
    grid = torch.stack([across * cosine + down * sine, down * cosine - across * sine], dim=-1) / half[..., None]
    shape = grid.shape[:-1]  # n, t, rows, columns; grid_sample gets the frames of a video as a single tall picture
    drawn = F.grid_sample(pictures[:, None].double(), grid.flatten(1, 2), align_corners=False)
    return drawn.view(shape).round().to(torch.uint8)


def _periodic(offset: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Map offsets on the torus to the shortest equivalent ones, in [-SIDE / 2, SIDE / 2)."""
    return (offset + SIDE / 2) % SIDE - SIDE / 2


def encode(path: Path, video: UInt8[Tensor, "t h w"]) -> None:
    """Write gray frames as an H.264 file."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(_CODEC, rate=_FPS, options=_X264)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:], "yuv420p"
        for picture in video:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="gray")))
        file.mux(stream.encode())


def _check_unchanged(folder: Path, recipe: Recipe) -> None:
    try:
        expected = json.loads((folder / _STAMP).read_text())
        unchanged = expected == asdict(recipe) | {"files": _fingerprint(folder)}
    except (OSError, ValueError):
        unchanged = False
    if not unchanged:
        raise FewtokensError(
            f"The moving_digits videos in {folder} differ from those that {_STAMP} describes, or the file is missing. "
            "Delete this folder to have it written again, or set `data.root` to another one."
        )


def _fingerprint(folder: Path) -> str:
    """Hash the names and sizes of all videos."""
    digest = hashlib.sha256()
    for part in PARTS:
        for name in MOTIONS:
            for entry in sorted(os.scandir(folder / part / name), key=lambda entry: entry.name):
                digest.update(f"{part}/{name}/{entry.name} {entry.stat().st_size}\n".encode())
    return digest.hexdigest()
