from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fewtokens.backbones.vivit import vivit
from fewtokens.errors import FewtokensError
from fewtokens.layers.embedding import Tubelets
from fewtokens.tasks.classification import Classifier
from fewtokens.tasks.mixup import Mix
from fewtokens.tokenizers.base import Tokenizer


def classifier(**settings) -> Classifier:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 7))
    return Classifier(net, 7, optimizer=partial(torch.optim.SGD, lr=0.1), **settings)


def test_logits_are_averaged_over_views() -> None:
    task = classifier()
    views = torch.randn(3, 4, 3, 2, 2)
    expected = torch.stack([task.model(views[:, v]) for v in range(4)]).mean(0)
    torch.testing.assert_close(task(views), expected)


def test_logits_of_a_video_are_the_mean_over_its_views_and_it_counts_once() -> None:
    tubelets = Tubelets(clip_frames=4, image_size=4, channels=1, frames=2, height=2, width=2)
    plain = {"at": [], "build": Tokenizer}
    torch.manual_seed(0)
    net = vivit(tubelets=tubelets, num_classes=7, tokenizer=plain, dim=8, depth=1, heads=2)
    task = Classifier(net, 7, optimizer=partial(torch.optim.SGD, lr=0.1)).eval()
    task.log = lambda *a, **k: None
    videos = torch.randn(3, 5, 1, 4, 4, 4)  # (videos, views, channels, frames, height, width), no two views alike
    each = torch.stack([torch.stack([net(view[None])[0] for view in video]) for video in videos])
    assert each.std(dim=1).min() > 1e-4
    torch.testing.assert_close(task(videos), each.mean(dim=1))
    torch.testing.assert_close(task(videos[:, [3, 1, 0, 4, 2]]), each.mean(dim=1))
    task.test_step((videos, each.mean(dim=1).argmax(dim=1)), 0)
    assert task.test_metrics["top1"].compute() == 1
    assert task.test_metrics["loss"].weight == 3


def test_several_labels_need_another_task() -> None:
    for step in (classifier(mix=Mix(7)).training_step, classifier().validation_step):
        with pytest.raises(FewtokensError, match="Set task=multilabel"):
            step((torch.randn(3, 1, 3, 2, 2), torch.ones(3, 7, dtype=torch.long)), 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_targets_are_indices_or_probabilities(smoothing: float) -> None:
    task = classifier(label_smoothing=smoothing)
    logits, index = torch.randn(5, 7), torch.randint(7, (5,))
    by_index = task._loss(logits, index)
    torch.testing.assert_close(by_index, F.cross_entropy(logits, index, label_smoothing=smoothing))
    torch.testing.assert_close(by_index, task._loss(logits, F.one_hot(index, 7).float()))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_every_class_of_a_mixed_image_is_a_label_of_binary_cross_entropy(smoothing: float) -> None:
    logits, mixed = torch.randn(2, 7), torch.zeros(2, 7)
    mixed[0, [1, 4]], mixed[1, 6] = torch.tensor([0.3, 0.7]), 1.0
    labels = (mixed > 0).float() * (1 - smoothing) + smoothing / 7
    p = logits.sigmoid()
    each = -(labels * p.log() + (1 - labels) * (1 - p).log())
    losses = {
        loss: classifier(loss=loss, label_smoothing=smoothing)._loss(logits, mixed) for loss in ("bce", "bce_sum")
    }
    torch.testing.assert_close(losses["bce"], each.mean())
    torch.testing.assert_close(losses["bce_sum"], each.sum(dim=1).mean())
    index = torch.tensor([3, 6])
    task = classifier(loss="bce", label_smoothing=smoothing)
    torch.testing.assert_close(task._loss(logits, index), task._loss(logits, F.one_hot(index, 7).float()))
    with pytest.raises(FewtokensError, match=r"`task.loss` must be"):
        classifier(loss="bec")


def test_training_takes_every_view_as_a_sample() -> None:
    task = classifier()
    task.log = lambda *a, **k: None  # outside a trainer there is nowhere to log
    views, target = torch.randn(3, 2, 3, 2, 2), torch.tensor([0, 1, 2])
    expected = F.cross_entropy(task.model(views.flatten(0, 1)), torch.tensor([0, 0, 1, 1, 2, 2]))
    torch.testing.assert_close(task.training_step((views, target), 0), expected)


def test_metrics_count_top1_and_top5() -> None:
    task = classifier()
    task.log = lambda *a, **k: None
    task.model = nn.Identity()
    order = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1]])
    task.test_step((order.repeat(4, 1)[:, None], torch.tensor([0, 4, 5, 6])), 0)
    assert task.test_metrics["top1"].compute() == 0.25
    assert task.test_metrics["top5"].compute() == 0.5
    assert task.test_metrics["loss"].compute() == pytest.approx(
        F.cross_entropy(order.repeat(4, 1), torch.tensor([0, 4, 5, 6])).item()
    )


@pytest.mark.parametrize("mode", ["layers", "model"])
def test_compiling_leaves_the_names_of_parameters(mode: str) -> None:
    assert classifier(compile=mode).state_dict().keys() == classifier().state_dict().keys()


def test_an_unknown_way_to_compile_is_an_error() -> None:
    with pytest.raises(FewtokensError, match=r"`task\.compile` must be 'none' or 'layers' or 'model', got 'layer'"):
        classifier(compile="layer")


def test_top5_is_no_metric_where_there_are_five_classes_or_fewer() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    assert "top5" not in Classifier(net, 5, optimizer=partial(torch.optim.SGD, lr=0.1)).test_metrics
    assert "top5" in classifier().test_metrics


def test_smoothing_out_of_range_is_refused() -> None:
    with pytest.raises(FewtokensError, match=r"`task\.label_smoothing` must be a number in \[0, 1\), got 1\.0"):
        classifier(label_smoothing=1.0)


@pytest.mark.parametrize("settings", [{"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}, {}])
@pytest.mark.parametrize("batch", [4, 5])
def test_mixing_keeps_shapes_and_gives_probabilities(settings: dict, batch: int) -> None:
    torch.manual_seed(0)
    images, target = torch.randn(batch, 3, 8, 8), torch.arange(batch)
    mixed, soft = Mix(7, **settings)(images, target)
    assert mixed.shape == images.shape
    torch.testing.assert_close(soft.sum(1), torch.ones(batch))
    assert not torch.equal(mixed, images)


def test_mixing_mixes_targets_with_several_classes() -> None:
    target = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]])
    _, soft = Mix(4, mixup=0.8, cutmix=0.0)(torch.randn(2, 3, 8, 8), target)
    torch.testing.assert_close(soft[:, 1:3], torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    torch.testing.assert_close(soft[:, 0] + soft[:, 3], torch.ones(2))


def test_mixing_is_off_at_zero_and_cuts_clips_alike_in_every_frame() -> None:
    images, target = torch.randn(4, 3, 8, 8), torch.arange(4)
    same, index = Mix(7, mixup=0.0, cutmix=0.0)(images, target)
    assert same is images
    assert index is target
    assert Mix(7, probability=0.0)(images, target)[0] is images
    clips = torch.randn(4, 1, 3, 8, 8).expand(4, 5, 3, 8, 8)
    torch.manual_seed(1)
    mixed, _ = Mix(7, mixup=0.0)(clips, target)
    assert torch.equal(mixed, mixed[:, :1].expand_as(mixed))


@pytest.mark.parametrize("settings", [{"mixup": -1.0}, {"cutmix": -0.1}, {"probability": 1.1}])
def test_mixing_refuses_numbers_out_of_range(settings: dict) -> None:
    with pytest.raises(FewtokensError, match=rf"`task\.mix\.{next(iter(settings))}` must be"):
        Mix(7, **settings)
