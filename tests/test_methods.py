"""Properties of every method. The tests find the methods by their yaml files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from conftest import CONFIGS
from fewtokens.analysis.cost import macs
from fewtokens.backbones.vit import ViT, vit
from fewtokens.runs.config import instantiate
from fewtokens.runs.fsdp import FullySharded
from fewtokens.tasks.classification import Classifier

METHODS = sorted(path.stem for path in (CONFIGS / "tokenizer").glob("*.yaml"))
REDUCING = [name for name in METHODS if name != "none"]
# Settings with which a method changes no patch
NOTHING_DROPPED = {"budget": "all", "r": 0, "keep_rate": 1.0}
# In evaluation, random numbers depend on the position in the batch.
RANDOM_BY_POSITION = {"random_drop"}
RANDOM_IN_TRAINING = {"random_drop", "dynamic_vit"}
HOOKED = hasattr(vit, "__wrapped__")  # pytest's jaxtyping hook, whose checks torch.compile cannot trace
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@cache
def recipe(method: str) -> dict:
    """Return `at` and `build` of a method from its yaml file."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        node = compose("train", [f"tokenizer={method}"]).tokenizer
    return {"at": node.at, "build": instantiate(node.build)}


def model_with(method: str, **settings: object) -> ViT:
    """Return a model of four blocks with a class token and concentrated attention, and the same weights every time."""
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 2, "num_classes": 5, "dim": 16, "depth": 4, "heads": 2, "pool": "token"}
    parts = recipe(method)
    model = vit(**sizes, tokenizer=parts | {"build": partial(parts["build"], **settings)})
    for block in model.encoder.blocks:
        block.attn.qkv.weight.data[:32] *= 40
    return model


def neutral(method: str) -> dict[str, object]:
    """Return the settings with which a method changes nothing; empty if it has none."""
    keys = recipe(method)["build"].keywords
    return {key: value for key, value in NOTHING_DROPPED.items() if key in keys}


def random_parameters(model: nn.Module) -> nn.Module:
    """Make all parameters random, so that none is zero as those of TokenFuser are."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


@torch.no_grad()
@pytest.mark.parametrize("method", [name for name in METHODS if name not in RANDOM_BY_POSITION])
def test_an_image_has_the_same_logits_alone_and_in_a_batch(method: str) -> None:
    model = model_with(method).eval()
    alone = torch.cat([model(image[None]) for image in IMAGES])
    torch.testing.assert_close(model(IMAGES), alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", [name for name in METHODS if neutral(name)])
def test_a_method_that_drops_nothing_is_the_plain_model(method: str) -> None:
    model = model_with(method, **neutral(method)).eval()
    found = model(IMAGES)
    with model.encoder.without_reduction():
        assert torch.equal(found, model(IMAGES))


@torch.no_grad()
@pytest.mark.parametrize("method", REDUCING)
def test_it_computes_less_and_records_the_origin_of_every_token(method: str) -> None:
    model = model_with(method).eval()
    cost = macs(model, IMAGES[:1])
    with model.encoder.without_reduction():
        assert cost < macs(model, IMAGES[:1])
    for record in model.trace(IMAGES):
        origin = record.origin
        assert origin is not None
        assert origin.shape == (4, record.num_patches, 64)
        assert (origin >= 0).all()
        assert origin.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_in_training_and_evaluation(method: str) -> None:
    model = random_parameters(model_with(method)).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IMAGES)
    logits.float().square().sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert model.bfloat16().eval()(IMAGES.bfloat16()).isfinite().all()


@pytest.mark.skipif(HOOKED, reason="runs in a process of its own, see tests/backbones/test_without_type_checks.py")
@pytest.mark.parametrize("method", METHODS)
def test_compiled_it_gives_the_eager_logits_without_a_graph_break(method: str) -> None:
    torch.compiler.reset()
    model = random_parameters(model_with(method)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)


# --- distributed: a training step of every method on two processes


@contextmanager
def process_group(rank: int, folder: str) -> Iterator[None]:
    """Return a context in which this process is one of two in a gloo group."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    yield
    torch.distributed.destroy_process_group()


def training_steps(step: nn.Module, parts: list[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Train for two steps on the mean loss of some batches, each with a seed.

    Returns:
        The loss of the second step, and the gradients of both steps and the parameters after them, by name.
    """
    optimizer, found = torch.optim.SGD(step.parameters(), lr=0.1), {}
    for number in range(2):  # DistributedDataParallel raises in the second one if a parameter got no gradient
        optimizer.zero_grad()
        losses = []
        for images, target, seed in parts:
            torch.manual_seed(seed)
            loss = step(images[:, None], target) / len(parts)
            loss.backward()
            losses.append(loss.detach())
        found |= {f"{name}, step {number}": whole(p.grad).clone() for name, p in step.named_parameters()}
        optimizer.step()
    after = {name: whole(p).detach().clone() for name, p in step.named_parameters()}
    return torch.stack(losses).sum(), {name.removeprefix("module."): value for name, value in (found | after).items()}


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def trained_model(method: str) -> ViT:
    """Return a model with random parameters, and attention that is concentrated so that ATS keeps different numbers."""
    model = random_parameters(model_with(method))
    for block in model.encoder.blocks:
        block.attn.qkv.weight.data[:32] *= 4
    return model.train()


def task_with(method: str) -> "Step":
    task = Classifier(trained_model(method), 5, optimizer=partial(torch.optim.SGD, lr=0.1))
    task.log = lambda *a, **k: None  # type: ignore[method-assign]  # There is no trainer to log to.
    return Step(task)


def steps_of_every_method(rank: int, folder: str) -> None:
    """Compare training steps on two processes, with DDP and FSDP, with those of one process and the same batch."""
    target = torch.arange(4)
    halves = [(IMAGES[i : i + 2], target[i : i + 2], i) for i in (0, 2)]
    with process_group(rank, folder):
        strategy = FullySharded()
        strategy._device_mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
        for method in METHODS:
            # In training, some methods draw random numbers for every position in the batch. Then one process draws what
            # the two draw, and accumulates the gradients.
            batches = halves if method in RANDOM_IN_TRAINING else [(IMAGES, target, 0)]
            loss, expected = training_steps(task_with(method), batches)
            for way in ("ddp", "fsdp"):
                step = task_with(method)
                if way == "fsdp":
                    strategy.shard_layers(step.task.model)
                else:
                    step = nn.parallel.DistributedDataParallel(step)
                part, found = training_steps(step, halves[rank : rank + 1])
                torch.distributed.all_reduce(part)
                torch.testing.assert_close(part / 2, loss, msg=f"{method}, {way}: the loss differs")
                assert found.keys() == expected.keys()
                for name, value in expected.items():
                    message = f"{method}, {way}: {name} differs"
                    torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=message)
            print(f"rank {rank}: {method}.", flush=True)


@torch.no_grad()
def test_the_halves_of_the_batch_have_other_numbers_of_tokens_with_ats() -> None:
    model = trained_model("ats").eval()
    counts = [model.trace(half)[-1].num_patches for half in IMAGES.chunk(2)]
    assert counts[0] != counts[1], "or the test below would not show that padding changes nothing"


class Step(nn.Module):
    """The training step of a task as a module, as DistributedDataParallel needs it."""

    def __init__(self, task: Classifier) -> None:
        super().__init__()
        self.task = task

    def forward(self, views: Tensor, target: Tensor) -> Tensor:
        return self.task.training_step((views, target), 0)


def both_ranks(step: Callable[[int, str], None], folder: Path) -> None:
    torch.multiprocessing.start_processes(step, (str(folder),), nprocs=2, start_method="fork")


@pytest.mark.skipif(HOOKED, reason="runs in a process of its own, see tests/backbones/test_without_type_checks.py")
def test_two_processes_equal_one_with_every_method(tmp_path: Path) -> None:
    both_ranks(steps_of_every_method, tmp_path)
