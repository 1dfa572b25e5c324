"""Weights of scenic (ViT, ViViT, TokenLearner) and of the Keras TokenLearner example in our models.

`backbone.weights=scenic:<file>` and `backbone.weights=keras:<file>` load them. A converter is a table from our names to
the names in the file, with the change of layout that each needs.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewtokens.backbones.array_files import State, read_arrays
from fewtokens.backbones.vit import ViT
from fewtokens.errors import FewtokensError, check, listed
from fewtokens.layers.factorised import SelfAttentionBlock
from fewtokens.tokenizers.base import Tokenizer
from fewtokens.tokenizers.token_fuser import TokenFuser
from fewtokens.tokenizers.token_learner import TokenLearner, TokenLearnerV11

log = logging.getLogger(__name__)
HEADS = ("output_projection.", "head.fc.")


@dataclass(frozen=True)
class Source:
    """The origin of one of our parameters in a file.

    Args:
        names: Names in the file.
        convert: Computes the parameter from these tensors.
    """

    names: tuple[str, ...]
    convert: Callable[..., Tensor]


Table = dict[str, Source]


def load_converted(model: ViT, weights: str) -> None:
    """Load a file of another framework into a model.

    A head of another size, and tokenizers that the file does not have, keep their random values, with a warning.

    Args:
        model: A model with the sizes and settings that the file was made with.
        weights: "scenic:<file>" or "keras:<file>".

    Raises:
        FewtokensError: The format is unknown, the file cannot be read, or its parameters are not those of the model.
    """
    kind, _, path = weights.partition(":")
    check(
        kind in FORMATS and bool(path), "backbone.weights", " or ".join(f"{name}:<file>" for name in FORMATS), weights
    )
    table, found = FORMATS[kind](model), read_arrays(Path(path))
    if kind == "keras":
        found = _in_order(found, table)
    if not any(".head." in name for name in table):  # num_classes=0
        found = {name: value for name, value in found.items() if not name.startswith(HEADS)}
    state = convert(found, table, model.state_dict(), f"{path} ({kind})")
    model.load_state_dict(state, strict=False)


def convert(found: Mapping[str, Tensor], table: Table, own: Mapping[str, Tensor], path: str) -> State:
    """Return the parameters of a model from those of a file.

    Args:
        found: Parameters in the file, with the file's names.
        table: Where each parameter of the model comes from.
        own: Parameters of the model.
        path: How errors and warnings name the file.

    Raises:
        FewtokensError: Parameters are missing, unexpected or of another shape. All are listed by their names in the
            file.
    """
    random = {name for name in table if ".tokenizer." in name and not found.keys() & set(table[name].names)}
    wanted = {name: source for name, source in table.items() if name not in random}
    used = {part for source in wanted.values() for part in source.names}
    missing, unexpected = sorted(used - found.keys()), sorted(found.keys() - used)
    state: State = {}
    wrong: list[str] = []
    for name, source in wanted.items():
        if not set(source.names) & set(missing):
            value = _converted(source, found)
            if value is not None and value.shape == own[name].shape:
                state[name] = value
            elif ".head." in name:
                random.add(name)
            else:
                wrong += source.names
    if missing or unexpected or wrong:
        raise FewtokensError(
            f"{path} does not fit the model: missing {listed(missing)}, unexpected {listed(unexpected)}, of another "
            f"shape {listed(wrong)}. Set the sizes of the backbone, backbone.pool, and the tokenizer and its blocks to "
            "those that the file was made with."
        )
    if random:
        log.warning("%s: %s stay random, since the file has none of that size", path, listed(sorted(random)))
    return state


def _converted(source: Source, found: Mapping[str, Tensor]) -> Tensor | None:
    try:
        return source.convert(*(found[name].float() for name in source.names))
    except (RuntimeError, IndexError):  # another number of dimensions
        return None


# --- scenic


def scenic(model: ViT) -> Table:
    """Return the table for weights of scenic: ViT, ViViT models 1 to 4, TokenLearner 1.0 and 1.1, TokenFuser.

    Raises:
        FewtokensError: The model computes another GELU than Flax, or has the final norm after the pooling.
    """
    _check_like_flax(model)
    temporal = cast(ViT | None, getattr(model, "temporal", None))
    if temporal is None:
        head, table = "vit.head", _scenic_encoder(model, "Transformer", "cls", "")
    else:
        head, table = "temporal.vit.head", _scenic_encoder(model, "SpatialTransformer", "cls_SpatialTransformer", "")
        table |= _scenic_encoder(temporal, "TemporalTransformer", "cls_TemporalTransformer", "temporal.")
    kernel, bias = "vit.patch_embed.proj.weight", "vit.patch_embed.proj.bias"
    table |= {kernel: Source(("embedding.kernel",), channels_first), bias: Source(("embedding.bias",), same)}
    if f"{head}.weight" in model.state_dict():
        table |= dense("output_projection", head)
    return table


def _scenic_encoder(model: ViT, encoder: str, class_token: str, ours: str) -> Table:
    table = {f"{ours}vit.pos_embed": Source((f"{encoder}.posembed_input.pos_embedding",), same)}
    table |= norm(f"{encoder}.encoder_norm", f"{ours}vit.norm")
    if model.vit.has_class_token:
        table[f"{ours}vit.cls_token"] = Source((class_token,), same)
    counts: dict[str, int] = {}
    for index, (block, tokenizer) in enumerate(zip(model.encoder.blocks, model.encoder.tokenizers, strict=True)):
        layer = f"{ours}encoder.layers.{index}"
        table |= scenic_block(
            f"{encoder}.encoderblock_{index}", f"{layer}.block", isinstance(block, SelfAttentionBlock)
        )
        table |= _scenic_tokenizer(encoder, tokenizer, f"{layer}.tokenizer", counts)
    return table


def scenic_block(source: str, target: str, factorised: bool = False) -> Table:
    """Return the table of a block; a factorised one has two attentions, over space and over time (ViViT's model 3)."""
    if not factorised:
        return _attention_and_mlp(source, target, ("_0", "_0", "_1"), "MlpBlock_0")
    over_time = _attention_and_mlp(source, target, ("_time", "_time", "_mlp"), "MlpBlock")
    renamed = {
        name.replace(".attn.", ".attn_time.").replace(".norm1.", ".norm_time."): entry
        for name, entry in over_time.items()
        if ".attn." in name or ".norm1." in name
    }
    return _attention_and_mlp(source, target, ("_space", "_space", "_mlp"), "MlpBlock") | renamed


def _attention_and_mlp(source: str, target: str, suffixes: tuple[str, str, str], mlp: str) -> Table:
    heads = f"{source}.MultiHeadDotProductAttention{suffixes[0]}"
    return {
        **attention([f"{heads}.{part}." for part in ("query", "key", "value", "out")], f"{target}.attn"),
        **norm(f"{source}.LayerNorm{suffixes[1]}", f"{target}.norm1"),
        **norm(f"{source}.LayerNorm{suffixes[2]}", f"{target}.norm2"),
        **dense(f"{source}.{mlp}.Dense_0", f"{target}.mlp.fc1"),
        **dense(f"{source}.{mlp}.Dense_1", f"{target}.mlp.fc2"),
    }


def _scenic_tokenizer(encoder: str, tokenizer: Tokenizer, target: str, counts: dict[str, int]) -> Table:
    """Return the table of a tokenizer. Flax numbers the modules of each class in the order of the blocks."""

    def numbered(name: str) -> str:
        counts[name] = counts.get(name, -1) + 1
        return f"{encoder}.{name}_{counts[name]}"

    if isinstance(tokenizer, TokenFuser):
        inner = _scenic_tokenizer(encoder, tokenizer.inner, f"{target}.inner", counts)
        fuse = tokenizer.fuse
        normalize, gain = isinstance(fuse.norm1, nn.LayerNorm), fuse.gain is not None
        return inner | token_fuser(numbered("TokenFuser"), f"{target}.fuse.", normalize, gain)
    if isinstance(tokenizer, TokenLearnerV11):
        return mask_mlp(numbered("TokenLearnerModuleV11"), f"{target}.")
    return token_learner(numbered("TokenLearnerModule"), f"{target}.") if isinstance(tokenizer, TokenLearner) else {}


def token_learner(source: str, target: str) -> Table:
    """Return the table of scenic's TokenLearner 1.0."""
    convs = {
        f"{target}convs.{i}.weight": Source((_join(source, f"Conv_{i}.kernel"),), channels_first) for i in range(4)
    }
    return norm(_join(source, "LayerNorm_0"), f"{target}norm") | convs


def mask_mlp(source: str, target: str) -> Table:
    """Return the table of scenic's TokenLearner 1.1, and of the maps of TokenFuser."""
    return {
        **norm(_join(source, "LayerNorm_0"), f"{target}norm"),
        **dense(_join(source, "token_masking.Dense_0"), f"{target}mlp.fc1"),
        **dense(_join(source, "token_masking.Dense_1"), f"{target}mlp.fc2"),
    }


def token_fuser(source: str, target: str, normalize: bool = True, gain: bool = False) -> Table:
    """Return the table of scenic's TokenFuser. It has no gain, which is therefore 1."""
    table = mask_mlp(source, target) | dense(_join(source, "Dense_0"), f"{target}mix")
    for i in (1, 2) if normalize else ():
        table |= norm(_join(source, f"fuser_mix_norm{i}"), f"{target}norm{i}")
    if gain:
        table[f"{target}gain"] = Source((_join(source, "LayerNorm_0.scale"),), torch.ones_like)
    return table


def _check_like_flax(model: ViT) -> None:
    act: Any = model.encoder.blocks[0].mlp.act
    after_pool = not isinstance(model.vit.fc_norm, nn.Identity)
    if after_pool or not ("tanh" in type(act).__name__.lower() or getattr(act, "approximate", "") == "tanh"):
        raise FewtokensError(
            "scenic's models have the tanh approximation of GELU, and the final norm before the pooling. Set "
            "backbone.options.act_layer=gelu_tanh backbone.norm=before_pool."
        )


# --- the Keras example


def keras(model: ViT) -> Table:
    """Return the table for the mini ViT of the Keras example, in the order of Keras's `model.get_weights()`.

    The example's positions are a constant that Keras does not save, `pos_embed` (patches, width).
    """
    table = {
        "vit.patch_embed.proj.weight": Source(("patch.kernel",), channels_first),
        "vit.patch_embed.proj.bias": Source(("patch.bias",), same),
    }
    for index, tokenizer in enumerate(model.encoder.tokenizers):
        source, layer = f"block{index}", f"encoder.layers.{index}"
        if isinstance(tokenizer, TokenLearner):
            table |= norm("tl.norm", f"{layer}.tokenizer.norm", "gamma", "beta")
            for i in range(4):
                table[f"{layer}.tokenizer.convs.{i}.weight"] = Source((f"tl.conv{i}",), channels_first)
        table |= norm(f"{source}.norm1", f"{layer}.block.norm1", "gamma", "beta")
        parts = [f"{source}.attn.{part}_" for part in ("query", "key", "value", "attention_output")]
        table |= attention(parts, f"{layer}.block.attn")
        table |= norm(f"{source}.norm2", f"{layer}.block.norm2", "gamma", "beta")
        for part in (1, 2):
            table |= dense(f"{source}.fc{part}", f"{layer}.block.mlp.fc{part}")
    table |= norm("head.norm", "vit.norm", "gamma", "beta")
    table |= dense("head.fc", "vit.head") if "vit.head.weight" in model.state_dict() else {}
    return table | {"vit.pos_embed": Source(("pos_embed",), lambda positions: positions[None])}


def keras_names(table: Table) -> list[str]:
    """Return the names of the table in the order of `model.get_weights()`, without the positions."""
    names = dict.fromkeys(
        part
        for source in table.values()
        # The kernels of query, key and value make one parameter, and their biases another; Keras alternates them.
        for part in (_alternating(source.names) if len(source.names) == 3 else source.names)
    )
    return [name for name in names if name != "pos_embed"]


def _alternating(kernels: Sequence[str]) -> list[str]:
    return [part for name in kernels for part in (name, name.replace("_kernel", "_bias"))]


def _in_order(found: State, table: Table) -> State:
    """Return the arrays of `numpy.savez(file, *model.get_weights(), pos_embed=...)` by their names in the table."""
    if not any(name.startswith("arr_") for name in found):
        return found
    names, count = keras_names(table), sum(name.startswith("arr_") for name in found)
    if count != len(names):
        raise FewtokensError(
            f"The Keras model has {count} arrays of weights, but this one has {len(names)}. Set backbone.depth, and "
            "tokenizer=token_learner with tokenizer.at one higher than the example's block, to those of the file."
        )
    return {(names[int(k.removeprefix("arr_"))] if k.startswith("arr_") else k): v for k, v in found.items()}


# --- layouts


def same(value: Tensor) -> Tensor:
    """Return a tensor as it is."""
    return value


def channels_first(kernel: Tensor) -> Tensor:
    """Return a kernel (*window, in, out) as (out, in, *window)."""
    return kernel.movedim((-1, -2), (0, 1))


def norm(source: str, target: str, scale: str = "scale", bias: str = "bias") -> Table:
    """Return the table of a layer norm."""
    return {
        f"{target}.weight": Source((f"{source}.{scale}",), same),
        f"{target}.bias": Source((f"{source}.{bias}",), same),
    }


def dense(source: str, target: str) -> Table:
    """Return the table of a linear layer, whose kernel is (in, out) in the file."""
    return {
        f"{target}.weight": Source((f"{source}.kernel",), torch.t),
        f"{target}.bias": Source((f"{source}.bias",), same),
    }


def attention(parts: Sequence[str], target: str) -> Table:
    """Return the table of an attention layer.

    Args:
        parts: Names of query, key, value (C, heads, D) and output (heads, D, C), up to "kernel" and "bias".
        target: Our name, with one matrix for query, key and value.
    """
    *qkv, out = parts
    return {
        f"{target}.qkv.weight": Source(
            tuple(f"{part}kernel" for part in qkv), lambda *kernels: torch.cat([k.flatten(1).T for k in kernels])
        ),
        f"{target}.qkv.bias": Source(
            tuple(f"{part}bias" for part in qkv), lambda *biases: torch.cat([b.flatten() for b in biases])
        ),
        f"{target}.proj.weight": Source((f"{out}kernel",), lambda kernel: kernel.flatten(0, 1).T),
        f"{target}.proj.bias": Source((f"{out}bias",), same),
    }


def _join(source: str, name: str) -> str:
    return f"{source}.{name}" if source else name


FORMATS: dict[str, Callable[[ViT], Table]] = {"scenic": scenic, "keras": keras}
