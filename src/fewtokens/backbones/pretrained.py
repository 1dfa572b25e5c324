"""Any timm VisionTransformer by its name, with its weights, around our encoder."""

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.layers.attention import Attention as TimmAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from fewtokens.backbones.trunk import check_sizes
from fewtokens.backbones.vit import TokenizerRecipe, ViT
from fewtokens.errors import FewtokensError
from fewtokens.layers.attention import Attention
from fewtokens.layers.block import Block
from fewtokens.layers.embedding import Size

log = logging.getLogger(__name__)


def timm_vit(
    *,
    name: str,
    image_size: Size,
    num_classes: int,
    tokenizer: TokenizerRecipe,
    channels: int = 3,
    pretrained: bool = False,
    weights: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> ViT:
    """A timm VisionTransformer (vit, deit, deit3, dinov2, clip, siglip, gap ...) with our encoder.

    Args:
        name: timm's name, with or without its pretrained tag ("deit_small_patch16_224.fb_in1k").
        image_size: Height and width of the input; positions are resampled when it is not the pretrained one.
        num_classes: Outputs; a head of another size starts anew.
        tokenizer: Where the tokenizer stands and its recipe.
        channels: Image channels.
        pretrained: Fetch timm's weights by that name.
        weights: A file of weights in timm's (or the original) names, .safetensors or a torch file without code.
        options: Any other argument of the timm model.

    Raises:
        FewtokensError: An unknown name, a model of another family, no network, or a file that does not fit.
    """
    _check_family(name)
    settings = dict(img_size=image_size, num_classes=num_classes, in_chans=channels, **(options or {}))
    try:
        trunk: Any = timm.create_model(name, pretrained=pretrained, block_fn=Block, attn_layer=Attention, **settings)
    except Exception as error:
        if not pretrained:
            raise FewtokensError(
                f"timm builds {name} from these settings",
                expected="settings that the model takes",
                got=f"{settings}: {error}",
                fix="check data.image_size, data.channels and backbone.options",
            ) from error
        raise FewtokensError(
            f"timm fetches the weights of {name} over the network",
            expected="a pretrained tag and a connection, or the weights in timm's cache",
            got=f"{type(error).__name__}: {error}",
            fix="download the file elsewhere and set backbone.weights=<file> backbone.pretrained=false",
        ) from error
    # timm would leave pixels at the edge unseen
    patch_size, heads = tuple(trunk.patch_embed.patch_size), trunk.blocks[0].attn.num_heads
    check_sizes(image_size, patch_size, trunk.embed_dim, heads, len(trunk.blocks))
    if weights is not None:
        load_weights(trunk, Path(weights))
    return ViT(trunk, tokenizer)


def load_weights(trunk: VisionTransformer, path: Path) -> None:
    """Load a file of weights into a timm model; a head of another size is left as it is, and said.

    Raises:
        FewtokensError: The file is missing, holds code, or its names do not fit the model's.
    """
    state = checkpoint_filter_fn(read_weights(path), trunk, adapt_layer_scale=True)
    own = trunk.state_dict()
    for key in [k for k in state if k.startswith("head") and k in own and own[k].shape != state[k].shape]:
        log.warning(
            "%s: %s is %s, the model's is %s; it starts anew",
            path,
            key,
            *map(tuple, (state.pop(key).shape, own[key].shape)),
        )
    head = {k for k in own if k.startswith(("head.", "head_dist."))}
    missing = sorted(set(own) - set(state) - head)
    unexpected = sorted(set(state) - set(own) - {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"})
    wrong = sorted(k for k in set(state) & set(own) if own[k].shape != state[k].shape)
    if missing or unexpected or wrong:
        raise FewtokensError(
            f"{path} holds the weights of this model",
            expected=f"the {len(own)} names and shapes of {type(trunk).__name__}",
            got=f"missing {missing[:5]}, unexpected {unexpected[:5]}, of another shape {wrong[:5]} "
            f"({len(missing)}, {len(unexpected)} and {len(wrong)} in all)",
            fix="set backbone.name to the model that the file was made from",
        )
    trunk.load_state_dict(state, strict=False)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a torch file; nothing in it is executed.

    Raises:
        FewtokensError: There is no such file, or it is neither, or it holds pickled code.
    """
    if not path.is_file():
        raise FewtokensError("backbone.weights is a file", expected="an existing file", got=path, fix="check the path")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        for key in ("state_dict", "model"):
            state = state[key] if isinstance(state, dict) and key in state else state
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise TypeError("it does not hold tensors by their names")
    except Exception as error:  # each format has errors of its own
        raise FewtokensError(
            "Weights are a .safetensors file or a torch file of plain tensors",
            expected="names and tensors, in a file that loads with weights_only=True",
            got=f"{path}: {type(error).__name__}: {error}".splitlines()[0],
            fix="convert the file to .safetensors on a machine where you trust it",
        ) from error
    return state


def _check_family(name: str) -> None:
    base = name.partition(".")[0]
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3)
        raise FewtokensError(
            "backbone.name is a name of timm's",
            expected=f"one of its {len(timm.list_models())}, such as {', '.join(near or ['vit_small_patch16_224'])}",
            got=name,
            fix="list them with: python -c \"import timm; print(timm.list_models('*vit*'))\"",
        )
    with torch.device("meta"):  # what timm itself would build, without its memory
        model: Any = timm.create_model(base)
    # Only exact types: a subclass may compute something else, and our blocks would replace it without a word.
    plain = type(model) in (VisionTransformer, VisionTransformerDistilled)
    if not plain or any(type(b) is not TimmBlock or type(b.attn) is not TimmAttention for b in model.blocks):
        block = type(model.blocks[0]).__name__ if plain else "not looked at"
        raise FewtokensError(
            "Tokenizers work inside timm's VisionTransformer with its standard blocks",
            expected="a vit, deit, deit3, dinov2, clip, siglip or gap model with Block and Attention",
            got=f"{name} is a {type(model).__name__} (blocks: {block})",
            fix="choose another with backbone.name=deit_small_patch16_224",
        )
