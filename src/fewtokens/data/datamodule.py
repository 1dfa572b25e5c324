"""Base class of all datamodules: settings, loaders, sharding, augmentation on the device, and resuming."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NotRequired, Required, TypedDict, Unpack

import lightning as L
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fewtokens.data import seeding
from fewtokens.data.cores import available_cores
from fewtokens.data.samplers import EvalSampler, TrainSampler, batch_position, resume_position
from fewtokens.data.transforms.normalize import Pipeline, Transform
from fewtokens.data.workers import leave_signals_to_parent
from fewtokens.errors import FewtokensError, check

Part = Literal["train", "val", "test"]


class Loading(TypedDict):
    """Settings of the loaders; `DataModule` explains them."""

    batch_size: Required[int]
    eval_batch_size: NotRequired[int | None]
    num_workers: NotRequired[int]
    seed: NotRequired[int]
    drop_last: NotRequired[bool]
    repeats: NotRequired[int]


class Common(Loading):
    """Settings shared by all datamodules; `DataModule` explains them."""

    num_classes: Required[int]
    image_size: Required[int]
    channels: NotRequired[int]
    frames: NotRequired[int]
    mean: NotRequired[Sequence[float] | None]
    std: NotRequired[Sequence[float] | None]
    train_transforms: NotRequired[Iterable[Transform]]
    eval_transforms: NotRequired[Iterable[Transform]]


class Loader(DataLoader):
    """A DataLoader that raises a FewtokensError of a worker unchanged.

    torch would turn it into a RuntimeError with a traceback as its message, so the data set returns the error in place
    of a batch, and it is raised here.

    Args:
        *settings: Arguments of DataLoader.
        receive: Called in this process with every batch. Returns the batch to train on, or None to skip it.
        **more: Keyword arguments of DataLoader.
    """

    def __init__(self, *settings: Any, receive: Callable[[Any], Any] | None = None, **more: Any) -> None:
        super().__init__(*settings, worker_init_fn=leave_signals_to_parent, **more)
        self.receive = receive

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        for batch in batches:
            if isinstance(batch, FewtokensError):
                # Otherwise the garbage collector does it, when their queues are gone and each takes a time-out of 5 s.
                if self.num_workers > 0:
                    batches._shutdown_workers()  # type: ignore[attr-defined]
                    self._iterator = None  # of persistent workers
                raise batch
            received = batch if self.receive is None else self.receive(batch)
            if received is not None:
                yield received

    # The state of the datamodule holds the position in the epoch. Without these two methods, Lightning would warn in
    # every resumed run that the loader cannot be resumed.
    def state_dict(self) -> dict[str, Any]:
        """Return an empty state; see `DataModule.state_dict`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing; see `DataModule.load_state_dict`."""


def identity_collate(batch: Any) -> Any:
    """Return the batch, which `__getitems__` of the data set has already collated."""
    return batch


class DataModule(L.LightningDataModule):
    """Loaders yield `(uint8 images (B, C, H, W), int64 targets (B,))`; models get `(views (B, 1, C, H, W), targets)`.

    Augmentation, conversion to float and normalization happen in `on_after_batch_transfer`, batched and on the device.
    A subclass implements `dataset`.

    Args:
        num_classes: Number of classes. `verify` compares it and the next three with the data.
        image_size: Side in pixels of the model's input, after the transforms.
        channels: Number of channels of an image.
        frames: Number of frames of a sample, 1 for images.
        mean: Mean per channel, on the scale 0 to 1; None: 0, which leaves x / 255.
        std: Standard deviation per channel, on the scale 0 to 1; None: 1.
        train_transforms: Transforms of a training batch, see `fewtokens.data.transforms.geometric`.
        eval_transforms: Transforms of a validation or test batch.
        **loading: `batch_size` and `eval_batch_size` (per process; None: the same), `num_workers` (at most the number
            of cores per process), `seed` (of order and augmentation), `drop_last` (in training), `repeats` (of each
            training sample, see `TrainSampler`).

    Raises:
        FewtokensError: A setting is out of range or does not fit the data.
    """

    # Evaluation without padding (see EvalSampler) leaves ranks without a batch, which Lightning refuses by default.
    allow_zero_length_dataloader_with_multiple_devices = True
    stamped: ClassVar[bool] = False  # whether the data set needs the epoch with every index, see `TrainSampler`
    holds_clips: ClassVar[bool] = False  # whether a sample may have several frames
    description = "images"
    class_names: Sequence[str] = ()  # in the order of the class numbers, if they are known; set by `setup`

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
        other = loading.get("eval_batch_size")
        self.eval_batch_size = self.batch_size if other is None else other
        self.num_workers, self.seed = loading.get("num_workers", 0), loading.get("seed", 0)
        self.drop_last, self.repeats = loading.get("drop_last", False), loading.get("repeats", 1)
        self.mean = [0.0] * channels if mean is None else [float(x) for x in mean]
        self.std = [1.0] * channels if std is None else [float(x) for x in std]
        self._check_settings()
        self.train_pipeline = Pipeline(train_transforms, self.mean, self.std)
        self.eval_pipeline = Pipeline(eval_transforms, self.mean, self.std)
        self._resume: dict[str, Any] | None = None

    def _check_settings(self) -> None:
        ones = ("num_classes", "image_size", "channels", "frames", "batch_size", "eval_batch_size", "repeats")
        for name, bound in (dict.fromkeys(ones, 1) | {"num_workers": 0, "seed": 0}).items():
            value = getattr(self, name)
            check(isinstance(value, int) and value >= bound, f"data.{name}", f"an int >= {bound}", value)
        check(self.frames == 1 or self.holds_clips, "data.frames", "1, since these data are images", self.frames)
        per_channel = f"one number per channel, {self.channels} in all"
        check(len(self.mean) in (1, self.channels), "data.mean", per_channel, self.mean)

    def dataset(self, part: Part) -> Dataset | None:
        """Return the samples of a part; None if it is empty. Valid after `setup`."""
        raise NotImplementedError

    def verify(self, part: Part) -> None:
        """Send two samples of a part through its transforms and compare the result with the settings."""
        samples = self.dataset(part)
        if samples is None:
            return
        batch = samples.__getitems__([0, len(samples) - 1])  # type: ignore[attr-defined, arg-type]
        if isinstance(batch, FewtokensError):
            raise batch
        pipeline = self.train_pipeline if part == "train" else self.eval_pipeline
        stored = batch[0].shape[1]
        check(stored == self.channels, "data.channels", f"{stored}, as {self.description} has", self.channels)
        height, width = pipeline(batch[0], seeding.generator(0)).shape[-2:]
        if (height, width) != (self.image_size, self.image_size):
            advice = (
                f"Set data.image_size={height}" if height == width else "Make them square with Resize or CenterCrop"
            )
            raise FewtokensError(
                f"`data.image_size` must be the side of the images after the transforms, which is {height} x {width} "
                f"pixels in the {part} part, got {self.image_size}. {advice}, or change the transforms."
            )

    def train_dataloader(self) -> Loader:
        """Return a loader of this process's training batches, starting at the position of the loaded checkpoint."""
        samples = self._part("train")
        size, (rank, world) = len(samples), self._ranks()  # type: ignore[arg-type]
        epoch, batches = self._take_resume(world, size)
        sampler = TrainSampler(
            size,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world=world,
            epoch=epoch,
            stamped=self.stamped,
            repeats=self.repeats,
        )
        sampler.skip(epoch, batches)
        enough = not self.drop_last or len(sampler) >= self.batch_size
        check(enough, "data.batch_size", f"at most {len(sampler)} with `data.drop_last`", self.batch_size)
        return self._loader(samples, sampler, self.batch_size, self.drop_last, part="train")

    def val_dataloader(self) -> Loader | list:
        """Return a loader of every validation sample, once over all processes; an empty list if there are none."""
        return self._eval_loader("val") if self.dataset("val") is not None else []

    def test_dataloader(self) -> Loader:
        """Return a loader of every test sample, once over all processes."""
        return self._eval_loader("test")

    def measured_dataloader(self) -> Loader:
        """Return a loader of the test samples for measures, which look at a single view of each."""
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
            raise FewtokensError(f"There are no {part} samples in {self.description}. Check the `data` settings.")
        return samples

    def receive(self, part: Part | None, batch: Any) -> Any:
        """Return the batch to use in place of a loaded one; None to skip it. `part` is None for measures."""
        return batch

    def _loader(self, samples: Dataset, sampler: Any, batch_size: int, drop_last: bool, part: Part | None) -> Loader:
        root = self.trainer.strategy.root_device.type if self.trainer is not None else "cpu"
        workers = self._num_workers()
        return Loader(
            samples,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=identity_collate,
            pin_memory=root == "cuda",
            drop_last=drop_last,
            persistent_workers=workers > 0,
            receive=partial(self.receive, part),
            # Every iterator draws a seed. From the global generator, this would change the dropout of resumed runs.
            generator=torch.Generator().manual_seed(seeding.mix(seeding.IMAGE, self.seed)),
        )

    def _num_workers(self) -> int:
        """Return `num_workers`, or the number of cores for each process of this machine if that is less."""
        if self.num_workers == 0:
            return 0
        processes = self.trainer.num_devices if self.trainer is not None else 1
        return min(self.num_workers, max(1, available_cores() // processes))

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def on_after_batch_transfer(
        self, batch: tuple[Shaped[Tensor, "b *stored"], Shaped[Tensor, "b *k"]], dataloader_idx: int
    ) -> tuple[Float[Tensor, "b v *sample"], Shaped[Tensor, "b *k"]]:
        """Augment (in training) and normalize a batch. The draws depend on (seed, rank, epoch, batch in the epoch)."""
        samples, targets = batch
        training = self.trainer is not None and self.trainer.training
        where = batch_position(self.trainer) if training and self.trainer is not None else (0, 0)
        draws = seeding.generator(seeding.BATCH, self.seed, self._ranks()[0], *where, device=samples.device)
        return self.views(self.train_pipeline if training else self.eval_pipeline, samples, draws), targets

    def views(self, pipeline: Pipeline, samples: Tensor, draws: torch.Generator) -> Float[Tensor, "b v *sample"]:
        """Return the views of each sample. An image has a single view."""
        return pipeline(samples, draws).unsqueeze(1)

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of its batches already used, and the settings on which their order depends."""
        if self.trainer is None:
            return {}
        epoch, batches = resume_position(self.trainer)
        order = [self.seed, self.batch_size, self._ranks()[1], self.repeats, len(self._part("train"))]  # type: ignore[arg-type]
        return {"epoch": epoch, "batches": batches, "order": order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the position for the next training loader."""
        self._resume = dict(state_dict)

    def _take_resume(self, world: int, size: int) -> tuple[int, int]:
        # The state is used once: a second fit with the same datamodule starts from the beginning.
        state, self._resume = self._resume, None
        if not state:
            return (self.trainer.current_epoch if self.trainer is not None else 0), 0
        order, saved = [self.seed, self.batch_size, world, self.repeats, size], list(state["order"])
        saved += [1, size][len(saved) - 3 :]  # older checkpoints have no repeats and no number of samples
        if state["batches"] and saved != order:
            names = "seed {}, batch_size {}, {} process(es), repeats {} and {} samples"
            raise FewtokensError(
                "Cannot resume in the middle of an epoch with another order of samples: the checkpoint was written "
                f"with {names.format(*saved)}, this run has {names.format(*order)}. Use the same values, or a "
                "checkpoint from the end of an epoch."
            )
        return state["epoch"], state["batches"]
