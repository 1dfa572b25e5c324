from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fewtokens.analysis.cost import peak_memory
from fewtokens.analysis.memory import LiveTensors, peak_bytes
from fewtokens.tokenizers.ats import ATS
from fewtokens.tokenizers.evit import EViT
from fewtokens.tokenizers.k_medoids import KMedoids
from fewtokens.tokenizers.tome import ToMe
from fewtokens.tokenizers.top_k import TopK

CPU = torch.device("cpu")
X, W = torch.randn(100, 100), torch.randn(100, 100)
SIZE = 4 * 100 * 100


def chain() -> torch.Tensor:
    a = X @ W
    b = a + 1  # two at once
    del a
    c = b.relu_().t()[:50]  # in place, and a view
    return c.sum()


def overwritten() -> torch.Tensor:
    for _ in range(5):
        y = X + 1  # the old one is held until the new one is there
    return y


def returned() -> list[torch.Tensor]:
    return [X + 1, X.half(), X.expand(7, 100, 100), X.double()]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("run", "size"), [(chain, 2 * SIZE), (overwritten, 2 * SIZE), (returned, SIZE + SIZE // 2 + 2 * SIZE)]
)
def test_by_hand(run, size, mode):
    with mode():
        assert peak_bytes(run, CPU) == size


def test_of_an_mlp_and_not_of_its_weights():
    mlp = nn.Sequential(nn.Linear(100, 300), nn.GELU(), nn.Linear(300, 100))
    with torch.no_grad():
        for rows in (1, 50):
            assert peak_bytes(lambda rows=rows: mlp(X[:rows]), CPU) == 4 * rows * (300 + 300)
    trained = peak_bytes(lambda: mlp(X), CPU)  # with gradients, what backward needs is held
    assert trained == 4 * 100 * (300 + 300 + 100)


METHODS = [
    partial(TopK, keep_rate=0.8),
    partial(EViT, keep_rate=0.8),
    partial(ToMe, r=3),
    partial(KMedoids, keep_rate=0.8),
    ATS,
]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_inside_the_block_holds_nothing_that_the_plain_block_does_not(make, method):
    images = torch.randn(4, 3, 8, 12)
    dense, few = (peak_memory(make(build, at=at), images) for build, at in ((method, []), (method, [1, 2])))
    early = peak_memory(make(method, at=[0, 1, 2]), images)
    assert few <= dense
    assert early < dense or method is ATS  # random weights give it nothing to drop


def test_nothing_made_nothing_held():
    with LiveTensors() as live:
        X.view(-1, 10).t()
        X[3:5].mul_(1)
    assert (live.now, live.peak) == (0, 0)
    with LiveTensors() as live:
        kept = F.relu(X)
        kept.add_(1)
    assert (live.now, live.peak) == (SIZE, SIZE)
    del kept
    assert live.now == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_by_its_allocator():
    x = X.cuda()
    assert peak_bytes(lambda: (x + 1) + 1, x.device) >= 2 * SIZE
