"""What the rest of the package knows of a video file; no decoder is loaded for it."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from fewtokens.errors import FewtokensError

# any: the decoders agree; pyav: only PyAV finds frames, by their times; sequential: it must count from the first on.
Access = Literal["any", "pyav", "sequential"]
# Module that a decoder comes in, and how to get it.
DECODERS = {
    "decord": ("decord", "pip install decord==0.6.0 (Linux x86-64 and Windows only)"),
    "torchcodec": ("torchcodec", "pip install torchcodec==0.17.0 and FFmpeg's libraries (apt-get install ffmpeg)"),
    "pyav": ("av", "pip install av==18.1.0"),
}


class UnreadableError(FewtokensError):
    """A file whose frames cannot be had; `path` and `reason` say which and why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            "A video file can be decoded",
            expected="frames",
            got=f"{path}: {reason}",
            fix="get this file again or leave it out; python -m fewtokens.data.prepare finds all such files beforehand",
        )
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple:
        return UnreadableError, (self.path, self.reason)


@dataclass(frozen=True)
class VideoInfo:
    """What there is to know of a file before its frames are read.

    Attributes:
        frames: Frames that can be decoded: those that an edit list cuts off do not count.
        width: In pixels, as displayed (after rotation).
        height: The same.
        fps: Frames per second, on average.
        seconds: From the first frame to the end of the last.
        access: Who can be asked for frames by number.
    """

    frames: int
    width: int
    height: int
    fps: float
    seconds: float
    access: Access

    def size(self, short_side: int | None) -> tuple[int, int]:
        """Width and height after scaling the shorter side; the longer one is rounded down."""
        if short_side is None:
            return self.width, self.height
        shorter = min(self.width, self.height)
        return self.width * short_side // shorter, self.height * short_side // shorter


def require(decoder: str) -> None:
    """Raises a FewtokensError unless the decoder is known and installed, and PyAV, which counts the frames for all."""
    if decoder not in DECODERS:
        raise FewtokensError(
            "Unknown data.decoder", expected=" or ".join(DECODERS), got=decoder, fix="set data.decoder=decord"
        )
    for name in ("pyav", decoder):
        if find_spec(DECODERS[name][0]) is None:
            raise missing(name, "no such package")


def missing(decoder: str, reason: str) -> FewtokensError:
    """The error for a decoder that cannot be loaded."""
    module, remedy = DECODERS[decoder]
    other = "" if decoder == "pyav" else ", or set data.decoder=pyav"
    return FewtokensError(
        f"data.decoder={decoder} needs its package", expected=f"the package {module}", got=reason, fix=remedy + other
    )
