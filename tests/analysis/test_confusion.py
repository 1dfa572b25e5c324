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


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "confusion.csv").open() as file:
        return list(csv.DictReader(file))


def test_accuracy_class_by_class_after_a_test(tmp_path: Path) -> None:
    task = Classifier(nn.Flatten(), 4, optimizer=partial(torch.optim.SGD, lr=0.1))
    task.log = lambda *a, **k: None  # self.log needs a trainer
    predicted = torch.tensor([0, 0, 1, 2, 2, 2])
    target = torch.tensor([0, 1, 1, 2, 2, 0])  # class 3 has no sample
    logits = nn.functional.one_hot(predicted, 4).float()[:, None, :, None, None]
    for part in (slice(0, 4), slice(4, 6)):
        task.test_step((logits[part], target[part]), 0)
    task.on_test_epoch_end()
    measure = Confusion()
    numbers = measure(task, LightningDataModule(), tmp_path)
    assert numbers == {
        "test/top1_class_mean": pytest.approx((0.5 + 0.5 + 1) / 3),
        "test/top1_class_worst": pytest.approx(0.5),
    }
    rows = read(tmp_path)
    assert [(row["samples"], row["top1"]) for row in rows][2:] == [("2", "1.000000"), ("0", "")]
    assert [rows[0][str(column)] for column in range(4)] == ["1", "0", "1", "0"]
    assert [row["class"] for row in rows] == ["0", "1", "2", "3"]
    assert measure.picture == tmp_path / "pictures" / "confusion.png"
    assert measure.picture.stat().st_size > 1000


def test_classes_have_the_names_of_the_datamodule(tmp_path: Path) -> None:
    task, data = LightningModule(), LightningDataModule()
    task.confusion = torch.tensor([[3, 1], [0, 2]])
    data.class_names = ["cat", "dog"]
    Confusion()(task, data, tmp_path)
    rows = read(tmp_path)
    assert [(row["class"], row["cat"], row["dog"]) for row in rows] == [("cat", "3", "1"), ("dog", "0", "2")]
    [axis] = draw(np.array([[3, 1], [0, 2]]), ["cat", "dog"]).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["cat", "dog"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["cat", "dog"]
    assert [text.get_text() for text in axis.texts] == ["0.75", "0.25", "0.0", "1.0"]


def test_without_a_test_it_does_nothing(tmp_path: Path) -> None:
    measure = Confusion()
    assert measure(LightningModule(), LightningDataModule(), tmp_path) == {}
    assert measure.picture is None
    assert not list(tmp_path.iterdir())


def test_many_classes_make_a_picture_of_limited_size() -> None:
    figure = draw(np.ones((400, 400), dtype=np.int64), [str(number) for number in range(400)])
    assert max(figure.get_size_inches()) <= 12
    assert not figure.axes[0].texts
    assert not figure.axes[0].get_xticklabels()
