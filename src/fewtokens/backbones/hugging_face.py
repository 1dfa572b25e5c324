"""Vision Transformers of Hugging Face's transformers as timm models. transformers itself is not imported."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fewtokens.errors import FewtokensError, check, listed

State = dict[str, Tensor]
# Activations of transformers and their names in timm.
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
CLASSIFIERS = ("ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher")
ENCODERS = ("ViTModel", "DeiTModel", "Dinov2Model", "Dinov2WithRegistersModel")
# Names of transformers 4 and 5, and those of timm. The last rules name what is below an attention or an MLP.
RENAMES = (
    (r"^(?:vit|deit)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:encoder\.)?layers?\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"^(?:cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.attention\.(?:attention\.)?(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.(?:o_proj|output\.dense)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)


def is_hugging_face(model: object) -> bool:
    """Return whether an object is a model of the package transformers."""
    return any(cls.__module__.partition(".")[0] == "transformers" for cls in type(model).__mro__)


@torch.no_grad()
def to_timm(model: Any) -> VisionTransformer:
    """Return a timm model with a copy of the weights of a ViT, DeiT or DINOv2 of Hugging Face's transformers.

    It maps images to logits or, for a model without a classifier, to the class token after the final norm. A pooler
    after that token is not part of it. It is a copy, since timm keeps query, key and value in one matrix; it is on the
    same device, of the same type and in the same mode.

    Args:
        model: One of `CLASSIFIERS` or `ENCODERS`.

    Raises:
        FewtokensError: The model is another one, or computes what timm's does not.
    """
    kind, config = type(model).__name__, model.config
    if kind not in CLASSIFIERS + ENCODERS:
        raise FewtokensError(
            f"Of Hugging Face's models, {', '.join(CLASSIFIERS + ENCODERS)} have weights that map to timm's, got a "
            f"{kind}. Use one of them, such as the encoder below a head, or the timm model of the same weights."
        )
    state = rename(model.state_dict())
    activation = ACTIVATIONS.get(config.hidden_act)
    check(activation is not None, "config.hidden_act", " or ".join(ACTIVATIONS), config.hidden_act)
    like = model.get_parameter(next(name for name, _ in model.named_parameters()))
    vit = _empty(kind, config, state, activation)
    _check_names(kind, state, vit.state_dict())
    vit.load_state_dict(state)
    return vit.to(like.device, like.dtype).train(model.training)


def rename(state: Mapping[str, Tensor]) -> State:
    """Return weights of transformers 4 or 5 with timm's names, and with query, key and value in one matrix."""
    named: State = {}
    for name, value in state.items():
        if not name.startswith("pooler.") and not name.endswith("embeddings.mask_token"):
            for pattern, target in RENAMES:
                name = re.sub(pattern, target, name)  # noqa: PLW2901
            named[name] = value
    for name in [name for name in named if ".attn.query." in name]:
        parts = [named.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        named[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    if "reg_token" in named:  # timm adds no position to registers, and that of the class token to the token itself
        named["cls_token"] = named["cls_token"] + named["pos_embed"][:, :1]
        named["pos_embed"] = named["pos_embed"][:, 1:]
    return named


def _empty(kind: str, config: Any, state: State, activation: str | None) -> VisionTransformer:
    """Return timm's model of the right shape, with `state` adapted to its names."""
    teacher = kind == "DeiTForImageClassificationWithTeacher"
    if "dist_token" in state and not teacher:  # a token without a head, as a register is
        state["reg_token"] = state.pop("dist_token")
    width, fc1 = config.hidden_size, state.get("blocks.0.mlp.fc1.weight")
    kernel = state["patch_embed.proj.weight"]
    settings: dict[str, Any] = {
        "img_size": config.image_size,
        "patch_size": tuple(kernel.shape[2:]),
        "in_chans": kernel.shape[1],
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "embed_dim": width,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": 4.0 if fc1 is None else len(fc1) / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "reg_tokens": state["reg_token"].shape[1] if "reg_token" in state else 0,
        "no_embed_class": kind == "Dinov2WithRegistersModel",
        "pos_drop_rate": config.hidden_dropout_prob,
        "proj_drop_rate": config.hidden_dropout_prob,
        "attn_drop_rate": config.attention_probs_dropout_prob,
        "drop_path_rate": getattr(config, "drop_path_rate", 0.0),
        "act_layer": activation,
        "norm_layer": partial(nn.LayerNorm, eps=config.layer_norm_eps),
        "weight_init": "skip",
    }
    return (VisionTransformerDistilled if teacher else VisionTransformer)(**settings)


def _check_names(kind: str, state: State, own: Mapping[str, Tensor]) -> None:
    wrong = [name for name in sorted(set(state) & set(own)) if state[name].shape != own[name].shape]
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if wrong or missing or unexpected:
        raise FewtokensError(
            f"The weights of this {kind} do not map to timm's VisionTransformer: missing {listed(missing)}, unexpected "
            f"{listed(unexpected)}, of another shape {listed(wrong)}. Use the timm model of the same weights."
        )
