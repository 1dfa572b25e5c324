"""ATS: the official numbers, a second version in numpy and float64, and properties for any image in any batch."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from conftest import run_without_type_checks
from fewtokens.analysis.cost import macs
from fewtokens.backbones.vit import ViT, vit
from fewtokens.errors import FewtokensError
from fewtokens.layers.attention import Attention, AttentionState
from fewtokens.layers.block import Block
from fewtokens.tokenizers.ats import ATS, inverse_transform, nearest, pack, pick_nearest, significance
from fewtokens.tokenizers.base import LayerContext
from fewtokens.tokens import Tokens

GOLDEN = Path(__file__).parents[1] / "golden"
CONTEXT = LayerContext(dim=16, heads=2, block=0, depth=2, prefix=1, class_token=True, grid=(4, 4))
RULES = [nearest, inverse_transform]
NAMES = ["nearest", "inverse_transform"]
HOOKED = hasattr(vit, "__wrapped__")  # pytest's jaxtyping hook, whose checks torch.compile cannot trace
close = partial(torch.testing.assert_close, rtol=1e-5, atol=2e-5)
few_examples = settings(max_examples=40, deadline=None, database=None, derandomize=True)


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def ids(order: Tensor, picked: Tensor) -> list[list[int]]:
    """Return the kept tokens without padding, where 0 is the class token, as in the official code."""
    index, mask = pack(order, picked, order.shape[1])
    return [[0, *(row[real] + 1).tolist()] for row, real in zip(index, mask, strict=True)]


def official_ids(g: dict[str, Tensor], case: str) -> list[list[int]]:
    return [row[row >= 0].tolist() for row in g[f"{case}.ids"]]


def case_scores(g: dict[str, Tensor], case: str) -> tuple[Tensor, Tensor]:
    """Return our scores of a golden case, and False where it has padding.

    The file has the attention, not queries and keys. Its logarithm as queries and unit vectors as keys give that
    attention. Padding the values with zeros to the same width does not change their norms.
    """
    attn, v = g[f"{case}.attn"], g[f"{case}.v"]
    n, dim = attn.shape[2], max(attn.shape[2], v.shape[3])
    query = nn.functional.pad(attn.clamp_min(1e-38).log(), (0, dim - n))
    key = torch.eye(n, dim).expand(*attn.shape[:3], dim)
    state = AttentionState(query, key, nn.functional.pad(v, (0, dim - v.shape[3])), None, 1.0)
    valid = g.get(f"{case}.policy_in", torch.ones(attn.shape[:3:2]))[:, 1:].bool()
    return significance(state)[:, 1:], valid


CASES = ["n17", "n17_flat", "n17_peaked", "n9_ref17", "n17_ref9", "n17_masked", "n4", "n4_ref17", "n3", "n9_ties"]
ODD = {"n3", "n17_masked", "n17_ref9"}


# --- the official numbers: one sampling step


@pytest.mark.parametrize("case", CASES)
def test_scores_and_order_are_the_official_ones(case: str) -> None:
    g = golden("ats_sampling")
    scores, valid = case_scores(g, case)
    order, _ = nearest(scores, valid, 4)
    expected = g[f"{case}.sorted_ids"].long() - 1
    real = valid.gather(1, order)
    assert torch.equal(order[real], expected[real])
    shares = (scores * valid / (scores * valid).sum(dim=1, keepdim=True)).gather(1, order)
    close(shares[real], g[f"{case}.sorted_scores"][real])


@pytest.mark.parametrize("case", [case for case in CASES if case not in ODD])
def test_kept_tokens_are_the_official_ones(case: str) -> None:
    g = golden("ats_sampling")
    scores, valid = case_scores(g, case)
    order, picked = nearest(scores, valid, int(g[f"{case}.n_ref"]) - 1)
    assert ids(order, picked) == official_ids(g, case)


@pytest.mark.parametrize("case", [case for case in CASES if case != "n3"])
def test_probes_pick_the_official_levels_from_the_official_levels(case: str) -> None:
    """This includes padding and few probes: the levels are those of the golden file, and only they differ."""
    g = golden("ats_sampling")
    probes = int(g[f"{case}.n_ref"]) - 1
    levels = g[f"{case}.cdf"]
    picks = pick_nearest(levels, probes).clamp_min(levels.shape[1] - probes)  # the official cut to the highest
    tokens = g[f"{case}.sorted_ids"].long().gather(1, picks)
    found = [[0, *row.unique_consecutive().tolist()] for row in tokens]
    assert found == official_ids(g, case)


def test_of_two_patches_the_higher_stays() -> None:
    """The official code keeps none. The levels are 0 and 1 and every probe is at 1, so the higher patch is correct."""
    g = golden("ats_sampling")
    scores, valid = case_scores(g, "n3")
    assert official_ids(g, "n3") == [[0], [0]]
    assert ids(*nearest(scores, valid, 2)) == [[0, 1 + int(row.argmax())] for row in scores]


def test_padding_keeps_what_the_sample_alone_keeps() -> None:
    """In the official code, the zeros of the padding become the lowest level, and the lowest real patch moves up."""
    g = golden("ats_sampling")
    scores, valid = case_scores(g, "n17_masked")
    found, official = ids(*nearest(scores, valid, 16)), official_ids(g, "n17_masked")
    assert found[0] == official[0], "sample 0 has no padding"
    alone = scores[1:, valid[1]]
    assert found[1] == ids(*nearest(alone, torch.ones_like(alone, dtype=torch.bool), 16))[0] != official[1]


def test_few_probes_are_spread_over_all_levels() -> None:
    """So are those of the official code, but it cuts their picks to the 8 highest patches (see above)."""
    g = golden("ats_sampling")
    scores, valid = case_scores(g, "n17_ref9")
    order, picked = nearest(scores, valid, 8)
    assert ids(order, picked) != official_ids(g, "n17_ref9")
    for row, real in zip(scores.double().numpy(), picked.gather(1, order.argsort(dim=1)), strict=True):
        assert set(real.nonzero()[:, 0].tolist()) == set(numpy_nearest(row, np.ones(16, dtype=bool), 8))


# --- the official numbers: two blocks in a row


def golden_blocks(g: dict[str, Tensor]) -> list[Block]:
    blocks = []
    for i in (0, 1):
        norm = partial(nn.LayerNorm, eps=1e-6)
        block = Block(16, 2, mlp_ratio=2, qkv_bias=True, attn_layer=Attention, norm_layer=norm)
        block.load_state_dict({name[3:]: value for name, value in g.items() if name.startswith(f"b{i}.")})
        blocks.append(block.eval())
    return blocks


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_two_official_blocks(static: bool) -> None:
    """Compare all of the first, and of the second the class tokens and all tokens of the sample without padding."""
    g = golden("ats_blocks")
    ats, blocks, mode = ATS(CONTEXT, static=static), golden_blocks(g), "keep" if static else "drop"
    first = ats(Tokens(g["x"], prefix=1), blocks[0])
    second = ats(first, blocks[1])
    for tokens, i in ((first, 0), (second, 1)):
        assert tokens.x.shape == g[f"{mode}.y{i}"].shape
        assert torch.equal(tokens.mask, g[f"{mode}.policy{i}"].bool())
    close(first.x[first.mask], g[f"{mode}.y0"][first.mask])
    close(second.x[:, 0], g[f"{mode}.y1"][:, 0])
    # With `keep`, the official code has padding in it as well. Only with `drop` is it as the sample alone.
    close(second.x[1, :9], g["drop.y1"][1])
    # One of the five patches of the padded samples differs: see test_padding_keeps_what_the_sample_alone_keeps.
    for sample in (0, 2):
        official = g[f"{mode}.y1"][sample, 1:6]
        same = torch.cdist(second.x[sample, 1:6], official).amin(dim=1) < 1e-4
        assert same.sum() == 4


# --- a second version, in numpy and float64


def numpy_nearest(scores: NDArray[Any], valid: NDArray[Any], probes: int) -> list[int]:
    real = [j for j in range(len(scores)) if valid[j]]
    order = sorted(real, key=lambda j: scores[j])  # Python's sort is stable
    if len(order) == 1:
        return order
    sums = np.cumsum([scores[j] for j in order])
    levels = (sums - sums[0]) / (sums[-1] - sums[0])
    first = min(level for level in levels if level > 0)
    at = [first + (1 - first) * i / (probes - 1) for i in range(probes)] if probes > 1 else [1.0]
    return [order[p] for p in sorted({int(np.argmin(np.abs(levels - y))) for y in at})]


def numpy_inverse_transform(scores: NDArray[Any], valid: NDArray[Any], probes: int) -> list[int]:
    picks = set()
    total = sum(scores[valid])
    for i in range(1, probes + 1):
        reached = 0.0
        for j in np.flatnonzero(valid):
            reached += scores[j] / total
            if reached >= (2 * i - 1) / (2 * probes) - 1e-12:
                picks.add(int(j))
                break
    return sorted(picks)


@few_examples
@given(
    patches=st.integers(1, 30),
    probes=st.integers(1, 40),
    peak=st.sampled_from([0.1, 1.0, 3.0]),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_both_rules_against_numpy(patches: int, probes: int, peak: float, padded: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = (peak * torch.randn(3, patches, generator=generator, dtype=torch.float64)).exp()
    valid = torch.rand(3, patches, generator=generator) < (0.6 if padded else 2.0)
    valid[:, 0] = True
    for rule, formula in ((nearest, numpy_nearest), (inverse_transform, numpy_inverse_transform)):
        for b, row in enumerate(ids(*rule(scores, valid, probes))):
            expected = formula(scores[b].numpy(), valid[b].numpy(), probes)
            assert [token - 1 for token in row[1:]] == expected


@few_examples
@given(heads=st.sampled_from([1, 2, 4]), n=st.integers(2, 12), biased=st.booleans(), seed=st.integers(0, 9))
def test_scores_against_numpy(heads: int, n: int, biased: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 2, heads, n, 8 // heads, generator=generator).double()
    bias = torch.rand(2, 1, 1, n, generator=generator).double() if biased else None
    found = significance(AttentionState(query, key, value, bias, 0.5)).numpy()
    for b in range(2):
        total = np.zeros(n)
        for h in range(heads):
            logits = 0.5 * key[b, h].numpy() @ query[b, h, 0].numpy() + (0 if bias is None else bias[b, 0, 0].numpy())
            total += np.exp(logits) / np.exp(logits).sum()
        norms = np.sqrt((value[b].numpy() ** 2).sum(axis=(0, 2)))
        np.testing.assert_allclose(found[b], total * norms, rtol=1e-4, atol=1e-6)


# --- guards


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scores", [[0.0], [3.0], [1e-40], [float("nan")], [float("inf")]], ids=str)
@pytest.mark.parametrize("probes", [1, 2, 16])
def test_one_patch_stays(rule: Any, scores: list[float], dtype: torch.dtype, probes: int) -> None:
    for pads in (0, 3):
        row = torch.tensor([[7.0] * pads + scores], dtype=dtype)
        valid = torch.arange(1 + pads)[None] >= pads
        assert ids(*rule(row, valid, probes)) == [[0, pads + 1]]


@pytest.mark.parametrize("probes", [1, 2, 3, 16])
@pytest.mark.parametrize("scores", [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1e-30, 1e30], [float("nan"), 1.0]], ids=str)
def test_of_two_patches_one_at_least_stays(scores: list[float], probes: int) -> None:
    row, valid = torch.tensor([scores]), torch.ones(1, 2, dtype=torch.bool)
    assert ids(*nearest(row, valid, probes)) == [[0, 2]]
    assert len(ids(*inverse_transform(row, valid, probes))[0]) >= 2


@pytest.mark.parametrize("rule", RULES)
def test_zero_scores_count_as_equal_and_ties_go_by_position(rule: Any) -> None:
    valid = torch.ones(2, 9, dtype=torch.bool)
    equal = torch.stack([torch.zeros(9), torch.full((9,), 0.25)])
    zero, tied = ids(*rule(equal, valid, 9))
    assert zero == tied == [0, *range(2 if rule is nearest else 1, 10)]


def test_a_probe_between_two_equally_near_levels_picks_the_lower() -> None:
    levels = torch.tensor([[0.0, 0.5, 1.0], [-0.5, 0.0, 1.0]])  # probes at 1/2, 3/4, 1, and all at 1
    assert pick_nearest(levels, 3).tolist() == [[1, 1, 2], [2, 2, 2]]


@pytest.mark.parametrize("rule", RULES)
def test_scores_of_zero_beside_others_are_never_picked(rule: Any) -> None:
    scores = torch.tensor([[0.0, 0.0, 2.0, 0.0, 1.0, 0.0]])
    kept = ids(*rule(scores, torch.ones_like(scores, dtype=torch.bool), 50))[0]
    assert sorted(kept) == [0, 3, 5]


@few_examples
@given(patches=st.integers(1, 20), probes=st.integers(1, 25), seed=st.integers(0, 99))
def test_kept_are_real_at_least_one_and_at_most_the_probes(patches: int, probes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(4, patches, generator=generator).round(decimals=1)
    valid = torch.rand(4, patches, generator=generator) < 0.5
    valid[:, -1] = True
    for rule in RULES:
        order, picked = rule(scores, valid, probes)
        assert valid.gather(1, order)[picked].all()
        assert ((picked.sum(dim=1) >= 1) & (picked.sum(dim=1) <= probes)).all()
        assert torch.equal(order.sort(dim=1).values, torch.arange(patches).expand(4, -1))


@pytest.mark.parametrize(("rule", "steps"), [(nearest, [2, 3, 5, 9, 17, 33]), (inverse_transform, [1, 3, 9, 27])])
def test_more_probes_never_drop_what_fewer_keep(rule: Any, steps: list[int]) -> None:
    """The positions of the few probes are among those of the many."""
    scores = torch.randn(8, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    kept = [ids(*rule(scores, torch.ones_like(scores, dtype=torch.bool), probes)) for probes in steps]
    for few, many in pairwise(kept):
        assert all(set(a) <= set(b) for a, b in zip(few, many, strict=True))


# --- in a model


def model_with(pool: str = "token", at: Any = "1:", options: dict[str, Any] | None = None, **arguments: Any) -> ViT:
    torch.manual_seed(0)
    model = vit(
        image_size=24,
        patch_size=4,
        num_classes=5,
        dim=16,
        depth=4,
        heads=2,
        pool=pool,
        tokenizer={"at": at, "build": partial(ATS, **arguments)},
        options={"class_token": True, **(options or {})},
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def images(count: int, seed: int = 0) -> Tensor:
    """Return images that differ in contrast, so that they keep different numbers of patches."""
    contrast = torch.linspace(0.1, 4, count)[:, None, None, None]
    return contrast * torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "avg", "max"])
@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize("budget", [None, 10, 0.5])
def test_an_image_has_the_same_logits_alone_and_in_any_batch(pool: str, rule: str, budget: Any) -> None:
    model, batch = model_with(pool, rule=rule, budget=budget), images(6)
    records = model.trace(batch)
    kept = records[-1].mask.sum(dim=1) if records[-1].mask is not None else torch.tensor([records[-1].x.shape[1]])
    if budget is None:
        assert kept.min() < kept.max(), "otherwise nothing is tested"
    together = model(batch)
    alone = torch.cat([model(image[None]) for image in batch])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(batch.flip(0))[:3], together.flip(0)[:3], rtol=0, atol=1e-5)
    still = model_with(pool, rule=rule, budget=budget, static=True)
    torch.testing.assert_close(still(batch), together, rtol=0, atol=1e-5)


@torch.no_grad()
def test_budget_all_is_the_plain_transformer() -> None:
    model, batch = model_with(budget="all"), images(2)
    found = model(batch)
    with model.encoder.without_reduction():
        assert torch.equal(found, model(batch))
    with model_with().encoder.without_reduction():
        assert not torch.equal(found, model_with()(batch))


@torch.no_grad()
@pytest.mark.parametrize("rule", NAMES)
def test_stages_keep_fewer_and_fewer_within_the_budget(rule: str) -> None:
    counts = {}
    for budget in (None, 0.5, 6, 1):
        trace = model_with(rule=rule, budget=budget).trace(images(6))
        counts[budget] = [tokens.num_patches for tokens in trace]
        assert counts[budget][0] == 36
        assert all(later <= earlier for earlier, later in pairwise(counts[budget]))
    assert counts[0.5][1] <= 18
    assert counts[6][1] <= 6
    assert counts[1][1:] == [1, 1, 1]
    static = model_with(rule=rule, budget=6, static=True).trace(images(6))
    assert [tokens.num_patches for tokens in static] == [36, 6, 6, 6]
    stages = model_with(rule=rule, budget=[6, 0.1, 2], static=True).trace(images(6))
    assert [tokens.num_patches for tokens in stages] == [36, 6, 4, 2]


@torch.no_grad()
def test_cost_rises_with_the_probes() -> None:
    image = images(2)[1:]
    costs = [macs(model_with(budget=budget), image) for budget in (1, 3, 9, 33, "all")]
    assert costs == sorted(set(costs))


@torch.no_grad()
def test_the_saved_multiply_adds_are_exact() -> None:
    """It saves queries, attention, projection and MLP of the dropped patches, and adds the class token's query and its
    row of attention for the scores. No N x N matrix is built."""
    model, image, n, c, heads = model_with(at=3, budget=9), images(2)[1:], 37, 16, 2
    dropped = n - model.trace(image)[-1].x.shape[1]
    with model.encoder.without_reduction():
        dense = macs(model, image)
    assert dropped > 0
    assert dense - macs(model, image) == dropped * (c * c + 2 * n * c + c * c + 8 * c * c) - heads * n * c - c * c


@torch.no_grad()
def test_only_survivors_attend() -> None:
    """The result equals the rows of the plain block, from fewer queries."""
    model = model_with(at=1, budget=6)
    block, seen = model.encoder.blocks[1], []
    block.attn.proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    tokens = model.encoder.blocks[0](model.embed(images(3)))
    out = model.encoder.tokenizers[1](tokens, block)
    assert seen == [out.x.shape[0] * out.x.shape[1]], "the images lie one behind the other"
    assert out.x.shape[1] <= 7
    attended, state = block.attend(tokens)
    index, mask = model.encoder.tokenizers[1].choose(tokens, state)
    torch.testing.assert_close(out.x, block.feed_forward(attended.select(index, mask)).x, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_gated_attention_uses_the_rows_of_the_survivors() -> None:
    torch.manual_seed(0)
    block = Block(16, 2, attn_layer=Attention).eval()
    block.attn = Attention(16, 2, qkv_bias=True, gated=True).eval()
    tokens, ats = Tokens(torch.randn(2, 17, 16), prefix=1), ATS(CONTEXT, budget=5)
    attended, state = block.attend(tokens)
    index, mask = ats.choose(tokens, state)
    expected = block.feed_forward(attended.select(index, mask)).x
    torch.testing.assert_close(ats(tokens, block).x, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_class_and_register_tokens_always_stay() -> None:
    model = model_with(budget=1, options={"reg_tokens": 3})
    trace = model.trace(images(3))
    assert [tokens.x.shape[1] for tokens in trace] == [40, 5, 5, 5]
    assert {tokens.prefix for tokens in trace} == {4}
    assert torch.isfinite(model(images(3))).all()


@torch.no_grad()
def test_the_origin_shows_which_patches_are_left() -> None:
    last = model_with().trace(images(6))[-1]
    real = last.mask[:, 1:]
    assert torch.equal(last.origin.sum(dim=2), real.float())
    assert last.origin.sum(dim=1).max() == 1, "no patch twice"


@torch.no_grad()
def test_sizes_of_merged_tokens_count_in_the_scores_and_are_kept() -> None:
    block = Block(16, 2, qkv_bias=True, attn_layer=Attention).eval()
    x, size = torch.randn(1, 17, 16, generator=torch.Generator().manual_seed(0)), torch.ones(1, 17)
    size[0, 5] = 1e4
    out = ATS(CONTEXT, budget=3)(Tokens(x, prefix=1, size=size), block)
    assert 1e4 in out.size[0].tolist()


@pytest.mark.parametrize("rule", NAMES)
def test_gradients_are_finite_and_reach_every_parameter(rule: str) -> None:
    model = model_with(rule=rule).train()
    batch = images(4).requires_grad_()
    model(batch).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert torch.isfinite(batch.grad).all()


def test_dropped_patches_get_gradients_as_values_and_the_selection_none() -> None:
    block = Block(16, 2, qkv_bias=True, attn_layer=Attention)
    x = torch.randn(1, 17, 16, requires_grad=True)
    tokens = Tokens(x, prefix=1)
    ats = ATS(CONTEXT, budget=3)
    ats(tokens, block).x.square().sum().backward()
    assert (x.grad.abs().sum(dim=2) > 0).all()
    order = ats.choose(tokens, block.attend(tokens)[1])[0]
    assert not order.requires_grad


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, batch = model_with(), images(4)
    with torch.autocast("cpu", dtype):
        logits, trace = model(batch), model.trace(batch)
    assert torch.isfinite(logits).all()
    assert {tokens.x.dtype for tokens in trace} == {torch.float32}
    block = model.encoder.blocks[1]
    with torch.autocast("cpu", dtype):
        state = block.attend(model.embed(batch))[1]
        scores = significance(state)
        assert state.query.dtype == dtype
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, significance(state), rtol=0, atol=0)  # the same without autocast
    assert torch.isfinite(model.to(dtype)(batch.to(dtype))).all()


@torch.no_grad()
def test_many_levels_are_summed_in_float32() -> None:
    """In bfloat16 the sum of 3000 equal scores would stop growing at 256."""
    scores = torch.full((1, 3000), 1.0)
    _, picked = nearest(scores, torch.ones_like(scores, dtype=torch.bool), 3000)
    assert picked.sum() >= 2990


@torch.no_grad()
@pytest.mark.parametrize("rule", NAMES)
def test_exported_equals_eager(rule: str) -> None:
    model, batch = model_with(rule=rule), images(3)
    exported = torch.export.export(model, (batch,)).module()
    torch.testing.assert_close(exported(batch), model(batch), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_static_does_not_depend_on_values() -> None:
    with torch.device("meta"):
        model = model_with(static=True)
        assert model(torch.empty(2, 3, 24, 24)).shape == (2, 5)


@pytest.mark.skipif(HOOKED, reason="runs in a process of its own, see the next test")
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rule", NAMES)
def test_compiled_equals_eager(rule: str, static: bool) -> None:
    torch.compiler.reset()
    model, batch = model_with(rule=rule, static=static), images(3)
    expected = model(batch)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.slow  # since test_methods compiles every method in every run
@pytest.mark.skipif(not HOOKED, reason="nothing to do: the test above ran")
def test_compiled_equals_eager_in_a_process_without_type_checks() -> None:
    assert "4 passed" in run_without_type_checks(__file__, "-k", "test_compiled_equals_eager[")


# --- errors


@pytest.mark.parametrize(
    ("context", "arguments", "message"),
    [
        (
            replace(CONTEXT, class_token=False),
            {},
            r"^ATS scores patches by the attention of the class token, .* Choose a backbone .*pool=token",
        ),
        (
            CONTEXT,
            {"rule": "gumbel"},
            r"^`tokenizer\.build\.rule` must be 'nearest' or 'inverse_transform', got 'gumbel'\.$",
        ),
        *[
            (
                CONTEXT,
                {"budget": budget},
                rf"^`tokenizer\.build\.budget` must be an int >= 1, a float .*, got {budget!r}\.$",
            )
            for budget in (0, -1, 0.0, 1.5, True, "most", float("nan"))
        ],
    ],
)
def test_errors(
    context: LayerContext, arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # It would check the types first.
    with pytest.raises(FewtokensError, match=message):
        ATS(context, **arguments)


def test_probes_by_budget() -> None:
    clip = replace(CONTEXT, frames=2, prefix=5)
    found = [ATS(clip, budget=budget).probes for budget in (None, 1.0, 0.5, 0.001, 1, 7, 100, "all")]
    assert found == [32, 32, 16, 1, 1, 7, 100, None]
