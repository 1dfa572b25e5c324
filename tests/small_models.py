"""Small models, minimal methods of every kind, and a data module without files."""

from collections.abc import Callable

import lightning as L
import pytest
import torch

from fewtokens.backbones.vit import ViT, vit
from fewtokens.tokenizers.ats import ATS
from fewtokens.tokenizers.base import Tokenizer


class Task(L.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model


class Data(L.LightningDataModule):
    """Batches of 3 uint8 images with two views each, the second of which is zero."""

    def __init__(self, channels: int, size: tuple[int, int], count: int = 7) -> None:
        super().__init__()
        self.images = torch.randint(0, 256, (count, channels, *size), generator=torch.Generator().manual_seed(1)).byte()

    def test_dataloader(self):
        return [(images, torch.zeros(len(images)).long()) for images in self.images.split(3)]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, targets = batch
        images = images.float() / 128 - 1
        return torch.stack([images, torch.zeros_like(images)], dim=1), targets


class Select(Tokenizer):
    """Drops the first third of the patches, as a selection method."""

    def forward(self, tokens, block):
        tokens, _ = block.attend(tokens)
        index = torch.arange(tokens.num_patches // 3, tokens.num_patches).expand(len(tokens.x), -1)
        return block.feed_forward(tokens.select(index))


class Adaptive(Tokenizer):
    """Keeps the patches with a positive sum and pads, as a method with another number of tokens for every image."""

    adaptive = True

    def forward(self, tokens, block):
        tokens, _ = block.attend(tokens)
        keep = tokens.patches.sum(dim=2) > 0
        keep[:, 0] = True
        return block.feed_forward(tokens.select(torch.arange(tokens.num_patches).expand_as(keep), keep))


class Merge(Tokenizer):
    """Merges the last two patches."""

    def forward(self, tokens, block):
        tokens, _ = block.attend(tokens)
        weights = torch.eye(tokens.num_patches)[:-1].clone()
        weights[-1, -2:] = 0.5
        weights = weights.expand(len(tokens.x), -1, -1)
        return block.feed_forward(tokens.resample(weights @ tokens.patches, weights))


def small(build=Tokenizer, at=(), channels=3, size=(8, 12), **settings) -> ViT:
    torch.manual_seed(0)
    settings = {"patch_size": 2, "dim": 16, "depth": 3, "heads": 2, "num_classes": 5} | settings
    return vit(image_size=size, channels=channels, tokenizer={"at": list(at), "build": build}, **settings)


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread, since models this small would only wait for the others, for long if the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make() -> Callable[..., ViT]:
    return small


@pytest.fixture
def adaptive() -> ViT:
    """Return a model with ATS in every block, and weights so large that images keep different numbers of tokens."""
    model = small(ATS, at=[0, 1, 2])
    for block in model.encoder.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)
    return model


@pytest.fixture
def measured() -> Callable[..., tuple[Task, Data]]:
    """Return a function that builds a task and its data for a model of images (channels, height, width)."""

    def build(model, channels=3, size=(8, 12), count=7):
        return Task(model), Data(channels, size, count)

    return build


@pytest.fixture
def methods() -> dict[str, type[Tokenizer]]:
    return {"selection": Select, "adaptive": Adaptive, "merging": Merge}
