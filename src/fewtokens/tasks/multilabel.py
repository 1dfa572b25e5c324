"""Classification with any number of classes per sample, measured by mean average precision."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MultilabelAveragePrecision
from torchmetrics.utilities.data import dim_zero_cat

from fewtokens.errors import FewtokensError, check, check_choice
from fewtokens.tasks.classification import Classifier


class MeanAveragePrecision(MultilabelAveragePrecision):
    """The mean of the average precision over the classes that at least one sample has.

    torchmetrics counts the other classes as 0.
    """

    def sync(self, *args: Any, **settings: Any) -> None:
        """Synchronize over ranks, some of which may have no samples.

        The placeholder of torchmetrics for such a rank lacks the axis of classes.
        """
        if not self.target:
            shape = (0, self.num_labels)
            self.preds.append(torch.empty(shape, device=self.device))
            self.target.append(torch.empty(shape, device=self.device, dtype=torch.long))
        super().sync(*args, **settings)

    def compute(self) -> Tensor:  # type: ignore[override]  # the curve's
        """Return the mean, or NaN if no sample has a class."""
        precision = super().compute()
        return precision[dim_zero_cat(self.target).bool().any(dim=0)].mean()


class MultilabelClassifier(Classifier):
    """Trains and evaluates a model on samples with any number of classes each (Charades, AViD).

    Targets are (B, classes), 1 for the classes of a sample and 0 for the others. The loss is the binary cross-entropy,
    averaged over classes; label smoothing moves targets towards 1/2. The metric `map` is the mean average precision
    over the whole set and all ranks, see `MeanAveragePrecision`. Logits are averaged over views.
    The arguments are those of `Classifier`; there is no other loss, and no teacher.

    Raises:
        FewtokensError: A teacher or another loss is given.
    """

    def _check_losses(self, compile: str) -> None:
        check(self.teacher is None, "task.teacher", "null with task=multilabel", self.teacher)
        check_choice("task.loss", self.loss, ("cross_entropy",))

    def _check_target(self, target: Tensor) -> None:
        pass  # `_checked` compares it with the logits

    def _loss(self, logits: Float[Tensor, "b k"], target: Tensor) -> Tensor:
        target = self._checked(logits, target)
        target = target * (1 - self.label_smoothing) + self.label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits.float(), target)

    def _losses(self, logits: Float[Tensor, "b k"], target: Tensor) -> Tensor:
        target = self._checked(logits, target)
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=1)

    def _labels(self, logits: Tensor, target: Tensor) -> Int[Tensor, "b k"]:
        return (target > 0.5).long()

    def _metrics(self, num_classes: int) -> nn.ModuleDict:
        mean_precision = MeanAveragePrecision(num_classes, average="none", validate_args=False)
        return nn.ModuleDict({"map": mean_precision, "loss": MeanMetric(nan_strategy="disable")})

    def _train_accuracy(self) -> None:
        return None  # mean average precision would keep all logits of an epoch

    def _counts(self, num_classes: int) -> Metric | None:
        return None  # there is no confusion matrix for samples with several classes

    def _checked(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.shape != logits.shape:
            raise FewtokensError(
                f"Multi-label targets must have one number per class and shape {tuple(logits.shape)}, got "
                f"{tuple(target.shape)}. Use data with several labels (data.multilabel=true), or task=classification."
            )
        return target.float()
