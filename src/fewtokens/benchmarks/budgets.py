"""The settings with which a method needs a given share of the dense model's multiply-adds."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from fewtokens.analysis.cost import macs
from fewtokens.analysis.flops import GIGA, count
from fewtokens.backbones.encoder import block_indices
from fewtokens.backbones.in_place import reduce
from fewtokens.backbones.vit import ViT
from fewtokens.benchmarks.variants import compose_with
from fewtokens.runs.config import instantiate

# Settings that say how much a method keeps. TRAINED are those that keep the shapes of a method's parameters, and can be
# changed after training.
TRAINED = ("keep_rate", "r", "budget")
BUDGETS = (*TRAINED, "num_tokens")


def settings(
    model: ViT,
    entry: str,
    shares: Sequence[float],
    images: Float[Tensor, "b c h w"],
    names: Sequence[str] = TRAINED,
    key: str = "methods",
) -> Iterator[str]:
    """Yield a method with the setting whose cost is nearest to every share, or as it is if there is none to choose.

    Args:
        model: The dense model. It has the method at work afterwards, with random values in the method's own parameters.
        entry: An option of configs/tokenizer, followed by its settings. If it sets its budget, or has none, it is
            yielded as it is.
        shares: Shares of the dense model's multiply-adds.
        images: The images over which multiply-adds are averaged.
        names: The settings that may be chosen, some of `BUDGETS`.
        key: The key of the config that holds the entry, for the error message.
    """
    node = compose_with(entry, key).tokenizer
    budget = next((name for name in names if name in node.build and f"build.{name}=" not in entry), None)
    if budget is None:
        yield entry
        return
    at, build = node.at, instantiate(node.build)
    context = model.encoder.tokenizers[0].context
    patches = context.frames * context.grid[0] * context.grid[1]
    values = budgets(budget, len(block_indices(at, len(model.encoder.layers))), patches)
    with model.encoder.without_reduction():
        dense = macs(model, images[:1]) / GIGA

    def share_of(value: Any) -> float:
        return gmacs(reduce(model, partial(build, **{budget: value}), at), images) / dense

    cost = cache(lambda index: share_of(values[index]))
    for share in shares:
        value = values[nearest(range(len(values)), cost, share)]
        yield f"{entry} build.{budget}={str(value).replace(' ', '')}"


def gmacs(model: ViT, images: Float[Tensor, "b c h w"]) -> float:
    """Return the multiply-adds of an image alone (1e9), averaged over the images if they differ between images."""
    adaptive = any(tokenizer.adaptive for tokenizer in model.encoder.tokenizers)
    return count(model, [images if adaptive else images[:1]]).macs.double().mean().item() / GIGA


def budgets(name: str, places: int, patches: int) -> list[Any]:
    """Return the values of a budget to choose from, the cheapest first.

    Args:
        name: "keep_rate" and "num_tokens" are tried in steps of 0.01; "r", the patches that each block merges away,
            with any sum over the blocks; "budget", the number of probes of ATS, up to 16 times the number of patches.
        places: Number of blocks with the method.
        patches: Number of patches.
    """
    if name in ("keep_rate", "num_tokens"):
        return [percent / 100 for percent in range(1, 101)]
    if name == "budget":
        return list(range(1, 16 * patches + 1))
    return [[total // places + (i < total % places) for i in range(places)] for total in range(patches - 1, -1, -1)]


def nearest(values: Sequence[Any], cost: Callable[[Any], float], target: float) -> Any:
    """Return the value whose cost is nearest to the target, by bisection.

    Args:
        values: Values in the order of their cost.
        cost: Returns the cost of a value.
        target: The wanted cost.
    """
    at = cache(lambda index: float(cost(values[index])))
    index = bisect_left(range(len(values)), target, key=at)
    around = [i for i in (index - 1, index) if 0 <= i < len(values)]
    return values[min(around, key=lambda i: abs(at(i) - target))]
