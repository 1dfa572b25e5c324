import io

import pytest
import torch
from rich.console import Console

from fewtokens.benchmarks import train_step as benchmark
from fewtokens.benchmarks.train_step import Timing
from fewtokens.errors import FewtokensError

SMALL = ["data.image_size=8", "backbone.patch_size=2", "backbone.depth=1", "backbone.dim=16", "backbone.heads=2",
         "tokenizer=none", "data.batch_size=256"]  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture
def built(monkeypatch):
    tasks, build = [], benchmark.build
    monkeypatch.setattr(benchmark, "build", lambda cfg: tasks.append((parts := build(cfg))[1]) or parts)
    return tasks


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_both_variants_do_the_same_work(precision, built, tmp_path):
    still = [
        "task.mix.mixup=0.0",
        "backbone.options.proj_drop_rate=0.0",
    ]  # random draws differ, because StepSeeds is a callback
    cfg = benchmark.compose_config("digits", str(tmp_path), 4, [*SMALL, *still, f"trainer.precision={precision}"])
    untrained = benchmark.build(cfg)[1].state_dict()
    timings = benchmark.train_with_lightning(cfg, CPU), benchmark.train_with_loop(cfg, CPU)
    assert all(timing.wall > 0 and timing.cpu > 0 for timing in timings)
    first, second = (task.model.state_dict() for task in built[-2:])
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], msg=name, rtol=1e-4, atol=1e-5)
    assert all(not torch.equal(value, untrained[f"model.{name}"]) for name, value in first.items())


def test_the_ends_of_epochs_are_counted(built, tmp_path):  # 10 steps, an epoch has fewer
    cfg = benchmark.compose_config("digits", str(tmp_path), 4, SMALL)
    benchmark.train_with_lightning(cfg, CPU)
    assert built[-1].trainer.current_epoch >= 1
    assert (tmp_path / "metrics.csv").exists()
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_variants_take_turns():
    order = []
    variants = {name: lambda name=name: order.append(name) or Timing(1.0, 1.0) for name in "ab"}
    assert {name: len(timings) for name, timings in benchmark.take_turns(variants, 3).items()} == {"a": 3, "b": 3}
    assert "".join(order) == "abbaab"


def test_the_ratio_is_the_median_over_the_rounds():
    page = io.StringIO()
    found = {
        "Lightning": [Timing(0.11, 0.21), Timing(0.30, 0.22), Timing(0.12, 0.23)],
        "reference loop": [Timing(0.10, 0.20), Timing(0.20, 0.20), Timing(0.10, 0.20)],
    }
    benchmark.show(found, 64, "title", Console(file=page, width=120))
    assert "overhead in time: +20.0 % (rounds from +10.0 % to +50.0 %" in page.getvalue()
    assert "steadier on a shared machine): +10.0 %" in page.getvalue()


def test_a_precision_that_the_loop_cannot_do_is_refused(tmp_path):
    cfg = benchmark.compose_config("digits", str(tmp_path), 4, [*SMALL, "trainer.precision=64-true"])
    with pytest.raises(FewtokensError, match=r"`trainer\.precision` must be '32-true' or 'bf16-mixed', got '64-true'"):
        benchmark.train_with_loop(cfg, CPU)


@pytest.mark.parametrize("data", list(benchmark.OVERRIDES))
def test_every_choice_composes(data, tmp_path):
    cfg = benchmark.compose_config(data, str(tmp_path), 10)
    assert not {"best", "last", "progress"} & set(cfg.callbacks)
    assert {"learning_rate", "seeds", "stop"} <= set(cfg.callbacks)


@pytest.mark.parametrize("wrong", ["abc", "nothing=3", "data.batch_size=0", "tokenizer=nothing"])
def test_a_wrong_override_is_answered_with_a_sentence(capsys: pytest.CaptureFixture[str], wrong: str) -> None:
    assert benchmark.main([wrong]) == 1
    assert capsys.readouterr().err.startswith("Error: ")
