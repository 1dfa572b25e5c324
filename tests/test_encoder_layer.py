"""Properties of the encoder layer with every method: hooks, pytrees, activation checkpointing, FSDP and compilation."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree

from fewtokens.analysis.memory import peak_bytes
from fewtokens.backbones.encoder import EncoderLayer
from fewtokens.backbones.keras_mini_vit import keras_mini_vit
from fewtokens.backbones.pretrained import timm_vit
from fewtokens.backbones.vit import ViT, vit
from fewtokens.backbones.vivit import vivit
from fewtokens.layers.embedding import Tubelets
from fewtokens.tasks.classification import compile_model
from fewtokens.tokenizers.base import Tokenizer
from fewtokens.tokenizers.token_learner import TokenLearnerV11
from fewtokens.tokens import Tokens
from test_methods import HOOKED, IMAGES, METHODS, model_with, random_parameters

PLAIN = {"at": [], "build": Tokenizer}
LEARNER = {"at": 1, "build": partial(TokenLearnerV11, num_tokens=4)}


def training_step(model: nn.Module, images: Tensor, seed: int = 0) -> Tensor:
    """Run one forward and backward pass, with the losses of tokenizers, and return the loss."""
    torch.manual_seed(seed)
    loss = model(images).float().square().mean()
    losses = [module.loss() for module in model.modules() if isinstance(module, Tokenizer)]
    loss = loss + sum(part for part in losses if part is not None)
    loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- hooks and pytrees


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_forward_hooks_fire_once_per_layer(method: str, training: bool) -> None:
    model, calls = model_with(method).train(training), []
    for index, layer in enumerate(model.encoder.layers):
        assert isinstance(layer, EncoderLayer)
        layer.register_forward_hook(lambda module, args, out, index=index: calls.append((index, args[0], out)))
    model(IMAGES)
    assert [index for index, _, _ in calls] == [0, 1, 2, 3]
    assert all(isinstance(tokens, Tokens) for _, before, after in calls for tokens in (before, after))
    assert all(earlier[2] is later[1] for earlier, later in pairwise(calls))


def test_tokens_are_a_pytree_of_their_tensors() -> None:
    trace: list[Tokens] = []
    tokens = Tokens(torch.ones(2, 5, 3), 1, 2, (1, 2), size=torch.ones(2, 5), trace=trace)
    leaves, spec = _pytree.tree_flatten(tokens)
    assert [leaf for leaf in leaves if leaf is not None] == [tokens.x, tokens.size]
    doubled = _pytree.tree_map_only(Tensor, lambda leaf: 2 * leaf, tokens)
    assert isinstance(doubled, Tokens)
    assert doubled.x.eq(2).all()
    assert (doubled.prefix, doubled.frames, doubled.grid) == (1, 2, (1, 2))
    assert doubled.trace is trace, "records must be collected in the same list"
    assert _pytree.tree_unflatten(leaves, spec).x is tokens.x


# --- activation checkpointing


@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing_gives_the_same_gradients(method: str) -> None:
    model = random_parameters(model_with(method)).train()
    calls: list[int] = []
    model.encoder.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    loss, expected = training_step(model, IMAGES), gradients(model)
    assert len(calls) == 1
    model.zero_grad()
    model.set_grad_checkpointing(True)
    assert torch.equal(training_step(model, IMAGES), loss)
    assert len(calls) == 3, "the layer runs again in the backward pass"
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


def clip_model(model: str) -> ViT:
    tubelets = Tubelets(clip_frames=8, image_size=16, frames=2, height=4, width=4)
    sizes = {"dim": 16, "depth": 6, "heads": 2, "temporal_depth": 2}
    return vivit(tubelets=tubelets, num_classes=5, tokenizer=LEARNER, model=model, grad_checkpointing=True, **sizes)  # type: ignore[arg-type]


BACKBONES: dict[str, tuple[Callable[[], ViT], tuple[int, ...]]] = {
    "vit": (
        lambda: vit(image_size=32, patch_size=2, num_classes=5, tokenizer=PLAIN, dim=16, depth=6, heads=2,
                    grad_checkpointing=True),
        (2, 3, 32, 32),
    ),
    "timm": (
        lambda: timm_vit(name="vit_tiny_patch16_224", image_size=64, num_classes=5, tokenizer=PLAIN,
                         grad_checkpointing=True, options={"depth": 4}),
        (32, 3, 64, 64),
    ),
    "keras_mini_vit": (
        lambda: keras_mini_vit(image_size=48, patch_size=6, num_classes=5, tokenizer=PLAIN, grad_checkpointing=True),
        (16, 3, 48, 48),
    ),
    **{
        model: (partial(clip_model, model), (2, 3, 8, 16, 16))
        for model in ("spatio_temporal", "factorised_encoder", "factorised_self_attention", "factorised_dot_product")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BACKBONES)
def test_activation_checkpointing_saves_memory_in_every_backbone(name: str) -> None:
    build, shape = BACKBONES[name]
    torch.manual_seed(0)
    model, images = random_parameters(build()).train(), torch.randn(shape)
    for module in model.modules():  # dropout would draw different numbers
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def step() -> None:
        model.zero_grad()
        training_step(model, images)

    step()
    saved, checkpointed = gradients(model), peak_bytes(step, torch.device("cpu"))
    model.set_grad_checkpointing(False)
    step()
    for gradient_name, gradient in gradients(model).items():
        torch.testing.assert_close(saved[gradient_name], gradient, rtol=1e-4, atol=1e-5)
    assert checkpointed < 0.8 * peak_bytes(step, torch.device("cpu"))


# --- compilation layer by layer


@pytest.mark.skipif(HOOKED, reason="runs in a process of its own, see tests/backbones/test_without_type_checks.py")
@pytest.mark.parametrize("method", METHODS)
def test_compiled_layers_equal_eager_ones(method: str) -> None:
    torch.compiler.reset()
    model = random_parameters(model_with(method)).eval()
    expected = model(IMAGES)
    expected.square().sum().backward()
    eager = gradients(model)
    model.zero_grad()
    compile_model(model, "layers", backend="aot_eager", fullgraph=True)
    found = model(IMAGES)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, eager[name], rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(HOOKED, reason="runs in a process of its own, see tests/backbones/test_without_type_checks.py")
def test_layers_of_one_shape_share_one_compilation() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = vit(image_size=16, patch_size=2, num_classes=5, tokenizer=PLAIN, dim=16, depth=12, heads=2).eval()
    compile_model(model, "layers", backend=counter)
    with torch.no_grad():
        model(IMAGES)
    assert counter.frame_count == 1
