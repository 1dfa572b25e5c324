"""Several classes at once: a sigmoid for each, and mean average precision."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MultilabelAveragePrecision
from torchmetrics.utilities.data import dim_zero_cat

from fewtokens.errors import FewtokensError
from fewtokens.tasks.classification import Classifier


class MeanAveragePrecision(MultilabelAveragePrecision):
    """Mean over those classes that some sample has: torchmetrics counts the others as 0."""

    def sync(self, *args: Any, **settings: Any) -> None:
        """A rank without samples takes part with none; torchmetrics' own stand-in has an axis too few."""
        if not self.target:
            shape = (0, self.num_labels)
            self.preds.append(torch.empty(shape, device=self.device))
            self.target.append(torch.empty(shape, device=self.device, dtype=torch.long))
        super().sync(*args, **settings)

    def compute(self) -> Tensor:  # type: ignore[override]  # the curve's
        """A number, NaN where there is no class at all."""
        found = super().compute()
        return found[dim_zero_cat(self.target).bool().any(dim=0)].mean()


class MultilabelClassifier(Classifier):
    """Trains and evaluates a model on samples with any number of classes each, none included (Charades, AViD).

    Targets are (B, classes), 1 where a class is there and 0 where not. The loss is the mean binary cross-entropy over
    classes; `map` is the mean over classes of average precision (classes without a sample that has them are left out),
    over the whole set on all ranks. Logits are averaged over views, as ever. Label smoothing draws targets to 1/2.

    Args:
        As those of `Classifier`.
    """

    def _loss(self, logits: Float[Tensor, "b k"], target: Tensor) -> Tensor:
        wanted = self._checked(logits, target)
        wanted = wanted * (1 - self.label_smoothing) + self.label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits.float(), wanted)

    def _losses(self, logits: Float[Tensor, "b k"], target: Tensor) -> Tensor:
        wanted = self._checked(logits, target)
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=1)

    def _truth(self, target: Tensor) -> Int[Tensor, "b k"]:
        return (target > 0.5).long()

    def _metrics(self, num_classes: int) -> nn.ModuleDict:
        return nn.ModuleDict(
            {
                "map": MeanAveragePrecision(num_classes, average="none", validate_args=False),
                "loss": MeanMetric(nan_strategy="disable"),
            }
        )

    def _counts(self, num_classes: int) -> Metric | None:
        return None  # with several classes at once nothing is confused with one other

    def _checked(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.shape != logits.shape:
            raise FewtokensError(
                "Multi-label targets have a number for every class",
                expected=f"targets {tuple(logits.shape)}",
                got=tuple(target.shape),
                fix="choose data with several labels, or task=classification",
            )
        return target.float()
