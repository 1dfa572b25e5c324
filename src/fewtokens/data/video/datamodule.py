"""Datamodule for video data sets: Kinetics, any set in one of its layouts, and multi-label sets (Charades, AViD)."""

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NotRequired, Unpack

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fewtokens.data import seeding
from fewtokens.data.datamodule import Common, Loader, Part
from fewtokens.data.skipped import Skipped
from fewtokens.data.transforms.normalize import Pipeline
from fewtokens.data.unreadable import ReplacingDataModule
from fewtokens.data.video.dataset import Clips, VideoDataset
from fewtokens.data.video.manifest import ManifestRow
from fewtokens.data.video.parts import check_same_classes, ordered_class_names, read_part
from fewtokens.data.video.reader import Reader
from fewtokens.data.video.records import Video
from fewtokens.data.video.sampling import FixedViews, RandomClip, Sampling
from fewtokens.errors import check

log = logging.getLogger(__name__)


class ClipSettings(Common):
    """Settings of video datamodules: which frames a clip consists of, how they are scaled, and how they are decoded.

    Attributes:
        stride: Distance between the frames of a clip, in frames of the video.
        resize: Shorter side of the frames before they are cropped to `image_size`, in pixels; None: not scaled.
        scale_jitter: Smallest and largest random factor on `resize` in training.
        views: Number of clips and number of crops of each test video.
        decoder: "decord", "torchcodec" or "pyav".
        decode_limit: Seconds after which decoding a clip is given up.
        max_broken: Largest share of the training videos that may be unreadable, from 0 to 1.
    """

    stride: NotRequired[int]
    resize: NotRequired[int | None]
    scale_jitter: NotRequired[Sequence[float]]
    views: NotRequired[Sequence[int]]
    decoder: NotRequired[str]
    decode_limit: NotRequired[float]
    max_broken: NotRequired[float]


_CLIP_DEFAULTS: dict[str, Any] = {  # of `ClipSettings`
    "stride": 1,
    "resize": None,
    "scale_jitter": (1.0, 1.0),
    "views": (1, 1),
    "decoder": "decord",
    "decode_limit": 60.0,
    "max_broken": 0.01,
}


class Videos(ReplacingDataModule):
    """Loaders yield `(uint8 views (B, V, T, 3, S, S), targets)`; models get `(views (B, V, 3, T, S, S), targets)`.

    With `frames=1` there is no time axis: image models get `(B, V, 3, S, S)`. Training uses one random clip per video,
    validation the center crop of the center clip, and the test `views`. Targets are class numbers (B,) or, with
    `multilabel`, 0 and 1 per class (B, classes).

    In training, a video that cannot be read is replaced by another of its class, counted, and named in the log; if more
    than `max_broken` of them are unreadable, training ends. In evaluation it is skipped. `skipped` lists all of them.

    Args:
        root: Folder to which paths are relative.
        parts: The list of each part (`train`, `val`, `test`), relative to the root or absolute, in any format that
            `fewtokens.data.video.parts.list_videos` reads, or a manifest of `python -m fewtokens.data.prepare`. None:
            the part does not exist.
        classes: File with all class names in the order of their numbers (see `parts.read_classes`). None: the names in
            the training part (in the part itself if there is no training part), sorted.
        multilabel: Whether a video may have any number of classes.
        **settings: See `DataModule` and `ClipSettings`. `eval_batch_size` counts views.

    Raises:
        FewtokensError: A setting is out of range or does not fit the data.
    """

    stamped: ClassVar[bool] = True
    holds_clips: ClassVar[bool] = True
    noun: ClassVar[str] = "videos"
    remedy: ClassVar[str] = "Train on a manifest of `python -m fewtokens.data.prepare`"

    def __init__(
        self,
        *,
        root: str,
        parts: Mapping[str, str | None],
        classes: str | None = None,
        multilabel: bool = False,
        **settings: Unpack[ClipSettings],
    ) -> None:
        given: dict[str, Any] = dict(settings)
        clips = {name: given.pop(name, default) for name, default in _CLIP_DEFAULTS.items()}
        super().__init__(**given)
        self.root, self.parts, self.classes = Path(root).expanduser(), dict(parts), classes
        self.multilabel, self.max_broken = multilabel, clips["max_broken"]
        self._check_clips(clips)
        self.reader = Reader(clips["decoder"], clips["decode_limit"])
        shape = (self.frames, clips["stride"], self.image_size, clips["resize"])
        self.sampling: dict[Part, Sampling] = {
            "train": RandomClip(*shape, clips["scale_jitter"]),
            "val": FixedViews(*shape),
            "test": FixedViews(*shape, *clips["views"]),
        }
        self.description = f"videos at {self.root}"
        self._datasets: dict[Part, VideoDataset] = {}
        self._lists: dict[str, tuple[Sequence[Video | ManifestRow], list[Skipped]]] = {}
        self._skipped_at_setup: dict[Part, list[Skipped]] = {}

    def _check_clips(self, clips: dict[str, Any]) -> None:
        views, unknown = list(clips["views"]), sorted(set(self.parts) - {"train", "val", "test"})
        check(len(views) == 2, "data.views", "two ints, the numbers of clips and of crops", views)
        check(clips["stride"] >= 1, "data.stride", "an int >= 1", clips["stride"])
        self._check_max_broken()
        check(self.channels == 3, "data.channels", "3, as videos are decoded to RGB", self.channels)
        check(not unknown, "data.parts", "a mapping with the keys train, val and test only", unknown)

    def setup(self, stage: str | None = None) -> None:
        """List the videos of the parts that a stage needs. None: of all parts whose lists exist."""
        stages = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        needed: Sequence[Part] = stages.get(stage or "", ("train", "val", "test"))  # type: ignore[assignment]
        for part in needed:
            source = self.parts.get(part)
            exists = source is not None and (stage is not None or (self.root / source).exists())
            if exists and part not in self._datasets:
                self._datasets[part] = self._read_part(part, str(source))
                self.verify(part)

    def _read_part(self, part: Part, source: str) -> VideoDataset:
        # Validation and test often share one list, which takes minutes to match with the files of a large set.
        videos, skipped = self._lists.get(source) or self._read_list(part, source)
        if part != "train":
            self._lists[source] = (videos, skipped)
        self._skipped_at_setup[part] = [video._replace(part=part) for video in skipped]
        if skipped:
            log.warning("Videos of the %s part that are skipped from the start: %d", part, len(skipped))
        classes = self.num_classes if self.multilabel else None
        sampling = self.sampling[part]
        return VideoDataset(self.root, videos, sampling, self.reader, part=part, seed=self.seed, classes=classes)

    def _read_list(self, part: Part, source: str) -> tuple[Sequence[Video | ManifestRow], list[Skipped]]:
        order = [self.parts.get("train"), source]
        names = ordered_class_names(self.root, self.classes, order, self.num_classes, self.multilabel)
        check_same_classes(self.root, self.parts | {part: source}, names)
        self.class_names = names
        return read_part(self.root, source, part, self.num_classes, multilabel=self.multilabel, classes=names or None)

    def dataset(self, part: Part) -> VideoDataset | None:
        """Return the videos of a part; None if it does not exist."""
        return self._datasets.get(part)

    def verify(self, part: Part) -> None:
        """Send a black clip through the transforms of a part and check the size of the result."""
        pipeline = self.train_pipeline if part == "train" else self.eval_pipeline
        black = torch.zeros(1, 1, self.frames, 3, self.image_size, self.image_size, dtype=torch.uint8)
        found = tuple(self.views(pipeline, black, seeding.generator(0)).shape[-2:])
        expected = f"{found[1]}, the size after the transforms of the {part} part"
        check(found == (self.image_size, self.image_size), "data.image_size", expected, self.image_size)

    def views(
        self, pipeline: Pipeline, samples: UInt8[Tensor, "b v t 3 s s"], draws: torch.Generator
    ) -> Float[Tensor, "b v *sample"]:
        """Augment and normalize all frames of a view alike, and move the time axis behind the channels."""
        done = pipeline(samples.flatten(0, 1), draws).unflatten(0, samples.shape[:2])
        return done[:, :, 0] if self.frames == 1 else done.transpose(2, 3)

    def test_dataloader(self) -> Loader:
        """Return a loader of every test video exactly once over all processes, with all its views."""
        self.tested = self.untested = 0
        return self._ordered(self._part("test"), max(1, self.eval_batch_size // self.test_views), "test")

    @property
    def test_views(self) -> int:
        """Return the number of views of a test video, over which its logits are averaged."""
        return self.sampling["test"].views

    def measured_dataloader(self) -> Loader:
        """Return a loader of every test video with a single view, the center crop of the center clip."""
        self.setup("test")  # runs without a test are measured, too
        videos = self._part("test")
        assert isinstance(videos, VideoDataset)
        return self._ordered(videos.with_sampling(self.sampling["val"]), self.eval_batch_size, None)

    def receive(self, part: Part | None, batch: Clips) -> tuple[Tensor, Tensor] | None:
        """Count and log the videos that could not be read. Return None for an empty batch, which is passed over.

        Raises:
            FewtokensError: More training videos are unreadable than `max_broken` allows.
        """
        if part is not None:
            self.note(part, batch.skipped)
        if part == "test":
            self.tested, self.untested = self.tested + len(batch.targets), self.untested + len(batch.skipped)
        return (batch.views, batch.targets) if len(batch.targets) else None

    def skipped_at_setup(self, part: Part) -> int:
        """Return how many videos of a part were skipped when its list was read, before anything was decoded."""
        return len(self._skipped_at_setup.get(part, []))

    @property
    def skipped(self) -> list[Skipped]:
        """Return the videos skipped so far by this process, with the reason for each."""
        return [*chain.from_iterable(self._skipped_at_setup.values()), *super().skipped]
