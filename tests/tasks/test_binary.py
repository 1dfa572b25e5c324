"""Classification with a binary cross-entropy: targets of mixed images, smoothing, and the usual metrics."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from fewtokens.tasks.binary import BinaryClassifier
from fewtokens.tasks.mixup import Mix


def classifier(**settings) -> BinaryClassifier:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    task = BinaryClassifier(net, 4, optimizer=partial(torch.optim.SGD, lr=0.1), **settings)
    task.log = lambda *a, **k: None  # outside a trainer there is nowhere to log
    return task


def test_targets_are_1_for_every_class_of_an_image() -> None:
    task, target = classifier(), torch.tensor([1, 3, 0])
    logits = torch.randn(3, 4)
    expected = F.binary_cross_entropy_with_logits(logits, F.one_hot(target, 4).float())
    torch.testing.assert_close(task._loss(logits, target), expected)
    torch.testing.assert_close(task._losses(logits, target).mean(), expected)
    mixed = torch.tensor([[0.7, 0.3, 0, 0], [0, 0, 0, 1.0], [0, 0.5, 0.5, 0]])
    torch.testing.assert_close(
        task._loss(logits, mixed), F.binary_cross_entropy_with_logits(logits, (mixed > 0).float())
    )
    smooth = F.one_hot(target, 4) * 0.9 + 0.025
    torch.testing.assert_close(
        classifier(label_smoothing=0.1)._loss(logits, target), F.binary_cross_entropy_with_logits(logits, smooth)
    )


def test_steps_and_metrics() -> None:
    task = classifier(mix=Mix(4, 0.8, 1.0))
    views, target = torch.randn(6, 1, 3, 2, 2), torch.tensor([0, 1, 2, 3, 0, 1])
    task.training_step((views, target), 0).backward()
    task.test_step((views, target), 0)
    right = (task(views).argmax(dim=1) == target).float().mean()
    torch.testing.assert_close(task.test_metrics["top1"].compute(), right)
