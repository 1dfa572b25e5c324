"""DynamicViT: learned decisions in training, and a fixed number of patches in evaluation."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from fewtokens.analysis.cost import macs
from fewtokens.backbones.vit import ViT, vit
from fewtokens.errors import FewtokensError
from fewtokens.layers.attention import EPS, Attention, masked_softmax
from fewtokens.layers.block import Block
from fewtokens.tasks.classification import Classifier
from fewtokens.tokenizers.base import LayerContext, Tokenizer, highest
from fewtokens.tokenizers.dynamic_vit import DynamicViT
from fewtokens.tokens import Tokens

Recipe = Callable[[LayerContext], Tokenizer]


def model(build: Recipe, at: tuple[int, ...] = (1, 2), pool: str = "token") -> ViT:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 16, "depth": 3, "heads": 2}
    return vit(**sizes, tokenizer={"at": at, "build": build}, pool=pool)


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def context(**more: object) -> LayerContext:
    return LayerContext(dim=8, heads=2, block=0, depth=4, prefix=1, grid=(14, 14), **more)


def test_the_masked_softmax_is_a_softmax_over_kept_tokens_and_the_token_itself() -> None:
    logits = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    keep = torch.tensor([[1.0, 0, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.float64)
    found = masked_softmax(logits, keep)
    for image in range(2):
        for row in range(5):
            seen = [column for column in range(5) if keep[image, column] or column == row]
            expected = torch.zeros(2, 5, dtype=torch.float64)
            expected[:, seen] = logits[image, :, row, seen].softmax(dim=-1)
            torch.testing.assert_close(found[image, :, row], expected, atol=100 * EPS, rtol=0)
    assert masked_softmax(logits + 1e4, torch.zeros(2, 5, dtype=torch.float64)).isfinite().all()


def test_dropped_tokens_get_the_gradient_of_keeping_them() -> None:
    keep = torch.tensor([[1.0, 0.0, 1.0]], requires_grad=True)
    value = torch.tensor([0.0, 5.0, 1.0])
    (masked_softmax(torch.zeros(1, 1, 1, 3), keep)[0, 0, 0] @ value).backward()
    assert keep.grad is not None
    assert keep.grad[0, 1] > 0.5


@pytest.mark.parametrize(("stage", "count"), [(0, 137), (1, 96), (2, 67)])
def test_each_stage_keeps_a_power_of_the_keep_rate_of_all_patches(stage: int, count: int) -> None:
    tokenizer = DynamicViT(context(stage=stage, stages=3)).eval()
    tokens = Tokens(torch.randn(2, 1 + 150, 8), 1)
    assert tokenizer.choose(tokens).num_patches == count
    assert DynamicViT(context(stage=2, stages=3), keep_rate=0.001).count == 1


@torch.no_grad()
def test_evaluation_keeps_the_highest_scores_in_their_order() -> None:
    network = model(partial(DynamicViT, keep_rate=0.4), at=(1,)).eval()
    tokens, tokenizer = network.embed(images()), network.encoder.tokenizers[1]
    scores = tokenizer.predictor(tokens.patches, None)[..., 0]
    kept = tokenizer.choose(tokens)
    for image in range(4):
        chosen = sorted(sorted(range(16), key=lambda i: -scores[image, i].item())[:6])
        assert torch.equal(kept.patches[image], tokens.patches[image, chosen])
    assert highest(torch.zeros(1, 4), 2).tolist() == [[0, 1]]
    torch.testing.assert_close(network(images())[1:2], network(images()[1:2]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_keeping_all_is_the_plain_model() -> None:
    network = model(partial(DynamicViT, keep_rate=1.0)).eval()
    found = network(images())
    with network.encoder.without_reduction():
        assert torch.equal(found, network(images()))


@torch.no_grad()
def test_it_costs_less_the_less_it_keeps() -> None:
    costs = [macs(model(partial(DynamicViT, keep_rate=keep)), images(1)) for keep in (0.25, 0.5, 0.75, 1.0)]
    assert costs == sorted(set(costs))


def test_training_keeps_all_in_the_batch_and_dropped_patches_stay_dropped() -> None:
    tokenizers = [DynamicViT(context(stage=stage, stages=2)).train() for stage in range(2)]
    tokens = Tokens(torch.randn(3, 1 + 196, 8), 1)
    for tokenizer in tokenizers:
        before, tokens = tokens.keep_mask, tokenizer.decide(tokens)
        assert tokens.x.shape == (3, 197, 8)
        assert tokens.keep_mask is not None
        assert set(tokens.keep_mask.unique().tolist()) == {0.0, 1.0}
        assert tokens.keep_mask[:, 0].eq(1).all()
        assert before is None or (tokens.keep_mask <= before).all()


@pytest.mark.parametrize("pool", ["token", "avg", "max", "map"])
def test_nothing_attends_to_dropped_patches_in_training(pool: str) -> None:
    network = model(Tokenizer, pool=pool).train()
    tokens = network.embed(images(2))
    keep = torch.ones(tokens.x.shape[:2])
    keep[:, tokens.prefix + 3] = 0
    changed = tokens.x.clone()
    changed[:, tokens.prefix + 3] = 7.0
    masked = [Tokens(x, tokens.prefix, grid=(4, 4), keep_mask=keep) for x in (tokens.x, changed)]
    found = [network.classify(network.encoder(record)) for record in masked]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_the_loss_is_the_squared_distance_to_the_target_and_is_returned_once() -> None:
    tokenizer = DynamicViT(context(stage=1, stages=2), keep_rate=0.5, ratio_weight=3.0).train()
    kept = tokenizer.decide(Tokens(torch.randn(5, 197, 8), 1)).keep_mask
    assert kept is not None
    expected = 3.0 / 2 * (kept[:, 1:].mean(dim=1) - 0.25).square().mean()
    torch.testing.assert_close(tokenizer.loss(), expected)
    assert tokenizer.loss() is None
    assert tokenizer.eval()(Tokens(torch.randn(1, 197, 8), 1), Block(8, 2, attn_layer=Attention)).num_patches == 49
    assert tokenizer.loss() is None


def test_training_reaches_the_target_and_every_parameter() -> None:
    network = model(partial(DynamicViT, keep_rate=0.5, ratio_weight=20.0)).train()
    task = Classifier(network, 5, optimizer=partial(torch.optim.AdamW, lr=3e-3))
    task.log = lambda *a, **k: None  # outside a trainer there is nowhere to log
    optimizer = task.optimizer(task.parameters())
    batch = (images(32)[:, None], torch.arange(32) % 5)
    for _ in range(60):
        optimizer.zero_grad()
        task.training_step(batch, 0).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    keep = network.encoder.tokenizers[1].decide(network.embed(images(64))).keep_mask
    assert keep is not None
    assert keep[:, 1:].mean().item() == pytest.approx(0.5, abs=0.1)


def test_bf16() -> None:
    network = model(partial(DynamicViT, keep_rate=0.5)).train()
    with torch.autocast("cpu", torch.bfloat16):
        network(images()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert network.bfloat16().eval()(images().bfloat16()).isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep_rate": 0.0}, r"^`tokenizer\.build\.keep_rate` must be above 0 and at most 1, got 0\.0\.$"),
        ({"keep_rate": 1.5}, r"^`tokenizer\.build\.keep_rate` must be above 0 and at most 1, got 1\.5\.$"),
        ({"ratio_weight": -1.0}, r"^`tokenizer\.build\.ratio_weight` must be at least 0, got -1\.0\.$"),
    ],
)
def test_invalid_settings(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(FewtokensError, match=message):
        DynamicViT(context(), **wrong)


def test_padding_is_an_error() -> None:
    tokens = Tokens(torch.randn(1, 5, 8), 1, mask=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(
        FewtokensError, match=r"^DynamicViT makes the same number .* an adaptive tokenizer before it has"
    ):
        DynamicViT(context())(tokens, Block(8, 2, attn_layer=Attention))
