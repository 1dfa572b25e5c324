"""ToMe: the official numbers, plain numpy, sizes in attention, and errors."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewtokens.analysis.cost import macs, tokens_per_block
from fewtokens.backbones.vit import ViT, vit
from fewtokens.errors import FewtokensError
from fewtokens.layers.attention import Attention
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext
from fewtokens.tokenizers.tome import ToMe, match, num_merged, schedule
from fewtokens.tokens import Tokens

with np.load(Path(__file__).parents[1] / "golden" / "tome_merge.npz") as file:
    GOLDEN = {key: torch.from_numpy(file[key]) for key in file.files}
CASES = sorted({key.split(".")[0] for key in GOLDEN if key.startswith("t")})
CONTEXT = LayerContext(dim=16, heads=2, block=0, depth=1, prefix=1, class_token=True)
close = partial(torch.testing.assert_close, rtol=1e-5, atol=2e-5)


def model(r: object = 2, **more: object) -> ViT:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 16, "depth": 3, "heads": 2}
    options = {"options": {"reg_tokens": 2}} if more.pop("registers", True) else {}
    build, at = partial(ToMe, r=r, proportional=more.pop("proportional", True)), more.pop("at", "0:")
    return vit(**sizes, **options, **more, tokenizer={"at": at, "build": build}).eval()


def patches(count: int, prefix: int = 0, batch: int = 2) -> Tokens:
    return Tokens(torch.randn(batch, prefix + count, 16), prefix, origin=torch.eye(count).expand(batch, -1, -1))


# --- the official numbers


@pytest.mark.parametrize("case", CASES)
def test_matching_merging_and_unmerging_are_the_official_ones(case: str) -> None:
    g = {key.split(".")[1]: value for key, value in GOLDEN.items() if key.startswith(f"{case}.")}
    prefix, total = int(g["class_token"] + g["distill_token"]), g["x"].shape[1]
    matching = match(g["metric"], num_merged(int(g["r"]), total - prefix), prefix)
    places = matching.keep, matching.source, matching.target
    tokens = Tokens(g["x"], prefix, origin=torch.eye(total - prefix).expand(len(g["x"]), -1, -1))
    plain, sized = tokens.merge(*places), replace(tokens, size=g["size"][..., 0]).merge(*places)
    close(plain.x, g["merged_mean"])
    close(sized.x, g["merged_wavg"])
    close(sized.size, g["merged_size"][..., 0])
    assert torch.equal(plain.origin > 0, g["source"][:, prefix:, prefix:].bool())
    unmerged = torch.cat([sized.x[:, :prefix], matching.unmerge(sized.patches)], dim=1)
    if "unmerged" in g:
        close(unmerged, g["unmerged"])
    # Every patch has the token that it is part of, also with a distillation token, where the official code is wrong.
    back = torch.einsum("bkm,bkc->bmc", (sized.origin > 0).float(), sized.patches)
    close(unmerged[:, prefix:], back)


def test_all_cases_and_schedules_are_there() -> None:
    assert len(CASES) == 8
    assert sum(key.endswith(".out") for key in GOLDEN) == 7


@pytest.mark.parametrize(
    ("name", "r", "inflection"),
    [
        ("sched0", 8, 0.0),
        ("sched1", 8, 0.0),
        ("sched2", 8, -1.0),
        ("sched3", 8, 1.0),
        ("sched4", 13, -0.5),
        ("sched5", 8, -1.0),
        ("sched6", [16, 8], 0.0),
    ],
)
def test_schedules_are_the_official_ones(name: str, r: object, inflection: float) -> None:
    assert schedule(r, inflection, int(GOLDEN[f"{name}.L"])) == GOLDEN[f"{name}.out"].tolist()


def test_a_schedule_for_one_stage_is_r() -> None:
    assert schedule(8, -1.0, 1) == [8]
    assert schedule([5], 0.0, 1) == [5]


# --- plain numpy


def matching_by_hand(metric: np.ndarray, r: int, prefix: int) -> tuple[set[int], dict[int, int]]:
    """Return the patches of an image that stay, and the targets of the others, by loops over all positions."""
    unit = metric / np.maximum(np.linalg.norm(metric, axis=1, keepdims=True), 1e-12)
    even = [i for i in range(prefix, len(metric)) if i % 2 == 0]
    odd = [i for i in range(prefix, len(metric)) if i % 2 == 1]
    edges = []
    for i in even:
        scores = [float(unit[i] @ unit[j]) for j in odd]
        edges.append((-max(scores), i, odd[int(np.argmax(scores))]))
    goes = {i - prefix: j - prefix for _, i, j in sorted(edges)[:r]}
    return set(range(len(metric) - prefix)) - set(goes), goes


@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("count", [2, 7, 16])
@pytest.mark.parametrize("ties", [False, True])
def test_matching_against_loops(prefix: int, count: int, ties: bool) -> None:
    metric = torch.randn(3, prefix + count, 6, dtype=torch.float64)
    if ties:  # orthogonal vectors of length 1, so that equal means equal
        metric = torch.eye(6, dtype=torch.float64)[torch.randint(0, 6, (3, prefix + count))]
    for r in range(1, count // 2 + 1):
        matching = match(metric, r, prefix)
        for i in range(3):
            stays, goes = matching_by_hand(metric[i].numpy(), r, prefix)
            keep = matching.keep[i].tolist()
            assert set(keep) == stays
            pairs = zip(matching.source[i].tolist(), matching.target[i].tolist(), strict=True)
            assert {a: keep[slot] for a, slot in pairs} == goes


@torch.no_grad()
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_merging_twice_keeps_mass_prefix_and_partition(prefix: int) -> None:
    tokens = patches(16, prefix)
    few = tokens
    for r in (5, 4):
        matching = match(few.x, r, prefix)
        few = few.merge(matching.keep, matching.source, matching.target)
    assert (few.num_patches, few.prefix, few.grid) == (7, prefix, None)
    assert torch.equal(few.x[:, :prefix], tokens.x[:, :prefix])
    assert few.size is not None
    assert few.origin is not None
    assert (few.size[:, :prefix] == 1).all()
    size = few.size[:, prefix:]
    parts = few.origin > 0
    assert (parts.sum(dim=1) == 1).all(), "every patch is in exactly one token"
    assert torch.equal(parts.sum(dim=2).float(), size)
    close(few.origin, parts / size[..., None])
    close(few.origin @ tokens.patches, few.patches)
    close(few.mean(), tokens.mean())


def test_a_metric_of_zeros_gives_no_nan() -> None:
    matching = match(torch.zeros(1, 5, 3), 2, 1)
    assert sorted(matching.keep[0].tolist() + matching.source[0].tolist()) == [0, 1, 2, 3]


# --- in a block


def attended_by_hand(block: Block, tokens: Tokens, sizes: Tensor) -> Tensor:
    """Attention in which a token of size s is there s times."""
    normed = block.norm1(tokens.x)
    query, key, value = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in block.attn.qkv(normed).chunk(3, dim=2))
    weights = (query @ key.transpose(2, 3) / 8**0.5).exp() * sizes[:, None, None, :]
    mixed = (weights / weights.sum(dim=3, keepdim=True)) @ value
    return tokens.x + block.attn.proj(mixed.transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("proportional", [True, False])
def test_sizes_count_in_attention_where_asked(proportional: bool) -> None:
    block = Block(16, 2, qkv_bias=True, attn_layer=Attention).eval()
    size = torch.randint(1, 5, (2, 17)).float()
    tokens = replace(patches(16, 1), size=size)
    context = replace(CONTEXT, stages=1)
    out = ToMe(context, 0, proportional=proportional)(tokens, block)
    attended = attended_by_hand(block, tokens, size if proportional else torch.ones(2, 17))
    close(out.x, block.feed_forward(tokens.update(attended)).x)
    assert out.size is size
    merged = ToMe(context, 3, proportional=proportional)(tokens, block)
    assert merged.size is not None
    close(merged.size[:, 1:].sum(dim=1), size[:, 1:].sum(dim=1))


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("proportional", [True, False])
def test_sizes_count_in_later_blocks_only_where_asked(proportional: bool, pool: str) -> None:
    """ToMe is in block 1, and block 2 is plain. Sizes always count in mean pooling, as in the official code for MAE."""
    net = model(3, at=[1], pool=pool, proportional=proportional)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images, (first, _, last) = torch.randn(2, 3, 16, 16), net.encoder.blocks
    tokens = net.encoder.layers[1](first(net.embed(images)))
    assert tokens.size is not None
    assert tokens.size_bias == proportional
    expected = last(replace(tokens, size=tokens.size if proportional else None)).x
    out = net.encoder(net.embed(images))
    close(out.x, expected)
    assert out.size is not None
    patches, size = net.vit.norm(expected)[:, out.prefix :], out.size[:, out.prefix :, None]
    if pool == "avg":
        close(net(images), net.vit.head(net.vit.fc_norm((patches * size).sum(dim=1) / size.sum(dim=1))))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zero_keys_are_similar_to_nothing_in_any_precision(dtype: torch.dtype) -> None:
    """The default epsilon of F.normalize is 0 in float16. A zero key then is NaN, and NaN is the highest similarity."""
    metric = torch.eye(4, 6, dtype=dtype)[None] + torch.eye(4, 6, dtype=dtype)[None].roll(-1, dims=1)
    metric[0, 2] = 0  # in set A, with the similarity 0; the similarity of position 0 to its neighbor is 0.5
    assert match(metric, 1, 0).source.tolist() == [[0]]


@torch.no_grad()
def test_keys_are_compared_and_the_mlp_comes_after() -> None:
    block, tokens = Block(16, 2, attn_layer=Attention).eval(), patches(16, 1)
    attended, state = block.attend(tokens)
    matching = match((state.key[:, 0] + state.key[:, 1]) / 2, 3, 1)
    expected = block.feed_forward(attended.merge(matching.keep, matching.source, matching.target))
    close(ToMe(CONTEXT, 3)(tokens, block).x, expected.x)


@torch.no_grad()
@pytest.mark.parametrize("r", [0, [0, 0], []])
def test_merging_nothing_is_the_plain_transformer(r: object) -> None:
    images, net = torch.randn(2, 3, 16, 16), model(r)
    with net.encoder.without_reduction():
        expected = net(images)
    assert torch.equal(net(images), expected)


@torch.no_grad()
def test_counts_follow_the_schedule_and_stop_at_half() -> None:
    images = torch.randn(1, 3, 16, 16)
    assert tokens_per_block(model(2), images) == [3 + 14, 3 + 12, 3 + 10]
    assert tokens_per_block(model([1, 3]), images) == [3 + 15, 3 + 12, 3 + 12]
    assert tokens_per_block(model(99), images) == [3 + 8, 3 + 4, 3 + 2]
    assert tokens_per_block(model(99, registers=False, pool="avg"), images) == [8, 4, 2]
    costs = [macs(model(r), images) for r in (4, 3, 2, 1)]
    assert costs == sorted(set(costs))


def test_gradients_under_autocast_and_in_bfloat16() -> None:
    for net in (model(3).train(), model(3, proportional=False, pool="avg", registers=False).train()):
        images = torch.randn(2, 3, 16, 16)
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(images).square().sum()
        loss.backward()
        assert torch.isfinite(loss)
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
        assert torch.isfinite(net.bfloat16()(images.bfloat16())).all()


def test_gradients_of_a_merged_token_reach_its_parts_by_their_sizes() -> None:
    tokens = replace(patches(2), size=torch.tensor([[1.0, 3.0]]).expand(2, 2))
    tokens.x.requires_grad_()
    keep, gone, slot = torch.tensor([[1], [0]]), torch.tensor([[0], [1]]), torch.zeros(2, 1, dtype=torch.int64)
    tokens.merge(keep, gone, slot).patches.sum().backward()
    assert tokens.x.grad[..., 0].tolist() == [[0.25, 0.75]] * 2


@torch.no_grad()
def test_large_sizes_are_counted_exactly_in_bfloat16() -> None:
    tokens = Tokens(torch.ones(1, 2, 16, dtype=torch.bfloat16), size=torch.tensor([[256.0, 1.0]]))
    few = tokens.merge(torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([[0]]))
    assert few.size is not None
    assert few.size.tolist() == [[257.0]]
    assert few.x.dtype == torch.bfloat16


# --- errors

R = r"^`tokenizer\.build\.r` must be an int >= 0, or a list of at most 2 of them, .*, got "
INFLECTION = r"^`tokenizer\.build\.inflection` must be "


@pytest.mark.parametrize(
    ("r", "inflection", "message"),
    [
        (-1, 0.0, R + r"-1\.$"),
        ([8, -1], 0.0, R + r"\[8, -1\]\.$"),
        ([1, 1, 1], 0.0, R + r"\[1, 1, 1\]\.$"),
        (8, 1.5, INFLECTION + r"between -1 and 1, got 1\.5\.$"),
        ([8], -1.0, INFLECTION + r"0 if tokenizer\.build\.r is a list, got -1\.0\.$"),
    ],
)
def test_invalid_schedules(r: object, inflection: float, message: str) -> None:
    with pytest.raises(FewtokensError, match=message):
        schedule(r, inflection, 2)


def test_padding_is_an_error() -> None:
    tokens = replace(patches(4, 1), mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(
        FewtokensError, match=r"^ToMe makes the same number of tokens of every sample and takes no padded"
    ):
        ToMe(CONTEXT, 1)(tokens, Block(16, 2, attn_layer=Attention))
