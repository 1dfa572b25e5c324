"""moving_digits: scikit-learn's digits as real video files, written once. The class is how a digit moves."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import av
import av.error
import torch
from av.codec.codec import UnknownCodecError
from jaxtyping import UInt8
from torch import Tensor

from fewtokens.data import seeding
from fewtokens.data.datamodule import ClipSettings, Part, out_of_range
from fewtokens.data.image.digits import Digits
from fewtokens.data.image.in_memory import Samples
from fewtokens.data.video import motion
from fewtokens.data.video.datamodule import Videos
from fewtokens.data.video.motion import MOTIONS
from fewtokens.errors import FewtokensError

log = logging.getLogger(__name__)

PARTS: tuple[Part, ...] = ("train", "val", "test")
_STAMP = "moving_digits.json"
_VERSION = 1  # raise it with every change of what is written
# Lossless: what a frame looks like depends on its own picture alone, so that compression cannot betray the motion.
_CODEC, _X264 = "libx264", {"preset": "ultrafast", "qp": "0", "threads": "1"}
_RATE, _AT_ONCE = 8, 64  # frames per second; videos drawn together


@dataclass(frozen=True)
class Recipe:
    """What is written.

    Attributes:
        video_frames: Frames of a video.
        copies: Videos of every digit, each with a motion, a speed and a start of its own.
    """

    video_frames: int = 16
    copies: int = 2

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise out_of_range(name, "at least 1", value)

    @property
    def folder(self) -> str:
        """Name of the folder: another recipe or version has another."""
        return f"v{_VERSION}-{self.video_frames}-frames-{self.copies}-copies"


class MovingDigits(Videos):
    """2594 training, 400 validation and 600 test videos of 32 x 32 pixels in eight classes (with the default recipe).

    Training is on the digits that `Digits` trains on, validation and test on its others.

    Args:
        root: Folder that the videos are written below, once, by one process of a machine.
        video_frames: See `Recipe`.
        copies: See `Recipe`.
        **settings: See `Videos`.

    Raises:
        FewtokensError: If a setting is out of range.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        video_frames: int = 16,
        copies: int = 2,
        **settings: Unpack[ClipSettings],
    ) -> None:
        self.recipe, self.place = Recipe(video_frames, copies), Path(root).expanduser()
        parts: dict[str, str | None] = {part: part for part in PARTS}
        super().__init__(root=str(self.place / self.recipe.folder), parts=parts, **settings)
        self.description = f"moving_digits (written to {self.root})"

    def prepare_data(self) -> None:
        """Writes the videos if they are not there."""
        written(self.place, self.recipe)

    def setup(self, stage: str | None = None) -> None:
        """Lists the videos; they are there already unless `prepare_data` was never called."""
        self.prepare_data()
        super().setup(stage)


def written(root: Path, recipe: Recipe) -> Path:
    """The folder below `root` with `<part>/<class>/<number>.mp4`; written if it is not there, whole or not at all.

    Raises:
        FewtokensError: It cannot be written, or is there and no longer as it was written.
    """
    folder = root / recipe.folder
    if not folder.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            _write(folder, recipe)
        except (OSError, av.error.FFmpegError, UnknownCodecError) as error:
            raise FewtokensError(
                "moving_digits is written once, as H.264 by PyAV, below data.root",
                expected="a folder with some MB to spare that can be written",
                got=f"{root}: {error}",
                fix="set data.root to another folder; where x264 is missing, pip install av==18.1.0",
            ) from error
    _check(folder, recipe)
    return folder


def _write(folder: Path, recipe: Recipe) -> None:
    log.info("Writing the videos of moving_digits to %s", folder)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        for part, samples in Digits(num_classes=10, image_size=8, channels=1, batch_size=1).read().items():
            _write_part(building / part, samples, recipe, PARTS.index(part))
        (building / _STAMP).write_text(json.dumps(asdict(recipe) | {"files": _fingerprint(building)}))
        building.chmod(0o755)  # mkdtemp makes folders that other users of shared data cannot read
        try:
            building.rename(folder)
        except OSError:
            if not folder.exists():
                raise  # else another process was faster, with the same videos
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_part(folder: Path, samples: Samples, recipe: Recipe, number: int) -> None:
    draws = seeding.generator(seeding.SPLIT, _VERSION, recipe.copies, number)
    digits = samples.images[:, 0].repeat_interleave(recipe.copies, dim=0)
    labels = (torch.arange(len(digits)) % len(MOTIONS))[torch.randperm(len(digits), generator=draws)]
    phases = motion.phases(labels, recipe.video_frames, draws)
    names = list(MOTIONS)
    for name in names:
        (folder / name).mkdir(parents=True)
    for start in range(0, len(digits), _AT_ONCE):
        frames = motion.draw(digits[start : start + _AT_ONCE], phases[start : start + _AT_ONCE])
        for index, video in enumerate(frames, start):
            encode(folder / names[labels[index]] / f"{index:05d}.mp4", video)


def encode(path: Path, video: UInt8[Tensor, "t h w"]) -> None:
    """Writes grey frames as an H.264 file."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(_CODEC, rate=_RATE, options=_X264)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:], "yuv420p"
        for picture in video:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="gray")))
        file.mux(stream.encode())


def _check(folder: Path, recipe: Recipe) -> None:
    expected: dict[str, Any] = {}
    try:
        expected = json.loads((folder / _STAMP).read_text())
        unchanged = expected == asdict(recipe) | {"files": _fingerprint(folder)}
    except (OSError, ValueError):
        unchanged = False
    if not unchanged:
        raise FewtokensError(
            "The videos of moving_digits are used as they were written",
            expected=f"the files that {_STAMP} was written for",
            got=f"others in {folder}" if expected else f"no such stamp in {folder}",
            fix="delete this folder, and it is written anew, or set data.root to another one",
        )


def _fingerprint(folder: Path) -> str:
    """A key that changes with the names and sizes of the videos."""
    digest = hashlib.sha256()
    for part in PARTS:
        for name in MOTIONS:
            for entry in sorted(os.scandir(folder / part / name), key=lambda entry: entry.name):
                digest.update(f"{part}/{name}/{entry.name} {entry.stat().st_size}\n".encode())
    return digest.hexdigest()
