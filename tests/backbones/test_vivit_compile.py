"""The models of ViViT under torch.compile and torch.export."""

from functools import partial
from typing import get_args

import pytest
import torch

from conftest import run_without_type_checks
from fewtokens.backbones.vivit import Model, ViViT, vivit
from fewtokens.layers.embedding import Tubelets
from fewtokens.tokenizers.token_learner import TokenLearnerV11

MODELS = get_args(Model)
CLIPS = torch.randn(2, 3, 8, 8, 8, generator=torch.Generator().manual_seed(0))
HOOKED = hasattr(vivit, "__wrapped__")  # jaxtyping's hook, whose checks torch.compile cannot trace
unhooked = pytest.mark.skipif(HOOKED, reason="runs in its own process, see the last test")


def build(model: Model) -> ViViT:
    torch.manual_seed(0)
    net = vivit(
        tubelets=Tubelets(clip_frames=8, image_size=8, frames=2, height=4, width=4, sampled_frames=4),
        num_classes=5,
        dim=16,
        depth=2,
        heads=2,
        temporal_depth=1,
        model=model,
        tokenizer={"at": 1, "build": partial(TokenLearnerV11, num_tokens=2)},
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


@unhooked
@pytest.mark.parametrize("model", MODELS)
def test_compiled_equals_eager(model: Model) -> None:
    torch.compiler.reset()
    net = build(model)
    expected = net(CLIPS)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    found = torch.compile(net, fullgraph=True, backend="aot_eager")(CLIPS)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
def test_exported_equals_eager(model: Model) -> None:
    net = build(model)
    exported = torch.export.export(net, (CLIPS,)).module()
    torch.testing.assert_close(exported(CLIPS), net(CLIPS))


@pytest.mark.slow
@pytest.mark.skipif(not HOOKED, reason="the tests above ran")
def test_compiled_equals_eager_in_a_process_without_type_checks() -> None:
    assert f"{len(MODELS)} passed" in run_without_type_checks(__file__, "-k", "test_compiled_equals_eager[")
