"""Properties of every method. The tests find the methods by their yaml files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from conftest import CONFIGS
from fewtokens.analysis.cost import macs
from fewtokens.backbones.vit import ViT, vit
from fewtokens.runs.config import instantiate
from fewtokens.tasks.classification import Classifier

METHODS = sorted(path.stem for path in (CONFIGS / "tokenizer").glob("*.yaml"))
REDUCING = [name for name in METHODS if name != "none"]
# Settings with which a method changes no patch
NOTHING_DROPPED = {"budget": "all", "r": 0, "keep_rate": 1.0}
# In evaluation, random numbers depend on the position in the batch.
RANDOM_BY_POSITION = {"random_drop"}
HOOKED = hasattr(vit, "__wrapped__")  # pytest's jaxtyping hook, whose checks torch.compile cannot trace
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


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


def one_step(rank: int, folder: str) -> None:
    """Train every method for two steps on other images on each rank, and check that the parameters agree afterwards."""
    with process_group(rank, folder):
        for method in METHODS:
            task = Classifier(random_parameters(model_with(method)), 5, optimizer=partial(torch.optim.SGD, lr=0.1))
            task.log = lambda *a, **k: None  # type: ignore[method-assign]  # There is no trainer to log to.
            step = Step(task)
            parallel = nn.parallel.DistributedDataParallel(step)
            before = [p.clone() for p in task.model.parameters()]
            torch.manual_seed(rank)
            optimizer = task.optimizer(parallel.parameters())
            for images in IMAGES.chunk(2)[rank].split(
                1
            ):  # A parameter without gradient would be an error in the second step.
                optimizer.zero_grad()
                parallel(images[:, None], torch.tensor([rank])).backward()
                optimizer.step()
            after = torch.cat([p.detach().flatten() for p in task.model.parameters()])
            other = [torch.empty_like(after) for _ in range(2)]
            torch.distributed.all_gather(other, after)
            assert torch.equal(other[0], other[1]), f"{method}: ranks differ"
            assert after.isfinite().all(), method
            assert not torch.equal(after, torch.cat([p.flatten() for p in before])), method
            print(f"rank {rank}: {method}.", flush=True)


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
def test_a_distributed_step_of_every_method(tmp_path: Path) -> None:
    both_ranks(one_step, tmp_path)
