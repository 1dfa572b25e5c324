"""Any timm VisionTransformer by its name, with pretrained weights, around our encoder."""

import difflib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from timm.layers.attention import Attention as TimmAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from fewtokens.backbones.vit import TokenizerRecipe, ViT, check_options, check_sizes
from fewtokens.errors import FewtokensError, first_line, listed
from fewtokens.layers.attention import Attention
from fewtokens.layers.block import Block
from fewtokens.layers.embedding import Size
from fewtokens.network import responds

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
    grad_checkpointing: bool = False,
    options: Mapping[str, Any] | None = None,
) -> ViT:
    """Build a timm VisionTransformer (vit, deit, deit3, dinov2, clip, siglip, gap ...) around our encoder.

    Args:
        name: timm's name, with or without its pretrained tag ("deit_small_patch16_224.fb_in1k").
        image_size: Height and width of the input in pixels. Positions are resampled if it is not the pretrained one.
        num_classes: Number of outputs. A head of another size is initialized at random.
        tokenizer: The blocks that get a tokenizer, and its recipe.
        channels: Number of image channels.
        pretrained: Download timm's weights of that name.
        weights: File of weights in timm's (or the original) names: .safetensors, or a torch file without code.
        grad_checkpointing: Recompute the activations of every layer in the backward pass, which saves memory.
        options: Further arguments of the timm model.

    Raises:
        FewtokensError: The name is unknown, the model is of another family, there is no network, or the file does not
            fit the model.
    """
    _check_family(name)
    check_options(options or {})
    settings = dict(img_size=image_size, num_classes=num_classes, in_chans=channels, **(options or {}))
    vit: Any = create(name, pretrained, block_fn=Block, attn_layer=Attention, **settings)
    # timm would ignore the pixels at the edge of an image that the patch size does not divide.
    patch_size, heads = tuple(vit.patch_embed.patch_size), vit.blocks[0].attn.num_heads
    check_sizes(image_size, patch_size, vit.embed_dim, heads, len(vit.blocks))
    if weights is not None:
        load_weights(vit, Path(weights))
    model = ViT(vit, tokenizer)
    model.set_grad_checkpointing(grad_checkpointing)
    return model


def create(name: str, pretrained: bool, **settings: Any) -> nn.Module:
    """Return timm's model of a name, of any family.

    Args:
        name: timm's name, with or without its pretrained tag.
        pretrained: Download timm's weights of that name.
        settings: Arguments of the model.

    Raises:
        FewtokensError: timm cannot build it, or there is no network.
    """
    try:
        with _offline_without_network() if pretrained else nullcontext():
            return timm.create_model(name, pretrained=pretrained, **settings)
    except Exception as error:
        if not pretrained:
            own = {key: value for key, value in settings.items() if key not in ("block_fn", "attn_layer")}
            raise FewtokensError(
                f"timm cannot build {name} with {own}: {error}. "
                "Check data.image_size, data.channels and backbone.options."
            ) from error
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        raise FewtokensError(
            f"timm could not download the weights of {name}: {reason}. Check the pretrained tag and the network, or "
            "download the file elsewhere and set backbone.weights=<file> backbone.pretrained=false."
        ) from error


@contextmanager
def _offline_without_network() -> Iterator[None]:
    """Return a context in which the Hugging Face Hub is not asked if it does not respond.

    Cached weights are then loaded at once, and others fail at once. The Hub's own retries take a minute.
    """
    before = constants.HF_HUB_OFFLINE
    if not responds(constants.ENDPOINT, 5.0):
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def load_weights(vit: VisionTransformer, path: Path) -> None:
    """Load a file of weights into a timm model. A head of another size is skipped with a warning.

    Raises:
        FewtokensError: The file is missing, holds code, or its names do not fit the model's.
    """
    state = checkpoint_filter_fn(read_weights(path), vit, adapt_layer_scale=True)
    own = vit.state_dict()
    for key in [k for k in state if k.startswith("head") and k in own and own[k].shape != state[k].shape]:
        shapes = tuple(state.pop(key).shape), tuple(own[key].shape)
        log.warning("%s: %s is %s, but the model's is %s; it is initialized at random", path, key, *shapes)
    head = {k for k in own if k.startswith(("head.", "head_dist."))}
    missing = sorted(set(own) - set(state) - head)
    unexpected = sorted(set(state) - set(own) - {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"})
    mismatched = sorted(k for k in set(state) & set(own) if own[k].shape != state[k].shape)
    if missing or unexpected or mismatched:
        raise FewtokensError(
            f"{path} does not fit the {len(own)} parameters of {type(vit).__name__}: missing {listed(missing)}, "
            f"unexpected {listed(unexpected)}, of another shape {listed(mismatched)}. "
            "Set backbone.name to the model that the file was made from."
        )
    vit.load_state_dict(state, strict=False)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file or of a torch file. No code in the file is executed.

    Raises:
        FewtokensError: The file does not exist, has another format, or holds pickled code.
    """
    if not path.is_file():
        raise FewtokensError(f"There is no file {path}. Set backbone.weights to a file of weights.")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        for key in ("state_dict", "model"):
            state = state[key] if isinstance(state, dict) and key in state else state
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise TypeError("it does not map names to tensors")
    except Exception as error:  # every format has its own errors
        raise FewtokensError(
            f"{path} must be a .safetensors file, or a torch file of tensors that loads with weights_only=True, but: "
            f"{type(error).__name__}: {first_line(error)}. Convert it to .safetensors on a machine where you trust it."
        ) from error
    return state


def _check_family(name: str) -> None:
    base = name.partition(".")[0]
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3) or ["vit_small_patch16_224"]
        raise FewtokensError(
            f"`backbone.name` must be the name of a timm model, such as {', '.join(near)}, got {name!r}. "
            "List them with: python -c \"import timm; print(timm.list_models('*vit*'))\""
        )
    with torch.device("meta"):  # builds timm's own model without allocating its memory
        model: Any = timm.create_model(base)
    check_family(model, name)


def check_family(model: nn.Module, name: str) -> None:
    """Raise an error if a model is not timm's VisionTransformer with its standard blocks.

    Args:
        model: Any model.
        name: How the error names the model.

    Raises:
        FewtokensError: It is another model.
    """
    # Only exact types: a subclass may compute something else, which our blocks would silently replace.
    supported = type(model) in (VisionTransformer, VisionTransformerDistilled)
    blocks: Any = model.blocks if supported else ()
    if not supported or any(type(b) is not TimmBlock or type(b.attn) is not TimmAttention for b in blocks):
        block = f" with blocks of type {type(blocks[0]).__name__}" if supported else ""
        raise FewtokensError(
            "Tokenizers work in timm's VisionTransformer with its standard blocks (vit, deit, deit3, dinov2, clip, "
            f"siglip, gap), but {name} is a {type(model).__name__}{block}. "
            "Choose another model, such as backbone.name=deit_small_patch16_224."
        )
