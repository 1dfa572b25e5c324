"""Parameter groups and learning-rate schedules by step."""

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fewtokens.errors import FewtokensError

Schedule = Callable[[int, int], float]


def parameter_groups(model: nn.Module, weight_decay: float, decay: str = "matrices") -> list[dict[str, Any]]:
    """Parameters that are trained, in a group with weight decay and one without.

    Args:
        model: Its `no_weight_decay()`, if it has one, names further parameters to leave alone.
        weight_decay: Of the first group.
        decay: "matrices" spares norms, biases, gains, positions and class tokens; "all" spares nothing.

    Raises:
        FewtokensError: An unknown value of `decay`.
    """
    if decay not in ("matrices", "all"):
        raise FewtokensError(
            "Weight decay acts on matrices or on all parameters",
            expected="'matrices' or 'all'",
            got=repr(decay),
            fix="set task.decay=matrices",
        )
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    ask = getattr(model, "no_weight_decay", set)
    spared: set[str] = ask()
    # A vector (norm, bias, LayerScale) sets a scale or an offset: shrinking it towards zero regularises nothing.
    free = set() if decay == "all" else {n for n, p in named if p.ndim < 2 or n.endswith(".bias") or n in spared}
    groups = [
        {"params": [p for n, p in named if n not in free], "weight_decay": weight_decay},
        {"params": [p for n, p in named if n in free], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def constant(step: int, steps: int) -> float:
    """The learning rate as it is."""
    return 1.0


def warmup_cosine(step: int, steps: int, *, warmup: int | float = 0.05, final: float = 0.0) -> float:
    """Linear from 0 over the warm-up, then half a cosine down to `final` at the last step.

    Args:
        step: Optimizer steps taken.
        steps: Optimizer steps in all.
        warmup: Steps of warm-up, or, below 1, their share of all.
        final: Share of the learning rate that is left at the end.

    Returns:
        The factor on the learning rate.
    """
    rise = int(warmup * steps) if isinstance(warmup, float) and warmup < 1 else int(warmup)
    if step < rise:
        return (step + 1) / rise
    progress = min(1.0, (step - rise) / max(1, steps - rise))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def by_step(optimizer: Optimizer, schedule: Schedule, steps: int) -> dict[str, Any]:
    """A schedule as Lightning wants it."""
    if isinstance(schedule, functools.partial):  # Hydra's own kind of partial checks its target on every call
        schedule = functools.partial(schedule.func, *schedule.args, **schedule.keywords)
    return {"scheduler": LambdaLR(optimizer, lambda step: schedule(step, steps)), "interval": "step"}
