"""What a model costs: multiply-adds per image, parameters, peak memory, and tokens alive after every block."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewtokens.analysis.flops import Counts, alive, count, evaluating, flop_counter
from fewtokens.analysis.memory import peak_bytes
from fewtokens.analysis.pictures.cost_histogram import write_histogram, write_picture
from fewtokens.backbones.vit import ViT
from fewtokens.benchmarks.keras_table.profiler_count import is_keras_example, keras_flops

GIGA = 1e9


class Cost:
    """The measure of cost, over the test set: what each image needs by itself, and what its batch really computed.

    An adaptive tokenizer spends more on one image than on another; every other method costs the same on all. `picture`
    is the file of the last call, None where all images cost the same.

    Args:
        num_images: The first test images are counted; None: all of them (on several processes, this process's share).
    """

    def __init__(self, num_images: int | None = None) -> None:
        self.num_images = num_images
        self.picture: Path | None = None

    def __call__(self, task: L.LightningModule, datamodule: L.LightningDataModule, run_dir: Path) -> dict[str, float]:
        """Counts the model of a task; writes `cost_histogram.csv` and, where images differ, `pictures/cost.png`.

        Args:
            task: Its `.model` is counted.
            datamodule: Set up for testing.
            run_dir: Made if there is none.

        Returns:
            What `distribution` says, of the first view of every sample; `cost/gmacs_dense`, of the same weights without
            the tokenizer, and for the Keras example's models `cost/gmacs_keras`, in that example's own convention;
            where samples have several views `cost/views`, how many, and `cost/gmacs_all_views`, so many times
            `cost/gmacs`; for clips `cost/frames`, the frames of a view; `cost/params`, `cost/params_trainable`;
            `cost/peak_mib` and `cost/peak_mib_dense`, what a forward pass of the first batch, of `cost/batch_size`
            images, holds at most on top of weights and images (see `peak_bytes`), in MiB, in the type of the weights,
            without autocast.
        """
        model, batches = plain(task.model), evaluation_batches(task, datamodule, self.num_images)
        first = next(batches)
        images, views = first[:, 0], getattr(datamodule, "test_views", first.shape[1])
        counts = count(model, (batch[:, 0] for batch in chain([first], batches)))
        with model.encoder.without_reduction():
            dense, peak_dense = macs(model, images[:1]), peak_memory(model, images)
        numbers = distribution(counts) | {
            "cost/gmacs_dense": dense / GIGA,
            "cost/params": float(sum(p.numel() for p in model.parameters())),
            "cost/params_trainable": float(sum(p.numel() for p in model.parameters() if p.requires_grad)),
            "cost/peak_mib": peak_memory(model, images) / 2**20,
            "cost/peak_mib_dense": peak_dense / 2**20,
            "cost/batch_size": float(len(images)),
        }
        if images.ndim == 5:
            numbers["cost/frames"] = float(images.shape[2])
        if views > 1:
            numbers |= {"cost/views": float(views), "cost/gmacs_all_views": views * numbers["cost/gmacs"]}
        if is_keras_example(model):
            numbers["cost/gmacs_keras"] = keras_flops(model) // 2 / GIGA
        write_histogram(counts, run_dir / "cost_histogram.csv")
        self.picture = run_dir / "pictures" / "cost.png" if numbers["cost/gmacs_std"] else None
        if self.picture:
            write_picture(counts, dense, self.picture)
        return numbers


def macs(model: nn.Module, images: Float[Tensor, "b c *t h w"]) -> int:
    """Multiply-adds of these images together, as the model really runs in evaluation, on padding too.

    Counted: every product of matrices and every convolution, that is patch embedding, the projections of queries, keys,
    values and outputs, both products of attention (in full, whatever is masked), MLPs, poolings done as products,
    similarities between tokens, the head. Not counted: what works element by element (biases, norms, activations,
    softmax, residuals), sorting, gathering and scattering. One multiply-add is two FLOPs.

    Args:
        model: A compiled one is counted as if it were not: compiled kernels cannot be seen into.
        images: (B, channels, H, W), or clips (B, channels, frames, H, W), on the model's device; "meta" will do unless
            the tokenizer looks at values. One image by itself pads nothing.
    """
    counter = flop_counter()
    with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"), counter:
        model(images)
    return counter.get_total_flops() // 2


def tokens_per_block(model: ViT, images: Float[Tensor, "b c *t h w"]) -> list[float]:
    """Tokens alive after every block, class and register tokens included and padding not; a mean over the images.

    Of a clip they are those of all time steps; of a factorised encoder only the first, spatial encoder is counted.
    """
    with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return [alive(tokens) * len(tokens.x) / len(images) for tokens in model.trace(images)]


def distribution(counts: Counts) -> dict[str, float]:
    """The numbers of some images.

    Returns:
        In 1e9 multiply-adds: `cost/gmacs`, of an image by itself, the mean, and `_std`, `_min` and `_max` of the same;
        `cost/gmacs_padded`, the mean of what the batches computed per image. `cost/images`, how many they are.
        `cost/tokens_block_00` and so on, tokens alive after a block, the mean, class and register tokens included and
        padding not; `cost/tokens_last_block`.
    """
    macs, tokens = counts.macs.double(), counts.tokens[:, 1:].double().mean(dim=0).tolist()
    return {
        "cost/gmacs": macs.mean().item() / GIGA,
        "cost/gmacs_std": macs.std(correction=0).item() / GIGA,
        "cost/gmacs_min": macs.min().item() / GIGA,
        "cost/gmacs_max": macs.max().item() / GIGA,
        "cost/gmacs_padded": counts.padded.mean().item() / GIGA,
        "cost/images": float(len(macs)),
        **{f"cost/tokens_block_{block:02d}": mean for block, mean in enumerate(tokens)},
        "cost/tokens_last_block": tokens[-1],
    }


def peak_memory(model: nn.Module, images: Float[Tensor, "b c *t h w"]) -> int:
    """Bytes that a forward pass in evaluation holds at most, on top of weights and images."""
    with evaluating(model), torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        return peak_bytes(lambda: model(images), images.device)


def plain(model: object) -> ViT:
    """The ViT within whatever `torch.compile` made of it."""
    model = getattr(model, "_orig_mod", model)
    assert isinstance(model, ViT)
    return model


def random_images(model: ViT, count: int, seed: int) -> Float[Tensor, "b c *t h w"]:
    """So many samples of the shape that a model takes, images or clips, from a normal distribution."""
    return torch.randn(count, *model.sample_shape, generator=torch.Generator().manual_seed(seed))


def test_images(task: L.LightningModule, datamodule: L.LightningDataModule, count: int) -> Float[Tensor, "b c *t h w"]:
    """The first `count` test images (fewer if there are no more), first view of each, as the model gets them.

    Args:
        task: They are brought to its device and to the type of its parameters.
        datamodule: Set up for testing.
        count: At least 1.
    """
    return torch.cat([views[:, 0] for views in evaluation_batches(task, datamodule, count)])


def evaluation_batches(
    task: L.LightningModule, datamodule: L.LightningDataModule, count: int | None = None
) -> Iterator[Float[Tensor, "b v c *t h w"]]:
    """The same in the batches of the data, with all their views; all test images where `count` is None."""
    dtype, left = next(task.parameters()).dtype, count
    # Videos are looked at once more, in one view; a datamodule without videos need not know of that.
    for batch in getattr(datamodule, "measured_dataloader", datamodule.test_dataloader)():
        wanted = tuple(part[:left].to(task.device) for part in batch)
        views, _ = datamodule.on_after_batch_transfer(wanted, 0)
        yield views.to(dtype)
        if left is not None:
            left -= len(views)
            if left <= 0:
                return


test_images.__test__ = False  # type: ignore[attr-defined]  # pytest takes it for a test where it is imported
