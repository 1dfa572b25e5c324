"""A method put to work inside a timm model that exists already: `fewtokens.reduce`.

The model stays the same object, with the same parameters under the same names. Only the classes of the model, of its
blocks and of their attention change, to subclasses of timm's, and every block gets one more child, its tokenizer.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

from jaxtyping import Float
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fewtokens.backbones.encoder import At, Encoder, EncoderLayer, build_tokenizers
from fewtokens.backbones.hugging_face import is_hugging_face, to_timm
from fewtokens.backbones.pretrained import check_family
from fewtokens.backbones.vit import ViT, check_pooling, layer_context
from fewtokens.errors import FewtokensError, check, first_line
from fewtokens.layers.attention import Attention
from fewtokens.layers.block import Block
from fewtokens.tokenizers.base import Tokenizer
from fewtokens.tokenizers.recipes import Method, recipe


class InPlaceLayer(EncoderLayer, Block):
    """A timm block that is its own `EncoderLayer`. Its parameters keep timm's names; `tokenizer` is a further child.

    `block` is the same block without the tokenizer, for the tokenizer to call. It is no child, and has the same
    children, so that a module that replaces one of them acts in both.
    """

    @classmethod
    def put_into(cls, block: Any, tokenizer: Tokenizer) -> None:
        """Change one of timm's blocks into an `InPlaceLayer`."""
        block.attn.__class__, block.__class__ = Attention, cls
        block.tokenizer = tokenizer
        plain = Block.__new__(Block)
        nn.Module.__init__(plain)
        plain.training = block.training
        plain.__dict__["_modules"] = block._modules
        block.__dict__["plain"] = plain

    @property
    def block(self) -> Block:  # type: ignore[override]  # a property in place of a child
        """Return the block without the tokenizer."""
        return self.__dict__["plain"]

    def train(self, mode: bool = True) -> "InPlaceLayer":
        """Set the mode of the block without the tokenizer, too, which is no child."""
        self.block.training = mode
        return super().train(mode)


class InPlaceEncoder(Encoder, nn.Sequential):
    """The `blocks` of a timm model as `Encoder`. Its layers are its children, so that their names are timm's."""

    @property
    def layers(self) -> "InPlaceEncoder":  # type: ignore[override]  # a property in place of a child
        """Return the layers: the encoder itself, which is a sequence of them."""
        return self


class InPlaceViT(ViT):
    """A timm model that is its own `ViT`: `forward`, `embed`, `classify` and `trace` are ours, the rest is timm's.

    `reduce` makes it of a model of the user. It is an instance of timm's class, too. `forward_features` returns fewer
    tokens than timm's, and what needs all of them is an error.
    """

    frames = 1

    @property
    def vit(self) -> VisionTransformer:  # type: ignore[override]  # a property in place of a child
        """Return the timm model: the model itself."""
        return cast(VisionTransformer, self)

    @property
    def encoder(self) -> Encoder:  # type: ignore[override]  # a property in place of a child
        """Return the blocks."""
        return cast(Encoder, self.blocks)

    def forward_features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Return the tokens that are left after the last block and timm's final norm (B, P+kept, C); zeros for padding.

        Raises:
            FewtokensError: The head pools patches that count differently, which a tensor of features does not tell it.
        """
        tokens = self.encoder(self.embed(images))
        if not tokens.uniform and self.global_pool != "token":
            raise FewtokensError(
                "The tokens that are left represent different numbers of patches, or some are padding, which "
                "forward_head cannot know. Call model(images), which with num_classes=0 returns the pooled features, "
                "or model.classify(model.encoder(model.embed(images)))."
            )
        features = self.vit.norm(tokens.x)
        return features if tokens.mask is None else features.masked_fill(~tokens.mask[..., None], 0.0)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of every layer in the backward pass instead of storing them."""
        super().set_grad_checkpointing(enable)
        cast(Any, super(ViT, self)).set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Return timm's names of the parameters without weight decay."""
        return cast(Any, super(ViT, self)).no_weight_decay()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's description of the layers, for learning-rate decay by layer. Tokenizers belong to the head."""
        found: dict[str, Any] = cast(Any, super(ViT, self)).group_matcher(coarse)
        own = r"(\d+)\.(?!tokenizer\.)"
        return found | {"blocks": [(name.replace(r"(\d+)", own), last) for name, last in found["blocks"]]}

    def set_input_size(self, *_: object, **__: object) -> NoReturn:
        """Raise an error, since tokenizers are built for one grid of patches."""
        raise FewtokensError("The tokenizers were built for this input size. Call set_input_size before reduce.")

    def forward_intermediates(self, *_: object, **__: object) -> NoReturn:
        """Raise an error, since reduced tokens form no grid."""
        raise FewtokensError(
            "Tokens that were dropped or merged form no feature maps. Use fewtokens.trace(model, images), which tells "
            "what became of every patch, or forward_intermediates before reduce."
        )

    get_intermediate_layers = prune_intermediate_layers = forward_intermediates


class InPlaceVisionTransformer(InPlaceViT, VisionTransformer):
    """timm's VisionTransformer with a method at work."""


class InPlaceVisionTransformerDistilled(InPlaceViT, VisionTransformerDistilled):
    """timm's VisionTransformerDistilled with a method at work."""


IN_PLACE: dict[type[nn.Module], type[InPlaceViT]] = {
    VisionTransformer: InPlaceVisionTransformer,
    VisionTransformerDistilled: InPlaceVisionTransformerDistilled,
}


def reduce(model: nn.Module, method: Method, at: At | None = None, **arguments: Any) -> ViT:
    """Put a token-reduction method to work in a Vision Transformer, without training, config or run directory.

    A timm model is changed in place and returned: the same object and parameters, on the same device and of the same
    type. Its `state_dict` keeps timm's names; a method with parameters adds `blocks.<index>.tokenizer.*`, initialized
    at random. It trains, compiles and is wrapped in DDP as before; do that, and build the optimizer, after `reduce`. To
    keep the dense model as well, pass a `copy.deepcopy`.

    A model that `reduce` returned, or one of our backbones, gets the new method in place of the one it has; "none"
    makes it the plain transformer again.

    Args:
        model: A timm VisionTransformer (vit, deit, deit3, dinov2, clip, siglip, gap), pretrained or not, or one of our
            backbones. A ViT, DeiT or DINOv2 of Hugging Face's transformers is not changed: a timm model with a copy of
            its weights is returned, see `fewtokens.backbones.hugging_face.to_timm`.
        method: A name from `methods`, such as "tome"; or a subclass of `Tokenizer`, to try a method of your own.
        at: The blocks that get a tokenizer: an index, a relative depth from 0 to 1, a list of them, or "0.5:" for all
            blocks from there on. None for the method's default, which is in `configs/tokenizer/<method>.yaml`.
        arguments: Arguments of the method, such as `r` of "tome", `keep_rate` or `num_tokens`; the others have the
            defaults of that file.

    Returns:
        The model, with logits equal bit for bit to those of `backbone=timm tokenizer=<method>`.

    Raises:
        FewtokensError: The method, an argument or a value is wrong, or the model cannot have the method. The model is
            then unchanged.
    """
    try:
        at, build = recipe(method, at, arguments)
        model = to_timm(model) if is_hugging_face(model) else model
        check_model(model)
        blocks = cast(Any, at)
        if isinstance(model, ViT):
            return _replaced(model, build, blocks)
        vit = cast(VisionTransformer, model)
        tokenizers = _like(vit, build_tokenizers(build, blocks, layer_context(vit)))
    except FewtokensError as error:
        raise FewtokensError(in_python(str(error))) from error
    except (TypeError, ValueError) as error:  # of a method, for an element of a list, or of a class of the user
        raise FewtokensError(f"{method!r} does not accept {arguments}: {first_line(error)}. Check them.") from error
    return _put_in_place(vit, tokenizers)


def check_model(model: nn.Module) -> None:
    """Raise an error if a model cannot have a method.

    Raises:
        FewtokensError: It is wrapped or compiled, of another family, or pools in a way that we do not carry.
    """
    wrapped = next((name for name in ("_orig_mod", "module") if hasattr(model, name)), None)
    if wrapped:
        raise FewtokensError(
            f"reduce changes the model itself, got a {type(model).__name__} around it. Call reduce first, and then "
            "torch.compile, DistributedDataParallel or FSDP."
        )
    check(isinstance(model, nn.Module), "model", "a timm VisionTransformer, as timm.create_model returns it", model)
    if not isinstance(model, ViT):
        check_family(model, "the model")
        check_pooling(cast(VisionTransformer, model))


def in_python(message: str) -> str:
    """Return an error's message with names of the config replaced by those of Python's arguments."""
    for word in (" (set backbone.pool=token)", "backbone.name=", "tokenizer@"):
        message = message.replace(word, "")
    return re.sub(r"tokenizer\.(build\.)?(?=\w)", "", message)


def _replaced(model: ViT, build: Callable[..., Tokenizer], at: At) -> ViT:
    tokenizers = _like(model, build_tokenizers(build, at, model.encoder.tokenizers[0].context))
    model.check_tokenizers(tokenizers)
    model.encoder.replace_tokenizers(tokenizers)
    return model


def _like(model: nn.Module, tokenizers: Sequence[Tokenizer]) -> list[Tokenizer]:
    """Return the tokenizers on the device of a model, of its floating-point type, and in its mode."""
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    return [tokenizer.to(like.device, like.dtype).train(model.training) for tokenizer in tokenizers]


def _put_in_place(vit: VisionTransformer, tokenizers: Sequence[Tokenizer]) -> InPlaceViT:
    model, blocks = cast(Any, vit), cast(Any, vit.blocks)
    for block, tokenizer in zip(blocks, tokenizers, strict=True):
        InPlaceLayer.put_into(block, tokenizer)
    blocks.__class__ = InPlaceEncoder
    blocks.grad_checkpointing = vit.grad_checkpointing
    model.__class__ = IN_PLACE[type(vit)]
    return model
