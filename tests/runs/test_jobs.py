"""Whole runs in this process: what they leave behind, and their errors."""

import csv
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from conftest import TINY
from fewtokens.callbacks.signals import Stopped
from fewtokens.errors import FewtokensError
from fewtokens.runs import eval as evaluation
from fewtokens.runs import train as training
from fewtokens.runs.cli import describe
from fewtokens.runs.compose import config_of
from fewtokens.runs.config import instantiate
from fewtokens.runs.directory import RunDirectory
from fewtokens.runs.job import build_trainer
from fewtokens.tasks.classification import Classifier
from saved_runs import Page


def test_a_run_leaves_config_checkpoints_metrics_and_a_report(composed, tmp_path: Path, capsys) -> None:
    numbers = training.run(
        composed(*TINY, "measure=default", "measure.throughput.seconds=0.2", "tokenizer.build.num_tokens=2")
    )
    printed = capsys.readouterr().out
    assert re.search(r"all tokens +\S TokenLearnerV11 +", printed), "the table at the end"
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
    page = Page(run / "report.html")
    page.check()
    assert len(page.source) < 2_000_000
    assert f"{report['test/top1']:.2%}" in page.text
    assert len(page.all("img")) == len(list((run / "pictures").iterdir()))
    assert f"Page: {run / 'report.html'}" in printed
    for name in ("best", "last"):
        content = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert yaml.safe_load(content["config"])["backbone"]["dim"] == 16


def test_eval_repeats_the_test_of_the_run(composed, tmp_path: Path) -> None:
    trained = training.run(composed(*TINY))
    for reference in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "best.ckpt"):
        cfg = composed(f"checkpoint={reference}", "measure=none", base="eval", directory=f"eval_{reference.name}")
        assert evaluation.run(cfg)["test/top1"] == pytest.approx(trained["test/top1"])
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes((tmp_path / "run" / "checkpoints" / "best.ckpt").read_bytes())
    assert config_of(moved)["backbone"]["dim"] == 16


def test_a_dense_run_is_evaluated_with_methods_plugged_in(composed, tmp_path: Path) -> None:
    dense = ["tokenizer=none", "backbone.pool=token"]
    trained = training.run(composed(*[part for part in TINY if "tokenizer" not in part], *dense))

    def evaluate(*overrides: str) -> dict[str, float]:
        given = [f"checkpoint={tmp_path / 'run'}", "measure=cost", *overrides]
        return evaluation.run(composed(*given, base="eval", directory="_".join(overrides)))

    for name, setting in (("ats", "budget=all"), ("tome", "r=0"), ("top_k", "keep_rate=1.0")):
        numbers = evaluate(f"tokenizer={name}", f"tokenizer.build.{setting}", "tokenizer.at=[0,1]")
        assert numbers["test/top1"] == trained["test/top1"]
    for name, setting in (
        ("ats", "budget=3"),
        ("tome", "r=2"),
        ("evit", "keep_rate=0.3"),
        ("random_drop", "keep_rate=0.3"),
    ):
        numbers = evaluate(f"tokenizer={name}", f"tokenizer.build.{setting}", "tokenizer.at=[0,1]")
        assert 0 <= numbers["test/top1"] <= 1
        assert numbers["cost/gmacs"] < numbers["cost/gmacs_dense"]
    with pytest.raises(FewtokensError, match="must be trained first"):
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


def test_auto_starts_a_run_and_continues_it(composed, tmp_path: Path, monkeypatch) -> None:
    training.run(composed(*TINY, "resume=auto"))
    training.run(composed(*TINY, "resume=auto", "trainer.max_epochs=2"))
    content = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 6
    calls: list[int] = []
    monkeypatch.setattr(training, "requeue", lambda: calls.append(1))
    monkeypatch.setattr(Classifier, "on_validation_epoch_start", lambda _: os.kill(os.getpid(), signal.SIGUSR1))
    for options in (["trainer.max_epochs=4", "resume=auto"], [f"resume={tmp_path / 'run'}", "trainer.max_epochs=5"]):
        with pytest.raises(Stopped):
            training.run(composed(*TINY, *options))
    assert calls == [1], "only with resume=auto would a restarted job continue"


def test_auto_continues_the_newest_run_if_it_is_not_finished(composed, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FEWTOKENS_OUTPUTS", str(tmp_path))
    for name in ("a", "b"):
        (tmp_path / "digits" / name / "checkpoints").mkdir(parents=True)
        for file in ("config.yaml", "checkpoints/last.ckpt"):
            (tmp_path / "digits" / name / file).write_text("")
    os.utime(tmp_path / "digits" / "a" / "config.yaml", (0, 0))

    def chosen(*overrides: str) -> str:
        composed("resume=auto", *overrides)
        return HydraConfig.get().run.dir

    assert chosen() == str(tmp_path / "digits" / "b")
    assert chosen("hydra.run.dir=mine") == "mine"
    (tmp_path / "digits" / "b" / "report.json").write_text("")
    assert chosen() not in (str(tmp_path / "digits" / "a"), str(tmp_path / "digits" / "b"))


def test_the_global_batch_decides_the_accumulation(composed, tmp_path: Path, capsys) -> None:
    sizes = ["data.batch_size=16", "trainer.limit_train_batches=4", "test=false", "data.train_transforms=[]"]
    training.run(composed(*TINY, *sizes, "trainer.global_batch_size=32"))
    line = "1 process(es) x 16 samples x 2 batch(es) = 32 samples per optimizer step, learning rate 0.003"
    assert line in capsys.readouterr().out
    one = ["data.batch_size=32", "trainer.limit_train_batches=2"]
    training.run(composed(*TINY, *sizes[2:], *one, directory="one"))
    found, expected = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("run", "one")
    )
    assert found["global_step"] == expected["global_step"] == 2
    for name, value in expected["state_dict"].items():
        if name.startswith("model."):
            torch.testing.assert_close(found["state_dict"][name], value, rtol=1e-3, atol=1e-4)


def test_float32_products_are_tf32_on_gpus_alone(composed) -> None:
    settings = {
        name: composed(f"trainer={name}").trainer for name in ("default", "cpu", "ddp_cpu", "mps", "gpu", "ddp", "fsdp")
    }
    assert [node.float32_matmul_precision for node in settings.values()] == ["highest"] * 4 + ["high"] * 3
    try:
        build_trainer(composed("trainer=cpu", "trainer.float32_matmul_precision=medium").trainer)
        assert torch.get_float32_matmul_precision() == "medium"
        assert build_trainer(settings["cpu"]).max_epochs == 60
        assert torch.get_float32_matmul_precision() == "highest"  # in the next job of a sweep
    finally:
        torch.set_float32_matmul_precision("highest")
    with pytest.raises(FewtokensError, match=r"`trainer\.float32_matmul_precision` must be 'highest'"):
        build_trainer(composed("trainer.float32_matmul_precision=tf32").trainer)


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
        ("tokenizer.at=9", r"`tokenizer\.at` must be a block index from 0 to 1"),
        ("tokenizer.at=1.0", r"`tokenizer\.at` must be .* a relative depth"),
        ("tokenizer.at=[0,0.1]", r"`tokenizer\.at` must name different blocks"),
        ("backbone.patch_size=3", "patch_size"),
        ("backbone.patch_size=", "`backbone.patch_size` must be an int"),
        ("backbone.heads=5", "heads"),
        ("data.num_classes=3", "`data.num_classes` must be 10"),
        ("data.image_size=9", "image_size"),
        ("data.batch_size=0", "`data.batch_size` must be an int >= 1"),
        ("data.batch_size=1.5", "`data.batch_size` must be an int, got 1.5"),
        ("seed=abc", "`seed` must be an int"),
        ("seed=-1", "`seed` must be an int"),
        ("task.label_smoothing=2.0", "`task.label_smoothing` must be a number in"),
        ("task._target_=os.system", "os.system has no argument `model`"),
        ("task.mix=7", "`task.mix` must be Mix or null, got 7"),
        ("task.mix.mixup=-1.0", "`task.mix.mixup` must be a number >= 0"),
        ("schedule.warmup=-1", "`schedule.warmup` must be a number of steps >= 0"),
        ("+optimizer.speed=1", "Muon has no argument `speed`"),
        ("optimizer.lr=1e30", "The mean training loss of epoch 1 "),
        ("optimizer.lr=-1", "The optimizer does not accept its settings: Invalid learning rate: -1"),
        ("optimizer=adamw optimizer.lr=nan", "`optimizer.lr` must be a number or Tensor, got nan"),
        ("optimizer=sgd optimizer.lr=inf", "`optimizer.lr` must be a finite number, got inf"),
        ("optimizer=adamw optimizer.betas=[1,2]", "The optimizer does not accept its settings: Invalid beta parameter"),
        ("+backbone.options.colour=red", "unexpected keyword argument 'colour'"),
        ("trainer.precision=16-true", "`trainer.precision` must be 32-true, bf16-mixed or 16-mixed"),
        ("trainer.max_epochs=abc", "`trainer.max_epochs` must be an int or null, got 'abc'"),
        ("backbone.num_classes=3", "`backbone.num_classes` must be data.num_classes, which is 10, got 3"),
        ("data.channels=4", "RandAugment needs 1 or 3 channels, got 4"),
        ("callbacks.best=abc", "`callbacks.best` must be null, or values with a _target_, got 'abc'"),
        ("init_from=7", "`checkpoint or init_from` must be a run directory or a checkpoint, got 7"),
        ("~task", "`task` must be an option of configs/task"),
        ("name=../x", "`name` must be the name of a folder below outputs/, got '../x'"),
        (
            "trainer.global_batch_size=100",
            r"`trainer\.global_batch_size` must be a multiple of 64 \(1 process\(es\) x data.batch_size=64\), got 100",
        ),
        (
            "trainer.global_batch_size=128 trainer.accumulate_grad_batches=2",
            r"`trainer\.accumulate_grad_batches` must be 1 with trainer\.global_batch_size, got 2",
        ),
        ("paths.outputs=null", "`paths.outputs` must be a folder, got None"),
        ("test=7", "`test` must be true or false, got 7"),
        ("+backbone.options.qk_norm=abc", "`backbone.options.qk_norm` must be true or false, got 'abc'"),
        ("callbacks.best.filename=last", r"Two callbacks would write .*/checkpoints/last\.ckpt"),
        ("+callbacks.best.save_last=true", r"Two callbacks would write .*/checkpoints/last\.ckpt"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(composed, override: str, words: str) -> None:
    with pytest.raises(FewtokensError, match=words):
        training.run(composed(*TINY, *override.split(" ")))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("accumulate_grad_batches=0", "an int >= 1"),
        ("max_epochs=0", "an int >= 1"),
        ("max_epochs=null", "an int >= 1, -1 for no limit, or null with trainer.max_steps"),
        ("max_steps=0", "an int >= 1"),
        ("limit_train_batches=0", "an int >= 1, a share"),
        ("limit_train_batches=0.0", "an int >= 1, a share"),
        ("check_val_every_n_epoch=0", "an int >= 1 or null, got 0"),
        ("val_check_interval=0", r"a share in \(0, 1\], an int >= 1"),
        ("num_sanity_val_steps=-5", "an int >= 0, or -1 for all"),
        ("log_every_n_steps=-1", "an int >= 1, or 0 for never"),
        ("gradient_clip_val=-1", "a number >= 0 or null"),
    ],
)
def test_settings_of_the_trainer_that_lightning_accepts_in_silence(composed, override: str, words: str) -> None:
    with pytest.raises(FewtokensError, match=f"`trainer.{override.partition('=')[0]}` must be {words}"):
        training.check_length(composed(f"trainer.{override}").trainer)


@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_machine_without_a_gpu_is_named(composed, monkeypatch: pytest.MonkeyPatch, accelerator: str) -> None:
    for kind in ("CUDA", "MPS"):
        monkeypatch.setattr(f"lightning.pytorch.accelerators.{kind}Accelerator.is_available", lambda: False)
    with pytest.raises(
        FewtokensError, match=f"accelerator={accelerator} needs a GPU, but torch finds none.*trainer=cpu"
    ):
        build_trainer(composed("trainer=gpu", f"trainer.accelerator={accelerator}").trainer)


def test_a_run_without_a_progress_bar(composed, tmp_path: Path) -> None:
    training.run(composed(*TINY, "trainer.enable_progress_bar=false", "trainer.limit_train_batches=1", "test=false"))
    assert (tmp_path / "run" / "report.json").is_file()


@pytest.mark.parametrize("model", [1, 2])
def test_an_experiment_that_starts_from_a_run_asks_for_it(composed, model: int, tmp_path: Path) -> None:
    with pytest.raises(FewtokensError, match=f"<run of vivit_b_m{model}_k400> does not exist"):
        training.run(composed(f"experiment=video/vivit_b_m{model}_ats_k400"))
    assert not (tmp_path / "run").exists()


def change_checkpoint(run: Path, **changes: Any) -> None:
    path = run / "checkpoints" / "last.ckpt"
    torch.save(torch.load(path, weights_only=True) | changes, path)


def test_a_checkpoint_from_elsewhere_cannot_delete_files(composed, tmp_path: Path) -> None:
    short = [*TINY, "trainer.limit_train_batches=1", "trainer.limit_val_batches=1", "test=false"]
    training.run(composed(*short))
    run, victim = tmp_path / "run", tmp_path / "victim"
    victim.mkdir()
    states = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    resume = [*short, f"resume={run}", "trainer.max_epochs=2"]
    for path in (f"{run}/checkpoints/../../victim", f"local://{victim}"):
        for state in states.values():
            if isinstance(state, dict) and "best_k_models" in state:
                value = torch.tensor(9.0)
                best = {"best_k_models": {path: value}, "kth_best_model_path": path, "best_model_path": path}
                state.update(best | {"kth_value": value, "best_model_score": value})
        change_checkpoint(run, callbacks=states)
        with pytest.raises(FewtokensError, match="a callback in its checkpoint names the file"):
            training.run(composed(*resume))
    assert victim.is_dir()
    for changes in ({"callbacks": 5}, {"loops": {}}, {"lr_schedulers": ["x"]}):
        change_checkpoint(run, **({"callbacks": {}} | changes))
        with pytest.raises(FewtokensError, match=r"last\.ckpt cannot be resumed with these settings"):
            training.run(composed(*resume))


@pytest.mark.parametrize("override", ["trainer.max_epochs=-5", "trainer.devices=0", "trainer.profiler=x"])
def test_what_lightning_refuses_is_its_own_exception(composed, override: str) -> None:
    with pytest.raises(MisconfigurationException) as caught:
        training.run(composed(*TINY, override))
    assert "Check the overrides of `trainer`" in describe(caught.value, "train")


def test_a_tokenizer_that_needs_the_grid_says_so_on_an_incomplete_one(composed) -> None:
    cfg = composed(*TINY, "tokenizer=token_learner", "tokenizer.at=[0,1]")
    model = instantiate(cfg.backbone)
    with pytest.raises(FewtokensError, match="needs patch tokens on a complete"):
        model(torch.randn(1, 1, 8, 8))


def run_json(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def files(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(
    "override",
    [
        "tokenizer=none",  # another model
        "optimizer=sgd",  # its first step fails
        "trainer.max_epochs=1",  # shorter than the run is
        "data.batch_size=0",
        "trainer.devices=0",
    ],
)
def test_a_run_that_cannot_be_resumed_stays_as_it_was(composed, tmp_path: Path, override: str) -> None:
    run = tmp_path / "run"
    training.run(composed(*TINY, "trainer.max_epochs=3"))
    (run / "report.json").unlink()  # as if it had been killed
    before = files(run)
    with pytest.raises((FewtokensError, MisconfigurationException, KeyError)):
        training.run(composed(f"resume={run}", "trainer.max_epochs=4", override))
    assert files(run) == before
    assert training.run(composed(f"resume={run}", "trainer.max_epochs=4"))["train/epochs"] == 4
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 4
    assert yaml.safe_load((run / "config.0.yaml").read_text())["trainer"]["max_epochs"] == 3


def test_a_finished_run_that_is_resumed_keeps_its_report(composed, tmp_path: Path, caplog) -> None:
    training.run(composed(*TINY, "tokenizer=none", "tokenizer.at=[]", directory="dense"))
    first = training.run(composed(*TINY, f"init_from={tmp_path / 'dense'}"))
    rows = (tmp_path / "run" / "metrics.csv").read_text()
    (tmp_path / "run" / "report.json").unlink()
    assert "Nothing is left to train" not in caplog.text
    again = training.run(composed(f"resume={tmp_path / 'run'}"))
    assert "Nothing is left to train: the run has reached trainer.max_epochs=1" in caplog.text
    assert {"val/top1", "val/loss", "init/loaded", "train/epochs", "test/top1"} <= first.keys()
    assert {k: v for k, v in again.items() if k != "train/seconds"} == {
        k: v for k, v in first.items() if k != "train/seconds"
    }
    assert again["train/seconds"] == pytest.approx(first["train/seconds"], abs=1)
    assert (tmp_path / "run" / "metrics.csv").read_text().startswith(rows[: rows.index("test")])


def test_a_resumed_run_counts_the_time_before_it_stopped(composed, tmp_path: Path) -> None:
    first = training.run(composed(*TINY))
    (tmp_path / "run" / "report.json").unlink()
    again = training.run(composed(f"resume={tmp_path / 'run'}", "trainer.max_epochs=2"))
    assert again["train/seconds"] > first["train/seconds"]
    assert run_json(tmp_path / "run")["status"] == "finished"


def test_two_runs_cannot_share_a_directory(composed, tmp_path: Path) -> None:
    cfg = composed(*TINY)
    other = RunDirectory(composed(*TINY))
    with RunDirectory(cfg), pytest.raises(FewtokensError, match=r"Another process writes to .*/run"):
        other.__enter__()
    with other:
        pass


def test_a_run_does_not_overwrite_another(composed, tmp_path: Path) -> None:
    training.run(composed(*TINY))
    before = files(tmp_path / "run")
    for cfg, run in ((composed(*TINY), training.run), (composed(base="eval"), evaluation.run)):
        with pytest.raises(FewtokensError, match=r"contains a finished run \(report.json\)"):
            run(cfg)
    assert files(tmp_path / "run") == before
    (tmp_path / "run" / "report.json").unlink()
    with pytest.raises(FewtokensError, match=r"contains an unfinished run .*resume="):
        training.run(composed(*TINY))


def test_a_run_that_failed_says_why(composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FewtokensError):
        training.run(composed(*TINY, "tokenizer.at=9"))
    record = run_json(tmp_path / "run")
    assert record["status"] == "failed"
    assert record["reason"].startswith("`tokenizer.at` must be")
    assert "traceback" not in record

    def broken(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(Classifier, "training_step", broken)
    with pytest.raises(ZeroDivisionError):
        training.run(composed(*TINY))
    record = run_json(tmp_path / "run")
    assert (record["status"], record["reason"]) == ("failed", "ZeroDivisionError: by zero")
    assert record["traceback"][0].startswith("Traceback")
    assert "ZeroDivisionError: by zero" in Page(tmp_path / "run" / "report.html").text


def test_a_run_that_is_interrupted_outside_of_training_says_so(composed, tmp_path: Path, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Classifier, "test_step", interrupted)
    with pytest.raises(KeyboardInterrupt):  # which the command line turns into exit code 130
        training.run(composed(*TINY))
    record = run_json(tmp_path / "run")
    assert (record["status"], record["reason"]) == ("stopped", "interrupted")


def test_gradients_reach_every_parameter_in_two_steps(composed) -> None:
    task = instantiate(composed(*TINY).task)
    task.model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in task.model.parameters() if p.requires_grad)
