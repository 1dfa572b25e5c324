"""Distillation: training losses that compare a model with a teacher, in its logits and in its patch tokens.

Logits: Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML 2021 (DeiT),
section 4. Tokens: Rao et al., "DynamicViT", NeurIPS 2021, section 3.4; Zong et al., "Self-slimmed Vision Transformer",
ECCV 2022 (SiT), section 3.3, and the official code github.com/Sense-X/SiT.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from fewtokens.backbones.vit import ViT
from fewtokens.errors import FewtokensError, check, check_choice
from fewtokens.tokenizers.base import Pooler, Tokenizer
from fewtokens.tokens import Tokens

MATCHES = ("kept", "recalibrated")


class Distillation(nn.Module):
    """The training loss with a teacher: a weighted sum of losses on labels, on the teacher's logits and on its tokens.

    DeiT: labels 0.5, logits 0.5, hard. DynamicViT: labels 1, logits 0.5, tokens 0.5, match "kept", not hard.
    SiT: labels 1, logits 2, tokens 2, match "recalibrated", not hard.

    In a distilled DeiT (`backbone.name=deit_small_distilled_patch16_224`), the head of the distillation token is
    compared with the teacher, and that of the class token with the labels. Other models have one head for both.

    Args:
        labels: Weight of the loss on the labels.
        logits: Weight of the loss on the teacher's logits.
        hard: Take the teacher's most probable class as a label, instead of the divergence KL(teacher, model) of the
            softmax of both.
        temperature: Divides the logits before the softmax; the divergence is multiplied by its square.
        tokens: Weight of the mean squared error between the patch tokens of both; 0 for none.
        match: Which tokens are compared. "kept": those after the last block and norm that a method with a keep mask
            (DynamicViT) or without reduction keeps. "recalibrated": those after every block. Where a pooling method has
            reduced them, a module for each block maps them back to all patches; it is trained, too, and not used later.
        recalibration_lr: Factor on the learning rate of these modules (official code of SiT: 5).

    Raises:
        FewtokensError: A setting is out of range.
    """

    def __init__(
        self,
        labels: float = 0.5,
        logits: float = 0.5,
        hard: bool = True,
        temperature: float = 1.0,
        tokens: float = 0.0,
        match: str = "kept",
        recalibration_lr: float = 5.0,
    ) -> None:
        super().__init__()
        for name, value in {"labels": labels, "logits": logits, "tokens": tokens}.items():
            check(value >= 0, f"task.distillation.{name}", "a number >= 0", value)
        check(temperature > 0, "task.distillation.temperature", "a number > 0", temperature)
        check(recalibration_lr > 0, "task.distillation.recalibration_lr", "a number > 0", recalibration_lr)
        check_choice("task.distillation.match", match, MATCHES)
        self.labels, self.logits, self.hard, self.temperature = labels, logits, hard, temperature
        self.tokens, self.match, self.recalibration_lr = tokens, match, recalibration_lr
        self.recalibrations = nn.ModuleList()
        # In a tuple, so that the teacher is neither saved in checkpoints nor seen by the optimizer.
        self._teacher: tuple[nn.Module, ...] = ()

    @property
    def teacher(self) -> nn.Module | None:
        """Return the teacher; None before `connect`."""
        return self._teacher[0] if self._teacher else None

    def connect(self, student: nn.Module, teacher: nn.Module) -> None:
        """Set the teacher, which is frozen, and build the modules that recalibrate the student's tokens.

        Args:
            student: The model that is trained.
            teacher: Maps the same samples to logits of the same classes. A loss on tokens needs a ViT with as many
                patches of the same width, and for "recalibrated" as many blocks.

        Raises:
            FewtokensError: The tokens of both cannot be compared.
        """
        self._teacher = (teacher.requires_grad_(False).eval(),)
        if not self.tokens:
            return
        layouts = [_layout(model) for model in (student, teacher)]
        if layouts[0] is None or layouts[0] != layouts[1]:
            raise FewtokensError(
                "task.distillation.tokens compares patch tokens, for which the teacher must be a ViT with the width, "
                f"number of blocks and patches of the model, which are {layouts[0]}, got {layouts[1]}. Choose another "
                "teacher, or set task.distillation.tokens=0."
            )
        if self.match == "recalibrated":
            assert isinstance(student, ViT)
            others = [t for t in student.encoder.tokenizers if type(t) is not Tokenizer and not isinstance(t, Pooler)]
            if others:
                raise FewtokensError(
                    "task.distillation.match=recalibrated needs a method that pools the patches into a fixed number of "
                    f"tokens (sit, token_learner_v11, sinkhorn, patch_merger), got {type(others[0]).__name__}. Set "
                    "task.distillation.tokens=0, or match=kept for dynamic_vit."
                )
            self.recalibrations = nn.ModuleList(_recalibrations(student, *layouts[0]))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return the groups of the parameters that recalibrate tokens, none if there are none."""
        if not any(True for _ in self.recalibrations.parameters()):
            return []
        groups = param_groups_weight_decay(self.recalibrations, weight_decay)
        return [group | {"lr_scale": self.recalibration_lr} for group in groups]

    def forward(
        self,
        student: nn.Module,
        run: Callable[[Tensor], Tensor],
        samples: Float[Tensor, "b *sample"],
        label_loss: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, ""]:
        """Return the loss of a batch.

        Args:
            student: The model that is trained.
            run: Returns its logits for samples.
            samples: A batch of it.
            label_loss: Returns the loss on the labels for logits (B, classes).
        """
        teacher = self._teacher[0]
        if any(parameter.device != samples.device for parameter in teacher.parameters()):
            teacher.to(samples.device)
        with recorded(student, bool(self.tokens)) as own, _heads(student) as heads:
            logits = run(samples)
        with torch.no_grad(), _bfloat16(samples.device), recorded(teacher, bool(self.tokens)) as theirs:
            target = teacher(samples)
        labels, compared = heads if heads else (logits, logits)
        loss = self.labels * label_loss(labels) + self.logits * self.logits_loss(compared.float(), target.float())
        if self.tokens:
            loss = loss + self.tokens * self._tokens_loss(student, teacher, own, theirs)
        return loss

    def logits_loss(self, logits: Float[Tensor, "b k"], target: Float[Tensor, "b m"]) -> Float[Tensor, ""]:
        """Return the loss on the teacher's logits `target`, averaged over the batch."""
        if target.shape != logits.shape:
            raise FewtokensError(
                f"The teacher must have the classes of the data, which are {logits.shape[1]}, but it has "
                f"{target.shape[1]}. Choose another teacher."
            )
        if self.hard:
            return F.cross_entropy(logits, target.argmax(dim=1))
        own, theirs = ((part / self.temperature).log_softmax(dim=1) for part in (logits, target))
        return F.kl_div(own, theirs, reduction="batchmean", log_target=True) * self.temperature**2

    def _tokens_loss(self, student: Any, teacher: Any, own: list[Tokens], theirs: list[Tokens]) -> Float[Tensor, ""]:
        if self.match == "recalibrated":
            pairs = zip(self.recalibrations, own, theirs, strict=True)
            losses = [F.mse_loss(back(mine.patches).float(), their.patches.float()) for back, mine, their in pairs]
            return torch.stack(losses).mean()
        last, target = own[-1], theirs[-1]
        if last.num_patches != target.num_patches:
            raise FewtokensError(
                f"task.distillation.match=kept needs all {target.num_patches} patches in the training batch, but the "
                f"method leaves {last.num_patches}. Set match=recalibrated for a pooling method, or tokens=0."
            )
        mine, their = (
            model.vit.norm(tokens.x)[:, tokens.prefix :].float()
            for model, tokens in ((student, last), (teacher, target))
        )
        errors = (mine - their).square().mean(dim=2)
        if last.keep_mask is None:
            return errors.mean()
        kept = (last.keep_mask[:, last.prefix :].detach() > 0).float()
        return (errors * kept).sum() / kept.sum().clamp_min(1.0)


class Recalibration(nn.Module):
    """SiT's reversed Token Slimming Module: maps the tokens that are left back to all patches.

    LN -> MLP over the tokens, from S to N -> plus an MLP over the channels of its own LN.

    Args:
        dim: Width C of the tokens.
        left: Number S of tokens.
        patches: Number N of patches.
    """

    def __init__(self, dim: int, left: int, patches: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.over_tokens = Mlp(left, 4 * patches, patches)
        self.over_channels = Mlp(dim, 4 * dim, dim)

    def forward(self, patches: Float[Tensor, "b s c"]) -> Float[Tensor, "b n c"]:
        """Map (B, S, C) to (B, N, C)."""
        x = self.over_tokens(self.norm1(patches).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(self.norm2(x))


@contextmanager
def _outputs_of(modules: Iterable[nn.Module]) -> Iterator[list[Any]]:
    """Return a context that collects the outputs of modules in a forward pass."""
    found: list[Any] = []
    handles = [module.register_forward_hook(lambda _, __, output: found.append(output)) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def recorded(model: nn.Module, wanted: bool = True) -> AbstractContextManager[list[Tokens]]:
    """Return a context that collects the tokens after every block of a forward pass, or nothing if not `wanted`."""
    return _outputs_of(model.encoder.layers if wanted and isinstance(model, ViT) else ())


def _heads(model: nn.Module) -> AbstractContextManager[list[Tensor]]:
    """Return a context that collects the logits of both heads of a distilled DeiT, whose output is their mean."""
    vit: Any = getattr(model, "vit", None)
    return _outputs_of((vit.head, vit.head_dist) if isinstance(vit, VisionTransformerDistilled) else ())


def _bfloat16(device: torch.device) -> AbstractContextManager[Any]:
    """Return autocast to bfloat16 on a GPU. Elsewhere the precision stays that of the trainer."""
    return torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else nullcontext()


def _layout(model: nn.Module) -> tuple[int, int, int] | None:
    """Return the width, the number of blocks and the number of patches of a ViT; None for other models."""
    if not isinstance(model, ViT):
        return None
    context = model.encoder.tokenizers[0].context
    return context.dim, context.depth, context.frames * context.grid[0] * context.grid[1]


def _recalibrations(student: ViT, dim: int, depth: int, patches: int) -> Iterator[nn.Module]:
    """Yield a module for every block, which does nothing where no tokenizer has reduced the tokens before."""
    left = patches
    for tokenizer in student.encoder.tokenizers:
        if isinstance(tokenizer, Pooler):
            left = tokenizer.num_tokens * tokenizer.context.frames
        yield nn.Identity() if left == patches else Recalibration(dim, left, patches)
