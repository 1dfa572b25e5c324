"""Tests that need a GPU, run by `make gpu`. Everywhere else they are skipped."""

import copy
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from fewtokens.analysis.cost import Cost
from fewtokens.analysis.evaluation import measured_on
from fewtokens.analysis.throughput import Throughput
from fewtokens.benchmarks.timing import Setting, time_models
from fewtokens.data.image.digits import Digits
from fewtokens.tasks.classification import Classifier, compile_model
from fewtokens.tasks.mixup import Mix
from test_methods import IMAGES, METHODS, model_with, random_parameters

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CUDA = torch.device("cuda")
# ATS trims the batch to the largest number of tokens in it, which it must copy from the device once per block.
SYNCHRONIZES = {"ats"}


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute float32 products in float32, not in TF32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_both(method: str) -> tuple[nn.Module, nn.Module]:
    model = random_parameters(model_with(method)).eval()
    return model, copy.deepcopy(model).to(CUDA)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_cuda_equals_cpu_in_float32(method: str) -> None:
    cpu, cuda = on_both(method)
    torch.testing.assert_close(cuda(IMAGES.to(CUDA)).cpu(), cpu(IMAGES), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_trains_and_is_close_to_float32(method: str) -> None:
    _, model = on_both(method)
    images = IMAGES.to(CUDA)
    expected = model(images)
    with torch.autocast("cuda", torch.bfloat16):
        logits = model(images)
    # A selection may differ where scores are nearly equal, so only the typical difference is compared.
    scale = expected.abs().max()
    assert (logits.float() - expected).abs().median() < 0.1 * scale
    model.train()
    with torch.autocast("cuda", torch.bfloat16):
        model(images).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_compiled_layers_equal_eager_ones(method: str) -> None:
    torch.compiler.reset()
    _, model = on_both(method)
    images = IMAGES.to(CUDA)
    with torch.no_grad():
        expected = model(images)
        compile_model(model, "layers")
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("compiled", ["none", "layers", "graph"])
def test_throughput_of_an_adaptive_method(compiled: str) -> None:
    models = {"none": model_with("none").to(CUDA), "ats": model_with("ats").to(CUDA)}
    records = time_models(models, IMAGES.to(CUDA), Setting(batch=4, compiled=compiled), 0.2)
    assert all(record["images_per_s"] > 0 for record in records)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in SYNCHRONIZES])
def test_a_training_step_does_not_synchronize(method: str) -> None:
    data = Digits(num_classes=10, image_size=16, channels=3, batch_size=32, train_transforms=transforms())
    data.setup("fit")
    model = model_with(method)
    model.vit.reset_classifier(10)
    task = Classifier(
        model.to(CUDA),
        10,
        partial(torch.optim.AdamW, lr=1e-3),
        mix=Mix(10, probability=1.0),
    )
    task.log = lambda *a, **k: None  # type: ignore[method-assign]  # outside a trainer there is nowhere to log
    task.train_loss.to(CUDA)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3)
    loader = iter(data.train_dataloader())

    def step() -> None:
        images, target = next(loader)
        draws = torch.Generator(CUDA).manual_seed(0)
        moved = images.pin_memory().to(CUDA, non_blocking=True)
        views = data.views(data.train_pipeline, moved, draws)
        optimizer.zero_grad(set_to_none=True)
        task.training_step((views, target.pin_memory().to(CUDA, non_blocking=True)), 0).backward()
        optimizer.step()

    step()  # the first step creates buffers and chooses kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def transforms() -> list:
    from fewtokens.data.transforms.color import ColorJitter
    from fewtokens.data.transforms.erasing import RandomErasing
    from fewtokens.data.transforms.geometric import PadCrop, RandomFlip, Resize
    from fewtokens.data.transforms.randaugment import RandAugment

    return [PadCrop(1), RandomFlip(), RandAugment(2, 9), ColorJitter(), Resize(16), RandomErasing(0.5)]


class Task(L.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Data(L.LightningDataModule):
    def test_dataloader(self) -> list[tuple[Tensor, Tensor]]:
        return [(IMAGES, torch.zeros(len(IMAGES)).long())]

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, targets = batch
        return images[:, None], targets


def test_measures_run_on_the_device(tmp_path: Path) -> None:
    task = Task(model_with("ats"))
    devices = []
    task.model.encoder.register_forward_hook(lambda module, args, out: devices.append(out.x.device.type))
    with measured_on(task, CUDA):
        cost = Cost()(task, Data(), tmp_path)
        speed = Throughput(seconds=0.2, batch_size=4)(task, Data(), tmp_path)
    assert set(devices) == {"cuda"}
    assert cost["cost/gmacs"] > 0
    assert cost["cost/peak_mib"] > 0
    assert speed["throughput/images_per_s"] > 0
    assert next(task.parameters()).device.type == "cpu"


def test_ddp_over_nccl_with_one_process(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(model_with("tome").to(CUDA), device_ids=[0])
        model(IMAGES.to(CUDA)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
