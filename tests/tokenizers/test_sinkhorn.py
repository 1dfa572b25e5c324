"""Sinkhorn: the official plan, a second version in numpy and float64, sizes, padding, frames, and errors."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewtokens.analysis.cost import macs, tokens_per_block
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.base import LayerContext
from fewtokens.tokenizers.sinkhorn import Sinkhorn, transport
from fewtokens.tokenizers.token_fuser import TokenFuser
from fewtokens.tokens import Tokens

CONTEXT = LayerContext(dim=8, heads=2, block=0, depth=1, prefix=2, grid=(3, 5))
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
with np.load(Path(__file__).parents[1] / "golden" / "token_reduction.npz") as file:
    GOLDEN = {key: torch.from_numpy(file[key]) for key in file.files if key.startswith("o")}


def clip(frames: int = 1, **more: object) -> Tokens:
    count = 15 * frames
    return Tokens(torch.randn(2, 2 + count, 8), 2, frames, (3, 5), origin=torch.eye(count).expand(2, -1, -1), **more)


def by_hand(x: np.ndarray, centers: np.ndarray, mass: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """Return the weights (S, N) of an image's patches, by scaling rows and columns in turns and without logarithms."""
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (centers, x)]
    kernel = np.exp(unit[0] @ unit[1].T / epsilon)
    columns = np.ones(len(x))
    for _ in range(iterations):
        rows = np.array(
            [1 / sum(kernel[s, n] * columns[n] * mass[n] for n in range(len(x))) for s in range(len(kernel))]
        )
        columns = np.array([1 / sum(rows[s] * kernel[s, n] for s in range(len(kernel))) for n in range(len(x))])
    plan = kernel * columns * mass
    return plan / plan.sum(axis=1, keepdims=True)


@torch.no_grad()
@pytest.mark.parametrize("case", sorted({key.split(".")[0] for key in GOLDEN}))
def test_the_plan_is_the_official_one(case: str) -> None:
    """It is up to the sums of its rows. The tokens then agree too, for patches of length 1."""
    g = {key.split(".")[1]: value for key, value in GOLDEN.items() if key.startswith(f"{case}.")}
    tokenizer = Sinkhorn(CONTEXT, len(g["centres"]), int(g["iterations"]), float(g["epsilon"]))
    tokenizer.centers = torch.nn.Parameter(7 * g["centres"])  # only their directions matter
    rows = g["weights"].sum(dim=2, keepdim=True)
    close(tokenizer.maps(Tokens(g["x"])), g["weights"] / rows)
    unit = torch.nn.functional.normalize(g["x"], dim=2)
    close(tokenizer.pool(Tokens(unit)).x * rows, g["tokens"], atol=1e-4)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(
    frames=st.integers(1, 3),
    tokens=st.integers(1, 20),
    iterations=st.integers(0, 6),
    epsilon=st.sampled_from([0.05, 0.25, 1.0]),
    sized=st.booleans(),
    seed=st.integers(0, 9),
)
def test_tokens_against_numpy(
    frames: int, tokens: int, iterations: int, epsilon: float, sized: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    tokenizer = Sinkhorn(CONTEXT, tokens, iterations, epsilon).double()
    size = torch.randint(1, 9, (2, 2 + 15 * frames)).float()
    record = clip(frames, size=size if sized else None)
    record = replace(record, x=record.x.double(), origin=record.origin.double())
    with torch.no_grad():
        few, centers = tokenizer.pool(record), tokenizer.centers.numpy()
    masses = size[:, 2:].double().reshape(2 * frames, 15).numpy() if sized else np.ones((2 * frames, 15))
    weights = [
        by_hand(x, centers, mass, epsilon, iterations) for x, mass in zip(record.per_frame.numpy(), masses, strict=True)
    ]
    expected = np.stack(weights) @ record.per_frame.numpy()
    np.testing.assert_allclose(few.per_frame, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(few.origin[0, :tokens, :15], weights[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(few.x[:, :2], record.x[:, :2])
    assert (few.num_patches, few.frames, few.prefix, few.grid) == (tokens * frames, frames, 2, None)
    torch.testing.assert_close(few.origin.sum(dim=2), torch.ones(2, tokens * frames).double())


def test_all_patches_are_taken_equally() -> None:
    """With a softmax all centers may take the same patch. With the plan, all patches have the same total weight."""
    logits = torch.zeros(1, 3, 6)
    logits[:, :, 2] = 5
    assert transport(logits, None, 0)[0, :, 2].min() > 0.9
    close(transport(logits, None, 50), torch.full((1, 3, 6), 1 / 6))
    logits = torch.randn(2, 4, 12, dtype=torch.float64)
    plan = transport(logits, None, 200)
    close(plan.sum(dim=2), torch.ones(2, 4).double())
    close(plan.sum(dim=1), torch.full((2, 12), 4 / 12).double())
    mass = torch.arange(1.0, 13, dtype=torch.float64)
    plan = transport(logits, mass.log().expand(2, 1, 12), 200)
    close(plan.sum(dim=1), (4 * mass / mass.sum()).expand(2, 12))


@torch.no_grad()
def test_a_patch_of_size_three_counts_three_times_and_padding_does_not_count() -> None:
    tokenizer, x = Sinkhorn(CONTEXT, 4), torch.randn(1, 7, 8)
    mask = torch.tensor([[True, True, True, False, True, True, False]])
    size = torch.tensor([[1.0, 1, 3, 9, 1, 1, 9]])
    x[~mask] = 1e3
    few = tokenizer.pool(Tokens(x, 2, mask=mask, size=size, origin=torch.eye(5)[None]))
    copies = Tokens(x[:, [0, 1, 2, 2, 2, 4, 5]], 2)
    close(few.x, tokenizer.pool(copies).x)
    assert few.mask is None
    assert few.size.tolist() == [[1.0] * 6]
    assert (few.origin[..., [1, 4]] == 0).all()


@torch.no_grad()
def test_equal_patches_weigh_the_same_and_zeros_give_no_nan() -> None:
    for value in (1.0, 0.0):
        few = Sinkhorn(CONTEXT, 4).pool(clip().update(torch.full((2, 17, 8), value)))
        close(few.origin, torch.full((2, 4, 15), 1 / 15))
        close(few.patches, torch.full((2, 4, 8), value))


def test_gradients_under_autocast_and_cost(make_model) -> None:
    net, images = make_model(Sinkhorn).train(), torch.randn(2, 3, 16, 16)
    assert tokens_per_block(net, images) == [3 + 16, 3 + 8, 3 + 4], "half of what the previous stage left"
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(images).square().sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    assert net.encoder.tokenizers[1].centers.grad.abs().min() > 0
    assert torch.isfinite(net.bfloat16()(images.bfloat16())).all()
    costs = [macs(make_model(partial(Sinkhorn, num_tokens=count)), images[:1]) for count in (1, 4, 8)]
    assert costs == sorted(set(costs))


@torch.no_grad()
def test_the_plan_is_computed_in_float32_under_autocast() -> None:
    tokenizer, tokens = Sinkhorn(CONTEXT, 4), clip()
    expected = tokenizer.maps(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.maps(tokens), expected)


@torch.no_grad()
def test_token_fuser_wraps_it_and_every_stage_sees_the_full_grid(make_model) -> None:
    fused = make_model(partial(TokenFuser, inner=Sinkhorn))
    assert [tokenizer.inner.num_tokens for tokenizer in fused.encoder.tokenizers[1:]] == [8, 8]
    assert torch.isfinite(fused(torch.randn(2, 3, 16, 16))).all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_tokens": 0}, r"^`tokenizer\.build\.num_tokens` must be an int >= 1, or a float .* at most 1, got 0\.$"),
        ({"num_tokens": 1.5}, r"^`tokenizer\.build\.num_tokens` must be an int >= 1, or a float .*, got 1\.5\.$"),
        ({"iterations": -1}, r"^`tokenizer\.build\.iterations` must be an int >= 0, got -1\.$"),
        ({"epsilon": 0.0}, r"^`tokenizer\.build\.epsilon` must be above 0, got 0\.0\.$"),
    ],
)
def test_errors(more: dict[str, object], message: str) -> None:
    with pytest.raises(FewtokensError, match=message):
        Sinkhorn(CONTEXT, **more)
