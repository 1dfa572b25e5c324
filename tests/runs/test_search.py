"""A search with Optuna, as a sweep."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from conftest import TINY
from fewtokens.callbacks.pruning import STUDY, PrunedError, Pruning, trial_of_environment
from fewtokens.errors import FewtokensError
from fewtokens.runs.search import NAME, distribution
from fewtokens.runs.sweep import read_table

optuna = pytest.importorskip("optuna")


@pytest.fixture
def search(multirun) -> Callable[..., int]:
    """Run a search of functions that stand for jobs, and return its exit code."""
    return partial(multirun, "hydra/sweeper=optuna")


def test_a_search_continues_where_it_was_interrupted(search, capsys, tmp_path: Path) -> None:
    ran = []

    def job(cfg) -> None:
        run = Path(HydraConfig.get().runtime.output_dir)
        ran.append((run.name, cfg.optimizer.lr, trial_of_environment()[0].trial))
        status = "finished"
        if len(ran) == 2:
            (run / "run.json").write_text(json.dumps({"status": "started"}))
            raise KeyboardInterrupt
        if len(ran) == 4:
            status = "stopped"
        (run / "run.json").write_text(json.dumps({"status": status, "reason": "Pruned after epoch 1"}))
        (run / "report.json").write_text(json.dumps({"val/loss": abs(cfg.optimizer.lr - 0.003)}))
        if status == "stopped":
            raise PrunedError("Pruned after epoch 1: others are better.")

    settings = ["optimized_metric=val/loss", "hydra.sweeper.n_trials=4", "backbone.dim=24"]
    space = "optimizer.lr=tag(log,interval(1e-4,1e-1))"
    assert search(job, *settings, space, "hydra.sweep.dir=sweep") == 130
    assert search(job, *settings, space, "sweep=sweep") == 0, "a pruned trial has not failed"
    assert [name for name, *_ in ran] == ["0", "1", "1", "2", "3"]
    assert ran[1] == ran[2], "the same trial with the same settings"
    assert len({rate for _, rate, _ in ran}) == 4
    rows = read_table(tmp_path / "sweep")
    states = ["finished", "finished", "stopped", "finished"]
    assert [(row.path, row.state) for row in rows] == list(zip("0123", states, strict=True))
    assert rows[0].overrides == ["optimized_metric=val/loss", "backbone.dim=24", f"optimizer.lr={ran[0][1]}"]
    study = optuna.load_study(study_name=NAME, storage=f"sqlite:///{tmp_path}/sweep/study.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"]
    assert study.best_value == min(row.numbers["val/loss"] for row in rows if row.state == "finished")
    capsys.readouterr()
    assert search(job, "sweep=sweep", *settings, space) == 0
    assert len(ran) == 5
    best = min((row for row in rows if row.state == "finished"), key=lambda row: row.numbers["val/loss"])
    value, rate = best.numbers["val/loss"], best.overrides[-1]
    said = f"Best val/loss: {value:.6g} in sweep/{best.path}\n  optimized_metric=val/loss backbone.dim=24 {rate}\n"
    assert capsys.readouterr().out.endswith(said)


@pytest.mark.slow
def test_a_search_continues_with_other_bounds_only(search, capsys, tmp_path: Path) -> None:
    def job(cfg) -> None:
        run = Path(HydraConfig.get().runtime.output_dir)
        (run / "run.json").write_text(json.dumps({"status": "finished"}))
        (run / "report.json").write_text(json.dumps({"val/loss": 1.0}))

    def search_again(trials: int, *settings: str, where: str = "sweep=sweep") -> str:
        metric = ["optimized_metric=val/loss", f"hydra.sweeper.n_trials={trials}"]
        code, error = search(job, *metric, *settings, where), capsys.readouterr().err
        assert (code == 0) == (error == "")
        return error

    first = ["optimizer.lr=interval(0.1,0.2)", "backbone.dim=24,48"]
    assert not search_again(1, *first, where="hydra.sweep.dir=sweep")
    error = search_again(2, first[0], "backbone.dim=24,96")
    assert "The search began with backbone.dim in CategoricalDistribution(choices=('24', '48')), got" in error
    error = search_again(2, *first, "hydra.sweeper.direction=maximize")
    assert "`hydra.sweeper.direction` must be minimize, as when the search began, got 'maximize'" in error
    assert not search_again(2, "optimizer.lr=interval(0.01,0.2)", first[1])
    assert len(read_table(tmp_path / "sweep")) == 2
    for setting in ("optimizer.lr=interval(1,0)", "optimizer.lr=tag(log,interval(0,1))", "backbone.dim=range(5,1)"):
        assert "A setting to search has wrong bounds" in search_again(1, setting)
    assert "`hydra.sweep.dir` must be a path without ?" in search_again(1, *first, where="hydra.sweep.dir='a?b'")
    (tmp_path / "sweep" / "study.db").write_text("no database")
    assert "study.db: (sqlite3.DatabaseError) file is not a database" in search_again(3, *first)


def test_what_a_search_needs_is_named(search, monkeypatch, capsys) -> None:
    def fail(cfg) -> None:
        pytest.fail("it ran")

    assert search(fail, "optimizer.lr=interval(1e-4,1e-2)") == 1
    assert "`optimized_metric` must be a number of report.json" in capsys.readouterr().err
    assert search(fail, "optimized_metric=val/loss") == 1
    assert "`hydra.sweeper.params` must be settings to search" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert search(fail, "optimized_metric=val/loss", "optimizer.lr=1,2") == 1
    assert "pip install -e '.[search]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=int(interval(1,8))", "IntDistribution(high=8, log=False, low=1, step=1)"),
        ("a=interval(0.1,1)", "FloatDistribution(high=1.0, log=False, low=0.1, step=None)"),
        ("a=tag(log,interval(1e-4,1))", "FloatDistribution(high=1.0, log=True, low=0.0001, step=None)"),
        ("a=range(4,17,4)", "IntDistribution(high=16, log=False, low=4, step=4)"),
        ("a=choice(x,y)", "CategoricalDistribution(choices=('x', 'y'))"),
        ("a=x,y", "CategoricalDistribution(choices=('x', 'y'))"),
    ],
)
def test_sweeps_become_distributions(text: str, expected: str) -> None:
    assert str(distribution(OverridesParser.create().parse_override(text))) == expected


def test_a_trial_is_pruned_by_what_others_reported(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(storage=storage, study_name=STUDY)
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

    def fit(loss: float, metric: str = "val/loss") -> None:
        pruning = Pruning(metric, study.ask()._trial_id, 1, storage)
        trainer = Trainer(max_epochs=1, callbacks=[pruning], enable_model_summary=False, **quiet)
        trainer.fit(Loss(loss), *[DataLoader(TensorDataset(torch.ones(1, 1)))] * 2)

    fit(1.0)
    study.tell(0, 1.0)
    with pytest.raises(PrunedError, match="Pruned after epoch 1: other trials had a better val/loss"):
        fit(2.0)
    fit(0.5)
    with pytest.raises(FewtokensError, match=r"metric of the validation for pruning, got x\. Use one of val/loss, or"):
        fit(0.5, "x")


class Loss(LightningModule):
    """Has the same validation loss in every epoch."""

    def __init__(self, loss: float) -> None:
        super().__init__()
        self.loss, self.layer = loss, torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.layer(batch[0]).sum()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", self.loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["cpu", "ddp_cpu"])
def test_a_search_of_real_runs(script, trainer: str, tmp_path: Path) -> None:
    tiny = [*TINY, f"trainer={trainer}", "trainer.limit_train_batches=null", "trainer.max_epochs=2"]
    trials = ["hydra.sweeper.n_trials=6", "hydra.sweeper.startup_trials=1"]
    rates = "hydra.sweeper.params={optimizer.lr: 'choice(1e-7,3e-3)'}"  # with the first it learns nothing
    script("train.py", "-m", "hparams_search=digits", *tiny, *trials, rates, f"hydra.sweep.dir={tmp_path}")
    rows = read_table(tmp_path)
    assert len(rows) == 6
    assert {row.state for row in rows} == {"finished", "stopped"}
    assert all("val/loss" in row.numbers for row in rows if row.state == "finished")
    assert not any("test/top1" in row.numbers for row in rows)
