from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fewtokens.analysis import flops as counting
from fewtokens.analysis.cost import macs, tokens_per_block
from fewtokens.analysis.flops import SingleImageMacs, count, count_forward
from fewtokens.layers.block import Block
from fewtokens.tokenizers.ats import ATS
from fewtokens.tokenizers.token_learner import TokenLearner

DIM, DEPTH, PATCHES, CLASSES = 16, 3, 24, 5


def closed_form(tokens_in: list[int], tokens_out: list[int]) -> int:
    """Of a ViT whose blocks attend with so many tokens and feed so many."""
    attend = sum(4 * n * DIM**2 + 2 * n * n * DIM for n in tokens_in)
    feed = sum(8 * n * DIM**2 for n in tokens_out)
    return PATCHES * 3 * 2**2 * DIM + attend + feed + DIM * CLASSES


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 8, 12, generator=torch.Generator().manual_seed(seed))


def test_an_adaptive_method_by_hand(make, methods):
    model = make(methods["adaptive"], at=[1])
    pictures = images(6)
    found = count(model, pictures.split(4))
    kept = found.tokens[:, 2].tolist()
    assert len(set(kept)) > 1
    assert found.tokens.tolist() == [[25, 25, n, n] for n in kept]
    # It pads to all patches, which a CPU does not compute: its block feeds those that stay, and the next has no others.
    costs = [closed_form([25, 25, n], [25, n, n]) for n in kept]
    assert found.macs.tolist() == costs
    assert found.padded.tolist() == [sum(costs[:4]) / 4] * 4 + [sum(costs[4:]) / 2] * 2


@pytest.mark.parametrize("packs", [True, False], ids=["CPU", "GPU"])
def test_ats_alone_and_in_batches(adaptive, monkeypatch, packs):
    model = adaptive
    if not packs:
        monkeypatch.setattr(Block, "_packs", lambda *_: False)
    pictures = images(40)
    found = count(model, pictures.split(16))
    assert found.macs.tolist() == [macs(model, image) for image in pictures.split(1)]
    assert len(set(found.macs.tolist())) > 5
    batches = [macs(model, part) / len(part) for part in pictures.split(16)]
    assert found.padded.tolist() == [batches[i // 16] for i in range(40)]
    extra = found.padded.mean() - found.macs.double().mean()
    assert extra == 0 if packs else extra > 0, "padding costs on a GPU only"
    assert found.tokens[:, 1:].double().mean(dim=0).tolist() == pytest.approx(tokens_per_block(model, pictures))


def test_selection_by_hand(make, methods):
    found = count(make(methods["selection"], at=[1, 2]), images(5).split(2))
    assert found.macs.tolist() == [closed_form([25, 25, 17], [25, 17, 12])] * 5
    assert found.padded.tolist() == found.macs.tolist()
    assert found.tokens.tolist() == [[25, 25, 17, 12]] * 5


def test_one_image_is_run_where_all_cost_the_same(make, monkeypatch):
    calls = []
    monkeypatch.setattr(
        counting, "count_forward", lambda model, batch: calls.append(len(batch)) or count_forward(model, batch)
    )
    count(make(partial(TokenLearner, num_tokens=4), at=[1]), images(9).split(4))
    assert calls == [4, 1, 4, 1]


def test_an_image_that_keeps_others_alone_costs_what_it_costs_alone(make):
    model = make(ATS, at=[0, 1, 2]).eval()
    image = images(1)
    with torch.no_grad():
        assert SingleImageMacs(model)(image, [25, 2, 2, 2]) == macs(model, image)


@pytest.mark.parametrize("build", [ATS, partial(TokenLearner, num_tokens=4)])
def test_the_count_is_that_of_torch_where_torch_counts_all(make, build):
    model, pictures = make(build, at=[1]).eval(), images(3)
    with sdpa_kernel([SDPBackend.MATH]), torch.no_grad():  # the CPU's fused kernel counts 0 there
        with FlopCounterMode(display=False) as counter:
            model(pictures)
        assert count_forward(model, pictures)[0] == counter.get_total_flops() // 2
    assert count_forward(model, pictures)[0] == counter.get_total_flops() // 2


def test_nothing_is_left_on_the_model(make):
    model = make(ATS, at=[1]).train()
    count(model, [images(2)])
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(Exception, match="size"):
        count(model, [torch.zeros(1, 3, 4, 4)])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
