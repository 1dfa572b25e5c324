"""Timing of several models on the same images: images per second, multiply-adds, and the speed-up that both promise."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.attention import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fewtokens.analysis.cost import macs
from fewtokens.analysis.flops import count
from fewtokens.analysis.memory import peak_bytes
from fewtokens.analysis.throughput import AUTOCAST, Run, autocast, interquartile_range, seconds_on, time_in_turns
from fewtokens.backbones.vit import ViT
from fewtokens.benchmarks.variants import DENSE
from fewtokens.errors import FewtokensError, check, check_choice
from fewtokens.tasks.classification import compile_model

PRECISIONS = ("32-true", "bf16-true", *AUTOCAST)
MODES = ("inference", "training")
COMPILED = {"none": "eager", "layers": "compiled layers", "model": "compiled", "graph": "CUDA graph"}
MIN_IMAGES = 8  # images timed together: at batch 1, the time of an adaptive tokenizer depends on the image


@dataclass(frozen=True)
class Setting:
    """A way to run the models.

    Args:
        batch: Images per forward pass.
        precision: "32-true", "bf16-true" (weights, too), "bf16-mixed" or "16-mixed" (autocast).
        compiled: "none"; "layers" or "model" for `torch.compile` of every layer or of the whole model; or "graph" to
            record the kernels of a forward pass as a CUDA graph, which removes the time to launch them.
        mode: "inference", or "training": forward pass, cross-entropy, backward pass and a step of AdamW.

    Raises:
        FewtokensError: The batch is less than 1, a name is unknown, or a graph is asked for in training.
    """

    batch: int = 32
    precision: str = "32-true"
    compiled: str = "none"
    mode: str = "inference"

    def __post_init__(self) -> None:
        check(self.batch >= 1, "batch", "a list of ints >= 1, as in batch=[1,32]", self.batch)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("mode", self.mode, MODES)
        check_choice("compiled", self.compiled, COMPILED)
        check(self.compiled != "graph" or self.mode == "inference", "compiled", "no graph with mode=training", "graph")

    def __str__(self) -> str:
        return f"{self.mode}, batch {self.batch}, {self.precision}, {COMPILED[self.compiled]}"


def time_models(
    models: Mapping[str, nn.Module],
    images: Float[Tensor, "b c *t h w"],
    setting: Setting,
    seconds: float,
    min_images: int = MIN_IMAGES,
) -> list[dict[str, Any]]:
    """Time all models in turns on the same images, and count their multiply-adds.

    Args:
        models: The models by name. The one named "none" is the dense model, with which all are compared.
        images: At least one, on the models' device. They are repeated or cut to fill the batches.
        setting: How the models are run.
        seconds: Time to measure all of them together, without warming up.
        min_images: Number of images that are timed together at least, as several batches if they are smaller.

    Returns:
        A record for each model: `tokenizer`; the setting; `images_per_s` (median over the rounds) and
        `images_per_s_spread` (interquartile range); `speedup_vs_dense` (median of the ratios within a round) and its
        `_spread`; `rounds`; `gmacs`, what an image needs alone, `gmacs_padded`, per image in these batches, and
        `gmacs_dense`, all in 1e9 multiply-adds; `realised_over_theoretical`, which is the speed-up divided by
        gmacs_dense / gmacs; `peak_mib`, see `peak_memory`.
    """
    batches = in_batches(images, setting.batch, min_images)
    costs = {name: macs_per_image(model, batches) for name, model in models.items()}
    try:
        runs = {name: timed_run(model, batches, setting) for name, model in models.items()}
        times = time_in_turns(runs, seconds, partial(seconds_on, device=images.device))
        memory = {name: peak_memory(model, batches, setting) for name, model in models.items()}
    finally:
        torch.compiler.reset()  # otherwise the next setting would reach the limit on recompilations
    images_per_round = sum(map(len, batches))
    records = []
    for name in models:
        single, padded = costs[name]
        speedups = [slow / fast for slow, fast in zip(times[DENSE], times[name], strict=True)]
        rates = [images_per_round / taken for taken in times[name]]
        records.append(
            {
                "tokenizer": name,
                **asdict(setting),
                "images_per_s": median(rates),
                "images_per_s_spread": interquartile_range(rates),
                "speedup_vs_dense": median(speedups),
                "speedup_vs_dense_spread": interquartile_range(speedups),
                "rounds": len(rates),
                "gmacs": single / 1e9,
                "gmacs_padded": padded / 1e9,
                "gmacs_dense": costs[DENSE][0] / 1e9,
                "realised_over_theoretical": median(speedups) / (costs[DENSE][0] / single),
                "peak_mib": memory[name],
            }
        )
    return records


def in_batches(
    images: Float[Tensor, "n c *t h w"], batch: int, min_images: int = MIN_IMAGES
) -> list[Float[Tensor, "b c *t h w"]]:
    """Split the images into full batches of about `min_images` together, but at least one. Repeat them if necessary."""
    wanted = max(1, min_images // batch) * batch
    repeated = torch.cat([images] * -(-wanted // len(images)))[:wanted]
    return list(repeated.split(batch))


def macs_per_image(model: nn.Module, batches: list[Float[Tensor, "b c *t h w"]]) -> tuple[float, float]:
    """Return the multiply-adds of an image alone, averaged over all images, and per image in these batches."""
    if not isinstance(model, ViT):  # timm's own, in which all images cost the same
        cost = float(macs(model, batches[0][:1]))
        return cost, cost
    counts = count(model, batches, skip_equal=True)
    return counts.macs.double().mean().item(), counts.padded.mean().item()


def peak_memory(model: nn.Module, batches: list[Float[Tensor, "b c *t h w"]], setting: Setting) -> float | None:
    """Return the peak memory of one batch in MiB, beyond the weights: activations and, in training, gradients.

    Compiled code is measured on a GPU only, and a graph, which keeps its memory, not at all: None.
    """
    device = batches[0].device
    if setting.compiled == "graph" or (setting.compiled != "none" and device.type != "cuda"):
        return None
    return peak_bytes(timed_run(model, batches[:1], setting), device) / 2**20


def timed_run(model: nn.Module, batches: list[Float[Tensor, "b c *t h w"]], setting: Setting) -> Run:
    """Return a function that runs all batches once, with the setting."""
    device = batches[0].device
    if setting.precision == "bf16-true":
        model = copy.deepcopy(model).bfloat16()
        batches = [batch.bfloat16() for batch in batches]
    if setting.compiled == "graph":
        with torch.inference_mode(), autocast(device, setting.precision):
            return record_graph(model.eval(), batches)
    compiled = compiled_copy(model, setting.compiled)

    def infer() -> None:
        with torch.inference_mode(), autocast(device, setting.precision):
            for batch in batches:
                compiled(batch)

    if setting.mode == "inference":
        compiled.eval()
        return infer
    # With a learning rate of 0, a step takes as long but does not change the weights, which the models share.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)

    def train() -> None:
        compiled.train()
        for batch in batches:
            with autocast(device, setting.precision):
                logits = compiled(batch)
            target = torch.arange(len(batch), device=device) % logits.shape[1]
            F.cross_entropy(logits.float(), target).backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


def compiled_copy(model: nn.Module, how: str) -> nn.Module:
    """Return a copy with the same parameters that is compiled, so that the model itself stays as it is.

    Args:
        model: A model of ours, or timm's.
        how: "none", "layers" or "model"; with "none" the model itself is returned.
    """
    if how == "none":
        return model
    copied = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    if how == "layers" and isinstance(model, VisionTransformer):
        for block in copied.blocks:
            block.compile()
        return copied
    compile_model(copied, how)
    return copied


def record_graph(model: nn.Module, batches: list[Float[Tensor, "b c *t h w"]]) -> Run:
    """Record the forward passes of all batches as one CUDA graph, and return the function that replays it.

    Raises:
        FewtokensError: The model is not on a GPU.
    """
    if batches[0].device.type != "cuda":
        raise FewtokensError("compiled=graph records a CUDA graph and needs a GPU. Set compiled=[none] or [layers].")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up outside of the recording, on the stream that records
        for batch in batches * 3:
            model(batch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for batch in batches:
            model(batch)
    return graph.replay


def timm_reference(model: ViT) -> nn.Module:
    """Return timm's model with the same parameters and timm's own blocks, whose speed the dense model should match."""
    shared = {id(p): p for p in model.parameters()}
    vit = copy.deepcopy(model.vit, dict(shared))
    blocks: list[Any] = copy.deepcopy(model.encoder.blocks, dict(shared))
    for block in blocks:
        # Our classes add methods to timm's, but no state, so that changing the class is enough.
        block.__class__, block.attn.__class__ = TimmBlock, TimmAttention
    vit.blocks = nn.Sequential(*blocks)
    return vit
