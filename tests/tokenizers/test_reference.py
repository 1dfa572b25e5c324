"""TokenLearner and TokenFuser against formulas in numpy and float64, on shapes that the golden files do not have.

The formulas are those of the papers and of scenic's and Keras's code, written a second time and without torch: windows
are summed by loops, and every token and frame on its own.
"""

from math import erf, pi, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import LayerContext
from fewtokens.tokenizers.token_fuser import Fuse, TokenFuser
from fewtokens.tokenizers.token_learner import MapPooler, TokenLearner, TokenLearnerV11, TokenLearnerV11Grouped
from fewtokens.tokens import Tokens

Array = NDArray[np.float64]
Params = dict[str, Array]
few_examples = settings(max_examples=15, deadline=None, database=None, derandomize=True)
shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "prefix": st.integers(0, 3),
        "frames": st.integers(1, 3),
        "height": st.integers(1, 5),
        "width": st.integers(1, 6),
        "dim": st.sampled_from([4, 8, 12]),
        "num_tokens": st.integers(1, 5),
        "seed": st.integers(0, 9),
    }
)


def gelu(x: Array, kind: str) -> Array:
    if kind == "tanh":
        return 0.5 * x * (1 + np.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(erf)(x / sqrt(2)))


def sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(x / 2))  # never overflows


def softmax_over_positions(logits: Array) -> Array:
    """Logits (N, S): each column sums to one."""
    e = np.exp(logits - logits.max(axis=0))
    return e / e.sum(axis=0)


def layer_norm(x: Array, p: Params, name: str) -> Array:
    centered = x - x.mean(axis=-1, keepdims=True)
    return (
        centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + 1e-6) * p[f"{name}.weight"] + p[f"{name}.bias"]
    )


def conv3x3(x: Array, weight: Array) -> Array:
    """Convolve x (H, W, C), padded with zeros, with the weight (out, C, 3, 3)."""
    height, width, _ = x.shape
    framed = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    out = np.zeros((height, width, weight.shape[0]))
    for i in range(height):
        for j in range(width):
            window = framed[i : i + 3, j : j + 3]  # (3, 3, C)
            out[i, j] = np.einsum("hwc,ochw->o", window, weight)
    return out


def grouped(x: Array, weight: Array, groups: int) -> Array:
    """Apply a 1x1 convolution in groups with the weight (C, C / groups, 1) to x (N, C)."""
    parts = np.split(x, groups, axis=1)
    kernels = np.split(weight[..., 0], groups, axis=0)
    return np.concatenate([part @ kernel.T for part, kernel in zip(parts, kernels, strict=True)], axis=1)


def mask_mlp(x: Array, p: Params, prefix: str, kind: str) -> Array:
    x = gelu(layer_norm(x, p, f"{prefix}norm") @ p[f"{prefix}mlp.fc1.weight"].T + p[f"{prefix}mlp.fc1.bias"], kind)
    return x @ p[f"{prefix}mlp.fc2.weight"].T + p[f"{prefix}mlp.fc2.bias"]


def token_learner_10(x: Array, p: Params, pooling: str, kind: str) -> Array:
    """Map x (H, W, C) to tokens (S, C)."""
    maps = layer_norm(x, p, "norm")
    for i in range(3):
        maps = gelu(conv3x3(maps, p[f"convs.{i}.weight"]), kind)
    maps = sigmoid(conv3x3(maps, p["convs.3.weight"]))
    tokens = np.stack([(maps[..., s, None] * x).sum(axis=(0, 1)) for s in range(maps.shape[2])])
    return tokens / (x.shape[0] * x.shape[1]) if pooling == "mean" else tokens


def token_learner_11(x: Array, p: Params, kind: str) -> Array:
    flat = x.reshape(-1, x.shape[2])
    return softmax_over_positions(mask_mlp(flat, p, "", kind)).T @ flat


def token_learner_grouped(x: Array, p: Params, groups: int) -> Array:
    flat = x.reshape(-1, x.shape[2])
    logits = grouped(layer_norm(flat, p, "norm"), p["group.weight"], groups) @ p["project.weight"][..., 0].T
    return softmax_over_positions(logits).T @ grouped(flat, p["value.weight"], groups)


def token_fuser(tokens: Array, original: Array, p: Params, normalize: bool, kind: str) -> Array:
    """Map tokens (S, C) to the positions of the original (N, C)."""
    values = layer_norm(tokens, p, "norm1") if normalize else tokens
    mixed = np.stack(
        [(p["mix.weight"][s, :, None] * values).sum(axis=0) + p["mix.bias"][s] for s in range(len(tokens))]
    )
    mixed = layer_norm(mixed, p, "norm2") if normalize else mixed
    out = sigmoid(mask_mlp(original, p, "", kind)) @ mixed
    return out * p.get("gain", 1.0)


def random_tokens(shape: dict[str, int]) -> Tokens:
    grid = (shape["height"], shape["width"])
    n = shape["prefix"] + shape["frames"] * grid[0] * grid[1]
    generator = torch.Generator().manual_seed(shape["seed"])
    x = torch.randn(shape["batch"], n, shape["dim"], generator=generator, dtype=torch.float64)
    return Tokens(x, prefix=shape["prefix"], frames=shape["frames"], grid=grid)


def context(shape: dict[str, int]) -> LayerContext:
    return LayerContext(dim=shape["dim"], heads=2, block=0, depth=1)


@torch.no_grad()
def randomized(module: nn.Module) -> tuple[nn.Module, Params]:
    """Return the module in float64 with random parameters, including those initialized to zero or one."""
    module = module.double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module, {name: value.numpy() for name, value in module.state_dict().items()}


@torch.no_grad()
def compare(tokenizer: MapPooler, tokens: Tokens, formula: object, *args: object) -> None:
    """Check every frame of every sample against the formula, and that the prefix is unchanged."""
    few = tokenizer.pool(tokens)
    images = tokens.per_frame.unflatten(1, tokens.grid).numpy()
    expected = np.stack([formula(image, *args) for image in images])
    np.testing.assert_allclose(few.per_frame.numpy(), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(few.x[:, : few.prefix], tokens.x[:, : tokens.prefix])
    assert (few.prefix, few.frames, few.grid) == (tokens.prefix, tokens.frames, None)


@few_examples
@given(shape=shapes, pooling=st.sampled_from(["sum", "mean"]), kind=st.sampled_from(["tanh", "none"]))
def test_token_learner_10(shape: dict[str, int], pooling: str, kind: str) -> None:
    tokenizer, p = randomized(TokenLearner(context(shape), shape["num_tokens"], pooling, kind))
    compare(tokenizer, random_tokens(shape), token_learner_10, p, pooling, kind)


@few_examples
@given(shape=shapes, hidden=st.integers(1, 9), kind=st.sampled_from(["tanh", "none"]))
def test_token_learner_11(shape: dict[str, int], hidden: int, kind: str) -> None:
    tokenizer, p = randomized(TokenLearnerV11(context(shape), shape["num_tokens"], hidden, gelu=kind))
    compare(tokenizer, random_tokens(shape), token_learner_11, p, kind)


@few_examples
@given(shape=shapes, groups=st.sampled_from([1, 2, 4]))
def test_token_learner_11_grouped(shape: dict[str, int], groups: int) -> None:
    tokenizer, p = randomized(TokenLearnerV11Grouped(context(shape), shape["num_tokens"], groups))
    compare(tokenizer, random_tokens(shape), token_learner_grouped, p, groups)


@few_examples
@given(
    shape=shapes,
    normalize=st.booleans(),
    kind=st.sampled_from(["tanh", "none"]),
    init=st.sampled_from(["gentle", "official"]),
)
def test_token_fuser(shape: dict[str, int], normalize: bool, kind: str, init: str) -> None:
    fuse, p = randomized(Fuse(shape["dim"], shape["num_tokens"], 5, normalize, 0.0, kind, init))
    original = random_tokens(shape).x
    tokens = torch.randn(original.shape[0], shape["num_tokens"], shape["dim"], dtype=torch.float64)
    out = fuse(tokens, original).detach().numpy()
    for b in range(original.shape[0]):
        expected = token_fuser(tokens[b].numpy(), original[b].numpy(), p, normalize, kind)
        np.testing.assert_allclose(out[b], expected, rtol=1e-9, atol=1e-9)


class Shift(Block):
    """A block that acts on each token alone in a simple way, so that tests can recognize its output."""

    def __init__(self) -> None:
        super().__init__(4, 1)

    def forward(self, tokens: Tokens) -> Tokens:
        return tokens.update(2 * tokens.x + 1)


@few_examples
@given(shape=shapes)
def test_token_fuser_pools_runs_the_block_fuses_per_frame_and_adds_the_input(shape: dict[str, int]) -> None:
    tokenizer, p = randomized(TokenFuser(context(shape), lambda at: TokenLearnerV11(at, shape["num_tokens"], 5)))
    inner = {name.removeprefix("inner."): value for name, value in p.items() if name.startswith("inner.")}
    outer = {name.removeprefix("fuse."): value for name, value in p.items() if name.startswith("fuse.")}
    tokens = random_tokens(shape)
    with torch.no_grad():
        out = tokenizer(tokens, Shift())
    assert (out.prefix, out.frames, out.grid) == (tokens.prefix, tokens.frames, tokens.grid)
    assert torch.equal(out.x[:, : out.prefix], 2 * tokens.x[:, : tokens.prefix] + 1)
    images = tokens.per_frame.unflatten(1, tokens.grid).numpy()
    for image, found in zip(images, out.per_frame.numpy(), strict=True):
        flat = image.reshape(-1, image.shape[2])
        few = 2 * token_learner_11(image, inner, "tanh") + 1
        expected = token_fuser(few, flat, outer, True, "tanh") + flat
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("kind", [TokenLearner, TokenLearnerV11, TokenLearnerV11Grouped])
def test_frames_share_weights_and_do_not_mix(kind: type[MapPooler]) -> None:
    """A clip of three frames gives the same as its frames one by one."""
    shape = {"batch": 2, "prefix": 1, "frames": 3, "height": 3, "width": 4, "dim": 8, "seed": 0}
    tokenizer, _ = randomized(kind(context(shape), 2))
    tokens = random_tokens(shape)
    few = tokenizer.pool(tokens)
    alone = [
        tokenizer.pool(Tokens(tokens.patches[:, 12 * t : 12 * t + 12], grid=tokens.grid)).x
        for t in range(tokens.frames)
    ]
    torch.testing.assert_close(few.patches, torch.cat(alone, dim=1), rtol=1e-12, atol=1e-12)
