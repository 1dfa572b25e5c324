"""Mixup and CutMix over a batch."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.transforms import v2

from fewtokens.errors import check


class Mix:
    """Applies mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) to a batch, chosen at random.

    Args:
        num_classes: Number of classes of the soft targets.
        mixup: Parameter of mixup's beta distribution; 0 disables it.
        cutmix: Parameter of CutMix's beta distribution; 0 disables it.
        probability: Share of the batches that are mixed.

    Raises:
        FewtokensError: A setting is out of range.
    """

    def __init__(self, num_classes: int, mixup: float = 0.8, cutmix: float = 1.0, probability: float = 1.0) -> None:
        check(mixup >= 0, "task.mix.mixup", "a number >= 0", mixup)
        check(cutmix >= 0, "task.mix.cutmix", "a number >= 0", cutmix)
        check(0 <= probability <= 1, "task.mix.probability", "a share in [0, 1]", probability)
        self.num_classes, self.probability = num_classes, probability
        self.variants: list[v2.Transform] = []
        if mixup > 0:
            self.variants.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix > 0:
            self.variants.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))

    def __call__(
        self, images: Float[Tensor, "b *shape"], target: Int[Tensor, "b *k"]
    ) -> tuple[Float[Tensor, "b *shape"], Int[Tensor, "b *k"] | Float[Tensor, "b classes"]]:
        """Mix the images and targets of a batch, or return them unchanged if this batch is not mixed.

        Args:
            images: Images or clips (B, ...).
            target: Class numbers (B,), or 1 and 0 for every class (B, classes).

        Returns:
            The mixed images, and probabilities (B, classes).
        """
        # These draws are on the CPU, whatever the device of the images, so that they need no synchronization.
        if not self.variants or torch.rand(()).item() >= self.probability:
            return images, target
        variant = self.variants[int(torch.randint(len(self.variants), ()).item())]
        flat = images.flatten(1, -3)  # the frames of a clip are treated as channels, so that all are mixed alike
        mixed, soft = variant(flat, target)
        return mixed.reshape(images.shape), soft
