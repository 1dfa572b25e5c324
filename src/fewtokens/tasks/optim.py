"""Parameter groups, and learning-rate schedules by step."""

import functools
import math
from collections.abc import Callable
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fewtokens.errors import check, check_choice

Schedule = Callable[[int, int], float]


def parameter_groups(
    model: nn.Module, weight_decay: float, decay: str = "matrices", layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Split the trainable parameters into groups by weight decay and, with `layer_decay`, by layer.

    Args:
        model: Its `no_weight_decay()`, if it has one, names parameters without weight decay. Layer decay needs its
            `group_matcher()`.
        weight_decay: Weight decay of the parameters that have one.
        decay: "matrices" excludes norms, biases, gains, positions and class tokens; "all" excludes nothing.
        layer_decay: Factor on the learning rate from each layer to the one before it (Clark et al. 2020; BEiT), as
            `lr_scale` of the groups; None for the same rate everywhere.

    Raises:
        FewtokensError: A setting is out of range.
    """
    check_choice("task.decay", decay, ("matrices", "all"))
    check(layer_decay is None or 0 < layer_decay <= 1, "task.layer_decay", "a number in (0, 1] or null", layer_decay)
    names: set[str] = getattr(model, "no_weight_decay", set)() if decay == "matrices" else set()
    settings: dict[str, Any] = {"no_weight_decay_list": names, "weight_decay_exclude_1d": decay == "matrices"}
    if layer_decay is None:
        return param_groups_weight_decay(model, weight_decay, **settings)
    return param_groups_layer_decay(model, weight_decay, layer_decay=layer_decay, **settings)


def scale_learning_rates(optimizer: Optimizer) -> None:
    """Multiply the learning rate of every group by its `lr_scale`, which timm sets and torch's optimizers ignore."""
    for group in optimizer.param_groups:
        group["lr"] *= group.pop("lr_scale", 1.0)


def constant(step: int, steps: int) -> float:
    """Return 1: the learning rate does not change."""
    return 1.0


def warmup_cosine(step: int, steps: int, *, warmup: int | float = 0.05, final: float = 0.0) -> float:
    """Return the factor on the learning rate: a linear warm-up from 0, then half a cosine down to `final`.

    Args:
        step: Optimizer steps taken.
        steps: Optimizer steps in all.
        warmup: Steps of the warm-up or, if it is a float below 1, their share of all steps.
        final: Share of the learning rate that is left at the last step.

    Raises:
        FewtokensError: A setting is out of range.
    """
    return _after_warmup(step, steps, warmup, final, lambda progress: 0.5 * (1 + math.cos(math.pi * progress)))


def warmup_linear(step: int, steps: int, *, warmup: int | float = 0.05, final: float = 0.0) -> float:
    """Return the factor on the learning rate: a linear warm-up from 0, then a linear decay to `final`.

    The arguments are those of `warmup_cosine`.
    """
    return _after_warmup(step, steps, warmup, final, lambda progress: 1 - progress)


def _after_warmup(step: int, steps: int, warmup: int | float, final: float, decay: Callable[[float], float]) -> float:
    check(0 <= warmup < math.inf, "schedule.warmup", "a number of steps >= 0 or a share in [0, 1)", warmup)
    check(0 <= final <= 1, "schedule.final", "a share in [0, 1]", final)
    rise = int(warmup * steps) if isinstance(warmup, float) and warmup < 1 else int(warmup)
    if step < rise:
        return (step + 1) / rise
    return final + (1 - final) * decay(min(1.0, (step - rise) / max(1, steps - rise)))


def by_step(optimizer: Optimizer, schedule: Schedule, steps: int) -> dict[str, Any]:
    """Return Lightning's configuration of a schedule that is applied after every step."""
    if isinstance(schedule, functools.partial):  # Hydra's own partial checks its target on every call
        schedule = functools.partial(schedule.func, *schedule.args, **schedule.keywords)
    return {"scheduler": LambdaLR(optimizer, lambda step: schedule(step, steps)), "interval": "step"}
