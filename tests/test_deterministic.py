"""trainer.deterministic: the same weights twice, and no operation that torch refuses on CUDA."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import TINY
from fewtokens.errors import FewtokensError
from fewtokens.runs import train as training
from fewtokens.runs.job import build_trainer
from fewtokens.tasks.classification import ConfusionMatrix
from test_methods import IMAGES, METHODS, model_with

# ATen's names of the operations that raise an error on CUDA, by the documentation of use_deterministic_algorithms. Of
# NLLLoss only the kernel of pictures (nll_loss2d) does, as its source shows.
REFUSED = re.compile(
    r"aten\.(avg_pool3d_backward|_?adaptive_.*_backward|fractional_max_pool.*_backward|max_unpool.*"
    r"|_?upsample_(linear|bilinear|bicubic|trilinear).*_backward|reflection_pad.*_backward|nll_loss2d.*|_ctc_loss_backward"
    r"|put_?|histc|bincount|median|nanmedian|grid_sampler_.*_backward|scatter_reduce_?)\."
)


class Operations(TorchDispatchMode):
    """Collects the names of all operations, those of the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def restored() -> Iterator[None]:
    """Undo what Lightning sets for the whole process."""
    benchmark, workspace = torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if workspace is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_two_deterministic_runs_have_the_same_weights(restored, composed: Callable, tmp_path: Path) -> None:
    """With ToMe, which adds at indices that occur several times."""
    tome = ["tokenizer=tome", "tokenizer.build.r=4", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    for name in ("first", "second"):
        training.run(composed(*TINY, *tome, "trainer.deterministic=true", directory=name))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    first, second = (weights(tmp_path / name) for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_warn_and_no_other_word(restored, composed: Callable) -> None:
    build_trainer(composed("trainer=cpu", "trainer.deterministic=warn").trainer)
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    with pytest.raises(FewtokensError, match=r"deterministic` must be true, false or warn, got 'warm'"):
        build_trainer(composed("trainer=cpu", "trainer.deterministic=warm").trainer)


def test_the_confusion_matrix_of_1000_classes_needs_no_comparisons_with_a_million_cells(restored) -> None:
    logits, labels = torch.rand(8, 1000), torch.arange(8) * 100
    logits[:6].scatter_(1, labels[:6, None], 2.0)
    torch.use_deterministic_algorithms(True)
    counts = ConfusionMatrix(1000, validate_args=False)
    with Operations() as operations:
        for _ in range(2):
            counts.update(logits, labels)
    expected = torch.zeros(1000, 1000).long().index_put_((labels, logits.argmax(dim=1)), torch.tensor(2))
    assert torch.equal(counts.compute(), expected)
    assert "aten.eq.Tensor" not in operations.names


@pytest.mark.parametrize("method", METHODS)
def test_no_method_trains_with_an_operation_that_is_refused_on_cuda(method: str) -> None:
    model = model_with(method).train()
    with Operations() as operations:
        F.cross_entropy(model(IMAGES), torch.arange(len(IMAGES)) % 5).backward()
    assert "aten.convolution_backward.default" in operations.names, "the backward pass is seen"
    assert not list(filter(REFUSED.match, operations.names))


def test_the_names_are_those_of_torch() -> None:
    picture = torch.rand(1, 1, 4, 4, requires_grad=True)
    with Operations() as operations:
        F.interpolate(picture, size=8, mode="bicubic", antialias=True).sum().backward()
        F.adaptive_avg_pool2d(picture, 3).sum().backward()
        F.grid_sample(picture, torch.zeros(1, 2, 2, 2), align_corners=False).sum().backward()
        F.cross_entropy(torch.rand(1, 2, 4, 4), torch.zeros(1, 4, 4).long())
    assert len(list(filter(REFUSED.match, operations.names))) == 4, operations.names
