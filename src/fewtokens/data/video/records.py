"""Records that describe a video, what is known about its file, and why it was skipped; and the names of the decoders.

This module imports neither a decoder nor torch.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, NamedTuple

from fewtokens.errors import FewtokensError, check_choice

# Which decoders find a frame by its number. "any": all of them; "pyav": only PyAV, by the time of the frame;
# "sequential": only PyAV, by counting from the first frame.
Access = Literal["any", "pyav", "sequential"]
# Name of a decoder -> its module, and how to install it.
DECODERS = {
    "decord": ("decord", "pip install decord==0.6.0 (Linux x86-64 and Windows only)"),
    "torchcodec": ("torchcodec", "pip install torchcodec==0.17.0 and FFmpeg's libraries (apt-get install ffmpeg)"),
    "pyav": ("av", "pip install av==18.1.0"),
}


class Video(NamedTuple):
    """A listed video, or a section of one.

    Attributes:
        path: Path of the file, relative to the root or absolute; in official annotations, first the id of the video.
        labels: Class numbers, or class names that are not numbered yet.
        start: Second of the file at which the section starts; None for the beginning of the file.
        end: Second of the file at which the section ends; None for the end of the file.
    """

    path: str
    labels: tuple[int | str, ...]
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video file that are known before its frames are decoded.

    Attributes:
        frames: Number of frames that can be decoded, without those that an edit list cuts off.
        width: Width in pixels as displayed, that is, after rotation.
        height: Height in pixels as displayed.
        fps: Average number of frames per second.
        seconds: Time from the first frame to the end of the last one.
        access: Which decoders find a frame by its number.
    """

    frames: int
    width: int
    height: int
    fps: float
    seconds: float
    access: Access

    def size(self, short_side: int | None) -> tuple[int, int]:
        """Return width and height after scaling the shorter side to `short_side`; the longer side is rounded down."""
        if short_side is None:
            return self.width, self.height
        shorter = min(self.width, self.height)
        return self.width * short_side // shorter, self.height * short_side // shorter


class UnreadableError(FewtokensError):
    """A video file that cannot be decoded. `path` and `reason` say which file and why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f"Cannot decode {path}: {reason}. Replace the file or remove it from the list; "
            "`python -m fewtokens.data.prepare` finds all such files of a data set."
        )
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple:
        return UnreadableError, (self.path, self.reason)


def require_decoder(name: str) -> None:
    """Check that a decoder exists and is installed, and PyAV as well, which counts the frames for all decoders.

    Raises:
        FewtokensError: The decoder is unknown or not installed.
    """
    check_choice("data.decoder", name, DECODERS)
    for needed in ("pyav", name):
        if find_spec(DECODERS[needed][0]) is None:
            raise decoder_error(needed, "it is not installed")


def decoder_error(name: str, reason: str) -> FewtokensError:
    """Return the error for a decoder that cannot be loaded."""
    module, remedy = DECODERS[name]
    other = "" if name == "pyav" else ", or set data.decoder=pyav"
    return FewtokensError(f"`data.decoder={name}` needs the package {module}: {reason}. Run {remedy}{other}.")
