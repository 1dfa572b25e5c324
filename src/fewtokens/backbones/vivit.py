"""ViViT: the ViT whose patches are tubelets, and three ways of attending over space and time by turns.

Arnab et al., "ViViT: A Video Vision Transformer", ICCV 2021 (arXiv 2103.15691), section 3.3, as scenic has it.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, get_args

from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fewtokens.backbones.trunk import check_heads, make_trunk
from fewtokens.backbones.vit import TokenizerRecipe, ViT
from fewtokens.errors import FewtokensError
from fewtokens.layers.block import Block
from fewtokens.layers.embedding import Pixels, TubeletEmbed, Tubelets
from fewtokens.layers.factorised import DotProductBlock, FactorisedBlock, SelfAttentionBlock
from fewtokens.tokenizers.base import Tokenizer
from fewtokens.tokens import Tokens

Model = Literal[
    "spatio_temporal",
    "factorised_encoder",
    "factorised_self_attention",
    "factorised_self_attention_time_space",
    "factorised_dot_product",
]
TWO_ATTENTIONS = ("factorised_self_attention", "factorised_self_attention_time_space")
PLAIN = TokenizerRecipe(at=[], build=Tokenizer)


class ViViT(ViT):
    """Models 1, 3 and 4: one sequence of all tubelets of a clip; what differs are the blocks.

    Args:
        trunk: timm's model, with `TubeletEmbed` for its embedding.
        tokenizer: Where the tokenizer stands and its recipe.
        frames: Time steps in which the tokens are laid out.

    Raises:
        FewtokensError: The blocks attend over time, and the tokenizer does not keep as many tokens in every time step.
    """

    def __init__(self, trunk: VisionTransformer, tokenizer: TokenizerRecipe, frames: int) -> None:
        super().__init__(trunk, tokenizer, frames)
        assert isinstance(trunk.patch_embed, TubeletEmbed)
        self.tubelets: Tubelets = trunk.patch_embed.tubelets
        if any(isinstance(block, FactorisedBlock) for block in self.encoder.blocks):
            _check_kept(list(self.encoder.tokenizers))

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(channels, frames, height, width) of a clip."""
        return (self.tubelets.channels, self.tubelets.clip_frames, *self.tubelets.sides)

    def pictures(self, clips: Float[Tensor, "b c *t h w"]) -> Float[Tensor, "bt c h w"]:
        """The middle frame of every time step (B*T, channels, H, W)."""
        clips = clips[:, :, None] if clips.ndim == 4 else clips
        return self.tubelets.centres(clips).transpose(1, 2).flatten(0, 1)

    def _check_shape(self, clips: Tensor) -> None:
        channels, frames, *sides = expected = self.sample_shape
        found = tuple(clips.shape[1:])
        if found != expected and not (frames == 1 and found == (channels, *sides)):
            raise FewtokensError(
                "A ViViT takes clips of the size that it was built for",
                expected="(batch, channels, frames, height, width) = (B, {}, {}, {}, {})".format(*expected),
                got=tuple(clips.shape),
                fix="set data.frames, data.image_size and data.channels to what the data gives",
            )


class FactorisedEncoder(ViViT):
    """Model 2: an encoder within every time step, then one over the time steps.

    Tokenizers stand in the first, where every time step is a sample of its own: all of them work as on images. The
    second is a ViT on a picture of T x 1 pixels, with class token, positions, norm and pooling of its own.

    Args:
        trunk: timm's model with `TubeletEmbed` by time step; without a head, unless `temporal` is None.
        tokenizer: Where the tokenizer stands and its recipe.
        temporal: The second encoder, features (B, C, T, 1) to logits; None for the mean over time.
    """

    def __init__(self, trunk: VisionTransformer, tokenizer: TokenizerRecipe, temporal: ViT | None) -> None:
        super().__init__(trunk, tokenizer, frames=1)
        self.temporal = temporal

    def classify(self, tokens: Tokens) -> Float[Tensor, "b classes"]:
        """Final norm and pooling of every time step (B*T, ...), the temporal encoder and the head (B, classes)."""
        steps = super().classify(tokens).unflatten(0, (-1, self.tubelets.steps))
        return steps.mean(dim=1) if self.temporal is None else self.temporal(steps.transpose(1, 2)[..., None])

    def no_weight_decay(self) -> set[str]:
        """Positions and class tokens of both encoders."""
        inner: set[str] = set() if self.temporal is None else self.temporal.no_weight_decay()
        return super().no_weight_decay() | {f"temporal.{name}" for name in inner}


def vivit(
    *,
    tubelets: Tubelets,
    num_classes: int,
    tokenizer: TokenizerRecipe,
    dim: int,
    depth: int,
    heads: int,
    model: Model = "spatio_temporal",
    temporal_depth: int = 4,
    pool: Literal["token", "avg", "max", "avgmax", "map"] | None = None,
    options: Mapping[str, Any] | None = None,
) -> ViViT:
    """A ViViT of any size, from random weights; `fewtokens.backbones.image_init` starts it from an image model.

    Args:
        tubelets: How clips (B, channels, frames, H, W) are cut into tokens.
        num_classes: Outputs.
        tokenizer: Where the tokenizer stands and its recipe.
        dim: Width of the tokens.
        depth: Blocks; of the factorised encoder those within time steps.
        heads: Attention heads; must divide the width.
        model: "spatio_temporal" (model 1: every tubelet attends to all), "factorised_encoder" (2: an encoder within
            time steps, one over them), "factorised_self_attention" (3: in every block attention within time steps, then
            over time; "..._time_space" the other way round), "factorised_dot_product" (4: half of the heads each).
        temporal_depth: Blocks of the factorised encoder's second encoder; 0 for the mean over time instead.
        pool: What the head reads: the class token, or the patches by one of timm's poolings. None: the class token in
            models 1 and 2, the mean in models 3 and 4, which can have no class token.
        options: Any other argument of timm's VisionTransformer. `drop_path_rate` is timm's stochastic depth: what is
            kept is divided by the probability to keep it, which scenic's ViViT does not do. `act_layer: gelu_tanh` is
            Flax's GELU. The final norm comes before pooling, as in scenic, unless `fc_norm: true`.

    Raises:
        FewtokensError: Sizes that do not fit, an unknown model or option, or what the model cannot have.
    """
    check_heads(dim, heads, depth)
    settings, sizes = _settings(model, pool, options or {}), {"embed_dim": dim, "num_heads": heads}
    steps, two = tubelets.steps, model == "factorised_encoder" and temporal_depth > 0
    trunk = make_trunk(
        settings | ({"drop_rate": 0.0} if two else {}),  # dropout ahead of a head that is not there
        **sizes,
        depth=depth,
        in_chans=tubelets.channels,
        num_classes=0 if two else num_classes,
        embed_layer=partial(TubeletEmbed, tubelets, model == "factorised_encoder"),
        block_fn=_block(model, steps),
    )
    if model != "factorised_encoder":
        return ViViT(trunk, tokenizer, steps)
    if not two:
        return FactorisedEncoder(trunk, tokenizer, None)
    over_time = make_trunk(
        settings | {"patch_drop_rate": 0.0},  # time steps are no patches
        **sizes,
        depth=temporal_depth,
        in_chans=dim,
        num_classes=num_classes,
        img_size=(steps, 1),
        patch_size=1,
        embed_layer=Pixels,
    )
    return FactorisedEncoder(trunk, tokenizer, ViT(over_time, PLAIN))


def _block(model: Model, steps: int) -> Any:
    if model == "factorised_dot_product":
        return partial(DotProductBlock, steps)
    if model in TWO_ATTENTIONS:
        return partial(SelfAttentionBlock, steps, model.endswith("time_space"))
    return Block


def _settings(model: Model, pool: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of timm's model that say what the head reads, and the options."""
    if model not in get_args(Model):
        raise FewtokensError(
            "ViViT comes in several models",
            expected=" or ".join(get_args(Model)),
            got=repr(model),
            fix="set backbone.model=spatio_temporal",
        )
    lattice = model not in ("spatio_temporal", "factorised_encoder")
    pool = pool or ("avg" if lattice else "token")
    settings = {"class_token": pool == "token", "global_pool": pool, "fc_norm": False, **options}
    wrong = [name for name in ("class_token", "reg_tokens", "patch_drop_rate") if settings.get(name)]
    if lattice and wrong:
        raise FewtokensError(
            f"{model} attends over the time steps of every position, so all tokens have a position and none is dropped",
            expected="no class or register token and no patch dropout",
            got=", ".join(f"{name}={settings[name]}" for name in wrong),
            fix="set backbone.pool=avg, or backbone.model=spatio_temporal or factorised_encoder",
        )
    return settings


def _check_kept(tokenizers: list[Any]) -> None:
    for tokenizer in tokenizers:
        if type(tokenizer) is not Tokenizer and not tokenizer.keeps_frames:
            raise FewtokensError(
                "Attention over time needs the same tokens in every time step",
                expected="a tokenizer that makes as many in each, such as token_learner, token_fuser or pool",
                got=f"{type(tokenizer).__name__}, which drops or merges them one by one",
                fix="set backbone.model=spatio_temporal or factorised_encoder, or tokenizer=token_learner",
            )
