"""DPC-KNN: the official numbers, loops in float64 with ties, frames, padding, sizes, and errors."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewtokens.analysis.cost import tokens_per_block
from fewtokens.errors import FewtokensError
from fewtokens.layers.block import Block
from fewtokens.tokenizers.ats import ATS
from fewtokens.tokenizers.base import LayerContext, num_kept
from fewtokens.tokenizers.clustering import squared_distances
from fewtokens.tokenizers.dpc_knn import DPCKNN, density_peaks
from fewtokens.tokens import Tokens

N, P, DIM = 15, 3, 16
CONTEXT = LayerContext(dim=DIM, heads=2, block=0, depth=1, prefix=P, class_token=True, grid=(3, 5))
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
with np.load(Path(__file__).parents[1] / "golden" / "token_reduction.npz") as file:
    GOLDEN = {key: torch.from_numpy(file[key]) for key in file.files if key.startswith("d")}


def points(kind: str, batch: int, count: int, width: int, seed: int) -> Tensor:
    """Return features in float64. With "grid" and "same", many distances are exactly equal."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "grid":
        return torch.randint(-1, 2, (batch, count, width), generator=generator).double()
    x = torch.randn(batch, 1 if kind == "same" else count, width, generator=generator, dtype=torch.float64)
    return x.expand(batch, count, width)


def by_hand(x: np.ndarray, clusters: int, neighbors: int) -> tuple[list[int], list[int]]:
    """Return the centers, ascending, and the cluster of every patch of an image, by loops over the definition."""
    count, width = x.shape
    squared = [[float(((a - b) ** 2).sum()) / width for b in x] for a in x]
    rho = []
    for row in squared:
        near = sorted(row)[:neighbors]
        rho.append(-sum(near) / len(near))
    delta = []
    for i in range(count):
        denser = [j for j in range(count) if rho[j] > rho[i] or (rho[j] == rho[i] and j < i)]
        delta.append(min(squared[i][j] for j in denser) if denser else max(squared[i]))
    scores = [np.exp(r) * np.sqrt(d) for r, d in zip(rho, delta, strict=True)]
    centers = sorted(sorted(range(count), key=lambda i: (-scores[i], i))[:clusters])
    slots = []
    for i in range(count):
        nearest = min(range(clusters), key=lambda s: (squared[i][centers[s]], s))
        slots.append(centers.index(i) if i in centers else nearest)
    return centers, slots


# --- the official numbers


@torch.no_grad()
@pytest.mark.parametrize("case", sorted({key.split(".")[0] for key in GOLDEN}))
def test_centers_clusters_and_means_are_the_official_ones(case: str) -> None:
    g = {key.split(".")[1]: value for key, value in GOLDEN.items() if key.startswith(f"{case}.")}
    count, clusters = g["x"].shape[1], g["centres"].shape[1]
    keep, order = clusters / count, g["centres"].argsort(dim=1)
    found = density_peaks(g["x"], keep, int(g["neighbours"]))
    assert torch.equal(found.centers, g["centres"].gather(1, order))
    assert torch.equal(found.centers.gather(1, found.slot), g["centres"].gather(1, g["slot"]))
    few = DPCKNN(CONTEXT, keep, int(g["neighbours"]), sizes=False).merge(Tokens(g["x"]))
    assert few.size is None
    close(few.x, g["merged"].gather(1, order[..., None].expand_as(g["merged"])))


# --- loops in float64


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(
    kind=st.sampled_from(["normal", "grid", "same"]),
    count=st.integers(1, 12),
    width=st.sampled_from([1, 2, 4]),
    keep=st.sampled_from([0.01, 0.25, 0.5, 0.7, 0.99]),
    neighbors=st.integers(1, 15),
    padded=st.booleans(),
    seed=st.integers(0, 9),
)
def test_clusters_against_loops(
    kind: str, count: int, width: int, keep: float, neighbors: int, padded: bool, seed: int
) -> None:
    """Padding changes nothing, at any position and with any features. Exact ties are the same in float32."""
    x = points(kind, 3, count, width, seed)
    valid = torch.rand(3, count, generator=torch.Generator().manual_seed(seed)) < (0.6 if padded else 2)
    valid[:, count // 2] = True
    for dtype in (torch.float64,) if kind == "normal" else (torch.float64, torch.float32):
        found = density_peaks(x.to(dtype), keep, neighbors, valid if padded else None)
        for i in range(3):
            real = valid[i].nonzero()[:, 0]
            centers, slots = by_hand(x[i, real].numpy(), num_kept(len(real), keep), neighbors)
            mask = slice(None) if found.mask is None else found.mask[i]
            assert found.centers[i, mask].tolist() == real[centers].tolist()
            assert found.slot[i, real].tolist() == slots


def test_densities_do_not_underflow() -> None:
    """exp(-mean of d^2) is 0 for all patches here, but the logarithms differ."""
    x = points("normal", 2, 20, 4, 0)
    small, large = density_peaks(1e-3 * x, 0.3, 5), density_peaks((300 * x).float(), 0.3, 5)
    for clusters, factor in ((small, 1e-3), (large, 300)):
        for i in range(2):
            squared = ((x[i][:, None] - x[i]) ** 2).mean(dim=2).mul(factor**2).numpy()
            rho = -np.sort(squared, axis=1)[:, :5].mean(axis=1)
            denser = rho[None] > rho[:, None]
            delta = np.where(denser.any(axis=1), np.where(denser, squared, np.inf).min(axis=1), squared.max(axis=1))
            expected = np.sort(np.argsort(-(rho + 0.5 * np.log(delta)), kind="stable")[:6])
            assert clusters.centers[i].tolist() == expected.tolist()


def test_distances_are_exact_between_equal_patches_and_never_negative() -> None:
    x = torch.randn(2, 7, 64).mul(30).add(100)
    x = x[:, torch.randint(0, 7, (40,))]
    found = squared_distances(x)
    same = (x[:, :, None] == x[:, None]).all(dim=3)
    assert (found[same] == 0).all()
    assert (found >= 0).all()
    torch.testing.assert_close(found.sqrt(), torch.cdist(x.double(), x.double()).float(), rtol=1e-3, atol=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(squared_distances(x), found)
    assert squared_distances(x.bfloat16()).dtype == torch.float32


# --- the record


@torch.no_grad()
@pytest.mark.parametrize("sizes", [True, False])
def test_every_cluster_becomes_its_mean_and_two_stages_keep_count(sizes: bool, make_images) -> None:
    tokens = few = make_images()
    for keep in (0.6, 0.4):
        few = DPCKNN(CONTEXT, keep, sizes=sizes).merge(few)
    assert (few.num_patches, few.prefix, few.grid, few.mask, few.frames) == (4, P, None, None, 1)
    assert torch.equal(few.x[:, :P], tokens.x[:, :P])
    assert few.origin is not None
    parts = few.origin > 0
    assert (parts.sum(dim=1) == 1).all(), "every patch is in exactly one token"
    close(few.origin.sum(dim=2), torch.ones(4, 4))
    close(few.origin @ tokens.patches, few.patches)
    if sizes:
        assert few.size is not None
        assert torch.equal(few.size[:, P:], parts.sum(dim=2).float())
        assert (few.size[:, :P] == 1).all()
        close(few.origin, parts / few.size[:, P:, None])
        close(few.mean(), tokens.mean())
    else:
        assert few.size is None


@torch.no_grad()
@pytest.mark.parametrize("sizes", [True, False])
def test_sizes_that_are_there_weigh_and_add_up(sizes: bool, make_images) -> None:
    size = torch.randint(1, 5, (4, P + N)).float()
    tokens = make_images(size=size)
    few = DPCKNN(CONTEXT, 0.3, sizes=sizes).merge(tokens)
    assert few.origin is not None
    assert few.size is not None
    weights = (few.origin > 0) * size[:, None, P:]
    close(few.size[:, P:], weights.sum(dim=2))
    close(few.patches, weights @ tokens.patches / weights.sum(dim=2, keepdim=True))


@torch.no_grad()
@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_frames_are_clustered_one_by_one_and_stay(keep: float) -> None:
    tokens = Tokens(torch.randn(2, 2 + 3 * 8, 6), 2, 3, (2, 4), origin=torch.eye(24).expand(2, -1, -1))
    few = DPCKNN(CONTEXT, keep).merge(tokens)
    count = num_kept(8, keep)
    assert (few.frames, few.num_patches, few.grid) == (3, 3 * count, None)
    for frame in range(3):
        alone = DPCKNN(CONTEXT, keep).merge(Tokens(tokens.patches[:, 8 * frame : 8 * frame + 8]))
        assert alone.size is not None
        own = slice(2 + count * frame, 2 + count * frame + count)
        close(few.x[:, own], alone.x)
        assert torch.equal(few.size[:, own], alone.size)
    shares = few.origin.unflatten(2, (3, 8)).unflatten(1, (3, count)).sum(dim=(2, 4))
    close(shares, count * torch.eye(3).expand(2, 3, 3))


@torch.no_grad()
def test_padding_takes_no_part_and_changes_nothing(make_images) -> None:
    """Each image gets the same tokens as alone and without its padding; a single patch is unchanged."""
    size = torch.randint(1, 4, (4, P + N)).float()
    size[:, :P] = 1
    tokens = make_images(size=size)
    mask = torch.rand(4, P + N) < 0.6
    mask[:, : P + 1] = True
    mask[2, P + 1 :] = False
    padded = replace(tokens, mask=mask, x=tokens.x.masked_fill(~mask[..., None], 1e3))
    out = DPCKNN(CONTEXT, 0.5).merge(padded)
    assert out.mask is not None
    assert out.size is not None
    assert torch.isfinite(out.x).all()
    for i in range(4):
        real = mask[i]
        alone = DPCKNN(CONTEXT, 0.5).merge(Tokens(tokens.x[i : i + 1, real], P, size=tokens.size[i : i + 1, real]))
        close(out.x[i][out.mask[i]], alone.x[0])
        close(out.size[i][out.mask[i]], alone.size[0])
        assert (out.origin[i][~out.mask[i, P:]] == 0).all()
    assert out.mask.sum(dim=1).tolist() == [P + num_kept(int(row.sum()) - P, 0.5) for row in mask]


@torch.no_grad()
def test_behind_ats_an_image_is_the_same_alone_and_in_a_batch(block: Block, make_images) -> None:
    ats, dpc = ATS(CONTEXT, budget=8), DPCKNN(CONTEXT, 0.5)
    tokens = replace(make_images(), origin=None)
    tokens = tokens.update(tokens.x * torch.linspace(0.1, 3, 4)[:, None, None])
    together = dpc(ats(tokens, block), block)
    assert together.mask is not None
    assert not together.mask.all()
    for i in range(4):
        alone = dpc(ats(Tokens(tokens.x[i : i + 1], P), block), block)
        close(together.x[i][together.mask[i]], alone.x[0])


# --- in a model


@torch.no_grad()
def test_it_acts_before_the_block(block: Block, make_images) -> None:
    tokens, dpc = make_images(), DPCKNN(CONTEXT, 0.5)
    assert torch.equal(dpc(tokens, block).x, block(dpc.merge(tokens)).x)
    assert list(dpc.parameters()) == []


@torch.no_grad()
def test_keeping_all_is_the_plain_transformer_and_less_is_cheaper(make_model, check_keep_rates) -> None:
    check_keep_rates(DPCKNN)
    few, images = make_model(partial(DPCKNN, keep_rate=0.3)), torch.randn(2, 3, 16, 16)
    assert tokens_per_block(few, images) == [P + 16, P + 5, P + 2]
    close(few(images)[1], few(images[1:])[0])


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("keep", [0.01, 0.5, 1.0])
def test_one_two_or_three_patches(count: int, keep: float) -> None:
    tokens = Tokens(torch.randn(2, P + count, DIM), P)
    few = DPCKNN(CONTEXT, keep).merge(tokens)
    assert few.num_patches == num_kept(count, keep)
    if few.num_patches == 1:
        close(few.patches[:, 0], tokens.mean())


def test_gradients_reach_every_patch_by_its_share_also_if_all_are_equal() -> None:
    for x in (torch.randn(2, P + N, DIM), torch.ones(2, P + N, DIM)):
        x.requires_grad_()
        few = DPCKNN(CONTEXT, 0.3).merge(Tokens(x, P, origin=torch.eye(N).expand(2, N, N)))
        few.patches.sum().backward()
        assert few.origin is not None
        close(x.grad[:, P:, 0], few.origin.sum(dim=1))


def test_it_is_finite_in_bfloat16_and_keeps_clusters_of_one_patch_in_float32(check_autocast) -> None:
    net = check_autocast(DPCKNN)
    assert torch.isfinite(net.bfloat16()(torch.randn(2, 3, 16, 16).bfloat16())).all()
    with torch.autocast("cpu", torch.bfloat16):
        tokens = Tokens(torch.randn(2, 10, DIM), origin=torch.eye(10).expand(2, 10, 10))
        few = DPCKNN(CONTEXT, 0.9).merge(tokens)
    single = few.origin.amax(dim=2) == 1
    assert single.sum() == 2 * 8
    assert torch.equal(few.x[single], (few.origin @ tokens.x)[single])


def test_errors() -> None:
    with pytest.raises(FewtokensError, match=r"^`tokenizer\.build\.neighbors` must be an int >= 1, got 0\.$"):
        DPCKNN(CONTEXT, 0.5, 0)
    with pytest.raises(FewtokensError, match=r"^`tokenizer\.build\.keep_rate` must be above 0 and at most 1, got 1\.5"):
        DPCKNN(CONTEXT, 1.5)
