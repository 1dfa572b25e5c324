import csv
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, LightningModule
from torch import nn

from fewtokens.analysis.confusion import Confusion, draw
from fewtokens.tasks.classification import Classifier


def test_accuracy_class_by_class_after_a_test(tmp_path: Path) -> None:
    task = Classifier(nn.Flatten(), 4, optimizer=partial(torch.optim.SGD, lr=0.1))
    task.log = lambda *a, **k: None  # outside a trainer there is nowhere to log
    said = torch.tensor([0, 0, 1, 2, 2, 2])
    target = torch.tensor([0, 1, 1, 2, 2, 0])  # of class 3 there is no sample
    logits = nn.functional.one_hot(said, 4).float()[:, None, :, None, None]
    for part in (slice(0, 4), slice(4, 6)):
        task.test_step((logits[part], target[part]), 0)
    task.on_test_epoch_end()
    measure = Confusion()
    numbers = measure(task, LightningDataModule(), tmp_path)
    assert numbers == {
        "test/top1_class_mean": pytest.approx((0.5 + 0.5 + 1) / 3),
        "test/top1_class_worst": pytest.approx(0.5),
    }
    with (tmp_path / "confusion.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["samples"], row["top1"]) for row in rows][2:] == [("2", "1.000000"), ("0", "")]
    assert [rows[0][str(column)] for column in range(4)] == ["1", "0", "1", "0"]
    assert measure.picture == tmp_path / "pictures" / "confusion.png"
    assert measure.picture.stat().st_size > 1000


def test_without_a_test_it_does_nothing(tmp_path: Path) -> None:
    measure = Confusion()
    assert measure(LightningModule(), LightningDataModule(), tmp_path) == {}
    assert measure.picture is None
    assert not list(tmp_path.iterdir())


def test_many_classes_make_a_picture_of_limited_size() -> None:
    assert max(draw(np.ones((400, 400), dtype=np.int64)).get_size_inches()) <= 12
