"""Our modules with the official parameters give the official numbers. README.md lists the sources."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewtokens.backbones import converters
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
CONTEXT = LayerContext(dim=24, heads=3, block=0, depth=1)
close = partial(torch.testing.assert_close, rtol=1e-5, atol=2e-5)
closer = partial(torch.testing.assert_close, rtol=1e-5, atol=5e-6)


def golden(name: str) -> Golden:
    with np.load(HERE / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def on_grid(x: Tensor) -> Tokens:
    """Return the features (B, H, W, C) as Tokens."""
    return Tokens(x.flatten(1, 2), grid=(x.shape[1], x.shape[2]))


def converted(g: Golden, table: converters.Table, prefix: str = "") -> dict[str, Tensor]:
    """Return the parameters that a converter makes of an official run, of those below a prefix."""
    found = {name.removeprefix(prefix): value for name, value in g.items() if name.startswith(prefix)}
    return {name: source.convert(*(found[part] for part in source.names)) for name, source in table.items()}


def load_official(model: ViT, g: Golden, tmp_path: Path) -> ViT:
    """Load the parameters of an official run by way of a file, as `backbone.weights=scenic:<file>` does."""
    path = tmp_path / "scenic.npz"
    np.savez(path, **{f"params/{k[2:].replace('.', '/')}": v.numpy() for k, v in g.items() if k.startswith("p.")})
    converters.load_converted(model, f"scenic:{path}")
    return model.eval()


def scenic_vit(tokenizer: dict) -> ViT:
    return vit(
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


def scenic_vivit(model: str, **settings) -> ViViT:
    return vivit(
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


def clips(g: Golden) -> Tensor:
    """Return the clips, converted from (B, T, H, W, C) to (B, C, T, H, W)."""
    return g["x"].permute(0, 4, 1, 2, 3)


def token_learner(g: Golden, pooling: str) -> TokenLearner:
    tokenizer = TokenLearner(CONTEXT, 8, pooling=pooling)
    tokenizer.load_state_dict(converted(g, converters.token_learner("", ""), "p."))
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
    tokenizer.load_state_dict(converted(g, converters.mask_mlp("", ""), "p."))
    close(tokenizer.mlp(tokenizer.norm(g["x"].flatten(1, 2))), g["map_logits"])
    close(tokenizer.pool(on_grid(g["x"])).x, g["out"])
    close(tokenizer.pool(on_grid(g["x_rect"])).x, g["out_rect"])


@torch.no_grad()
def test_token_learner_of_the_keras_example() -> None:
    g = golden("keras_tokenlearner_v10")
    tokenizer = TokenLearner(CONTEXT, 8, pooling="mean", gelu="none")
    convs = {f"convs.{i}.weight": converters.channels_first(g[f"conv{i}"]) for i in range(4)}
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
    module.load_state_dict(converted(g, converters.token_fuser("", "", normalize), f"{source}."))
    close(module(g["tokens"], g["original"]), g[out])


@torch.no_grad()
def test_image_encoder_with_token_learner(tmp_path: Path) -> None:
    g = golden("tlvit_v11")
    tokenizer = {"at": 1, "build": partial(TokenLearnerV11, num_tokens=4)}
    check_scenic(load_official(scenic_vit(tokenizer), g, tmp_path), g)


@torch.no_grad()
@pytest.mark.parametrize("init", ["official", "gentle"])  # the gain that the official module lacks becomes 1
def test_image_encoder_with_token_fuser(init: str, tmp_path: Path) -> None:
    g = golden("tlvit_fuser_v11")
    inner = partial(TokenLearnerV11, num_tokens=4)
    tokenizer = {"at": "1:", "build": partial(TokenFuser, inner=inner, init=init)}
    check_scenic(load_official(scenic_vit(tokenizer), g, tmp_path), g)


def check_scenic(model: ViT, g: Golden) -> None:
    images = g["x"].permute(0, 3, 1, 2)
    for i, record in enumerate(model.trace(images)):  # recorded by the block, before TokenFuser
        close(record.x, g[f"block{i}_out"])
    close(model.vit.norm(model.encoder(model.embed(images)).x), g["encoded"])
    close(model(images), g["logits"])


@torch.no_grad()
@pytest.mark.parametrize("ordered", [False, True], ids=["by name", "get_weights()"])
def test_mini_vit_of_the_keras_example(ordered: bool, tmp_path: Path) -> None:
    g = golden("keras_minivit_tl")
    build = partial(TokenLearner, num_tokens=4, pooling="mean", gelu="none")
    sizes = {"image_size": 48, "patch_size": 12, "num_classes": 10, "dim": 16, "depth": 3, "heads": 2, "key_dim": 16}
    recipe = {"at": 2, "build": build}  # the example says "after block 1"
    parameters = {name: value.numpy() for name, value in g.items() if name not in ("x", "probs")}
    if ordered:
        names = converters.keras_names(converters.keras(keras_mini_vit(tokenizer=recipe, **sizes)))
        assert len(names) == len(parameters) - 1
        np.savez(tmp_path / "w.npz", *(parameters[name] for name in names), pos_embed=parameters["pos_embed"])
    else:
        np.savez(tmp_path / "w.npz", **parameters)
    model = keras_mini_vit(tokenizer=recipe, weights=f"keras:{tmp_path / 'w.npz'}", **sizes)
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
    tokenizer.load_state_dict(converted(g, converters.mask_mlp("", ""), "p."))
    steps = Tokens(g["x"].flatten(1, 2).reshape(1, 2 * 49, 24), frames=2, grid=(7, 7))
    close(tokenizer.pool(steps).x, g["out"].reshape(1, 2 * 8, 24))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "model", "settings"),
    [
        ("vivit_m1_spacetime_cls", "spatio_temporal", {"pool": "token"}),
        ("vivit_m2_factorized_encoder_cls", "factorised_encoder", {"temporal_depth": 1}),
        ("vivit_m3_factorized_self_attention_gap", "factorised_self_attention", {}),
        ("vivit_m4_factorized_dot_product_gap", "factorised_dot_product", {"pool": "avg"}),
    ],
)
def test_vivit(name: str, model: str, settings: dict, tmp_path: Path) -> None:
    g = golden(name)
    close(load_official(scenic_vivit(model, **settings), g, tmp_path)(clips(g)), g["logits"])


@torch.no_grad()
def test_the_order_of_the_two_attentions_matters(tmp_path: Path) -> None:
    g = golden("vivit_m3_factorized_self_attention_gap")
    other = load_official(scenic_vivit("factorised_self_attention_time_space"), g, tmp_path)
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
