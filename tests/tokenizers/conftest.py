"""Fixtures shared by the tests of tokenizers: seed, block, tokens, small models, and checks of many methods."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from fewtokens.analysis.cost import macs
from fewtokens.backbones.vit import ViT, vit
from fewtokens.layers.attention import Attention
from fewtokens.layers.block import Block
from fewtokens.tokens import Tokens

N, P, DIM = 15, 3, 16
MakeImages = Callable[..., Tokens]
MakeModel = Callable[..., ViT]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def block() -> Block:
    """Return a block whose attention is far from uniform."""
    block = Block(DIM, 2, qkv_bias=True, attn_layer=Attention).eval()
    torch.nn.init.normal_(block.attn.qkv.weight)
    return block


@pytest.fixture
def make_images() -> MakeImages:
    """Return a function that makes four images with the origin of every patch, and any other field of Tokens."""

    def make(**more: object) -> Tokens:
        return Tokens(torch.randn(4, P + N, DIM), P, grid=(3, 5), origin=torch.eye(N).expand(4, N, N), **more)

    return make


@pytest.fixture
def make_model() -> MakeModel:
    """Return a function that builds a ViT of three blocks and 4x4 patches, with the same weights every time.

    The tokenizer is in the last two blocks.
    """

    def make(build: object, at: Sequence[int] = (1, 2)) -> ViT:
        torch.manual_seed(0)
        sizes = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 16, "depth": 3, "heads": 2}
        return vit(**sizes, tokenizer={"at": at, "build": build}, options={"reg_tokens": 2}).eval()

    return make


@pytest.fixture
def padding() -> Tensor:
    """Return the mask of four images, the second of which has only 10 valid patches."""
    mask = torch.ones(4, P + N, dtype=torch.bool)
    mask[1, P + 10 :] = False
    return mask


@pytest.fixture
def check_keep_rates(make_model: MakeModel) -> Callable[..., None]:
    """Check that a keep rate of 1 gives the plain transformer, and that lower ones change the output and cost less."""

    @torch.no_grad()
    def check(build: object, rates: Sequence[float] = (0.25, 0.5, 0.75)) -> None:
        images = torch.randn(2, 3, 16, 16)
        with (complete := make_model(partial(build, keep_rate=1.0))).encoder.without_reduction():
            expected = complete(images)
        assert torch.equal(complete(images), expected)
        assert not torch.equal(make_model(partial(build, keep_rate=0.3))(images), expected)
        costs = [macs(make_model(partial(build, keep_rate=rate)), images[:1]) for rate in rates]
        assert costs == sorted(set(costs))

    return check


@pytest.fixture
def check_autocast(make_model: MakeModel) -> Callable[..., ViT]:
    """Check that loss and gradients are finite under bfloat16 autocast, and return the model with its gradients.

    The model is given, or built around a tokenizer.
    """

    def check(build: object) -> ViT:
        net = (build if isinstance(build, ViT) else make_model(build)).train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(torch.randn(2, *net.sample_shape)).square().sum()
        loss.backward()
        assert torch.isfinite(loss)
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
        return net

    return check
