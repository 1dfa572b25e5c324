"""Files of scenic and Keras: formats, warnings and errors. tests/golden has the official numbers."""

import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewtokens.backbones import array_files, converters
from fewtokens.backbones.keras_mini_vit import keras_mini_vit
from fewtokens.backbones.vit import ViT, vit
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.base import Tokenizer
from fewtokens.tokenizers.token_learner import TokenLearner, TokenLearnerV11

PLAIN = {"at": [], "build": Tokenizer}
LEARNER = {"at": 1, "build": partial(TokenLearnerV11, num_tokens=4)}
SIZES = {"image_size": 16, "patch_size": 8, "dim": 16, "depth": 2, "heads": 2}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BLOCK = "Transformer.encoderblock_0."


def model_with(tokenizer: Any = PLAIN, num_classes: int = 5, **settings: Any) -> ViT:
    torch.manual_seed(0)
    settings = {"norm": "before_pool", "options": {"act_layer": "gelu_tanh"}} | settings
    return vit(tokenizer=tokenizer, num_classes=num_classes, **SIZES, **settings).eval()


def parameters(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return random parameters of a scenic ViT with TokenLearner 1.1 before its second block."""
    rng = np.random.default_rng(0)
    shapes = {"embedding.kernel": (8, 8, 3, 16), "embedding.bias": (16,), "cls": (1, 1, 16)}
    shapes |= {"Transformer.posembed_input.pos_embedding": (1, 5, 16)}
    learner = "Transformer.TokenLearnerModuleV11_0"
    norms = [f"{learner}.LayerNorm_0", "Transformer.encoder_norm"]
    denses = {"output_projection": (16, 5), f"{learner}.token_masking.Dense_0": (16, 64)}
    denses |= {f"{learner}.token_masking.Dense_1": (64, 4)}
    for i in range(2):
        block = f"Transformer.encoderblock_{i}"
        norms += [f"{block}.LayerNorm_0", f"{block}.LayerNorm_1"]
        denses |= {f"{block}.MlpBlock_0.Dense_0": (16, 64), f"{block}.MlpBlock_0.Dense_1": (64, 16)}
        for part in ("query", "key", "value"):
            heads = f"{block}.MultiHeadDotProductAttention_0.{part}"
            shapes |= {f"{heads}.kernel": (16, 2, 8), f"{heads}.bias": (2, 8)}
        out = f"{block}.MultiHeadDotProductAttention_0.out"
        shapes |= {f"{out}.kernel": (2, 8, 16), f"{out}.bias": (16,)}
    shapes |= {f"{name}.{part}": (16,) for name in norms for part in ("scale", "bias")}
    for name, shape in denses.items():
        shapes |= {f"{name}.kernel": shape, f"{name}.bias": shape[1:]}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: value for name, value in (arrays | changes).items() if value is not None}


def npz(path: Path, arrays: dict[str, np.ndarray]) -> str:
    np.savez(path / "weights.npz", **{name.replace(".", "/"): value for name, value in arrays.items()})
    return f"scenic:{path / 'weights.npz'}"


def nested(arrays: dict[str, np.ndarray], leaf: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in arrays.items():
        *groups, last = name.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = leaf(value)
    return tree


def flax(path: Path, arrays: dict[str, np.ndarray], root: str) -> str:
    """Write a training state as flax.serialization.msgpack_serialize does, with one chunked and one bfloat16 array."""
    msgpack = pytest.importorskip("msgpack")

    def array(value: np.ndarray, name: str = "float32") -> Any:
        return msgpack.ExtType(1, msgpack.packb((value.shape, name, value.tobytes())))

    tree = nested(arrays, array)
    kernel = arrays["embedding.kernel"]
    shape = {str(i): side for i, side in enumerate(kernel.shape)}
    chunks = {str(i): array(part) for i, part in enumerate(np.array_split(kernel.ravel(), 3))}
    tree["embedding"]["kernel"] = {array_files.CHUNKS: True, "shape": shape, "chunks": chunks}
    bias = torch.from_numpy(arrays["embedding.bias"]).bfloat16().view(torch.int16).numpy()
    tree["embedding"]["bias"] = array(bias, "bfloat16")
    for part in reversed([part for part in root.split(".") if part]):
        tree = {part: tree}
    state = {**tree, "step": 3, "rng": None, "opt_state": {"0": {"mu": nested(arrays, array)}}}
    (path / "checkpoint_3").write_bytes(msgpack.packb(state))
    return f"scenic:{path / 'checkpoint_3'}"


@torch.no_grad()
@pytest.mark.parametrize("root", array_files.FLAX_ROOTS)
def test_a_checkpoint_of_flax_equals_an_npz_file(root: str, tmp_path: Path) -> None:
    arrays = parameters()
    bias = torch.from_numpy(arrays["embedding.bias"]).bfloat16().float().numpy()
    expected = model_with(LEARNER, weights=npz(tmp_path, arrays | {"embedding.bias": bias}))(IMAGES)
    assert torch.equal(model_with(LEARNER, weights=flax(tmp_path, arrays, root))(IMAGES), expected)
    assert not torch.equal(model_with(LEARNER)(IMAGES), expected)


def test_a_head_of_another_size_and_a_new_tokenizer_stay_random(tmp_path: Path, caplog: Any) -> None:
    weights = npz(tmp_path, {name: value for name, value in parameters().items() if "TokenLearner" not in name})
    with caplog.at_level(logging.WARNING):
        model = model_with(LEARNER, num_classes=7, weights=weights)
    assert "weights.npz (scenic): encoder.layers.1.tokenizer.mlp.fc1.bias, " in caplog.text
    assert "(8 in all) stay random, since the file has none of that size" in caplog.text
    assert model(IMAGES).shape == (2, 7)
    assert model_with(PLAIN, num_classes=0, weights=weights)(IMAGES).shape == (2, 16)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cls": None}, "missing cls, unexpected none, of another shape none"),
        ({"pre_logits.bias": np.zeros(3)}, "missing none, unexpected pre_logits.bias, of another shape none"),
        (
            {f"{BLOCK}LayerNorm_0.scale": np.zeros(8)},
            f"missing none, unexpected none, of another shape {BLOCK}LayerNorm_0",
        ),
        ({"embedding.kernel": np.zeros((2, 8, 8, 3, 16))}, "of another shape embedding.kernel. Set the sizes of the"),
        ({"embedding.kernel": np.zeros(16)}, "of another shape embedding.kernel"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_listed(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(FewtokensError, match=rf"\(scenic\) does not fit the model: .*{re.escape(said)}"):
        model_with(LEARNER, weights=npz(tmp_path, parameters(**changes)))


def test_a_tokenizer_that_the_model_lacks_is_listed(tmp_path: Path) -> None:
    said = r"unexpected Transformer\.TokenLearnerModuleV11_0.* \(6 in all\), .* the tokenizer and its blocks"
    with pytest.raises(FewtokensError, match=said):
        model_with(PLAIN, weights=npz(tmp_path, parameters()))


def test_settings_that_scenic_lacks_are_an_error(tmp_path: Path) -> None:
    weights = npz(tmp_path, parameters())
    for settings in ({"options": {}}, {"norm": "after_pool", "pool": "avg"}):
        with pytest.raises(
            FewtokensError, match=r"Set backbone\.options\.act_layer=gelu_tanh backbone\.norm=before_pool"
        ):
            model_with(LEARNER, weights=weights, **settings)


def test_files_of_other_kinds_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    for weights in ("weights.npz", "keras:", "timm:x"):
        with pytest.raises(FewtokensError, match=r"^`backbone\.weights` must be scenic:<file> or keras:<file>, got '"):
            model_with(weights=weights)
    with pytest.raises(FewtokensError, match=r"^There is no file .*weights\. Set backbone\.weights to scenic:<file>"):
        model_with(weights=f"scenic:{file}")
    file.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(
        FewtokensError, match=r"is an HDF5 file\. Write an \.npz file in Keras, with: numpy\.savez\(file, \*"
    ):
        model_with(weights=f"scenic:{file}")
    np.savez(tmp_path / "pickled.npz", np.array([{}], dtype=object))
    with pytest.raises(
        FewtokensError, match=r"without pickled objects, or a checkpoint of Flax, but: ValueError: Object"
    ):
        model_with(weights=f"scenic:{tmp_path / 'pickled.npz'}")
    for content in (b"", b"no weights", bytes(100)):
        file.write_bytes(content)
        with pytest.raises(
            FewtokensError, match=r"install msgpack|or a checkpoint of Flax, but: |missing .* \(\d+ in all\)"
        ):
            model_with(weights=f"scenic:{file}")


def test_weights_of_another_keras_model_are_an_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", *(np.zeros(3) for _ in range(4)), pos_embed=np.zeros((4, 16)))
    build = partial(keras_mini_vit, num_classes=5, key_dim=8, tokenizer={"at": 1, "build": TokenLearner}, **SIZES)
    with pytest.raises(
        FewtokensError, match=r"^The Keras model has 4 arrays of weights, but this one has 44\. Set backbone"
    ):
        build(weights=f"keras:{tmp_path / 'w.npz'}")


def test_the_layout_of_kernels() -> None:
    kernel: Tensor = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).float()
    assert torch.equal(converters.channels_first(kernel), kernel.permute(3, 2, 0, 1))
    assert converters.channels_first(torch.zeros(2, 3, 4, 5, 6)).shape == (6, 5, 2, 3, 4)
