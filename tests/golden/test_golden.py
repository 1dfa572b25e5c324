"""Our modules with the official parameters give the official numbers. README.md lists the sources."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewtokens.backbones.keras_mini_vit import keras_mini_vit
from fewtokens.backbones.vit import ViT, vit
from fewtokens.backbones.vivit import ViViT, vivit
from fewtokens.layers.block import Block
from fewtokens.layers.embedding import Tubelets
from fewtokens.tokenizers.base import LayerContext, Tokenizer
from fewtokens.tokenizers.token_fuser import Fuse, TokenFuser
from fewtokens.tokenizers.token_learner import TokenLearner, TokenLearnerV11
from fewtokens.tokens import Tokens

HERE = Path(__file__).parent
Golden = dict[str, Tensor]
State = dict[str, Tensor]
CONTEXT = LayerContext(dim=24, heads=3, block=0, depth=1)
close = partial(torch.testing.assert_close, rtol=1e-5, atol=2e-5)
closer = partial(torch.testing.assert_close, rtol=1e-5, atol=5e-6)


def golden(name: str) -> Golden:
    with np.load(HERE / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def on_grid(x: Tensor) -> Tokens:
    """Return the features (B, H, W, C) as Tokens."""
    return Tokens(x.flatten(1, 2), grid=(x.shape[1], x.shape[2]))


def norm(g: Golden, source: str, target: str) -> State:
    scale, bias = ("scale", "bias") if f"{source}.scale" in g else ("gamma", "beta")
    return {f"{target}.weight": g[f"{source}.{scale}"], f"{target}.bias": g[f"{source}.{bias}"]}


def dense(g: Golden, source: str, target: str) -> State:
    return {f"{target}.weight": g[f"{source}.kernel"].T, f"{target}.bias": g[f"{source}.bias"]}


def conv(kernel: Tensor) -> Tensor:
    """Convert a kernel from HWIO to OIHW."""
    return kernel.permute(3, 2, 0, 1)


def attention(g: Golden, names: list[str], out: str, joint: str, target: str) -> State:
    """Convert query, key and value (C, heads, D) to timm's single matrix, and the output (heads, D, C)."""
    qkv = [g[f"{name}{joint}kernel"].flatten(1).T for name in names]
    bias = [g[f"{name}{joint}bias"].flatten() for name in names]
    return {
        f"{target}.qkv.weight": torch.cat(qkv),
        f"{target}.qkv.bias": torch.cat(bias),
        f"{target}.proj.weight": g[f"{out}{joint}kernel"].flatten(0, 1).T,
        f"{target}.proj.bias": g[f"{out}{joint}bias"],
    }


def mask_mlp(g: Golden, source: str, target: str) -> State:
    return {
        **norm(g, f"{source}.LayerNorm_0", f"{target}norm"),
        **dense(g, f"{source}.token_masking.Dense_0", f"{target}mlp.fc1"),
        **dense(g, f"{source}.token_masking.Dense_1", f"{target}mlp.fc2"),
    }


def fuse(g: Golden, source: str, target: str, normalize: bool = True) -> State:
    state = {**mask_mlp(g, source, target), **dense(g, f"{source}.Dense_0", f"{target}mix")}
    if normalize:
        for i in (1, 2):
            state |= norm(g, f"{source}.fuser_mix_norm{i}", f"{target}norm{i}")
    return state


def scenic_block(g: Golden, block: str, ours: str, names: tuple[str, str, str] = ("_0", "_0", "_1")) -> State:
    """Return attention, MLP and norms of a block. `names` are the suffixes of attention and norms."""
    heads = f"{block}.MultiHeadDotProductAttention{names[0]}"
    qkv = [f"{heads}.{part}" for part in ("query", "key", "value")]
    mlp = f"{block}.MlpBlock_0" if names[0] == "_0" else f"{block}.MlpBlock"
    return {
        **attention(g, qkv, f"{heads}.out", ".", f"{ours}.attn"),
        **norm(g, f"{block}.LayerNorm{names[1]}", f"{ours}.norm1"),
        **norm(g, f"{block}.LayerNorm{names[2]}", f"{ours}.norm2"),
        **dense(g, f"{mlp}.Dense_0", f"{ours}.mlp.fc1"),
        **dense(g, f"{mlp}.Dense_1", f"{ours}.mlp.fc2"),
    }


def scenic_encoder(g: Golden) -> State:
    """Return all parameters except those of the tokenizers."""
    t = "p.Transformer"
    state = {
        "vit.patch_embed.proj.weight": conv(g["p.embedding.kernel"]),
        "vit.patch_embed.proj.bias": g["p.embedding.bias"],
        "vit.pos_embed": g[f"{t}.posembed_input.pos_embedding"],
        **norm(g, f"{t}.encoder_norm", "vit.norm"),
        **dense(g, "p.output_projection", "vit.head"),
    }
    for i in range(3):
        state |= scenic_block(g, f"{t}.encoderblock_{i}", f"encoder.layers.{i}.block")
    return state


def scenic_vit(tokenizer: dict, state: State) -> ViT:
    model = vit(
        image_size=16,
        patch_size=4,
        num_classes=5,
        dim=24,
        depth=3,
        heads=3,
        pool="avg",
        tokenizer=tokenizer,
        options={
            "fc_norm": False,
            "class_token": False,
            "mlp_ratio": 2,
            "act_layer": partial(nn.GELU, approximate="tanh"),
            "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        },
    )
    model.load_state_dict(state)
    return model.eval()


def scenic_vivit(g: Golden, model: str, state: State, **settings) -> ViViT:
    net = vivit(
        tubelets=Tubelets(clip_frames=4, image_size=16, frames=2, height=4, width=4),
        num_classes=5,
        dim=24,
        depth=2,
        heads=4,
        model=model,
        tokenizer={"at": [], "build": Tokenizer},
        options={"mlp_ratio": 2, "act_layer": "gelu_tanh"},
        **settings,
    )
    kernel = g["p.embedding.kernel"].permute(4, 3, 0, 1, 2)  # THWIO to OITHW
    net.load_state_dict(
        {"vit.patch_embed.proj.weight": kernel, "vit.patch_embed.proj.bias": g["p.embedding.bias"], **state}
    )
    return net.eval()


def scenic_sequence(g: Golden, encoder: str, vit: str) -> State:
    """Return positions and final norm of an encoder."""
    positions = {f"{vit}.pos_embed": g[f"p.{encoder}.posembed_input.pos_embedding"]}
    return positions | norm(g, f"p.{encoder}.encoder_norm", f"{vit}.norm")


def clips(g: Golden) -> Tensor:
    """Return the clips, converted from (B, T, H, W, C) to (B, C, T, H, W)."""
    return g["x"].permute(0, 4, 1, 2, 3)


def token_learner(g: Golden, pooling: str) -> TokenLearner:
    tokenizer = TokenLearner(CONTEXT, 8, pooling=pooling)
    convs = {f"convs.{i}.weight": conv(g[f"p.Conv_{i}.kernel"]) for i in range(4)}
    tokenizer.load_state_dict({**norm(g, "p.LayerNorm_0", "norm"), **convs})
    return tokenizer


@torch.no_grad()
def test_token_learner_10_map_logits() -> None:
    g = golden("tokenlearner_v10")
    tokenizer = token_learner(g, "sum")
    seen: list[Tensor] = []
    tokenizer.convs[-1].register_forward_hook(lambda _, __, out: seen.append(out))
    tokenizer.pool(on_grid(g["x"]))
    close(seen[0].permute(0, 2, 3, 1), g["map_logits"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("pooling", "x", "out", "compare"),
    [
        ("sum", "x", "out_sum", close),
        ("sum", "x_rect", "out_sum_rect", close),
        ("sum", "x", "out_sum_from_bnc", close),
        ("mean", "x", "out_mean", closer),
        ("mean", "x_rect", "out_mean_rect", closer),
    ],
)
def test_token_learner_10(pooling: str, x: str, out: str, compare: partial) -> None:
    g = golden("tokenlearner_v10")
    compare(token_learner(g, pooling).pool(on_grid(g[x])).x, g[out])


@torch.no_grad()
def test_token_learner_11() -> None:
    g = golden("tokenlearner_v11")
    tokenizer = TokenLearnerV11(CONTEXT, 8)
    tokenizer.load_state_dict(mask_mlp(g, "p", ""))
    close(tokenizer.mlp(tokenizer.norm(g["x"].flatten(1, 2))), g["map_logits"])
    close(tokenizer.pool(on_grid(g["x"])).x, g["out"])
    close(tokenizer.pool(on_grid(g["x_rect"])).x, g["out_rect"])


@torch.no_grad()
def test_token_learner_of_the_keras_example() -> None:
    g = golden("keras_tokenlearner_v10")
    tokenizer = TokenLearner(CONTEXT, 8, pooling="mean", gelu="none")
    convs = {f"convs.{i}.weight": conv(g[f"conv{i}"]) for i in range(4)}
    tokenizer.load_state_dict({"norm.weight": g["ln_gamma"], "norm.bias": g["ln_beta"], **convs})
    closer(tokenizer.pool(on_grid(g["x"])).x, g["out"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("normalize", "source", "out"),
    [
        (True, "p", "out"),
        (False, "q", "out_no_norm"),
        # The official module returns an original of (B, H, W, C) flattened, which contradicts its documentation. The
        # values are correct. Ours takes no 4-D input, since the record has the grid.
        (True, "p", "out_4d_original"),
    ],
)
def test_token_fuser(normalize: bool, source: str, out: str) -> None:
    g = golden("tokenfuser")
    module = Fuse(24, 8, normalize=normalize, init="official")
    module.load_state_dict(fuse(g, source, "", normalize))
    close(module(g["tokens"], g["original"]), g[out])


@torch.no_grad()
def test_image_encoder_with_token_learner() -> None:
    g = golden("tlvit_v11")
    t = "p.Transformer"
    tokenizer = {"at": 1, "build": partial(TokenLearnerV11, num_tokens=4)}
    learner = mask_mlp(g, f"{t}.TokenLearnerModuleV11_0", "encoder.layers.1.tokenizer.")
    check_scenic(scenic_vit(tokenizer, scenic_encoder(g) | learner), g)


@torch.no_grad()
def test_image_encoder_with_token_fuser() -> None:
    g = golden("tlvit_fuser_v11")
    t = "p.Transformer"
    inner = partial(TokenLearnerV11, num_tokens=4)
    tokenizer = {"at": "1:", "build": partial(TokenFuser, inner=inner, init="official")}
    state = scenic_encoder(g)
    for i in (0, 1):
        place = f"encoder.layers.{i + 1}.tokenizer"
        state |= mask_mlp(g, f"{t}.TokenLearnerModuleV11_{i}", f"{place}.inner.")
        state |= fuse(g, f"{t}.TokenFuser_{i}", f"{place}.fuse.")
    check_scenic(scenic_vit(tokenizer, state), g)


def check_scenic(model: ViT, g: Golden) -> None:
    images = g["x"].permute(0, 3, 1, 2)
    for i, record in enumerate(model.trace(images)):  # recorded by the block, before TokenFuser
        close(record.x, g[f"block{i}_out"])
    close(model.vit.norm(model.encoder(model.embed(images)).x), g["encoded"])
    close(model(images), g["logits"])


@torch.no_grad()
def test_mini_vit_of_the_keras_example() -> None:
    g = golden("keras_minivit_tl")
    build = partial(TokenLearner, num_tokens=4, pooling="mean", gelu="none")
    model = keras_mini_vit(
        image_size=48,
        patch_size=12,
        num_classes=10,
        dim=16,
        depth=3,
        heads=2,
        key_dim=16,
        tokenizer={"at": 2, "build": build},  # the example says "after block 1"
    )
    state = {
        "vit.patch_embed.proj.weight": conv(g["patch.kernel"]),
        "vit.patch_embed.proj.bias": g["patch.bias"],
        "vit.pos_embed": g["pos_embed"][None],
        **norm(g, "head.norm", "vit.norm"),
        **dense(g, "head.fc", "vit.head"),
        **norm(g, "tl.norm", "encoder.layers.2.tokenizer.norm"),
        **{f"encoder.layers.2.tokenizer.convs.{i}.weight": conv(g[f"tl.conv{i}"]) for i in range(4)},
    }
    for i in range(3):
        theirs, ours = f"block{i}", f"encoder.layers.{i}.block"
        names = [f"{theirs}.attn.{part}" for part in ("query", "key", "value")]
        state |= attention(g, names, f"{theirs}.attn.attention_output", "_", f"{ours}.attn")
        for part in (1, 2):
            state |= norm(g, f"{theirs}.norm{part}", f"{ours}.norm{part}")
            state |= dense(g, f"{theirs}.fc{part}", f"{ours}.mlp.fc{part}")
    model.load_state_dict(state)
    closer(model.eval()(g["x"].permute(0, 3, 1, 2)).softmax(dim=-1), g["probs"])


@torch.no_grad()
def test_token_learner_treats_the_time_steps_of_a_clip_one_by_one() -> None:
    """The two samples of the official run are two time steps of one clip here, with S tokens each."""
    g = golden("tokenlearner_v10")
    steps = Tokens(g["x"].flatten(1, 2).reshape(1, 2 * 49, 24), frames=2, grid=(7, 7))
    few = token_learner(g, "sum").pool(steps)
    close(few.x, g["out_sum"].reshape(1, 2 * 8, 24))
    assert few.frames == 2
    g = golden("tokenlearner_v11")
    tokenizer = TokenLearnerV11(CONTEXT, 8)
    tokenizer.load_state_dict(mask_mlp(g, "p", ""))
    steps = Tokens(g["x"].flatten(1, 2).reshape(1, 2 * 49, 24), frames=2, grid=(7, 7))
    close(tokenizer.pool(steps).x, g["out"].reshape(1, 2 * 8, 24))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "model", "pool"),
    [
        ("vivit_m1_spacetime_cls", "spatio_temporal", "token"),
        ("vivit_m4_factorized_dot_product_gap", "factorised_dot_product", "avg"),
    ],
)
def test_vivit_models_1_and_4(name: str, model: str, pool: str) -> None:
    g = golden(name)
    state = scenic_sequence(g, "Transformer", "vit") | dense(g, "p.output_projection", "vit.head")
    for i in range(2):
        state |= scenic_block(g, f"p.Transformer.encoderblock_{i}", f"encoder.layers.{i}.block")
    if pool == "token":
        state["vit.cls_token"] = g["p.cls"]
    close(scenic_vivit(g, model, state, pool=pool)(clips(g)), g["logits"])


@torch.no_grad()
def test_vivit_model_2() -> None:
    g = golden("vivit_m2_factorized_encoder_cls")
    state = dense(g, "p.output_projection", "temporal.vit.head")
    for encoder, ours, depth in (("SpatialTransformer", "", 2), ("TemporalTransformer", "temporal.", 1)):
        state |= scenic_sequence(g, encoder, f"{ours}vit") | {f"{ours}vit.cls_token": g[f"p.cls_{encoder}"]}
        for i in range(depth):
            state |= scenic_block(g, f"p.{encoder}.encoderblock_{i}", f"{ours}encoder.layers.{i}.block")
    close(scenic_vivit(g, "factorised_encoder", state, temporal_depth=1)(clips(g)), g["logits"])


@torch.no_grad()
def test_vivit_model_3() -> None:
    g = golden("vivit_m3_factorized_self_attention_gap")
    state = scenic_sequence(g, "Transformer", "vit") | dense(g, "p.output_projection", "vit.head")
    for i in range(2):
        theirs, ours = f"p.Transformer.encoderblock_{i}", f"encoder.layers.{i}.block"
        state |= scenic_block(g, theirs, ours, ("_space", "_space", "_mlp"))
        over_time = scenic_block(g, theirs, ours, ("_time", "_time", "_mlp"))
        for part, twin in ((".attn.", ".attn_time."), (".norm1.", ".norm_time.")):
            state |= {name.replace(part, twin): value for name, value in over_time.items() if part in name}
    model = scenic_vivit(g, "factorised_self_attention", state)
    close(model(clips(g)), g["logits"])
    other = scenic_vivit(g, "factorised_self_attention_time_space", state)
    assert (other(clips(g)) - g["logits"]).abs().max() > 1e-2


def test_every_layer_norm_has_the_epsilon_of_flax_and_keras() -> None:
    inner = partial(TokenLearner, num_tokens=4)
    sizes = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 24, "depth": 2, "heads": 3}
    tokenizer = {"at": "0:", "build": partial(TokenFuser, inner=inner)}
    modules = [
        vit(tokenizer=tokenizer, **sizes),
        keras_mini_vit(tokenizer=tokenizer, key_dim=8, **sizes),
        TokenLearnerV11(CONTEXT),
    ]
    norms = [layer for module in modules for layer in module.modules() if isinstance(layer, nn.LayerNorm)]
    assert len(norms) == 2 * (2 * 2 + 2 * 4 + 1) + 1
    assert {layer.eps for layer in norms} == {1e-6}
    assert all(isinstance(block, Block) for module in modules[:2] for block in module.encoder.blocks)
