"""The settings that all data sets take, and the error for one that cannot be."""

from collections.abc import Iterable, Sequence
from typing import Literal, NotRequired, Required, TypedDict

from fewtokens.data.transforms.normalize import Transform
from fewtokens.errors import FewtokensError

Part = Literal["train", "val", "test"]


class Loading(TypedDict):
    """How batches are read: images per process and step, worker processes, the run's seed."""

    batch_size: Required[int]
    eval_batch_size: NotRequired[int | None]
    num_workers: NotRequired[int]
    seed: NotRequired[int]
    drop_last: NotRequired[bool]


class Common(Loading):
    """The settings that every data set takes; `DataModule` explains them."""

    num_classes: Required[int]
    image_size: Required[int]
    channels: NotRequired[int]
    frames: NotRequired[int]
    mean: NotRequired[Sequence[float] | None]
    std: NotRequired[Sequence[float] | None]
    train_transforms: NotRequired[Iterable[Transform]]
    eval_transforms: NotRequired[Iterable[Transform]]


class ClipSettings(Common):
    """The settings of video data sets: which frames of a video a clip has, how they are scaled, who decodes them.

    Attributes:
        stride: Distance between the frames of a clip, in frames of the video.
        resize: Shorter side of the frames before they are cut to `image_size`, in pixels; None leaves them as stored.
        scale_jitter: Least and greatest random factor on `resize` in training.
        views: Clips and crops of a test video.
        decoder: "decord", "torchcodec" or "pyav".
        decode_limit: Seconds after which a clip is given up.
    """

    stride: NotRequired[int]
    resize: NotRequired[int | None]
    scale_jitter: NotRequired[Sequence[float]]
    views: NotRequired[Sequence[int]]
    decoder: NotRequired[str]
    decode_limit: NotRequired[float]


def out_of_range(name: str, expected: str, got: object) -> FewtokensError:
    """The error for a setting of the configuration that cannot be."""
    return FewtokensError(
        f"The setting data.{name} is out of range", expected=expected, got=got, fix=f"change data.{name}"
    )
