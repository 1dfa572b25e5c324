from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fewtokens.errors import FewtokensError
from fewtokens.tasks.multilabel import MultilabelClassifier


def classifier(**settings) -> MultilabelClassifier:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    task = MultilabelClassifier(net, 4, optimizer=partial(torch.optim.SGD, lr=0.1), **settings)
    task.log = lambda *a, **k: None  # outside a trainer there is nowhere to log
    return task


def average_precision(scores: list[float], labels: list[int]) -> float:
    """Mean of the precisions at every positive, from the highest score down."""
    ranked = [label for _, label in sorted(zip(scores, labels, strict=True), reverse=True)]
    hits = [sum(ranked[: place + 1]) / (place + 1) for place, label in enumerate(ranked) if label]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_the_loss_is_binary_cross_entropy_over_all_classes(dtype: torch.dtype) -> None:
    task = classifier(label_smoothing=0.2)
    views, target = torch.randn(3, 1, 3, 2, 2), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).to(dtype)
    expected = F.binary_cross_entropy_with_logits(task.model(views[:, 0]), target.float() * 0.8 + 0.1)
    torch.testing.assert_close(task.training_step((views, target), 0), expected)


def test_mean_average_precision_over_batches_and_views() -> None:
    task = classifier()
    torch.manual_seed(0)
    views, target = torch.randn(40, 2, 3, 2, 2), (torch.rand(40, 4) > 0.6).long()
    target[:, 3] = 0  # a class without a sample is left out of the mean
    for part in range(4):
        task.test_step((views[10 * part : 10 * part + 10], target[10 * part : 10 * part + 10]), part)
    scores = task(views).detach().sigmoid()
    expected = [average_precision(scores[:, k].tolist(), target[:, k].tolist()) for k in range(3)]
    assert task.test_metrics["map"].compute().item() == pytest.approx(sum(expected) / 3, abs=1e-5)
    losses = F.binary_cross_entropy_with_logits(task(views), target.float())
    assert task.test_metrics["loss"].compute().item() == pytest.approx(losses.item(), rel=1e-5)
    task.on_test_epoch_end()
    assert task.confusion is None


def test_a_single_label_is_refused() -> None:
    with pytest.raises(FewtokensError, match="task=classification"):
        classifier().training_step((torch.randn(3, 1, 3, 2, 2), torch.tensor([0, 1, 2])), 0)


def test_a_process_without_samples_takes_part_in_the_mean() -> None:
    other, idle = classifier().test_metrics["map"], classifier().test_metrics["map"]
    other.update(torch.randn(6, 4), torch.tensor([[1, 0, 1, 0]] * 3 + [[0, 1, 1, 1]] * 3))
    states = {torch.float32: torch.cat(other.preds), torch.int64: torch.cat(other.target)}

    def gather(mine: torch.Tensor, group: object = None) -> list[torch.Tensor]:
        assert mine.ndim == 2, "gathering wants as many axes everywhere"
        return [mine, states[mine.dtype]]

    idle.dist_sync_fn, idle.distributed_available_fn = gather, lambda: True
    torch.testing.assert_close(idle.compute(), other.compute())
