"""Classification of images, and of videos as stacks of views."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NotRequired, TypedDict, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from fewtokens.backbones.encoder import EncoderLayer
from fewtokens.errors import FewtokensError, check, check_choice
from fewtokens.tasks.distillation import Distillation
from fewtokens.tasks.mixup import Mix
from fewtokens.tasks.optim import Schedule, by_step, constant, parameter_groups, scale_learning_rates
from fewtokens.tokenizers.base import Tokenizer

Batch = tuple[Tensor, Tensor]
RECOMPILE_LIMIT = 64
LOSSES = ("cross_entropy", "bce", "bce_sum")


class Losses(TypedDict):
    """Settings of the training loss; `Classifier` explains them."""

    label_smoothing: NotRequired[float]
    mix: NotRequired[Mix | None]
    loss: NotRequired[str]
    teacher: NotRequired[str | None]
    distillation: NotRequired[Distillation | None]


class ConfusionMatrix(MulticlassConfusionMatrix):
    """Counts samples by class and predicted class.

    With trainer.deterministic, torchmetrics compares every sample with each of the classes^2 cells, which takes seconds
    per batch for 1000 classes. Counting integers is exact in any order.
    """

    def update(self, preds: Float[Tensor, "b k"], target: Int[Tensor, " b"]) -> None:
        """Count a batch of logits and class numbers."""
        cells = target * self.num_classes + preds.argmax(dim=1)
        self.confmat += torch.bincount(cells, minlength=self.num_classes**2).view_as(self.confmat)


class Classifier(LightningModule):
    """Trains and evaluates a model that maps samples to logits.

    A sample is a stack of views. A batch is (views (B, V, *sample), targets), where targets are class numbers (B,) or
    probabilities (B, classes). Training uses every view as a sample of its own; evaluation averages the logits over the
    views.

    Args:
        model: Maps samples (B, *sample) to logits (B, classes).
        num_classes: Number of classes.
        optimizer: Recipe, called as `optimizer(parameter_groups)`.
        schedule: Called as `schedule(step, steps)`, returns a factor on the learning rate.
        weight_decay: Weight decay of the parameters that have one.
        decay: Which parameters have one: "matrices" or "all", see `parameter_groups`.
        layer_decay: Factor on the learning rate from each layer to the one before it, or None.
        compile: "none", "layers" or "model", see `compile_model`.
        **losses: `loss` of training: "cross_entropy", or binary cross-entropy, for which every class in a mixed image
            is a label, averaged over classes ("bce", DeiT III) or added up ("bce_sum", scenic). Validation and test
            report the cross-entropy. `label_smoothing` of the training loss, in [0, 1). `mix`: mixup and CutMix, or
            None. `teacher`: name of the model to distill from, which `fewtokens.runs.teacher` loads for training, or
            None; `distillation`: the losses with it.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        schedule: Schedule = constant,
        weight_decay: float = 0.0,
        decay: str = "matrices",
        layer_decay: float | None = None,
        compile: str = "none",
        **losses: Unpack[Losses],
    ) -> None:
        super().__init__()
        self.label_smoothing, mix = losses.get("label_smoothing", 0.0), losses.get("mix")
        check(0 <= self.label_smoothing < 1, "task.label_smoothing", "a number in [0, 1)", self.label_smoothing)
        self.loss, self.teacher = losses.get("loss", "cross_entropy"), losses.get("teacher")
        check_choice("task.loss", self.loss, LOSSES)
        self.distillation = losses.get("distillation")
        self._check_losses(compile)
        if mix is not None:
            mixed = mix.num_classes
            check(mixed == num_classes, "task.mix.num_classes", f"data.num_classes, which is {num_classes}", mixed)
        self.model, self.optimizer, self.schedule, self.mix = model, optimizer, schedule, mix
        self.weight_decay, self.decay, self.layer_decay = weight_decay, decay, layer_decay
        self.num_classes = num_classes
        compile_model(model, compile)
        self.train_loss = MeanMetric(nan_strategy="disable")
        self.train_loss.persistent(True)  # a run that resumes in the middle of an epoch keeps the sum of its first part
        self.train_top1 = self._train_accuracy()
        self.strict_loading = False  # a checkpoint's model is checked before (load_model); metrics may be new
        self.val_metrics, self.test_metrics = self._metrics(num_classes), self._metrics(num_classes)
        self.counts, self.confusion = self._counts(num_classes), None

    def _check_losses(self, compile: str) -> None:
        tokens = self.teacher is not None and self.distillation is not None and self.distillation.tokens > 0
        check(not tokens or compile == "none", "task.compile", "none with task.distillation.tokens", compile)

    def forward(self, views: Float[Tensor, "b v *sample"]) -> Float[Tensor, "b classes"]:
        """Return the logits (B, classes) in float32, averaged over the views."""
        logits = self._logits(views.flatten(0, 1)).float()
        return logits.unflatten(0, views.shape[:2]).mean(dim=1)

    def _logits(self, samples: Float[Tensor, "b *sample"]) -> Float[Tensor, "b classes"]:
        logits, classes = self.model(samples), self.num_classes
        outputs = logits.shape[1]  # compared here, since a model of any kind has them
        check(outputs == classes, "backbone.num_classes", f"data.num_classes, which is {classes}", outputs)
        return logits

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Return the loss of a batch, including the losses of tokenizers that have one."""
        views, target = batch
        self._check_target(target)
        samples, target = views.flatten(0, 1), target.repeat_interleave(views.shape[1], dim=0)
        if self.mix is not None:
            samples, target = self.mix(samples, target)
        label_loss = partial(self._label_loss, target=target)
        if self.distillation is None or self.distillation.teacher is None:
            loss = label_loss(self._logits(samples))
        else:
            loss = self.distillation(self.model, self._logits, samples, label_loss)
        tokenizer_losses = [module.loss() for module in self.model.modules() if isinstance(module, Tokenizer)]
        loss = sum((part for part in tokenizer_losses if part is not None), start=loss)
        self.train_loss.update(loss.detach().expand(len(target)))
        # Not in the progress bar, which would copy the value from the device after every step.
        self.log("train/loss", loss.detach(), on_step=True, on_epoch=False, rank_zero_only=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the mean loss of the epoch and the accuracy on its samples as they were augmented, over all ranks.

        Raises:
            FewtokensError: The loss is not finite.
        """
        loss = self.train_loss.compute()
        self.train_loss.reset()
        self.log("train/loss_epoch", loss, prog_bar=True, rank_zero_only=True)
        if self.train_top1 is not None:
            self.log("train/top1", self.train_top1.compute(), rank_zero_only=True)
            self.train_top1.reset()
        if not torch.isfinite(loss):
            raise FewtokensError(
                f"The mean training loss of epoch {self.current_epoch + 1} is {loss.item()}. Lower optimizer.lr, set "
                "trainer.gradient_clip_val=1.0, or train in float32 (trainer.precision=32-true)."
            )

    def validation_step(self, batch: Batch, index: int) -> None:
        """Update the validation metrics."""
        self._evaluate(self.val_metrics, batch, "val")

    def test_step(self, batch: Batch, index: int) -> None:
        """Update the test metrics."""
        self._evaluate(self.test_metrics, batch, "test")

    def configure_model(self) -> None:
        """Let a strategy that shards models, as `fewtokens.runs.fsdp` has one, shard this one."""
        shard = getattr(self.trainer.strategy, "shard", None)
        if shard is not None:
            shard(self.model)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule."""
        groups = parameter_groups(self.model, self.weight_decay, self.decay, self.layer_decay)
        if self.distillation is not None:
            groups += self.distillation.parameter_groups(self.weight_decay)
        try:
            optimizer = self.optimizer(groups)
        except (TypeError, ValueError) as error:
            raise FewtokensError(f"The optimizer does not accept its settings: {error}. Check `optimizer`.") from error
        rate = optimizer.defaults["lr"]
        check(math.isfinite(rate), "optimizer.lr", "a finite number", rate)
        scale_learning_rates(optimizer)
        steps = int(self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": by_step(optimizer, self.schedule, steps)}

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics over all ranks."""
        self._log(self.val_metrics, "val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics over all ranks, and keep the confusion matrix for the measure that draws it."""
        self._log(self.test_metrics, "test")
        if self.counts is not None:
            self.confusion = self.counts.compute()
            self.counts.reset()

    def _check_target(self, target: Tensor) -> None:
        if target.ndim > 1 and not target.is_floating_point():
            raise FewtokensError(
                f"The data have several labels per sample (targets of shape {tuple(target.shape)}), which a "
                "classification with one label does not take. Set task=multilabel, or data.multilabel=false."
            )

    def _label_loss(self, logits: Float[Tensor, "b k"], target: Tensor) -> Tensor:
        """Return the loss of the labels, and update the training accuracy."""
        if self.train_top1 is not None:
            self.train_top1.update((logits.detach().argmax(dim=1) == self._labels(logits, target)).float())
        return self._loss(logits, target)

    def _loss(self, logits: Float[Tensor, "b k"], target: Int[Tensor, " b"] | Float[Tensor, "b k"]) -> Tensor:
        if self.loss == "cross_entropy":
            return F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing)
        classes, smoothing = logits.shape[1], self.label_smoothing
        labels = (F.one_hot(target, classes) if target.ndim == 1 else target > 0).float()
        labels = labels * (1 - smoothing) + smoothing / classes
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels)
        return loss * classes if self.loss == "bce_sum" else loss

    def _losses(self, logits: Float[Tensor, "b k"], target: Int[Tensor, " b"] | Float[Tensor, "b k"]) -> Tensor:
        """Return the loss of every sample (B,), without label smoothing, which belongs to training."""
        return F.cross_entropy(logits, target, reduction="none")

    def _labels(
        self, logits: Float[Tensor, "b k"], target: Int[Tensor, " b"] | Float[Tensor, "b k"]
    ) -> Int[Tensor, "b *k"]:
        """Return the labels that metrics compare with: of several that are most probable, the one with most evidence.

        A prediction is then right if it is one of them, as with the ReaL labels of ImageNet.
        """
        if target.ndim == 1:
            return target
        return logits.masked_fill(target < target.amax(dim=1, keepdim=True), -torch.inf).argmax(dim=1)

    def _metrics(self, num_classes: int) -> nn.ModuleDict:
        metrics: dict[str, Metric] = {"top1": MulticlassAccuracy(num_classes, average="micro", validate_args=False)}
        if num_classes > 5:
            metrics["top5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro", validate_args=False)
        # By default torchmetrics drops NaN silently. "disable" ignores weights, so losses are passed one by one.
        return nn.ModuleDict(metrics | {"loss": MeanMetric(nan_strategy="disable")})

    def _train_accuracy(self) -> MeanMetric | None:
        """Return the metric that collects which training samples were right, or None."""
        accuracy = MeanMetric(nan_strategy="disable")
        accuracy.persistent(True)
        return accuracy

    def _counts(self, num_classes: int) -> Metric | None:
        """Return the metric that collects the confusion matrix, or None."""
        return ConfusionMatrix(num_classes, validate_args=False)

    def _evaluate(self, metrics: nn.ModuleDict, batch: Batch, stage: str) -> None:
        views, target = batch
        self._check_target(target)
        logits = self(views)
        losses, labels = self._losses(logits, target), self._labels(logits, target)
        if stage == "test" and self.counts is not None:
            self.counts.update(logits, labels)
        for name, metric in metrics.items():
            assert isinstance(metric, Metric)
            metric.update(losses) if name == "loss" else metric.update(logits, labels)

    def _log(self, metrics: nn.ModuleDict, stage: str) -> None:
        # Metric objects are synchronized once, so that every sample counts once on any number of ranks. This cannot
        # happen in the step: a rank without samples, or without readable ones, takes no step, and the others would wait
        # for it.
        for name, metric in metrics.items():
            assert isinstance(metric, Metric)
            self.log(f"{stage}/{name}", metric, prog_bar=name in ("top1", "map"))


def compile_model(model: nn.Module, mode: str, **settings: Any) -> None:
    """Compile a model in place, so that the names of its parameters do not change.

    Args:
        model: The model.
        mode: "layers" compiles every `EncoderLayer` on its own. Layers with the same shapes share one compilation, and
            DDP can send the gradients of a layer while those of the next are computed. "model" compiles the model as
            one graph. "none" does nothing.
        settings: Arguments of torch.compile.

    Raises:
        FewtokensError: The mode is unknown.
    """
    check_choice("task.compile", mode, ("none", "layers", "model"))
    if mode == "model":
        model.compile(**settings)
    elif mode == "layers":
        # All layers run the same code, for which torch keeps at most 8 compilations by default. Each combination of
        # tokenizer, number of tokens and training or evaluation is one.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, RECOMPILE_LIMIT)
        for module in model.modules():
            if isinstance(module, EncoderLayer):
                module.compile(**settings)
