"""What a model costs: multiply-adds per image, parameters, and tokens alive after every block."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import lightning as L
import torch
from jaxtyping import Float
from torch import Size, Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fewtokens.analysis.keras_cost import is_keras_example, keras_flops
from fewtokens.backbones.vit import ViT
from fewtokens.tokens import Tokens


class Cost:
    """The measure of cost: a mean over test images, each a batch of its own, so that padding costs nothing.

    An adaptive tokenizer spends more on one image than on another; every other method costs the same on all.

    Args:
        num_images: Test images to count.
    """

    def __init__(self, num_images: int = 8) -> None:
        self.num_images = num_images

    def __call__(self, task: L.LightningModule, datamodule: L.LightningDataModule, run_dir: Path) -> dict[str, float]:
        """Counts the model of a task.

        Args:
            task: Its `.model` is counted.
            datamodule: Set up for testing.
            run_dir: Not written to.

        Returns:
            `cost/gmacs`, `cost/gmacs_dense` (the same weights without the tokenizer), in 1e9 multiply-adds per image;
            `cost/params`, `cost/params_trainable`; `cost/tokens_last_block` (class and register tokens included);
            `cost/gmacs_keras` for the Keras example's models, in that example's own convention.
        """
        model = plain(task.model)
        images = test_images(task, datamodule, self.num_images).split(1)
        counts = [macs(model, image) for image in images]
        with model.encoder.dense():
            dense = macs(model, images[0])
        numbers = {
            "cost/gmacs": sum(counts) / len(counts) / 1e9,
            "cost/gmacs_dense": dense / 1e9,
            "cost/params": float(sum(p.numel() for p in model.parameters())),
            "cost/params_trainable": float(sum(p.numel() for p in model.parameters() if p.requires_grad)),
            "cost/tokens_last_block": sum(tokens_per_block(model, image)[-1] for image in images) / len(images),
        }
        if is_keras_example(model):
            numbers["cost/gmacs_keras"] = keras_flops(model) // 2 / 1e9
        return numbers


def macs(model: nn.Module, images: Float[Tensor, "b c h w"]) -> int:
    """Multiply-adds of these images together, as the model really runs in evaluation, on padding too.

    Counted: every product of matrices and every convolution, that is patch embedding, the projections of queries, keys,
    values and outputs, both products of attention (in full, whatever is masked), MLPs, poolings done as products,
    similarities between tokens, the head. Not counted: what works element by element (biases, norms, activations,
    softmax, residuals), sorting, gathering and scattering. One multiply-add is two FLOPs.

    Args:
        model: A compiled one is counted as if it were not: compiled kernels cannot be seen into.
        images: (B, channels, H, W), on the model's device; "meta" will do unless the tokenizer looks at values. One
            image by itself pads nothing.
    """
    # Not left to torch's own table, which has missed a kernel of one device or another (CPU: pytorch issue 195460).
    mapping = dict.fromkeys(_attention_kernels(), _attention_flops) | {
        torch.ops.aten.mv: _mv_flops,
        torch.ops.aten.dot: _mv_flops,
        torch.ops.aten.addmv: _addmv_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"), counter:
        model(images)
    return counter.get_total_flops() // 2


def tokens_per_block(model: ViT, images: Float[Tensor, "b c h w"]) -> list[float]:
    """Tokens alive after every block, class and register tokens included and padding not; a mean over the images."""
    with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return [alive(tokens) for tokens in model.trace(images)]


def alive(tokens: Tokens) -> float:
    """Tokens of an image that are not padding, the mean over the batch."""
    return float(tokens.x.shape[1]) if tokens.mask is None else tokens.mask.sum(dim=1).float().mean().item()


def plain(model: object) -> ViT:
    """The ViT within whatever `torch.compile` made of it."""
    model = getattr(model, "_orig_mod", model)
    assert isinstance(model, ViT)
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode; afterwards every module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def test_images(task: L.LightningModule, datamodule: L.LightningDataModule, count: int) -> Float[Tensor, "b c h w"]:
    """The first `count` test images (fewer if there are no more), first view of each, as the model gets them.

    Args:
        task: They are brought to its device and to the type of its parameters.
        datamodule: Set up for testing.
        count: At least 1.
    """
    dtype = next(task.parameters()).dtype
    found: list[Tensor] = []
    for batch in datamodule.test_dataloader():
        wanted = tuple(part[: count - sum(map(len, found))].to(task.device) for part in batch)
        views, _ = datamodule.on_after_batch_transfer(wanted, 0)
        found.append(views[:, 0].to(dtype))
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)


test_images.__test__ = False  # type: ignore[attr-defined]  # pytest takes it for a test where it is imported


def _attention_kernels() -> list[object]:
    """Whatever scaled_dot_product_attention dispatches to, on any device that this torch knows."""
    names = (
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
        "attention_math_for_mps",
    )
    kernels = (getattr(torch.ops.aten, f"_scaled_dot_product_{name}", None) for name in names)
    return [kernel for kernel in kernels if kernel is not None]


def _attention_flops(query: Size, key: Size, value: Size, *_: object, **__: object) -> int:
    *batch, rows, width = query
    return 2 * prod(batch) * rows * key[-2] * (width + value[-1])


def _mv_flops(matrix: Size, vector: Size, *_: object, **__: object) -> int:
    return 2 * prod(matrix)


def _addmv_flops(bias: Size, matrix: Size, vector: Size, *_: object, **__: object) -> int:
    return 2 * prod(matrix)
