"""The device and the mode in which measures run."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from omegaconf import OmegaConf
from torch import nn

from fewtokens.analysis.evaluation import class_names, measured_on, unwrap_compiled
from fewtokens.runs import job


class Recorder(LightningModule):
    """A task that is moved on paper only: there is one device here."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.now = nn.Dropout(), torch.device("cpu")

    @property
    def device(self) -> torch.device:
        return self.now

    def to(self, device):
        self.now = device
        return self


def test_measures_run_on_the_given_device_in_evaluation_mode() -> None:
    task, meta = Recorder(), torch.device("meta")
    with measured_on(task, meta):
        assert (task.device, task.training, task.model.training) == (meta, False, False)
    assert (task.device, task.training, task.model.training) == (torch.device("cpu"), True, True)


def test_the_task_goes_back_after_an_error() -> None:
    task = Recorder()
    with pytest.raises(KeyError), measured_on(task, torch.device("meta")):
        raise KeyError
    assert (task.device, task.training) == (torch.device("cpu"), True)


def test_a_run_measures_on_the_device_of_its_trainer(tmp_path, monkeypatch) -> None:
    seen = []

    class Measure:
        def __call__(self, task, datamodule, run_dir):
            seen.append((task.device.type, task.training))
            return {"x": 1.0}

    meta, trainer = torch.device("meta"), Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(job, "instantiate", lambda node: Measure())
    monkeypatch.setattr(type(trainer.strategy), "root_device", property(lambda self: meta))
    parts = SimpleNamespace(
        cfg=OmegaConf.create({"measure": {"x": {"_target_": "Measure"}}}),
        directory=tmp_path,
        data=None,
        task=Recorder(),
        trainer=trainer,
    )
    numbers, measures = inspect.unwrap(job.measure)(parts)
    assert (numbers, [type(measure) for measure in measures]) == ({"x": 1.0}, [Measure])
    assert seen == [("meta", False)]
    assert parts.task.device.type == "cpu"


def test_the_model_is_moved_with_its_buffers() -> None:
    task = LightningModule()
    task.model = nn.BatchNorm1d(2)
    with pytest.raises(NotImplementedError, match="meta"), measured_on(task, torch.device("meta")):
        assert {p.device.type for p in [*task.parameters(), *task.buffers()]} == {"meta"}
        assert task.device.type == "meta"


def test_classes_without_known_names_are_numbered() -> None:
    class Named(LightningDataModule):
        class_names = ("cat", "dog")

    assert class_names(Named(), 2) == ["cat", "dog"]
    assert class_names(Named(), 3) == class_names(None, 3) == class_names(LightningDataModule(), 3) == ["0", "1", "2"]


def test_a_compiled_model_is_unwrapped(make) -> None:
    model = make()
    assert unwrap_compiled(torch.compile(model)) is unwrap_compiled(model) is model
