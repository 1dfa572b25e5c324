"""Mixup and CutMix over a batch."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.transforms import v2


class Mix:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), one of the two drawn per batch.

    Args:
        num_classes: Width of the soft targets.
        mixup: Beta parameter of mixup; 0 leaves it out.
        cutmix: Beta parameter of CutMix; 0 leaves it out.
        probability: Share of batches that are mixed at all.
    """

    def __init__(self, num_classes: int, mixup: float = 0.8, cutmix: float = 1.0, probability: float = 1.0) -> None:
        self.num_classes, self.probability = num_classes, probability
        self.ways: list[v2.Transform] = []
        if mixup > 0:
            self.ways.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix > 0:
            self.ways.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))

    def __call__(
        self, images: Float[Tensor, "b *shape"], target: Int[Tensor, "b *k"]
    ) -> tuple[Float[Tensor, "b *shape"], Int[Tensor, "b *k"] | Float[Tensor, "b classes"]]:
        """Images and probabilities, or both as they came; targets are class numbers or 1 and 0 for every class."""
        if not self.ways or torch.rand(()).item() >= self.probability:
            return images, target
        way = self.ways[int(torch.randint(len(self.ways), ()).item())]
        flat = images.flatten(1, -3)  # a clip's frames are cut and mixed alike, as if they were channels
        mixed, soft = way(flat, target)
        return mixed.reshape(images.shape), soft
