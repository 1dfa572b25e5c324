"""Whole runs, in this process: what they leave, and what errors they give."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml

from conftest import TINY
from fewtokens.errors import FewtokensError
from fewtokens.runs import config as saved
from fewtokens.runs import eval as evaluation
from fewtokens.runs import train as training
from fewtokens.runs.targets import instantiate


def test_a_run_leaves_config_checkpoints_metrics_and_a_report(composed, tmp_path: Path) -> None:
    numbers = training.run(
        composed(*TINY, "measure=default", "measure.throughput.seconds=0.2", "tokenizer.build.num_tokens=2")
    )
    run = tmp_path / "run"
    report = json.loads((run / "report.json").read_text())
    assert report == pytest.approx(numbers)
    assert all(isinstance(value, float) for value in report.values())
    assert 0 <= report["test/top1"] <= report["test/top5"] <= 1
    assert 0 < report["cost/gmacs"] < report["cost/gmacs_dense"]
    assert report["throughput/images_per_s"] > 0
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"command", "commit", "device", "started", "seed", "choices"} <= record.keys()
    assert yaml.safe_load((run / "config.yaml").read_text())["backbone"]["dim"] == 16
    with (run / "metrics.csv").open() as file:
        assert {"train/loss_epoch", "val/top1", "test/top1"} <= set(csv.DictReader(file).fieldnames or [])
    assert (run / "pictures" / "token_maps.png").stat().st_size > 1000
    for name in ("best", "last"):
        content = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert yaml.safe_load(content["config"])["backbone"]["dim"] == 16


def test_eval_repeats_the_test_of_the_run(composed, tmp_path: Path) -> None:
    trained = training.run(composed(*TINY))
    for reference in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "best.ckpt"):
        folder = saved.overlay(saved.config_of(saved.checkpoint_of(str(reference))), "eval", _configs())
        cfg = composed(f"checkpoint={reference}", "measure=none", base="job", folder=folder, directory="eval")
        assert evaluation.run(cfg)["test/top1"] == pytest.approx(trained["test/top1"])
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes((tmp_path / "run" / "checkpoints" / "best.ckpt").read_bytes())
    assert saved.config_of(moved)["backbone"]["dim"] == 16


def test_a_dense_run_is_evaluated_with_methods_plugged_in(composed, tmp_path: Path) -> None:
    dense = ["tokenizer=none", "backbone.pool=token"]
    trained = training.run(composed(*[part for part in TINY if "tokenizer" not in part], *dense))
    folder = saved.overlay(saved.config_of(saved.checkpoint_of(str(tmp_path / "run"))), "eval", _configs())

    def evaluate(*overrides: str) -> dict[str, float]:
        given = [f"checkpoint={tmp_path / 'run'}", "measure=cost", *overrides]
        return evaluation.run(composed(*given, base="job", folder=folder, directory="eval"))

    for name, setting in (("ats", "budget=all"), ("tome", "r=0"), ("top_k", "keep_rate=1.0")):
        numbers = evaluate(f"tokenizer={name}", f"tokenizer.build.{setting}", "tokenizer.at=[0,1]")
        assert numbers["test/top1"] == trained["test/top1"]
    for name, setting in (("ats", "budget=3"), ("tome", "r=2"), ("evit", "keep_rate=0.3"), ("random_drop", "keep_rate=0.3")):
        numbers = evaluate(f"tokenizer={name}", f"tokenizer.build.{setting}", "tokenizer.at=[0,1]")
        assert 0 <= numbers["test/top1"] <= 1
        assert numbers["cost/gmacs"] < numbers["cost/gmacs_dense"]
    with pytest.raises(FewtokensError, match="trained first"):
        evaluate("tokenizer=token_learner", "tokenizer.at=1")


def test_training_starts_from_a_dense_run(composed, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = [part for part in TINY if "tokenizer" not in part]
    training.run(composed(*few, "tokenizer=none", directory="dense"))
    start = f"init_from={tmp_path / 'dense'}"
    numbers = training.run(composed(*TINY, start, "optimizer.lr=0.0", directory="fine"))
    dense, fine = (
        torch.load(tmp_path / name / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
        for name in ("dense", "fine")
    )
    models = [name for name in dense if name.startswith("model.")]
    assert all(torch.equal(dense[name], fine[name]) for name in models)
    assert numbers["init/loaded"] == len(models)
    assert numbers["init/missing"] == len([n for n in fine if ".tokenizer." in n]) > 0
    assert numbers["init/unexpected"] == 0
    assert "model.encoder.layers.1.tokenizer.norm.weight" in caplog.text


VIDEO = [
    "backbone=vivit_mini",
    "backbone.tubelets.frames=1",
    "backbone.tubelets.height=2",
    "backbone.tubelets.width=2",
    "backbone.pool=avg",
]


def test_a_video_model_starts_from_a_run_of_an_image_model(composed, tmp_path: Path) -> None:
    training.run(composed(*TINY, "test=false"))
    small = [entry for entry in TINY if "patch_size" not in entry]
    start = ["init_image=central_frame", f"init_image.weights={tmp_path / 'run'}"]
    numbers = training.run(composed(*small, *VIDEO, *start, "trainer.limit_train_batches=1", directory="video"))
    assert (numbers["init_image/missing"], numbers["init_image/unexpected"]) == (0, 0)
    assert "test/top1" in numbers
    with pytest.raises(FewtokensError, match="init_image starts a video model"):
        training.run(composed(*TINY, *start, directory="image"))
    left = ["init_image=none", "+init_image.weights=/nowhere", f"init_from={tmp_path / 'video'}"]  # of an experiment
    numbers = training.run(composed(*small, *VIDEO, *left, "trainer.limit_train_batches=1", directory="again"))
    assert numbers["init/missing"] == 0
    with pytest.raises(FewtokensError, match="one set of weights"):
        training.run(composed(*small, *VIDEO, *start, f"init_from={tmp_path / 'run'}", directory="both"))


@pytest.mark.parametrize("options", [["callbacks=ema"], ["optimizer=sgd", "trainer.accumulate_grad_batches=2"],
                                     ["optimizer=lamb", "schedule=constant"], ["trainer.precision=bf16-mixed"],
                                     ["task.mix.mixup=0.8", "task.mix.cutmix=1.0", "task.label_smoothing=0.1"],
                                     ["logger=tensorboard"], ["logger=none"], ["test=false"]])  # fmt: skip
def test_the_options_of_training_run(composed, tmp_path: Path, options: list[str]) -> None:
    numbers = training.run(composed(*TINY, *options))
    assert ("test/top1" in numbers) == (options != ["test=false"])


def test_the_average_is_what_is_tested_and_saved(composed, tmp_path: Path) -> None:
    training.run(composed(*TINY, "callbacks=ema", "callbacks.ema.decay=0.5", "optimizer.lr=0.1"))
    content = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    averaged, current = content["state_dict"], content["current_model_state"]
    assert any(not torch.equal(averaged[name], current[name]) for name in averaged)


def test_an_offline_wandb_run_is_recorded_and_closed(composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("a", "b"):
        training.run(composed(*TINY, "logger=wandb", directory=name))
        assert wandb.run is None
        assert len(list((tmp_path / name / "wandb").glob("offline-run-*"))) == 1
    assert (tmp_path / "a" / "wandb_run_id").read_text() != (tmp_path / "b" / "wandb_run_id").read_text()
    with pytest.raises(FewtokensError):
        training.run(composed(*TINY, "logger=wandb", "tokenizer.at=9", directory="c"))
    assert wandb.run is None, "closed on failure too"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tokenizer.at=9", "0..1"),
        ("tokenizer.at=1.0", "relative depth"),
        ("tokenizer.at=[0,0.1]", "name each block once"),
        ("backbone.patch_size=3", "tile"),
        ("backbone.heads=5", "divides 16"),
        ("data.num_classes=3", "num_classes"),
        ("data.image_size=9", "image_size|tile"),
        ("data.batch_size=0", "batch_size"),
        ("task.label_smoothing=2.0", "smoothing"),
        ("task._target_=os.system", "allowed"),
        ("+optimizer.speed=1", "speed"),
        ("optimizer.lr=1e30", "finite|loss"),
        ("+backbone.options.colour=red", "colour"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(composed, override: str, words: str) -> None:
    with pytest.raises(FewtokensError, match=words) as caught:
        training.run(composed(*TINY, override))
    assert "To do:" in str(caught.value)


def test_a_tokenizer_that_needs_the_lattice_says_so_on_a_broken_one(composed) -> None:
    cfg = composed(*TINY, "tokenizer.at=[0,1]")
    model = instantiate(cfg.backbone)
    with pytest.raises(FewtokensError, match="lattice"):
        model(torch.randn(1, 1, 8, 8))


def test_gradients_reach_every_parameter_in_two_steps(composed) -> None:
    task = instantiate(composed(*TINY).task)
    task.model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in task.model.parameters() if p.requires_grad)


def _configs() -> Path:
    from conftest import CONFIGS

    return CONFIGS
