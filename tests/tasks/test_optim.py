import re
from itertools import pairwise

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from fewtokens.backbones.in_place import reduce
from fewtokens.backbones.pretrained import timm_vit
from fewtokens.backbones.vit import vit
from fewtokens.backbones.vivit import PLAIN
from fewtokens.errors import FewtokensError
from fewtokens.tasks.optim import parameter_groups, scale_learning_rates, warmup_cosine, warmup_linear
from fewtokens.tokenizers.token_learner import TokenLearner


def model() -> nn.Module:
    recipe = {"at": 1, "build": lambda context: TokenLearner(context, num_tokens=2)}
    return vit(image_size=8, patch_size=2, num_classes=3, tokenizer=recipe, dim=8, depth=2, heads=2, pool="token")


def test_matrices_decay_and_the_rest_does_not() -> None:
    net = model()
    free, decayed = parameter_groups(net, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    ids = {id(p) for p in free["params"]}
    assert id(net.vit.pos_embed) in ids
    assert id(net.vit.cls_token) in ids
    assert id(net.encoder.tokenizers[1].convs[0].weight) not in ids
    count = len(decayed["params"]) + len(free["params"])
    assert count == len(list(net.parameters()))


def test_all_decay_and_frozen_ones_are_left_out() -> None:
    net = model()
    net.vit.pos_embed.requires_grad_(False)
    (group,) = parameter_groups(net, 0.1, "all")
    assert len(group["params"]) == len(list(net.parameters())) - 1
    with pytest.raises(FewtokensError, match="decay"):
        parameter_groups(net, 0.1, "some")  # type: ignore[arg-type]


def test_layer_decay_lowers_the_learning_rate_from_layer_to_layer() -> None:
    net = model()
    optimizer = torch.optim.AdamW(parameter_groups(net, 0.1, layer_decay=0.5), lr=1.0)
    scale_learning_rates(optimizer)
    names = {id(p): name for name, p in net.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates["vit.head.weight"] == rates["encoder.layers.1.tokenizer.norm.weight"] == 1.0
    assert rates["encoder.layers.1.block.mlp.fc1.weight"] == 0.5
    assert rates["vit.norm.weight"] == 0.5  # belongs to the last block, as in timm
    assert rates["encoder.layers.0.block.norm1.bias"] == 0.25
    assert rates["vit.pos_embed"] == rates["vit.patch_embed.proj.weight"] == 0.125
    assert len(rates) == len(list(net.parameters()))
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups if group["params"][0].ndim == 1)
    with pytest.raises(FewtokensError, match=r"`task\.layer_decay` must be .* got 1\.5"):
        parameter_groups(net, 0.1, layer_decay=1.5)


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_siglip_224",
        "vit_base_patch16_clip_224",
        "vit_small_patch14_reg4_dinov2",
        "deit_tiny_distilled_patch16_224",
        "vit_base_patch16_gap_224",
    ],
)
def test_the_groups_of_layer_decay_equal_timms(name: str) -> None:
    with torch.device("meta"):
        expected = timm.create_model(name, depth=2, num_classes=1000)
        size = expected.patch_embed.img_size
        mine = timm_vit(name=name, image_size=size, num_classes=1000, tokenizer=PLAIN, options={"depth": 2})
    shared = set(expected.no_weight_decay())
    groups = param_groups_layer_decay(expected, 0.1, shared, layer_decay=0.5)
    names = {id(p): name for name, p in expected.named_parameters()}
    wanted = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    names = {id(p): name for name, p in mine.named_parameters()}
    found = {
        re.sub(r"encoder\.layers\.(\d+)\.block", r"blocks.\1", names[id(p)]).removeprefix("vit."): (
            g["lr_scale"],
            g["weight_decay"],
        )
        for g in parameter_groups(mine, 0.1, layer_decay=0.5)
        for p in g["params"]
    }
    assert found == wanted


def test_layer_decay_spares_a_tokenizer_in_a_model_of_timm() -> None:
    net = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=12, num_heads=2, img_size=32, num_classes=2)
    before = _scales(net)
    after = _scales(reduce(net, "token_learner", at=0, num_tokens=2))
    assert {scale for name, scale in after.items() if ".tokenizer." in name} == {1.0}
    assert {name: scale for name, scale in after.items() if ".tokenizer." not in name} == before
    assert before["blocks.0.attn.qkv.weight"] == 0.25


def _scales(net: nn.Module) -> dict[str, float]:
    names = {id(p): name for name, p in net.named_parameters()}
    groups = parameter_groups(net, 0.1, layer_decay=0.5)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("settings", [{"warmup": -1}, {"warmup": float("inf")}, {"final": 2.0}])
def test_schedules_out_of_range_are_errors(settings: dict) -> None:
    with pytest.raises(FewtokensError, match=rf"`schedule\.{next(iter(settings))}` must be"):
        warmup_cosine(0, 10, **settings)


def test_the_decay_of_the_keras_example_is_tfas() -> None:
    # tfa: p <- p - wd * p, not multiplied by the learning rate; torch: p <- p - lr * wd * p
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    weight.grad = torch.zeros(1)
    torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.1, eps=1e-7).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([2.0 * (1 - 1e-4)]))


@pytest.mark.parametrize(("warmup", "rise"), [(10, 10), (0.1, 10), (0, 0), (0.0, 0)])
def test_warmup_then_half_a_cosine(warmup: float, rise: int) -> None:
    values = [warmup_cosine(step, 100, warmup=warmup, final=0.1) for step in range(101)]
    assert values[rise] == pytest.approx(1.0)
    assert values[100] == pytest.approx(0.1)
    assert all(b > a for a, b in pairwise(values[:rise]))
    assert all(b <= a for a, b in pairwise(values[rise:]))
    if rise:
        assert values[0] == pytest.approx(1 / rise)
    middle = rise + (100 - rise) // 2
    assert values[middle] == pytest.approx(0.55, abs=0.02)


def test_warmup_then_a_line() -> None:
    values = [warmup_linear(step, 110, warmup=10, final=0.2) for step in range(111)]
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert values[10:] == pytest.approx([1 - 0.8 * step / 100 for step in range(101)])
