"""K-medoids: loops in float64 with ties, the objective, the weights, frames, padding, sizes, and errors."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewtokens.analysis.cost import tokens_per_block
from fewtokens.errors import FewtokensError
from fewtokens.layers.block import Block
from fewtokens.tokenizers.ats import ATS
from fewtokens.tokenizers.base import LayerContext, num_kept
from fewtokens.tokenizers.k_medoids import KMedoids, medoids
from fewtokens.tokenizers.top_k import TopK, class_attention
from fewtokens.tokens import Tokens

N, P, DIM = 15, 3, 16
CONTEXT = LayerContext(dim=DIM, heads=2, block=0, depth=1, prefix=P, class_token=True, grid=(3, 5))
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def nearest_by_hand(squared: list[list[float]], centers: list[int]) -> list[int]:
    slots = [min(range(len(centers)), key=lambda s: (row[centers[s]], s)) for row in squared]
    for slot, center in enumerate(centers):
        slots[center] = slot
    return slots


def by_hand(x: np.ndarray, weights: np.ndarray, clusters: int, iterations: int) -> tuple[list[int], list[int]]:
    """Return the medoids and the cluster of every patch of an image, by loops over the definition."""
    patches = range(len(x))
    squared = [[float(((a - b) ** 2).sum()) for b in x] for a in x]
    centers = sorted(sorted(patches, key=lambda i: (-weights[i], i))[:clusters])
    for _ in range(iterations):
        slots = nearest_by_hand(squared, centers)
        for slot in range(clusters):
            members = [i for i in patches if slots[i] == slot]
            costs = {i: sum(weights[j] * squared[i][j] for j in members) for i in members}
            centers[slot] = min(members, key=lambda i: (costs[i], i))
    return centers, nearest_by_hand(squared, centers)


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(
    kind=st.sampled_from(["normal", "grid", "same"]),
    count=st.integers(1, 12),
    width=st.sampled_from([1, 2, 4]),
    keep=st.sampled_from([0.01, 0.25, 0.5, 0.7, 0.99]),
    iterations=st.integers(0, 4),
    padded=st.booleans(),
    seed=st.integers(0, 9),
)
def test_clusters_against_loops(
    kind: str, count: int, width: int, keep: float, iterations: int, padded: bool, seed: int
) -> None:
    """Padding changes nothing, at any position and with any features. Exact ties are the same in float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, count, width, generator=generator, dtype=torch.float64)
    weights = torch.rand(3, count, generator=generator, dtype=torch.float64)
    if kind != "normal":
        x = torch.randint(-1, 2, (3, count, width), generator=generator).double() * (kind == "grid")
        weights = torch.randint(0, 4, (3, count), generator=generator).double() / 4
    valid = torch.rand(3, count, generator=generator) < (0.6 if padded else 2)
    valid[:, count // 2] = True
    for dtype in (torch.float64,) if kind == "normal" else (torch.float64, torch.float32):
        found = medoids(x.to(dtype), weights.to(dtype), keep, iterations, valid if padded else None)
        for i in range(3):
            real = valid[i].nonzero()[:, 0]
            count = num_kept(len(real), keep)
            centers, slots = by_hand(x[i, real].numpy(), weights[i, real].numpy(), count, iterations)
            mask = slice(None) if found.mask is None else found.mask[i]
            assert found.centers[i, mask].tolist() == real[centers].tolist()
            assert found.slot[i, real].tolist() == slots


def test_no_iteration_raises_the_weighted_error() -> None:
    x, weights = torch.randn(4, 40, 2), torch.rand(4, 40)
    squared = torch.cdist(x, x).square()
    errors = []
    for iterations in range(8):
        found = medoids(x, weights, 0.2, iterations)
        least = squared.gather(2, found.centers[:, None].expand(-1, 40, -1)).amin(dim=2)
        errors.append((weights * least).sum(dim=1))
    steps = torch.stack(errors).diff(dim=0)
    assert (steps < 1e-4).all()
    assert (steps[0] < 0).all()
    assert torch.equal(medoids(x, weights, 0.2, 30).centers, medoids(x, weights, 0.2, 31).centers)


# --- the weights


def attention_by_hand(block: Block, tokens: Tokens) -> torch.Tensor:
    """Return the attention matrix (B, heads, N, N), in float64."""
    qkv = block.attn.qkv(block.norm1(tokens.x)).double()
    query, key, _ = (part.unflatten(2, (2, DIM // 2)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    logits = query @ key.transpose(2, 3) / (DIM / 2) ** 0.5
    if tokens.mask is not None:
        logits = logits.masked_fill(~tokens.mask[:, None, None], float("-inf"))
    return logits.softmax(dim=3)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_weights_are_the_attention_that_patches_receive(padded: bool, block: Block, make_images) -> None:
    mask = torch.ones(4, P + N, dtype=torch.bool)
    mask[1, P + 4 :] = False
    tokens = make_images(mask=mask if padded else None)
    state = block.attend(tokens)[1]
    attention = attention_by_hand(block, tokens).mean(dim=1)
    by_class = KMedoids(CONTEXT).weights(tokens, state)
    by_all = KMedoids(CONTEXT, significance="all").weights(tokens, state)
    close(by_class.double(), attention[:, 0, P:])
    close(by_all.double(), (attention * mask[..., None] if padded else attention).sum(dim=1)[:, P:])
    without = KMedoids(replace(CONTEXT, class_token=False))
    assert torch.equal(without.weights(tokens, state), by_all)
    assert not padded or (by_all[1, 4:] == 0).all()


# --- the record


@torch.no_grad()
@pytest.mark.parametrize("significance", ["class", "all"])
def test_it_acts_between_attention_and_mlp_and_medoids_stay_as_attention_left_them(
    significance: str, block: Block, make_images
) -> None:
    tokens, method = make_images(), KMedoids(CONTEXT, 0.4, significance=significance)
    attended, state = block.attend(tokens)
    out = method(tokens, block)
    assert torch.equal(out.x, block.feed_forward(method.choose(attended, method.weights(attended, state))).x)
    assert out.origin is not None
    assert (out.origin.sum(dim=2) == 1).all()
    assert (out.origin.amax(dim=2) == 1).all()
    expected = medoids(attended.patches, method.weights(attended, state), 0.4, 3).centers
    assert torch.equal(out.origin.argmax(dim=2), expected)
    rows = torch.cat([torch.arange(P).expand(4, P), expected + P], dim=1)
    plain = block(tokens).x  # The MLP acts on each token alone, so the kept ones equal those of the plain block.
    close(out.x, plain.gather(1, rows[..., None].expand(-1, -1, DIM)))
    assert (out.prefix, out.grid, out.mask) == (P, None, None)
    assert list(method.parameters()) == []


@torch.no_grad()
def test_without_iterations_it_is_top_k(block: Block, make_images) -> None:
    tokens, method = make_images(), KMedoids(CONTEXT, 0.4, 0, sizes=False)
    assert torch.equal(method(tokens, block).x, TopK(CONTEXT, 0.4)(tokens, block).x)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [True, False])
def test_a_medoid_counts_for_its_cluster(sizes: bool, make_images) -> None:
    tokens, weights, size = make_images(), torch.rand(4, N), torch.randint(1, 5, (4, P + N)).float()
    size[:, :P] = 1
    method = KMedoids(CONTEXT, 0.3, sizes=sizes)
    found = medoids(tokens.patches, weights, 0.3, 3)
    member = torch.nn.functional.one_hot(found.slot, 5).float()
    few = method.choose(tokens, weights)
    assert sizes or few.size is None
    if few.size is not None:
        assert torch.equal(few.size[:, P:], member.sum(dim=1))
        assert (few.size[:, :P] == 1).all()
    sized = method.choose(replace(tokens, size=size), weights)
    assert sized.size is not None
    assert torch.equal(sized.size[:, P:], (member * size[:, P:, None]).sum(dim=1))
    assert torch.equal(sized.size[:, :P], size[:, :P])
    assert torch.equal(sized.x, few.x)


@torch.no_grad()
def test_frames_are_clustered_one_by_one_and_stay() -> None:
    tokens = Tokens(torch.randn(2, 2 + 3 * 8, 6), 2, 3, (2, 4), origin=torch.eye(24).expand(2, -1, -1))
    weights, method = torch.rand(2, 24), KMedoids(CONTEXT, 0.4)
    few = method.choose(tokens, weights)
    assert (few.frames, few.num_patches, few.grid) == (3, 12, None)
    for frame in range(3):
        own = slice(8 * frame, 8 * frame + 8)
        alone = method.choose(Tokens(tokens.patches[:, own], origin=torch.eye(8).expand(2, 8, 8)), weights[:, own])
        part = slice(4 * frame, 4 * frame + 4)
        assert torch.equal(few.patches[:, part], alone.x)
        assert torch.equal(few.size[:, 2:][:, part], alone.size)
        assert torch.equal(few.origin[:, part, own], alone.origin)


@torch.no_grad()
@pytest.mark.parametrize("significance", ["class", "all"])
def test_padding_takes_no_part_and_changes_nothing(significance: str, block: Block, make_images) -> None:
    size = torch.randint(1, 4, (4, P + N)).float()
    size[:, :P] = 1
    tokens = make_images(size=size)
    mask = torch.rand(4, P + N) < 0.6
    mask[:, : P + 1] = True
    mask[2, P + 1 :] = False
    method = KMedoids(CONTEXT, 0.5, significance=significance)
    out = method(replace(tokens, mask=mask, x=tokens.x.masked_fill(~mask[..., None], 1e3)), block)
    assert out.mask is not None
    assert out.size is not None
    assert torch.isfinite(out.x).all()
    for i in range(4):
        real = mask[i]
        alone = method(Tokens(tokens.x[i : i + 1, real], P, size=tokens.size[i : i + 1, real]), block)
        close(out.x[i][out.mask[i]], alone.x[0])
        close(out.size[i][out.mask[i]], alone.size[0])
        assert (out.origin[i][~out.mask[i, P:]] == 0).all()
    assert out.mask.sum(dim=1).tolist() == [P + num_kept(int(row.sum()) - P, 0.5) for row in mask]


@torch.no_grad()
@pytest.mark.parametrize("significance", ["class", "all"])
def test_behind_ats_an_image_is_the_same_alone_and_in_a_batch(significance: str, block: Block, make_images) -> None:
    ats, method = ATS(CONTEXT, budget=8), KMedoids(CONTEXT, 0.5, significance=significance)
    tokens = replace(make_images(), origin=None)
    tokens = tokens.update(tokens.x * torch.linspace(0.1, 3, 4)[:, None, None])
    together = method(ats(tokens, block), block)
    assert together.mask is not None
    assert not together.mask.all()
    for i in range(4):
        alone = method(ats(Tokens(tokens.x[i : i + 1], P), block), block)
        close(together.x[i][together.mask[i]], alone.x[0])


# --- in a model


@torch.no_grad()
@pytest.mark.parametrize("significance", ["class", "all"])
def test_keeping_all_is_the_plain_transformer_and_less_is_cheaper(
    significance: str, make_model, check_keep_rates
) -> None:
    build = partial(KMedoids, significance=significance)
    check_keep_rates(build)
    few, images = make_model(partial(build, keep_rate=0.3)), torch.randn(2, 3, 16, 16)
    assert tokens_per_block(few, images) == [P + 16, P + 5, P + 2]
    close(few(images)[1], few(images[1:])[0])


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("keep", [0.01, 0.5, 1.0])
def test_one_two_or_three_patches(count: int, keep: float, block: Block) -> None:
    out = KMedoids(CONTEXT, keep)(Tokens(torch.randn(2, P + count, DIM), P), block)
    assert out.num_patches == num_kept(count, keep)
    assert torch.isfinite(out.x).all()


def test_gradients_reach_the_medoids_and_equal_patches_give_no_nan(make_images) -> None:
    tokens, weights = make_images(), torch.rand(4, N)
    for x in (tokens.x, torch.ones_like(tokens.x)):
        x.requires_grad_()
        few = KMedoids(CONTEXT, 0.3).choose(tokens.update(x), weights)
        few.patches.sum().backward()
        assert few.origin is not None
        assert torch.equal(x.grad[:, P:, 0], few.origin.sum(dim=1))


def test_it_is_finite_under_autocast_and_in_bfloat16(check_autocast) -> None:
    net = check_autocast(KMedoids)
    assert torch.isfinite(net.bfloat16()(torch.randn(2, 3, 16, 16).bfloat16())).all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"iterations": -1}, r"^`tokenizer\.build\.iterations` must be an int >= 0, got -1\.$"),
        (
            {"significance": "class"},
            r"^`tokenizer\.build\.significance` must be 'all', null, or 'class' if .*, got 'class' with no class token",
        ),
        ({"keep_rate": 0.0}, r"^`tokenizer\.build\.keep_rate` must be above 0 and at most 1, got 0\.0\.$"),
    ],
)
def test_errors(more: dict[str, object], message: str) -> None:
    with pytest.raises(FewtokensError, match=message):
        KMedoids(replace(CONTEXT, class_token=False), **more)


@torch.no_grad()
def test_the_class_tokens_attention_is_that_of_top_k(block: Block, make_images) -> None:
    tokens = make_images()
    state = block.attend(tokens)[1]
    assert torch.equal(KMedoids(CONTEXT).weights(tokens, state), class_attention(state, P))
