"""Every tokenizer of this folder under torch.compile, torch.export and autocast."""

from functools import partial

import pytest
import torch

from conftest import run_without_type_checks
from fewtokens.backbones.vit import ViT, vit
from fewtokens.tokenizers.base import Tokenizer
from fewtokens.tokenizers.dpc_knn import DPCKNN
from fewtokens.tokenizers.evit import EViT
from fewtokens.tokenizers.fixed_pattern import FixedPattern
from fewtokens.tokenizers.k_medoids import KMedoids
from fewtokens.tokenizers.patch_merger import PatchMerger
from fewtokens.tokenizers.pool import Pool
from fewtokens.tokenizers.random_drop import RandomDrop
from fewtokens.tokenizers.sinkhorn import Sinkhorn
from fewtokens.tokenizers.sit import SiT
from fewtokens.tokenizers.token_fuser import TokenFuser
from fewtokens.tokenizers.token_learner import TokenLearner, TokenLearnerV11, TokenLearnerV11Grouped
from fewtokens.tokenizers.tome import ToMe
from fewtokens.tokenizers.top_k import TopK

TOKENIZERS = [
    pytest.param(Tokenizer, id="none"),
    pytest.param(partial(TokenLearner, num_tokens=4), id="1.0 sum"),
    pytest.param(partial(TokenLearner, num_tokens=4, pooling="mean"), id="1.0 mean"),
    pytest.param(partial(TokenLearnerV11, num_tokens=4), id="1.1"),
    pytest.param(partial(TokenLearnerV11Grouped, num_tokens=4), id="1.1 grouped"),
    pytest.param(partial(TokenFuser, inner=partial(TokenLearner, num_tokens=4)), id="fuser 1.0"),
    pytest.param(partial(TokenFuser, inner=partial(TokenLearnerV11, num_tokens=4), init="official"), id="fuser 1.1"),
    pytest.param(partial(PatchMerger, num_tokens=4), id="patch merger"),
    pytest.param(SiT, id="sit"),
    pytest.param(Sinkhorn, id="sinkhorn"),
    pytest.param(Pool, id="pool"),
    pytest.param(RandomDrop, id="random drop"),
    pytest.param(FixedPattern, id="fixed pattern"),
]
# In bfloat16 they may select other patches, and some need a class token. Their own tests run them under autocast.
SELECTORS = [
    pytest.param(TopK, id="top-k"),
    pytest.param(EViT, id="evit"),
    pytest.param(partial(ToMe, r=3), id="tome"),
    pytest.param(DPCKNN, id="dpc-knn"),
    pytest.param(KMedoids, id="k-medoids"),
    pytest.param(partial(KMedoids, significance="all"), id="k-medoids all"),
]
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


HOOKED = hasattr(vit, "__wrapped__")  # pytest's jaxtyping hook, whose checks torch.compile cannot trace
unhooked = pytest.mark.skipif(HOOKED, reason="runs in a process of its own, see the last test")


def model_with(build: object, pool: str = "token") -> ViT:
    """Return a ViT with the tokenizer before its second block, in which no parameter is zero."""
    torch.manual_seed(0)
    model = vit(
        image_size=16,
        patch_size=4,
        num_classes=5,
        dim=16,
        depth=2,
        heads=2,
        pool=pool,
        tokenizer={"at": 1, "build": build},
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def check_compiled(build: object, backend: str) -> None:
    """Check that logits and gradients equal those of the eager model, and that there is no graph break."""
    torch.compiler.reset()
    model = model_with(build)
    expected = model(IMAGES)
    expected.square().sum().backward()
    gradients = [p.grad.clone() if p.grad is not None else None for p in model.parameters()]
    model.zero_grad()
    found = torch.compile(model, fullgraph=True, backend=backend)(IMAGES)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


@unhooked
@pytest.mark.parametrize("build", TOKENIZERS + SELECTORS)
def test_compiled_equals_eager(build: object) -> None:
    check_compiled(build, "aot_eager")


@pytest.mark.slow
@unhooked
@pytest.mark.parametrize("build", [TOKENIZERS[1], TOKENIZERS[6], *SELECTORS])
def test_compiled_by_inductor_equals_eager(build: object) -> None:
    check_compiled(build, "inductor")


@torch.no_grad()
@pytest.mark.parametrize("build", TOKENIZERS + SELECTORS)
def test_exported_equals_eager(build: object) -> None:
    model = model_with(build)
    exported = torch.export.export(model, (IMAGES,)).module()
    torch.testing.assert_close(exported(IMAGES), model(IMAGES))


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("build", TOKENIZERS)
def test_autocast_is_near_float32_and_keeps_the_residual_stream_in_float32(build: object, pool: str) -> None:
    model = model_with(build, pool)
    expected = model(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        logits, records = model(IMAGES), model.trace(IMAGES)
    assert logits.isfinite().all()
    assert {record.x.dtype for record in records} == {torch.float32}
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())


@pytest.mark.slow  # since test_methods compiles every method in every run
@pytest.mark.skipif(not HOOKED, reason="nothing to do: the tests above ran")
def test_compiled_equals_eager_in_a_process_without_type_checks() -> None:
    printed = run_without_type_checks(__file__, "-k", "test_compiled_equals_eager[")
    assert f"{len(TOKENIZERS + SELECTORS)} passed" in printed
