"""Every method of `Tokens`, on every combination of fields that it treats differently."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import Tensor

from fewtokens.errors import FewtokensError
from fewtokens.tokens import Tokens

B, P, T, H, W, C = 2, 2, 3, 2, 4, 5
N = T * H * W


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def clip(**changes: object) -> Tokens:
    """Return a clip of T frames with two prefix tokens."""
    return replace(Tokens(rand(B, P + N, C), prefix=P, frames=T, grid=(H, W)), **changes)


def eye() -> Tensor:
    return torch.eye(N).expand(B, N, N)


def full_mask() -> Tensor:
    return torch.ones(B, P + N, dtype=torch.bool)


def test_patches_are_what_follows_the_prefix() -> None:
    tokens = clip()
    torch.testing.assert_close(tokens.patches, tokens.x[:, P:], rtol=0, atol=0)
    assert tokens.num_patches == N
    without_prefix = Tokens(tokens.x)
    assert without_prefix.patches is tokens.x
    assert without_prefix.num_patches == P + N


def test_per_frame_makes_every_frame_a_sample() -> None:
    tokens = clip()
    frames = tokens.per_frame
    assert frames.shape == (B * T, H * W, C)
    for b in range(B):
        for t in range(T):
            start = P + t * H * W
            assert torch.equal(frames[b * T + t], tokens.x[b, start : start + H * W])


def test_a_record_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        clip().prefix = 0  # type: ignore[misc]


def test_update_changes_the_features_alone() -> None:
    tokens = clip(size=rand(B, P + N), mask=full_mask(), origin=eye(), trace=[])
    new = tokens.update(-tokens.x)
    assert torch.equal(new.x, -tokens.x)
    others = ("prefix", "frames", "grid", "size", "mask", "origin", "trace")
    assert all(getattr(new, name) is getattr(tokens, name) for name in others)


def test_a_complete_clip_has_a_grid() -> None:
    assert clip().require_grid("X") == (H, W)


@pytest.mark.parametrize("change", [{"grid": None}, {"mask": full_mask()}], ids=["no grid", "padding"])
def test_an_incomplete_grid_is_an_error(change: dict) -> None:
    said = (
        r"^X needs patch tokens on a complete \(height, width\) grid, but an earlier tokenizer dropped or merged some "
        r"and left 24\. Place it before that tokenizer, or use token_learner_v11\.$"
    )
    with pytest.raises(FewtokensError, match=said):
        clip(**change).require_grid("X")


def test_resample_replaces_the_patches_and_keeps_the_prefix() -> None:
    tokens, new = clip(), rand(B, 4, C)
    few = tokens.resample(new, rand(B, 4, N))
    assert torch.equal(few.x[:, :P], tokens.x[:, :P])
    assert torch.equal(few.patches, new)
    assert (few.prefix, few.frames, few.grid) == (P, T, None)
    assert few.size is few.mask is few.origin is None
    assert clip().resample(new, rand(B, 4, N), grid=(2, 2)).grid == (2, 2)
    assert torch.equal(Tokens(tokens.x).resample(new, rand(B, 4, P + N)).x, new)


def test_resampled_tokens_have_size_one_and_no_padding() -> None:
    few = clip(size=rand(B, P + N) + 1, mask=full_mask()).resample(rand(B, 4, C), rand(B, 4, N))
    assert few.size is not None
    assert torch.equal(few.size, torch.ones(B, P + 4))
    assert few.mask is None


def test_resample_keeps_the_dtype_of_the_record() -> None:
    """Under autocast the new tokens are bfloat16; the residual stream keeps its type, with or without a prefix."""
    for tokens in (clip(), Tokens(rand(B, N, C))):
        assert tokens.resample(rand(B, 4, C).bfloat16(), rand(B, 4, N).bfloat16()).x.dtype == torch.float32


def test_origin_through_two_resamplings_is_the_product_of_their_weights() -> None:
    first, second = rand(B, 4, N).requires_grad_(), rand(B, 3, 4)
    few = clip(origin=eye()).resample(rand(B, 4, C), first)
    assert few.origin is not None
    assert torch.equal(few.origin, first.detach())
    assert not few.origin.requires_grad
    fewer = few.resample(rand(B, 3, C), second)
    torch.testing.assert_close(fewer.origin, second @ first.detach())


def test_resample_per_frame_is_resampling_each_frame() -> None:
    tokens, new, weights = clip(origin=eye()), rand(B * T, 2, C), rand(B * T, 2, H * W)
    few = tokens.resample_per_frame(new, weights)
    assert torch.equal(few.per_frame, new)
    assert few.origin is not None
    assert few.origin.shape == (B, T * 2, N)
    expected = torch.stack([torch.block_diag(*weights[b * T : b * T + T]) for b in range(B)])
    assert torch.equal(few.origin, expected)


def test_resample_per_frame_mixes_origins_that_are_no_longer_single_patches() -> None:
    origin, weights = rand(B, N, 7), rand(B * T, 2, H * W)
    few = clip(origin=origin).resample_per_frame(rand(B * T, 2, C), weights)
    frames = weights @ origin.reshape(B * T, H * W, 7)
    torch.testing.assert_close(few.origin, frames.reshape(B, T * 2, 7))


def test_resample_per_frame_of_one_frame_is_resample() -> None:
    tokens = Tokens(rand(B, P + 8, C), prefix=P, origin=torch.eye(8).expand(B, 8, 8))
    new, weights = rand(B, 3, C), rand(B, 3, 8)
    one, other = tokens.resample_per_frame(new, weights), tokens.resample(new, weights)
    assert torch.equal(one.x, other.x)
    assert one.origin is not None
    assert other.origin is not None
    assert torch.equal(one.origin, other.origin)


def test_select_keeps_the_named_patches_in_the_order_given() -> None:
    tokens = clip(size=rand(B, P + N), origin=eye())
    index = torch.tensor([[5, 0, 23], [1, 2, 2]])
    few = tokens.select(index)
    assert (few.prefix, few.frames, few.grid, few.mask) == (P, 1, None, None)
    for b in range(B):
        rows = [0, 1] + [P + i for i in index[b].tolist()]
        assert torch.equal(few.x[b], tokens.x[b, rows])
        assert few.size is not None
        assert tokens.size is not None
        assert torch.equal(few.size[b], tokens.size[b, rows])
        assert few.origin is not None
        assert torch.equal(few.origin[b], torch.eye(N)[index[b]])


def test_select_with_padding_on_top_of_padding() -> None:
    mask = full_mask()
    mask[0, P + 5] = False  # padded before
    few = clip(mask=mask, origin=eye()).select(
        torch.tensor([[5, 0, 3], [1, 5, 3]]), torch.tensor([[True, True, False], [True, True, True]])
    )
    assert few.mask is not None
    assert few.mask.tolist() == [[True, True, False, True, False], [True, True, True, True, True]]
    assert few.origin is not None
    assert few.origin[0, 2].sum() == 0  # padding has no origin
    assert few.origin[1, 2].tolist() == torch.eye(N)[3].tolist()


def test_select_with_padding_where_there_was_none() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    few = clip().select(torch.tensor([[0, 1], [2, 3]]), mask)
    assert few.mask is not None
    assert few.mask.tolist() == [[True, True, True, False], [True, True, True, True]]
    without_prefix = Tokens(rand(B, N, C)).select(torch.tensor([[0, 1], [2, 3]]), mask)
    assert without_prefix.mask is not None
    assert torch.equal(without_prefix.mask, mask)


def test_bias_is_none_when_there_is_nothing_to_add() -> None:
    assert clip().bias() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bias_is_the_logarithm_of_the_size_and_minus_infinity_in_padding(dtype: torch.dtype) -> None:
    x = rand(1, 3, C).to(dtype)
    size, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, False]])
    logs = size.log().to(dtype)
    infinite = float("-inf")
    both = Tokens(x, size=size, mask=mask).bias()
    assert both is not None
    assert both.dtype == dtype
    assert both.shape == (1, 1, 1, 3)
    assert both.flatten().tolist() == [*logs[0, :2].tolist(), infinite]
    sizes, padding = Tokens(x, size=size).bias(), Tokens(x, mask=mask).bias()
    assert sizes is not None
    assert padding is not None
    assert sizes.flatten().tolist() == logs[0].tolist()
    assert padding.flatten().tolist() == [0, 0, infinite]


def test_mean_is_plain_if_all_tokens_count_equally() -> None:
    tokens = clip()
    assert torch.equal(tokens.mean(), tokens.x[:, P:].mean(dim=1))


def test_mean_counts_sizes_and_skips_padding_and_prefix() -> None:
    x = torch.tensor([[[100.0], [1.0], [2.0], [7.0]]])
    size, mask = torch.tensor([[9.0, 3.0, 1.0, 5.0]]), torch.tensor([[True, True, True, False]])
    assert Tokens(x, prefix=1, size=size).mean().item() == pytest.approx((3 * 1 + 1 * 2 + 5 * 7) / 9)
    assert Tokens(x, prefix=1, mask=mask).mean().item() == pytest.approx((1 + 2) / 2)
    assert Tokens(x, prefix=1, size=size, mask=mask).mean().item() == pytest.approx((3 * 1 + 1 * 2) / 4)


def test_mean_of_padding_alone_is_zero_not_nan() -> None:
    assert Tokens(rand(1, 3, C), mask=torch.zeros(1, 3, dtype=torch.bool)).mean().tolist() == [[0.0] * C]


def test_merge_is_a_mean_weighted_by_size() -> None:
    x = torch.tensor([[[100.0], [1.0], [2.0], [7.0], [4.0]]])
    keep, source, target = torch.tensor([[3, 0]]), torch.tensor([[1, 2]]), torch.tensor([[1, 1]])
    tokens = Tokens(x, 1, grid=(2, 2), origin=torch.eye(4)[None])
    few = tokens.merge(keep, source, target)
    assert few.x.flatten().tolist() == pytest.approx([100, 4, (1 + 2 + 7) / 3])
    assert few.size is not None
    assert few.size.tolist() == [[1, 1, 3]]
    assert few.origin is not None
    assert few.origin[0].flatten().tolist() == pytest.approx([0, 0, 0, 1, 1 / 3, 1 / 3, 1 / 3, 0])
    assert (few.prefix, few.frames, few.grid) == (1, 1, None)
    sized = replace(tokens, size=torch.tensor([[9.0, 3, 1, 5, 2]])).merge(keep, source, target)
    assert sized.x.flatten().tolist() == pytest.approx([100, 4, (3 * 1 + 1 * 2 + 5 * 7) / 9])
    assert sized.size is not None
    assert sized.size.tolist() == [[9, 2, 9]]


def test_join_puts_the_patches_of_another_record_last() -> None:
    one, other = clip(origin=eye()), clip(origin=eye(), mask=torch.zeros(B, P + N, dtype=torch.bool))
    both = one.join(other)
    assert torch.equal(both.x, torch.cat([one.x, other.patches], dim=1))
    assert both.mask is not None
    assert both.mask.sum(dim=1).tolist() == [P + N] * B
    assert torch.equal(both.mask, torch.arange(P + N + N).expand(B, -1) < P + N)
    assert both.origin is not None
    assert both.origin.shape == (B, N + N, N)
    assert (both.prefix, both.frames, both.grid, both.size) == (P, 1, None, None)
    size = torch.rand(B, P + N) + 1
    sized = clip(size=size).join(clip(size=2 * size))
    assert sized.mask is None
    assert sized.size is not None
    assert torch.equal(sized.size, torch.cat([size, 2 * size[:, P:]], dim=1))
