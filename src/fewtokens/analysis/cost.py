"""The cost of a model: multiply-adds per image, tokens after every block, parameters and peak memory."""

from itertools import chain
from pathlib import Path

import lightning as L
from jaxtyping import Float
from torch import Tensor, nn

from fewtokens.analysis.evaluation import evaluating_eagerly, evaluation_batches, unwrap_compiled
from fewtokens.analysis.flops import GIGA, Counts, count, flop_counter, mean_tokens
from fewtokens.analysis.memory import peak_bytes
from fewtokens.analysis.pictures.cost_histogram import write_histogram, write_picture
from fewtokens.backbones.vit import ViT
from fewtokens.errors import check


class Cost:
    """The measure of cost: what each test image needs alone, and what its batch computes.

    With an adaptive tokenizer some images cost more than others, and all are counted. With any other tokenizer all
    images cost the same, and only the first batch is counted. After a call, `picture` is the file that was drawn, or
    None if all images cost the same.

    Args:
        num_images: Count at most this many test images; None for all (of this process, if there are several).

    Raises:
        FewtokensError: A setting is out of range.
    """

    def __init__(self, num_images: int | None = None) -> None:
        check(num_images is None or num_images >= 1, "measure.cost.num_images", "an int >= 1 or null", num_images)
        self.num_images = num_images
        self.picture: Path | None = None

    def __call__(self, task: L.LightningModule, datamodule: L.LightningDataModule, run_dir: Path) -> dict[str, float]:
        """Count the model of a task; write `cost_histogram.csv` and, if images differ, `pictures/cost.png`.

        Args:
            task: Its `.model` is counted.
            datamodule: Set up for testing.
            run_dir: Folder of the files; created if it does not exist.

        Returns:
            The numbers of `distribution`, for the first view of every sample, and:
            `cost/gmacs_dense`: as `cost/gmacs`, for the same weights without the tokenizer;
            `cost/params`, `cost/params_trainable`: numbers of parameters;
            `cost/peak_mib`, `cost/peak_mib_dense`: peak memory of a forward pass of the first batch, which has
            `cost/batch_size` images, in MiB, without weights and images, in the type of the weights and without
            autocast (see `peak_bytes`);
            for samples with several views `cost/views`, their number, and `cost/gmacs_all_views`, that many times
            `cost/gmacs`; for clips `cost/frames`, the frames of a view.
        """
        model, batches = unwrap_compiled(task.model), evaluation_batches(task, datamodule, self.num_images)
        first, _ = next(batches)
        images, views = first[:, 0], getattr(datamodule, "test_views", first.shape[1])
        counts = count(model, (part[:, 0] for part in chain([first], (views for views, _ in batches))), skip_equal=True)
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
        write_histogram(counts, run_dir / "cost_histogram.csv")
        self.picture = run_dir / "pictures" / "cost.png" if numbers["cost/gmacs_std"] else None
        if self.picture:
            write_picture(counts, dense, self.picture)
        return numbers


def macs(model: nn.Module, images: Float[Tensor, "b c *t h w"]) -> int:
    """Return the multiply-adds of these images together, as the model runs in evaluation, padding included.

    Counted are all matrix products and convolutions: the patch embedding, the projections to queries, keys, values and
    outputs, both products of attention (in full, also where a mask is zero), MLPs, poolings that are products,
    similarities between tokens, and the head. Not counted are elementwise operations (biases, norms, activations,
    softmax, residuals), sorting, gathering and scattering. One multiply-add is two FLOPs.

    Args:
        model: If it is compiled, the uncompiled model is counted.
        images: (B, channels, H, W), or clips (B, channels, frames, H, W), on the model's device. "meta" works unless
            the tokenizer depends on values. A batch of one image has no padding.
    """
    counter = flop_counter()
    with evaluating_eagerly(model), counter:
        model(images)
    return counter.get_total_flops() // 2


def tokens_per_block(model: ViT, images: Float[Tensor, "b c *t h w"]) -> list[float]:
    """Return the number of tokens after every block, averaged over the images.

    Class and register tokens are included, padding is not. For a clip, the tokens of all time steps are counted; for a
    factorised encoder, those of the first, spatial one.
    """
    with evaluating_eagerly(model):
        return [mean_tokens(tokens) * len(tokens.x) / len(images) for tokens in model.trace(images)]


def distribution(counts: Counts) -> dict[str, float]:
    """Summarize the counts of some images.

    Returns:
        `cost/gmacs`: 1e9 multiply-adds of an image alone, averaged over the images; `_std`, `_min` and `_max`: their
        standard deviation, minimum and maximum; `cost/gmacs_padded`: 1e9 multiply-adds per image within its batch;
        `cost/images`: number of images that were counted; `cost/tokens_block_00` ...: mean number of tokens after a
        block, class and register tokens included, padding not; `cost/tokens_last_block`.
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
    """Return the peak memory of a forward pass in evaluation, in bytes, without weights and images."""
    with evaluating_eagerly(model):
        return peak_bytes(lambda: model(images), images.device)
