"""Memory of a training step, counted without computing it."""

import json

import pytest
import torch

from conftest import ROOT
from fewtokens.analysis.memory import peak_bytes
from fewtokens.benchmarks import training_memory

SMALL = ["data=digits", "backbone=vit_mini", "backbone.depth=8", "backbone.dim=64", "backbone.patch_size=4"]


@pytest.mark.slow
def test_fake_tensors_take_the_memory_of_real_ones() -> None:
    record = training_memory.count(SMALL, checkpointing=False, precision="32-true")
    model, shape = training_memory.build(SMALL)
    model.train()
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["parameter_bytes"] == record["gradient_bytes"] == 4 * record["parameters"]
    assert record["optimizer_bytes"] == pytest.approx(8 * record["parameters"], rel=0.01)

    def peak(size: int) -> int:
        return peak_bytes(lambda: model(torch.zeros(size, *shape)).square().mean().backward(), torch.device("cpu"))

    assert record["bytes_per_sample"] == pytest.approx((peak(16) - peak(8)) / 8, rel=0.1)
    saved = training_memory.count(SMALL, checkpointing=True, precision="32-true")
    assert saved["bytes_per_sample"] < 0.6 * record["bytes_per_sample"]


def test_the_page_has_the_recorded_table() -> None:
    records = json.loads((ROOT / "docs" / "results" / "training_memory.json").read_text())["records"]
    assert training_memory.table(records) in (ROOT / "docs" / "several_gpus.md").read_text()
