"""Video data sets: Kinetics and whatever comes in its layouts, or with several labels a video (Charades, AViD)."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fewtokens.data import seeding
from fewtokens.data.datamodule import ClipSettings, DataModule, Loader, Part, out_of_range
from fewtokens.data.transforms.normalize import Pipeline
from fewtokens.data.video import sources
from fewtokens.data.video.dataset import Clips, VideoDataset
from fewtokens.data.video.reader import Reader
from fewtokens.data.video.sampling import FixedViews, RandomClip, Sampling
from fewtokens.data.video.sources import Sources, Unread
from fewtokens.errors import FewtokensError

log = logging.getLogger(__name__)
_CLIPS: dict[str, Any] = {  # what `ClipSettings` are where they are not given
    "stride": 1,
    "resize": None,
    "scale_jitter": (1.0, 1.0),
    "views": (1, 1),
    "decoder": "decord",
    "decode_limit": 60.0,
}


class LeftOut(NamedTuple):
    """A video that a part lists and that was not used, and why."""

    part: Part
    path: str
    reason: str


class Videos(DataModule):
    """Loaders yield `(uint8 views (B, V, T, 3, S, S), targets)`; models get `(views (B, V, 3, T, S, S), targets)`.

    With `frames=1` there is no axis of time: models for images get `(B, V, 3, S, S)`. Training has one random clip a
    video and validation the centre of the centre clip; the test has `views`. Targets are class numbers (B,) or, with
    `multilabel`, 1 and 0 (B, classes).

    A video that cannot be read is replaced by another of its class in training, counted and named in the log; above
    `max_broken` training ends. In evaluation it is left out and named: `left_out` has all of them.

    Args:
        root: Folder that paths are below.
        parts: Where the parts `train`, `val` and `test` are listed, below the root or absolute: see
            `annotations.listing`; or a manifest of `python -m fewtokens.data.prepare`. None: there is no such part.
        classes: File with all class names in the order of their numbers (`annotations.read_classes`). None: the names
            of the training part (if it is not there, of the part itself), sorted.
        multilabel: A video may have any number of classes.
        max_broken: Share of the training videos that may break during training.
        **settings: See `DataModule` and `ClipSettings`. `eval_batch_size` counts views.

    Raises:
        FewtokensError: If a setting is out of range or does not fit the data.
    """

    stamped: ClassVar[bool] = True
    holds_clips: ClassVar[bool] = True

    def __init__(
        self,
        *,
        root: str,
        parts: Mapping[str, str | None],
        classes: str | None = None,
        multilabel: bool = False,
        max_broken: float = 0.01,
        **settings: Unpack[ClipSettings],
    ) -> None:
        given: dict[str, Any] = dict(settings)
        clips = {name: given.pop(name, default) for name, default in _CLIPS.items()}
        super().__init__(**given)
        self.root, self.parts, self.multilabel, self.max_broken = (
            Path(root).expanduser(),
            dict(parts),
            multilabel,
            max_broken,
        )
        self.classes = classes
        self._check_clips(clips)
        self.reader = Reader(clips["decoder"], clips["decode_limit"])
        shape = (self.frames, clips["stride"], self.image_size, clips["resize"])
        self.sampling: dict[Part, Sampling] = {
            "train": RandomClip(*shape, clips["scale_jitter"]),
            "val": FixedViews(*shape),
            "test": FixedViews(*shape, *clips["views"]),
        }
        self.description = f"videos at {self.root}"
        self._parts: dict[Part, VideoDataset] = {}
        self._lists: dict[str, Sources] = {}  # for evaluation: validation and test often have one in common
        self._refused: dict[Part, list[Unread]] = {}  # from the beginning
        self._unread: dict[tuple[Part, str], str] = {}  # since then
        self.replaced, self.tested, self.untested = 0, 0, 0  # samples, of this process

    def _check_clips(self, clips: dict[str, Any]) -> None:
        if len(clips["views"]) != 2:
            raise out_of_range("views", "two numbers, of clips and of crops", list(clips["views"]))
        if clips["stride"] < 1:
            raise out_of_range("stride", "at least 1", clips["stride"])
        if not 0 <= self.max_broken <= 1:
            raise out_of_range("max_broken", "a share from 0 to 1", self.max_broken)
        if self.channels != 3:
            raise out_of_range("channels", "3, since videos are decoded to RGB", self.channels)
        if unknown := set(self.parts) - {"train", "val", "test"}:
            raise out_of_range("parts", "train, val and test", sorted(unknown))

    def setup(self, stage: str | None = None) -> None:
        """Lists the videos that a stage needs (None: those that are there) and compares the classes with the facts."""
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        wanted: Sequence[Part] = needed.get(stage or "", ("train", "val", "test"))  # type: ignore[assignment]
        for part in wanted:
            source = self.parts.get(part)
            there = source is not None and (stage is not None or (self.root / source).exists())
            if there and part not in self._parts:
                self._parts[part] = self._listed(part, str(source))
                self.verify(part)

    def _listed(self, part: Part, source: str) -> VideoDataset:
        found = self._lists.get(source) or self._sources(source)
        if part != "train":
            self._lists[source] = found
        self._refused[part] = found.left_out
        if found.left_out:
            log.warning("Left out of the %s part from the beginning: %d videos", part, len(found.left_out))
        return VideoDataset(
            self.root,
            found.videos,
            self.sampling[part],
            self.reader,
            seed=self.seed,
            replaces=part == "train",
            classes=self.num_classes if self.multilabel else None,
        )

    def _sources(self, source: str) -> Sources:
        order = [self.parts.get("train"), source]
        names = sources.class_names(self.root, self.classes, order, self.num_classes, self.multilabel)
        return sources.read(self.root, source, self.num_classes, several=self.multilabel, classes=names or None)

    def dataset(self, part: Part) -> VideoDataset | None:
        """The videos of a part."""
        return self._parts.get(part)

    def verify(self, part: Part) -> None:
        """Sends black clips of `part` through its transforms and compares the result with the facts."""
        pipeline = self.train_pipeline if part == "train" else self.eval_pipeline
        black = torch.zeros(1, 1, self.frames, 3, self.image_size, self.image_size, dtype=torch.uint8)
        found = tuple(self.views(pipeline, black, seeding.generator(0)).shape[-2:])
        if found != (self.image_size, self.image_size):
            raise out_of_range(
                "image_size", f"{found[1]}, as the transforms of the {part} part make it", self.image_size
            )

    def views(
        self, pipeline: Pipeline, samples: UInt8[Tensor, "b v t 3 s s"], draws: torch.Generator
    ) -> Float[Tensor, "b v *sample"]:
        """Augments and normalises the frames of every view alike, and puts the axis of time behind the channels."""
        done = pipeline(samples.flatten(0, 1), draws).unflatten(0, samples.shape[:2])
        return done[:, :, 0] if self.frames == 1 else done.transpose(2, 3)

    def test_dataloader(self) -> Loader:
        """Every test video exactly once over all processes, with all its views."""
        self.tested = self.untested = 0
        return self._ordered(self._part("test"), max(1, self.eval_batch_size // self.test_views), "test")

    @property
    def test_views(self) -> int:
        """Views of a test video, over which its logits are averaged."""
        return self.sampling["test"].views

    def measured_dataloader(self) -> Loader:
        """Every test video with the centre of its centre clip alone."""
        self.setup("test")  # a run without a test is measured, too
        videos = self._part("test")
        assert isinstance(videos, VideoDataset)
        return self._ordered(videos.sampled(self.sampling["val"]), self.eval_batch_size, None)

    def receive(self, part: Part | None, batch: Clips) -> tuple[Tensor, Tensor] | None:
        """Counts and names what could not be read; passes over a batch with nothing in it.

        Raises:
            FewtokensError: More training videos are broken than `max_broken` allows.
        """
        if part is not None:
            for unread in batch.unread:
                self._note(part, unread)
        if part == "train" and batch.unread:
            self.replaced += len(batch.unread)
            self._check_broken()
        if part == "test":
            self.tested, self.untested = self.tested + len(batch.targets), self.untested + len(batch.unread)
        return (batch.views, batch.targets) if len(batch.targets) else None

    def refused(self, part: Part) -> int:
        """How many videos of a part its list or manifest left out from the beginning."""
        return len(self._refused.get(part, []))

    @property
    def left_out(self) -> list[LeftOut]:
        """All videos that the parts list and that were not used so far, as this process knows it."""
        refused = [LeftOut(part, *video) for part, videos in self._refused.items() for video in videos]
        return refused + [LeftOut(part, path, reason) for (part, path), reason in self._unread.items()]

    def state_dict(self) -> dict[str, Any]:
        """The base's, and what was found broken in training."""
        state = super().state_dict()
        return state and state | {"broken": [list(unread) for unread in self._broken()], "replaced": self.replaced}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting where the checkpoint stood."""
        super().load_state_dict(state_dict)
        self.replaced = state_dict.get("replaced", 0)
        self._unread |= {("train", path): reason for path, reason in state_dict.get("broken", [])}

    def _broken(self) -> list[Unread]:
        return [Unread(path, reason) for (part, path), reason in self._unread.items() if part == "train"]

    def _note(self, part: Part, unread: Unread) -> None:
        if (part, unread.path) not in self._unread:
            what = "another one takes its place" if part == "train" else "it is left out"
            log.warning("%s (%s part) cannot be read, %s: %s", unread.path, part, what, unread.reason)
            self._unread[part, unread.path] = unread.reason

    def _check_broken(self) -> None:
        broken, videos = self._broken(), len(self._parts["train"])
        if len(broken) > self.max_broken * videos:
            raise FewtokensError(
                "Only few of the training videos may be broken",
                expected=f"at most data.max_broken={self.max_broken:g} of {videos}",
                got=f"{len(broken)}, among them {broken[-1].path}: {broken[-1].reason}",
                fix="train from a manifest of python -m fewtokens.data.prepare, or raise data.max_broken",
            )
