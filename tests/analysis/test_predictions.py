import csv

import pytest
import torch

from fewtokens.analysis.flops import count
from fewtokens.analysis.predictions import Predictions
from fewtokens.errors import FewtokensError


def test_every_image_has_its_label_prediction_tokens_and_cost(adaptive, measured, tmp_path):
    task, data = measured(adaptive)
    data.class_names = ["ant", "bee", "cat", "dog", "elk"]
    measure = Predictions(num_images=5)
    assert measure(task, data, tmp_path) == {}
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    images = torch.cat([data.on_after_batch_transfer(batch, 0)[0][:, 0] for batch in data.test_dataloader()])[:5]
    counts = count(adaptive, [images])
    guesses = adaptive.eval()(images).argmax(dim=1).tolist()
    assert [row["image"] for row in rows] == list("01234")
    assert [row["label"] for row in rows] == ["ant"] * 5
    assert [row["prediction"] for row in rows] == [data.class_names[guess] for guess in guesses]
    assert [int(row["tokens"]) for row in rows] == counts.tokens[:, -1].tolist()
    assert [float(row["gmacs"]) for row in rows] == pytest.approx((counts.macs / 1e9).tolist())
    assert len({row["tokens"] for row in rows}) > 1, "images differ"
    assert measure.table.pictures.shape[0] == len(measure.table.rows) == 5
    assert measure.table.pictures.shape[3] == 3


def test_samples_with_several_classes_name_all_of_them(make, measured, tmp_path):
    task, data = measured(make())
    batches = [(images, torch.tensor([[1, 0, 0, 1, 0]] * len(images))) for images, _ in data.test_dataloader()]
    data.test_dataloader = lambda: batches
    measure = Predictions(num_images=2)
    measure(task, data, tmp_path)
    assert [row[0] for row in measure.table.rows] == ["0 + 3"] * 2


def test_a_wrong_number_is_an_error():
    with pytest.raises(FewtokensError, match=r"`measure\.predictions\.num_images` must be an int >= 1"):
        Predictions(num_images=0)
