"""The memory layouts that docs/results/ats_layouts.sh compares: they must compute the same as ATS."""

import importlib.util
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from fewtokens.analysis.cost import macs
from fewtokens.backbones.vit import ViT, vit
from fewtokens.benchmarks.children import HOME
from fewtokens.tokenizers.ats import ATS


@pytest.fixture(scope="module")
def layouts() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ats_layouts", HOME / "docs" / "results" / "ats_layouts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_with(kind: type[ATS]) -> ViT:
    torch.manual_seed(0)
    model = vit(image_size=24, patch_size=4, num_classes=5, dim=16, depth=4, heads=2,
                tokenizer={"at": "1:", "build": partial(kind)}, options={"class_token": True})  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def images() -> Tensor:
    """Return images that differ in contrast, so that they keep different numbers of patches."""
    contrast = torch.linspace(0.1, 4, 6)[:, None, None, None]
    return contrast * torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("name", ["Padded", "FeedForwardOnReal", "LinearOnReal"])
def test_a_layout_computes_what_ats_computes(layouts: ModuleType, name: str) -> None:
    ours, other, batch = model_with(ATS), model_with(getattr(layouts, name)), images()
    mask = ours.trace(batch)[-1].mask
    assert mask is not None, "otherwise nothing is tested"
    torch.testing.assert_close(other(batch), ours(batch), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other(batch[:1]), ours(batch[:1]), rtol=1e-5, atol=1e-5)
    assert macs(other, batch[:1]) == macs(ours, batch[:1]), "an image alone has no padding"


@torch.no_grad()
def test_layouts_compute_less_and_less_of_the_padding(layouts: ModuleType) -> None:
    batch = images()
    kinds = (layouts.Padded, layouts.FeedForwardOnReal, layouts.LinearOnReal, ATS)
    found = [macs(model_with(kind), batch) for kind in kinds]
    assert found[0] > found[1] > found[2] > found[3]
    assert found[3] == sum(macs(model_with(ATS), image[None]) for image in batch), "of padding, nothing is left"
