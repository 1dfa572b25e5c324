"""The one task: classification of images, and of videos as stacks of views."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from fewtokens.errors import FewtokensError
from fewtokens.tasks.mixup import Mix
from fewtokens.tasks.optim import Schedule, by_step, constant, parameter_groups
from fewtokens.tokenizers.base import Tokenizer

Batch = tuple[Tensor, Tensor]


class Classifier(LightningModule):
    """Trains and evaluates a model that maps samples to logits.

    A sample is a stack of views: a batch is (views (B, V, *sample), targets (B,) or probabilities (B, classes)).
    Training takes every view as a sample of its own; evaluation averages the logits over the views.

    Args:
        model: Samples (B, *sample) to logits (B, classes).
        num_classes: Classes.
        optimizer: Recipe, `optimizer(parameter_groups)`; its `weight_decay` is that of the decayed group.
        schedule: `schedule(step, steps)` to a factor on the learning rate.
        weight_decay: Weight decay of the parameters that have one.
        decay: Which do: "matrices" or "all".
        label_smoothing: Of the cross-entropy.
        mix: Mixup and CutMix, or None.
        compile: torch.compile the model, in place, so that names of parameters stay as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        schedule: Schedule = constant,
        weight_decay: float = 0.0,
        decay: str = "matrices",
        label_smoothing: float = 0.0,
        mix: Mix | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise FewtokensError(
                "Label smoothing is a share", expected="0 <= s < 1", got=label_smoothing, fix="set task.label_smoothing"
            )
        self.model, self.optimizer, self.schedule, self.mix = model, optimizer, schedule, mix
        self.weight_decay, self.decay, self.label_smoothing = weight_decay, decay, label_smoothing
        if compile:
            self.model.compile()
        self.train_loss = MeanMetric(nan_strategy="disable")
        self.train_loss.persistent(True)  # an epoch that is resumed in its middle keeps the mean of its beginning
        self.val_metrics, self.test_metrics = self._metrics(num_classes), self._metrics(num_classes)
        self.counts, self.confusion = self._counts(num_classes), None

    def forward(self, views: Float[Tensor, "b v *sample"]) -> Float[Tensor, "b classes"]:
        """Logits (B, classes), averaged over the views, in float32."""
        logits = self.model(views.flatten(0, 1)).float()
        return logits.unflatten(0, views.shape[:2]).mean(dim=1)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Cross-entropy of a batch, and what tokenizers with a loss of their own add to it."""
        views, target = batch
        samples, target = views.flatten(0, 1), target.repeat_interleave(views.shape[1], dim=0)
        if self.mix is not None:
            samples, target = self.mix(samples, target)
        loss = self._loss(self.model(samples), target)
        own = [
            part for part in (t.loss() for t in self.model.modules() if isinstance(t, Tokenizer)) if part is not None
        ]
        if own:
            loss = loss + torch.stack(own).sum()
        self.train_loss.update(loss.detach().expand(len(target)))
        self.log("train/loss", loss.detach(), on_step=True, on_epoch=False, prog_bar=True, rank_zero_only=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the epoch's mean loss over all ranks; a loss that is no number ends the run."""
        loss = self.train_loss.compute()
        self.train_loss.reset()
        self.log("train/loss_epoch", loss, rank_zero_only=True)
        if not torch.isfinite(loss):
            raise FewtokensError(
                "Training keeps a finite loss",
                expected="a number",
                got=f"{loss.item()} as mean of epoch {self.current_epoch}",
                fix="lower optimizer.lr, set trainer.gradient_clip_val=1.0, or train in float32 (trainer.precision=32)",
            )

    def validation_step(self, batch: Batch, index: int) -> None:
        """Count a batch of the validation set."""
        self._evaluate(self.val_metrics, batch, "val")

    def test_step(self, batch: Batch, index: int) -> None:
        """Count a batch of the test set."""
        self._evaluate(self.test_metrics, batch, "test")

    def configure_optimizers(self) -> Any:
        """The optimizer over both parameter groups, and the schedule by step."""
        optimizer = self.optimizer(parameter_groups(self.model, self.weight_decay, self.decay))
        steps = int(self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": by_step(optimizer, self.schedule, steps)}

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all ranks."""
        self._log(self.val_metrics, "val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics over all ranks, and keep the confusion matrix for whoever wants to draw it."""
        self._log(self.test_metrics, "test")
        if self.counts is not None:
            self.confusion = self.counts.compute()
            self.counts.reset()

    def _loss(self, logits: Float[Tensor, "b k"], target: Int[Tensor, " b"] | Float[Tensor, "b k"]) -> Tensor:
        return F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing)

    def _losses(self, logits: Float[Tensor, "b k"], target: Int[Tensor, " b"] | Float[Tensor, "b k"]) -> Tensor:
        """Of every sample (B,). Smoothing belongs to training: the reported loss is the plain cross-entropy."""
        return F.cross_entropy(logits, target, reduction="none")

    def _truth(self, target: Int[Tensor, " b"] | Float[Tensor, "b k"]) -> Int[Tensor, "b *k"]:
        """What metrics compare with."""
        return target if target.ndim == 1 else target.argmax(dim=1)

    def _metrics(self, num_classes: int) -> nn.ModuleDict:
        top5 = min(5, num_classes)
        return nn.ModuleDict(
            {
                "top1": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
                "top5": MulticlassAccuracy(num_classes, top_k=top5, average="micro", validate_args=False),
                # The default leaves out what is no number. "disable" ignores weights, so losses come one by one.
                "loss": MeanMetric(nan_strategy="disable"),
            }
        )

    def _counts(self, num_classes: int) -> Metric | None:
        """Collects the confusion matrix, where there is one."""
        return MulticlassConfusionMatrix(num_classes, validate_args=False)

    def _evaluate(self, metrics: nn.ModuleDict, batch: Batch, stage: str) -> None:
        views, target = batch
        logits = self(views)
        losses, truth = self._losses(logits, target), self._truth(target)
        if stage == "test" and self.counts is not None:
            self.counts.update(logits, truth)
        for name, metric in metrics.items():
            assert isinstance(metric, Metric)
            metric.update(losses) if name == "loss" else metric.update(logits, truth)

    def _log(self, metrics: nn.ModuleDict, stage: str) -> None:
        # Metric objects are gathered once, so every sample counts once on any ranks. Not in the step: a rank that has
        # no sample, or none that could be read, takes no step, and the others would wait for it for ever.
        for name, metric in metrics.items():
            assert isinstance(metric, Metric)
            self.log(f"{stage}/{name}", metric, prog_bar=name in ("top1", "map"))
