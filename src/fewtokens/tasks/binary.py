"""Classification trained with a binary cross-entropy per class, as DeiT III and timm's recipes do."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fewtokens.tasks.classification import Classifier


class BinaryClassifier(Classifier):
    """A `Classifier` whose loss is the binary cross-entropy, averaged over classes (Touvron et al., arXiv:2204.07118).

    With mixup or CutMix, both classes of a mixed image have the target 1. Label smoothing moves targets towards
    1 / classes. Metrics, and the arguments, are those of `Classifier`.
    """

    def _loss(self, logits: Float[Tensor, "b k"], target: Int[Tensor, " b"] | Float[Tensor, "b k"]) -> Tensor:
        share = self.label_smoothing
        marks = self._marks(target) * (1 - share) + share / self.num_classes
        return F.binary_cross_entropy_with_logits(logits.float(), marks)

    def _losses(self, logits: Float[Tensor, "b k"], target: Int[Tensor, " b"] | Float[Tensor, "b k"]) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, self._marks(target), reduction="none").mean(dim=1)

    def _marks(self, target: Int[Tensor, " b"] | Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        return (F.one_hot(target, self.num_classes) if target.ndim == 1 else target > 0).float()
