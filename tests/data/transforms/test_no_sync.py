"""Augmentation must not wait for the GPU: the host would stand still until all queued work is done, in every step.

Without a GPU, the images are fake CUDA tensors, whose values cannot be read, while tensors on the CPU are real.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewtokens.data.seeding import generator
from fewtokens.data.transforms.color import ColorJitter
from fewtokens.data.transforms.erasing import RandomErasing
from fewtokens.data.transforms.geometric import CenterCrop, PadCrop, RandomCrop, RandomFlip, Resize
from fewtokens.data.transforms.host import cpu_generator, to_device
from fewtokens.data.transforms.normalize import Pipeline
from fewtokens.data.transforms.randaugment import RandAugment
from fewtokens.data.transforms.three_augment import ThreeAugment

CUDA = torch.device("cuda", 0)
STEPS: list[Callable[[], Any]] = [
    lambda: PadCrop(4),
    lambda: PadCrop(4, mode="reflect"),
    lambda: RandomCrop(28),
    lambda: RandomCrop(28, per_batch=True),
    lambda: CenterCrop(28),
    lambda: Resize(40),
    lambda: RandomFlip(),
    lambda: RandAugment(2, 9),
    lambda: ColorJitter(),
    lambda: ThreeAugment(),
    lambda: RandomErasing(0.5),
    lambda: RandomErasing(0.5, fill="noise"),
]


class CudaGenerator(torch.Generator):
    """A generator that claims to be on a GPU."""

    device = CUDA


class Synchronized(Exception):
    """An operation waited for the GPU."""


class NoSync(TorchDispatchMode):
    """Refuses copies between CPU and GPU that wait. What is on the CPU alone is computed outside of the fake mode."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[Tensor] = []
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        target = torch.device(kwargs.get("device") or "cpu").type
        if target == "cpu" and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        self.seen.add(func.overloadpacket.__name__)
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            self._check_copy(args[0], target, kwargs.get("non_blocking", False))
        return func(*args, **kwargs)

    def _check_copy(self, source: Tensor, target: str, non_blocking: bool) -> None:
        pinned = any(source is tensor for tensor in self.pinned)
        if source.device.type != target and not (target == "cuda" and non_blocking and pinned):
            raise Synchronized(f"{source.device.type} -> {target}, non_blocking={non_blocking}, pinned={pinned}")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[NoSync]:
    """A fake GPU."""
    mode = NoSync()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: mode.pinned.append(tensor) or tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), mode:
        yield mode


def batch(*frames: int) -> Tensor:
    return torch.zeros(16, *frames, 3, 32, 32, dtype=torch.uint8, device=CUDA)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.max().item(),
        lambda x: x[0, 0, 0].tolist(),
        lambda x: x[x > 3],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.cpu(),
        lambda x: x + torch.tensor([1, 2], device=x.device)[0],
        lambda x: x + torch.arange(32).to(x.device, non_blocking=True),  # not pinned
        lambda x: x + torch.arange(32).pin_memory().to(x.device),
        lambda x: x if (x > 3).any() else -x,
    ],
    ids=range(10),
)
def test_the_fake_gpu_notices_what_waits(gpu: NoSync, read: Callable[[Tensor], Any]) -> None:
    with pytest.raises((Synchronized, DataDependentOutputException, DynamicOutputShapeException)):
        read(batch())


@pytest.mark.parametrize("frames", [(), (2,)], ids=["images", "clips"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step()).__name__)
def test_no_transform_waits_for_the_gpu(gpu: NoSync, step: Callable[[], Any], frames: tuple[int, ...]) -> None:
    transform = step()
    images = batch(*frames)
    out = transform(images.float() if isinstance(transform, RandomErasing) else images, CudaGenerator())
    assert out.device == CUDA
    assert out.shape[:-2] == images.shape[:-2]


def test_a_training_pipeline_waits_in_its_first_step_only(gpu: NoSync) -> None:
    steps = [PadCrop(4), RandomFlip(), RandAugment(2, 9), ColorJitter(), RandomErasing(0.25)]
    with unset_fake_temporarily():
        pipeline = Pipeline(steps, [0.5] * 3, [0.2] * 3)
    pipeline.factor, pipeline.offset = (torch.zeros(3, 1, 1, device=CUDA) for _ in range(2))  # as after the first step
    out = pipeline(batch(), CudaGenerator())
    assert (out.device, out.shape, out.dtype) == (CUDA, (16, 3, 32, 32), torch.float32)
    assert {"as_strided", "index_select", "gather", "bmm", "masked_fill"} <= gpu.seen


def test_cpu_draws_follow_the_gpu_generator_and_advance_it(gpu: NoSync) -> None:
    def draws(seed: int) -> list[int]:
        on_gpu = CudaGenerator()
        on_gpu.manual_seed(seed)
        return torch.randint(1000, (8,), generator=cpu_generator(on_gpu)).tolist()

    assert draws(1) == draws(1) != draws(2)
    assert gpu.seen == {"rand"}  # what advances the generator; a fake draw does not


def test_cpu_draws_come_from_a_cpu_generator_itself() -> None:
    mine = generator(3)
    assert cpu_generator(mine) is mine
    tensor = torch.arange(3)
    assert to_device(tensor, torch.device("cpu")) is tensor


@pytest.mark.skipif("not torch.cuda.is_available()", reason="no GPU")
@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step()).__name__)
def test_a_real_gpu_agrees(step: Callable[[], Any]) -> None:
    transform, draws = step(), generator(5, device=CUDA)
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8, generator=generator(1)).to(CUDA)
    images = images.float() if isinstance(transform, RandomErasing) else images
    state = draws.get_state()
    first = transform(images, draws)
    assert not torch.equal(draws.get_state(), state) or isinstance(transform, CenterCrop | Resize)
    torch.cuda.set_sync_debug_mode("error")
    try:
        draws.set_state(state)
        second = transform(images, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)
