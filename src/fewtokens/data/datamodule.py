"""What all data sets share: loaders, sharding, the way to the device, and the place where a run resumes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NotRequired, Required, TypedDict, Unpack

import lightning as L
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fewtokens.data import seeding
from fewtokens.data.samplers import EvalSampler, TrainSampler, coming, position
from fewtokens.data.transforms.normalize import Pipeline, Transform
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


class Loader(DataLoader):
    """A DataLoader that re-raises a FewtokensError of a worker unchanged.

    torch would wrap it into a RuntimeError made of a traceback, so the data set hands it over as if it were a batch.

    Args:
        receive: Called in this process with every batch; returns the batch to train on, or None to pass over it.
        settings: Those of DataLoader.
    """

    def __init__(self, *settings: Any, receive: Callable[[Any], Any] | None = None, **more: Any) -> None:
        super().__init__(*settings, **more)
        self.receive = receive

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, FewtokensError):
                raise batch
            received = batch if self.receive is None else self.receive(batch)
            if received is not None:
                yield received

    # The position in the epoch travels in the datamodule's state; Lightning warns of every resumed loader that lacks
    # these two methods.
    def state_dict(self) -> dict[str, Any]:
        """Nothing: see `DataModule.state_dict`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: see `DataModule.load_state_dict`."""


def whole(batch: Any) -> Any:
    """The collate function for data sets whose `__getitems__` already returns a batch."""
    return batch


class DataModule(L.LightningDataModule):
    """Loaders yield `(uint8 images (B, C, H, W), int64 targets (B,))`; models get `(views (B, 1, C, H, W), targets)`.

    Augmentation, conversion and normalisation happen in `on_after_batch_transfer`, batched and on the device.

    Args:
        num_classes: Number of classes; compared with the data.
        image_size: Side in pixels of what the model gets, after the transforms; compared with the data.
        channels: Channels of an image; compared with the data.
        frames: Frames of a sample, 1 for images.
        mean: Mean per channel, scale 0 to 1; None for 0, which leaves x / 255.
        std: Standard deviation per channel, scale 0 to 1; None for 1.
        train_transforms: See `fewtokens.data.transforms`.
        eval_transforms: The same for validation and test.
        **loading: `batch_size` and `eval_batch_size` (of one process; None: the same), `num_workers`, `seed` (order and
            augmentation), `drop_last` (of training).

    Raises:
        FewtokensError: If a setting is out of range or does not fit the data.
    """

    # Lightning refuses ranks without a batch unless told so; evaluation without padding makes them (see EvalSampler).
    allow_zero_length_dataloader_with_multiple_devices = True
    stamped: ClassVar[bool] = False
    holds_clips: ClassVar[bool] = False
    description = "images"

    def __init__(
        self,
        *,
        num_classes: int,
        image_size: int,
        channels: int = 3,
        frames: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        train_transforms: Iterable[Transform] = (),
        eval_transforms: Iterable[Transform] = (),
        **loading: Unpack[Loading],
    ) -> None:
        super().__init__()
        self.num_classes, self.image_size, self.channels, self.frames = num_classes, image_size, channels, frames
        self.batch_size = loading["batch_size"]
        self.eval_batch_size = loading.get("eval_batch_size") or self.batch_size
        self.num_workers, self.seed = loading.get("num_workers", 0), loading.get("seed", 0)
        self.drop_last = loading.get("drop_last", False)
        self.mean = [0.0] * channels if mean is None else [float(x) for x in mean]
        self.std = [1.0] * channels if std is None else [float(x) for x in std]
        self._check_settings()
        self.train_pipeline = Pipeline(train_transforms, self.mean, self.std)
        self.eval_pipeline = Pipeline(eval_transforms, self.mean, self.std)
        self._resume: dict[str, Any] | None = None

    def _check_settings(self) -> None:
        least = {"num_classes": 1, "image_size": 1, "channels": 1, "frames": 1, "batch_size": 1, "eval_batch_size": 1}
        for name, bound in (least | {"num_workers": 0, "seed": 0}).items():
            if getattr(self, name) < bound:
                raise out_of_range(name, f"at least {bound}", getattr(self, name))
        if self.frames != 1 and not self.holds_clips:
            raise out_of_range("frames", "1, since this data set holds images", self.frames)
        if len(self.mean) not in (1, self.channels):
            raise out_of_range("mean", f"one number per channel, that is {self.channels}", self.mean)

    def dataset(self, part: Part) -> Dataset | None:
        """The samples of a part; None where the part is empty. Only after `setup`."""
        raise NotImplementedError

    def verify(self, part: Part) -> None:
        """Sends two samples of `part` through its transforms and compares the result with the facts."""
        samples = self.dataset(part)
        if samples is None:
            return
        batch = samples.__getitems__([0, len(samples) - 1])  # type: ignore[attr-defined, arg-type]
        if isinstance(batch, FewtokensError):
            raise batch
        pipeline = self.train_pipeline if part == "train" else self.eval_pipeline
        if batch[0].shape[1] != self.channels:
            raise out_of_range("channels", f"{batch[0].shape[1]}, as {self.description} has", self.channels)
        found = tuple(pipeline(batch[0], seeding.generator(0)).shape[-2:])
        if found != (self.image_size, self.image_size):
            raise FewtokensError(
                f"data.image_size is the side of what the model gets after the transforms ({part} part)",
                expected=f"{self.image_size} x {self.image_size} pixels",
                got=f"{found[0]} x {found[1]} pixels",
                fix=f"set data.image_size={found[0]} or change the transforms",
            )

    def train_dataloader(self) -> Loader:
        """Batches of this process, beginning where the loaded checkpoint stood."""
        samples = self._part("train")
        size, (rank, world) = len(samples), self._ranks()  # type: ignore[arg-type]
        epoch, batches = self._take_resume(world)
        sampler = TrainSampler(
            size,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world=world,
            epoch=epoch,
            stamped=self.stamped,
        )
        sampler.skip(epoch, batches)
        if self.drop_last and len(sampler) < self.batch_size:
            raise out_of_range("batch_size", f"at most {len(sampler)} with drop_last", self.batch_size)
        return self._loader(samples, sampler, self.batch_size, self.drop_last, part="train")

    def val_dataloader(self) -> Loader | list:
        """Every validation sample exactly once over all processes; an empty list if there are none."""
        return self._eval_loader("val") if self.dataset("val") is not None else []

    def test_dataloader(self) -> Loader:
        """Every test sample exactly once over all processes."""
        return self._eval_loader("test")

    def measured_dataloader(self) -> Loader:
        """The test samples for measures of one view, and of nothing that could be counted twice."""
        return self.test_dataloader()

    def _eval_loader(self, part: Part) -> Loader:
        return self._ordered(self._part(part), self.eval_batch_size, part)

    def _ordered(self, samples: Dataset, batch_size: int, part: Part | None) -> Loader:
        rank, world = self._ranks()
        sampler = EvalSampler(len(samples), rank=rank, world=world)  # type: ignore[arg-type]
        return self._loader(samples, sampler, batch_size, False, part)

    def _part(self, part: Part) -> Dataset:
        samples = self.dataset(part)
        if samples is None:
            raise FewtokensError(
                "A loader needs samples", expected=f"a {part} part", got="none", fix=f"check {self.description}"
            )
        return samples

    def receive(self, part: Part | None, batch: Any) -> Any:
        """What becomes of a batch of a part (None: of measures) on its way to the model. None passes over it."""
        return batch

    def _loader(self, samples: Dataset, sampler: Any, batch_size: int, drop_last: bool, part: Part | None) -> Loader:
        root = self.trainer.strategy.root_device.type if self.trainer is not None else "cpu"
        return Loader(
            samples,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=whole,
            pin_memory=root == "cuda",
            drop_last=drop_last,
            persistent_workers=self.num_workers > 0,
            receive=partial(self.receive, part),
            # Every iterator draws a seed: from the global generator this would shift the dropout of resumed runs.
            generator=torch.Generator().manual_seed(seeding.mix(seeding.IMAGE, self.seed)),
        )

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def on_after_batch_transfer(
        self, batch: tuple[Shaped[Tensor, "b *stored"], Int64[Tensor, "b *k"]], dataloader_idx: int
    ) -> tuple[Float[Tensor, "b v *sample"], Int64[Tensor, "b *k"]]:
        """Augments (in training), converts and normalises; draws depend on (seed, rank, epoch, batch in the epoch)."""
        samples, targets = batch
        training = self.trainer is not None and self.trainer.training
        where = coming(self.trainer) if training and self.trainer is not None else (0, 0)
        draws = seeding.generator(seeding.BATCH, self.seed, self._ranks()[0], *where, device=samples.device)
        return self.views(self.train_pipeline if training else self.eval_pipeline, samples, draws), targets

    def views(self, pipeline: Pipeline, samples: Tensor, draws: torch.Generator) -> Float[Tensor, "b v *sample"]:
        """The views of every sample: of an image there is one, the image."""
        return pipeline(samples, draws).unsqueeze(1)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches of it that are used up, and what must not change for this count to keep its meaning."""
        if self.trainer is None:
            return {}
        epoch, batches = position(self.trainer)
        order = [self.seed, self.batch_size, self._ranks()[1]]
        return {"epoch": epoch, "batches": batches, "order": order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the position for the next training loader."""
        self._resume = dict(state_dict)

    def _take_resume(self, world: int) -> tuple[int, int]:
        # Taken, not read: a second fit with the same datamodule begins at its own beginning.
        state, self._resume = self._resume, None
        if not state:
            return (self.trainer.current_epoch if self.trainer is not None else 0), 0
        order = [self.seed, self.batch_size, world]
        if state["batches"] and state["order"] != order:
            raise FewtokensError(
                "A run resumes in the middle of an epoch only in the same order of samples",
                expected="seed {}, batch_size {}, {} process(es)".format(*state["order"]),
                got="seed {}, batch_size {}, {} process(es)".format(*order),
                fix="resume with the same values, or from a checkpoint that was written at the end of an epoch",
            )
        return state["epoch"], state["batches"]
