"""What the tests of methods share: a seed, a block, images behind a class and two register tokens, small models."""

from collections.abc import Callable, Sequence

import pytest
import torch

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
    """A block whose attention is far from even."""
    block = Block(DIM, 2, qkv_bias=True, attn_layer=Attention).eval()
    torch.nn.init.normal_(block.attn.qkv.weight)
    return block


@pytest.fixture
def make_images() -> MakeImages:
    """Four images with the origin of every patch, and whatever else is asked for."""

    def make(**more: object) -> Tokens:
        return Tokens(torch.randn(4, P + N, DIM), P, grid=(3, 5), origin=torch.eye(N).expand(4, N, N), **more)

    return make


@pytest.fixture
def make_model() -> MakeModel:
    """A ViT of three blocks and 4x4 patches with the tokenizer before the last two, the same weights every time."""

    def make(build: object, at: Sequence[int] = (1, 2)) -> ViT:
        torch.manual_seed(0)
        sizes = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 16, "depth": 3, "heads": 2}
        return vit(**sizes, tokenizer={"at": at, "build": build}, options={"reg_tokens": 2}).eval()

    return make
