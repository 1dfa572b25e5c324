"""Models side by side: images per second and multiply-adds, and how much of the saving the clock shows."""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.attention import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from fewtokens.analysis.cost import evaluating, macs
from fewtokens.analysis.timing import Run, interleaved, seconds_on, spread
from fewtokens.backbones.vit import ViT
from fewtokens.errors import FewtokensError

DENSE = "none"
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
PRECISIONS = ("32-true", "bf16-true", *AUTOCAST)
MODES = ("inference", "training")
FEWEST = 8  # images timed together: at batch 1 an adaptive tokenizer's time depends on the image


@dataclass(frozen=True)
class Setting:
    """How models are run.

    Args:
        batch: Images per forward pass.
        precision: "32-true", "bf16-true" (the weights too), "bf16-mixed" or "16-mixed" (autocast).
        compiled: By torch.compile, each model by itself and for this batch size.
        mode: "inference", or "training": forward, cross-entropy, backward and a step of AdamW.

    Raises:
        FewtokensError: An unknown precision or mode, or no batch.
    """

    batch: int = 32
    precision: str = "32-true"
    compiled: bool = False
    mode: str = "inference"

    def __post_init__(self) -> None:
        if self.batch < 1 or self.precision not in PRECISIONS or self.mode not in MODES:
            raise FewtokensError(
                "A speed is that of a batch, a precision and a mode",
                expected=f"batch >= 1, a precision of {', '.join(PRECISIONS)}, a mode of {', '.join(MODES)}",
                got=f"batch={self.batch}, precision={self.precision}, mode={self.mode}",
                fix="set batch=[1,32] precision=[32-true] mode=[inference]",
            )

    def __str__(self) -> str:
        return f"{self.mode}, batch {self.batch}, {self.precision}, {'compiled' if self.compiled else 'eager'}"


def compare(
    models: Mapping[str, nn.Module],
    images: Float[Tensor, "b c *t h w"],
    setting: Setting,
    seconds: float,
    fewest: int = FEWEST,
) -> list[dict[str, Any]]:
    """Times all models in turns, on the same images, and counts what they compute.

    Args:
        models: By name; one of them is "none", the dense one that the others are compared with.
        images: At least one, on the models' device; repeated or cut to whole batches.
        setting: How they are run.
        seconds: For all of them together, warm-up not included.
        fewest: Images that are timed together, as several batches where those are smaller.

    Returns:
        A record for each: tokenizer, the setting, images_per_s (median over the rounds) and its interquartile range,
        speedup_vs_dense (the median of the ratios within a round) and its range, gmacs (what an image needs by itself;
        mean), gmacs_padded (what an image costs in these batches), gmacs_dense, and realised_over_theoretical: the
        speed-up over gmacs_dense / gmacs.
    """
    batches = in_batches(images, setting.batch, fewest)
    count = sum(map(len, batches))
    costs = {name: costs_of(model, batches) for name, model in models.items()}
    try:
        runs = {name: run_of(model, batches, setting) for name, model in models.items()}
        clock = partial(seconds_on, device=images.device)
        times = interleaved(runs, seconds, clock)
    finally:
        torch.compiler.reset()  # or the next setting meets the limit on recompilations
    records = []
    for name in models:
        alone, padded = costs[name]
        ratios = [slow / fast for slow, fast in zip(times[DENSE], times[name], strict=True)]
        rates = [count / taken for taken in times[name]]
        theoretical = costs[DENSE][0] / alone
        records.append(
            {
                "tokenizer": name,
                "batch": setting.batch,
                "precision": setting.precision,
                "compiled": setting.compiled,
                "mode": setting.mode,
                "images_per_s": median(rates),
                "images_per_s_spread": spread(rates),
                "speedup_vs_dense": median(ratios),
                "speedup_vs_dense_spread": spread(ratios),
                "rounds": len(rates),
                "gmacs": alone / 1e9,
                "gmacs_padded": padded / 1e9,
                "gmacs_dense": costs[DENSE][0] / 1e9,
                "realised_over_theoretical": median(ratios) / theoretical,
            }
        )
    return records


def in_batches(
    images: Float[Tensor, "n c *t h w"], batch: int, fewest: int = FEWEST
) -> list[Float[Tensor, "b c *t h w"]]:
    """Whole batches of the images, which are repeated where they do not fill one; about `fewest` images or a batch."""
    wanted = max(1, fewest // batch) * batch
    repeated = torch.cat([images] * -(-wanted // len(images)))[:wanted]
    return list(repeated.split(batch))


def costs_of(model: nn.Module, batches: list[Float[Tensor, "b c *t h w"]]) -> tuple[float, float]:
    """Multiply-adds per image: of each by itself, the mean of up to 16, and in these batches."""
    images = torch.cat(batches)
    some = images[:16].split(1)
    padded = sum(macs(model, batch) for batch in batches) / len(images)
    return sum(macs(model, image) for image in some) / len(some), padded


def run_of(model: nn.Module, batches: list[Float[Tensor, "b c *t h w"]], setting: Setting) -> Run:
    """What is timed: all batches once."""
    device = batches[0].device
    if setting.precision == "bf16-true":
        model = copy.deepcopy(model).bfloat16()
        batches = [batch.bfloat16() for batch in batches]
    called = torch.compile(model, dynamic=False) if setting.compiled else model
    autocast = AUTOCAST.get(setting.precision)

    def context() -> AbstractContextManager[Any]:
        return nullcontext() if autocast is None else torch.autocast(device.type, autocast)

    def infer() -> None:
        with torch.inference_mode(), context():
            for batch in batches:
                called(batch)

    if setting.mode == "inference":
        model.eval()
        return infer
    # A rate of 0 computes the same step, and leaves the weights, which the models share, as they are.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)

    def train() -> None:
        model.train()
        for batch in batches:
            with context():
                logits = called(batch)
            target = torch.arange(len(batch), device=device) % logits.shape[1]
            F.cross_entropy(logits.float(), target).backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


def timms_own(model: ViT) -> nn.Module:
    """timm's model, with the same parameters and timm's own blocks and forward: what dense ought to equal in speed."""
    with evaluating(model):
        vit = copy.deepcopy(model.vit, {id(p): p for p in model.parameters()})
        blocks: list[Any] = copy.deepcopy(model.encoder.blocks, {id(p): p for p in model.parameters()})
    for block in blocks:
        # Ours add methods to timm's and no state, so that the way back is the class alone.
        block.__class__, block.attn.__class__ = TimmBlock, TimmAttention
    vit.blocks = nn.Sequential(*blocks)
    return vit
