"""Models of Hugging Face's transformers as timm models. Most tests need transformers, which is no dependency."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fewtokens
from fewtokens.backbones.hugging_face import ENCODERS, is_hugging_face, rename, to_timm
from fewtokens.backbones.vit import ViT
from fewtokens.errors import FewtokensError

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def hugging_face(name: str, **options: Any) -> Any:
    """Return a small model of transformers whose parameters are all random."""
    transformers = pytest.importorskip("transformers")
    family = name.removesuffix("WithTeacher").removesuffix("ForImageClassification").removesuffix("Model")
    sizes = SIZES | ({} if name.startswith("Dino") else {"intermediate_size": 48}) | options
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(num_labels=5, **sizes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "ViTForImageClassification",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
        "ViTModel",
        "DeiTModel",
        "Dinov2Model",
        "Dinov2WithRegistersModel",
    ],
)
def test_the_timm_model_computes_the_same(name: str) -> None:
    model = hugging_face(name)
    outputs = model(IMAGES)
    expected = outputs.last_hidden_state[:, 0] if name in ENCODERS else outputs.logits
    assert expected.std() > 0.01
    torch.testing.assert_close(to_timm(model)(IMAGES), expected, rtol=1e-4, atol=1e-4)
    reduced = fewtokens.reduce(model, "tome", r=2)
    assert isinstance(reduced, ViT)
    assert reduced(IMAGES).shape == expected.shape
    prefix = reduced.encoder.tokenizers[0].context.prefix
    assert fewtokens.cost(reduced, IMAGES).tokens == [prefix + 16, prefix + 14, prefix + 12]


def test_what_does_not_map_is_an_error() -> None:
    with pytest.raises(FewtokensError, match=r"have weights that map to timm's, got a Dinov2ForImageClassification\."):
        fewtokens.reduce(hugging_face("Dinov2ForImageClassification"), "tome")
    with pytest.raises(FewtokensError, match=r"of this Dinov2Model do not map .* unexpected blocks\.0\.mlp\.down_proj"):
        fewtokens.reduce(hugging_face("Dinov2Model", use_swiglu_ffn=True), "tome")
    with pytest.raises(FewtokensError, match=r"^`config\.hidden_act` must be gelu or .*, got 'silu'"):
        fewtokens.reduce(hugging_face("ViTModel", hidden_act="silu"), "tome")


def test_names_of_transformers_4_and_5() -> None:
    """Written from the two versions' state_dict, since only one can be installed."""
    pairs = {
        "attention.attention.query.weight": "attention.q_proj.weight",
        "attention.attention.key.weight": "attention.k_proj.weight",
        "attention.attention.value.weight": "attention.v_proj.weight",
        "attention.output.dense.weight": "attention.o_proj.weight",
        "intermediate.dense.weight": "mlp.fc1.weight",
        "output.dense.weight": "mlp.fc2.weight",
        "layernorm_before.weight": "layernorm_before.weight",
        "layernorm_after.weight": "layernorm_after.weight",
    }
    old = {f"vit.encoder.layer.1.{name}": torch.ones(2, 2) for name in pairs}
    new = {f"vit.layers.1.{name}": torch.ones(2, 2) for name in pairs.values()}
    other = {
        "vit.embeddings.cls_token": torch.ones(1),
        "vit.layernorm.bias": torch.ones(1),
        "pooler.dense.bias": torch.ones(1),
    }
    found = rename(old | other)
    assert found.keys() == rename(new | other).keys()
    assert found.keys() == {
        "cls_token",
        "norm.bias",
        *(f"blocks.1.{name}.weight" for name in ("attn.qkv", "attn.proj", "norm1", "norm2", "mlp.fc1", "mlp.fc2")),
    }
    assert found["blocks.1.attn.qkv.weight"].shape == (6, 2)


def test_models_are_recognized_by_their_package() -> None:
    pretended = type(
        "ViTMSNModel", (nn.Module,), {"__module__": "transformers.models.vit_msn", "config": SimpleNamespace()}
    )
    assert is_hugging_face(pretended())
    assert not is_hugging_face(nn.Linear(1, 1))
    with pytest.raises(FewtokensError, match=r"got a ViTMSNModel\. Use one of them, such as the encoder below a head"):
        fewtokens.reduce(pretended(), "tome")
