"""Video Vision Transformers: a ViT over tubelets, in the four models of the ViViT paper.

Arnab et al., "ViViT: A Video Vision Transformer", ICCV 2021 (arXiv 2103.15691), section 3.3, as implemented in scenic.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fewtokens.backbones.vit import (
    Norm,
    Pool,
    TokenizerRecipe,
    ViT,
    build_timm,
    check_heads,
    load_weights,
    pool_settings,
)
from fewtokens.errors import FewtokensError, check_choice
from fewtokens.layers.block import Block
from fewtokens.layers.embedding import Pixels, TubeletEmbed, Tubelets
from fewtokens.layers.factorised import USE_INSTEAD, DotProductBlock, FactorisedBlock, SelfAttentionBlock
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
    """Models 1, 3 and 4: one sequence of all tubelets of a clip. The models differ in their blocks.

    Args:
        vit: timm's model, with `TubeletEmbed` as its embedding.
        tokenizer: The blocks that get a tokenizer, and its recipe.
        frames: Number T of time steps in which the tokens are laid out.

    Raises:
        FewtokensError: The blocks attend over time, and the tokenizer does not keep the same tokens in every time step.
    """

    def __init__(self, vit: VisionTransformer, tokenizer: TokenizerRecipe, frames: int) -> None:
        super().__init__(vit, tokenizer, frames)
        assert isinstance(vit.patch_embed, TubeletEmbed)
        self.tubelets: Tubelets = vit.patch_embed.tubelets
        self.check_tokenizers(self.encoder.tokenizers)

    def check_tokenizers(self, tokenizers: Sequence[Tokenizer]) -> None:
        """Raise an error if blocks attend over time, and a tokenizer drops or merges tokens one by one.

        Raises:
            FewtokensError: One of them does.
        """
        if not any(isinstance(block, FactorisedBlock) for block in self.encoder.blocks):
            return
        for tokenizer in tokenizers:
            if type(tokenizer) is not Tokenizer and not tokenizer.keeps_frames:
                raise FewtokensError(
                    "Attention over time needs the same tokens in every time step, but "
                    f"{type(tokenizer).__name__} drops or merges tokens one by one. {USE_INSTEAD}"
                )

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Return the shape of a clip: (channels, frames, height, width)."""
        return (self.tubelets.channels, self.tubelets.clip_frames, *self.tubelets.sides)

    def pictures(self, clips: Float[Tensor, "b c *t h w"]) -> Float[Tensor, "bt c h w"]:
        """Return the middle frame of every time step (B*T, channels, H, W)."""
        clips = clips[:, :, None] if clips.ndim == 4 else clips
        return self.tubelets.central_frames(clips).transpose(1, 2).flatten(0, 1)

    def _check_shape(self, clips: Tensor) -> None:
        channels, frames, *sides = expected = self.sample_shape
        found = tuple(clips.shape[1:])
        if found != expected and not (frames == 1 and found == (channels, *sides)):
            raise FewtokensError(
                "The model was built for clips (batch, channels, frames, height, width) = (B, {}, {}, {}, {}), ".format(
                    *expected
                )
                + f"got {tuple(clips.shape)}. Set data.frames, data.image_size and data.channels to those of the data."
            )


class FactorisedEncoder(ViViT):
    """Model 2: an encoder within every time step, followed by an encoder over the time steps.

    Tokenizers act in the first encoder, in which every time step is a sample, so that all of them work as on images.
    The second encoder is a ViT on an image of T x 1 pixels, with its own class token, positions, norm and pooling.

    Args:
        vit: timm's model, whose `TubeletEmbed` embeds every time step on its own. It has no head unless `temporal` is
            None.
        tokenizer: The blocks that get a tokenizer, and its recipe.
        temporal: The second encoder, which maps features (B, C, T, 1) to logits; None to average over time instead.
    """

    def __init__(self, vit: VisionTransformer, tokenizer: TokenizerRecipe, temporal: ViT | None) -> None:
        super().__init__(vit, tokenizer, frames=1)
        self.temporal = temporal

    def classify(self, tokens: Tokens) -> Float[Tensor, "b classes"]:
        """Pool the tokens of every time step (B*T, ...), apply the temporal encoder and return logits (B, classes)."""
        steps = super().classify(tokens).unflatten(0, (-1, self.tubelets.steps))
        return steps.mean(dim=1) if self.temporal is None else self.temporal(steps.transpose(1, 2)[..., None])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the layers of both encoders in the backward pass."""
        super().set_grad_checkpointing(enable)
        if self.temporal is not None:
            self.temporal.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the positions and class tokens of both encoders."""
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
    pool: Pool | None = None,
    norm: Norm | None = None,
    weights: str | None = None,
    grad_checkpointing: bool = False,
    options: Mapping[str, Any] | None = None,
) -> ViViT:
    """Build a ViViT of any size with random weights; `fewtokens.backbones.image_init` starts it from an image model.

    Args:
        tubelets: How clips (B, channels, frames, H, W) are cut into tokens.
        num_classes: Number of outputs.
        tokenizer: The blocks that get a tokenizer, and its recipe.
        dim: Width C of the tokens.
        depth: Number of blocks; of the factorised encoder, those within time steps.
        heads: Number of attention heads; must divide the width.
        model: "spatio_temporal" (model 1: every tubelet attends to all), "factorised_encoder" (2: an encoder within
            time steps and one over them), "factorised_self_attention" (3: every block attends within time steps and
            then over time; "factorised_self_attention_time_space" in the other order), "factorised_dot_product" (4:
            half of the heads attends within time steps, half over time).
        temporal_depth: Blocks of the factorised encoder's second encoder; 0 averages over time instead.
        pool: Input of the head: the class token ("token"), or the patches pooled by one of timm's poolings. None is the
            class token in models 1 and 2, and the mean in models 3 and 4, which cannot have a class token.
        norm: Position of the final norm, "before_pool" or "after_pool". None is scenic's: before the pooling.
        weights: "scenic:<file>" to start from a checkpoint of scenic, see `fewtokens.backbones.converters`.
        grad_checkpointing: Recompute the activations of every layer in the backward pass, which saves memory.
        options: Further arguments of timm's VisionTransformer. `drop_path_rate` is timm's stochastic depth, which
            divides the kept samples by the probability to keep them; scenic's ViViT does not. `act_layer: gelu_tanh` is
            Flax's GELU. LayerScale (`init_values`) is in the blocks of the image model alone.

    Raises:
        FewtokensError: The sizes do not fit together, or the model does not have an option.
    """
    check_heads(dim, heads, depth)
    settings, sizes = _settings(model, pool, norm, options or {}), {"embed_dim": dim, "num_heads": heads}
    per_step = model == "factorised_encoder"
    has_temporal = per_step and temporal_depth > 0
    timm_model = build_timm(
        settings | ({"drop_rate": 0.0} if has_temporal else {}),  # no dropout before a head that does not exist
        **sizes,
        depth=depth,
        in_chans=tubelets.channels,
        num_classes=0 if has_temporal else num_classes,
        embed_layer=partial(TubeletEmbed, tubelets, per_step),
        block_fn=_block(model, tubelets.steps),
    )
    if per_step:
        temporal = (
            _temporal_encoder(settings, sizes, tubelets.steps, temporal_depth, num_classes) if has_temporal else None
        )
        network: ViViT = FactorisedEncoder(timm_model, tokenizer, temporal)
    else:
        network = ViViT(timm_model, tokenizer, tubelets.steps)
    network.set_grad_checkpointing(grad_checkpointing)
    load_weights(network, weights)
    return network


def _temporal_encoder(settings: dict[str, Any], sizes: dict[str, int], steps: int, depth: int, num_classes: int) -> ViT:
    timm_model = build_timm(
        # Only patches are dropped, no time steps. LayerScale is absent, as in scenic: at 1e-5, as in image models, the
        # class token would say nothing about the clip, and hardly learn to in a fine-tuning.
        settings | {"patch_drop_rate": 0.0, "init_values": None},
        **sizes,
        depth=depth,
        in_chans=sizes["embed_dim"],
        num_classes=num_classes,
        img_size=(steps, 1),
        patch_size=1,
        embed_layer=Pixels,
    )
    return ViT(timm_model, PLAIN)


def _block(model: Model, steps: int) -> Any:
    if model == "factorised_dot_product":
        return partial(DotProductBlock, steps)
    if model in TWO_ATTENTIONS:
        return partial(SelfAttentionBlock, steps, model.endswith("time_space"))
    return Block


def _settings(model: Model, pool: str | None, norm: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of timm's model that depend on the pooling, and the options."""
    check_choice("backbone.model", model, get_args(Model))
    over_time = model not in ("spatio_temporal", "factorised_encoder")
    pool = pool or ("avg" if over_time else "token")
    settings = {"fc_norm": False, **pool_settings(pool, norm, options)}
    invalid = [name for name in ("class_token", "reg_tokens", "patch_drop_rate") if settings.get(name)]
    if over_time and invalid:
        raise FewtokensError(
            f"backbone.model={model} attends over the time steps of every position, so it can have no class or "
            f"register token and no patch dropout, got {', '.join(f'{name}={settings[name]}' for name in invalid)}. "
            "Set backbone.pool=avg, or backbone.model=spatio_temporal or factorised_encoder."
        )
    return settings
