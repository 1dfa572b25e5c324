"""Sweeps: a table at the end, and only what is left to do when they continue."""

import csv
import json
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

from conftest import ROOT, TINY, environment
from fewtokens.errors import FewtokensError
from fewtokens.runs import cli
from fewtokens.runs.sweep import SweepJob, by_seed, mean_and_interval, read_table, write_table


@pytest.fixture
def sweep(multirun) -> Callable[..., int]:
    """Run a sweep of functions that stand for jobs, and return its exit code."""
    return partial(multirun, "hydra.sweep.dir=sweep")


def end(status: str, **numbers: float) -> None:
    """Leave what a job leaves in its run directory."""
    run = Path(HydraConfig.get().runtime.output_dir)
    (run / "run.json").write_text(json.dumps({"status": status, "reason": f"{status} for a reason"}))
    if status == "finished":
        (run / "report.json").write_text(json.dumps(numbers))


def rows(sweep: Path = Path("sweep")) -> list[dict[str, str]]:
    with (sweep / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_a_row_for_every_job_and_the_jobs_that_are_left_run_later(sweep, capsys) -> None:
    ran = []

    def job(cfg) -> None:
        ran.append((cfg.seed, cfg.resume))
        if cfg.seed == 1 and len(ran) < 5:
            end("failed")
            raise FewtokensError("This seed is bad.")
        if cfg.seed == 2 and len(ran) < 5:
            end("started")
            (Path(HydraConfig.get().runtime.output_dir) / "checkpoints").mkdir()
            raise KeyboardInterrupt
        end("finished", **{"test/top1": cfg.seed / 10, "val/loss": 1.0})

    assert sweep(job, "seed=0,1,2,3", "optimizer.lr=0.5") == 130
    assert [row["state"] for row in rows()] == ["finished", "failed", "stopped", "missing"]
    assert [row["path"] for row in rows()] == ["0", "1", "2", "3"]
    assert rows()[1]["reason"] == "This seed is bad."
    assert rows()[0]["overrides"] == "seed=0 optimizer.lr=0.5"
    assert (rows()[0]["test/top1"], rows()[1]["test/top1"]) == ("0.0", "")
    printed = capsys.readouterr().out
    assert "failed: This seed is" in printed
    assert "optimizer.lr" not in printed.partition("Table")[0].partition("overrides")[2], "all jobs have it"
    ran[:] = [(None, None)] * 5
    assert sweep(job, "seed=0,1,2,3", "optimizer.lr=0.5", "sweep=sweep") == 0
    assert ran[5:] == [(1, None), (2, None), (3, None)]
    assert [row["test/top1"] for row in rows()] == ["0.0", "0.1", "0.2", "0.3"]
    assert "0.15 ± 0.21" in capsys.readouterr().out
    assert sweep(job, "seed=4,0", "optimizer.lr=0.5", "sweep=sweep") == 0, "another seed"
    assert ran[8:] == [(4, None)]
    assert sorted(row["path"] for row in rows()) == ["0", "1", "2", "3", "4"], "rows of another command stay"


def test_a_training_that_was_interrupted_is_resumed_in_its_directory(sweep, composed, tmp_path: Path) -> None:
    from fewtokens.runs import config

    seen = []

    def job(cfg) -> None:
        run = Path(HydraConfig.get().runtime.output_dir)
        seen.append((cfg.resume, run.relative_to(tmp_path).as_posix()))
        cfg.name = "digits"
        config.save(cfg, run)
        (run / "checkpoints").mkdir(exist_ok=True)
        (run / "checkpoints" / "last.ckpt").touch()
        if cfg.resume is None:
            end("stopped")
            raise KeyboardInterrupt
        end("finished", a=1.0)

    subdirectories = "hydra.sweep.subdir='${hydra.job.override_dirname}'"
    assert sweep(job, "backbone.dim=24", "tokenizer.at=1,'[0,1]'", subdirectories) == 130
    assert sweep(job, "backbone.dim=24", "tokenizer.at=1,'[0,1]'", subdirectories, "sweep=sweep") == 130
    first, second = ("sweep/backbone.dim=24,tokenizer.at=1", "sweep/backbone.dim=24,tokenizer.at='[0,1]'")
    assert seen == [(None, first), (first, first), (None, second)]
    assert [row["state"] for row in rows()] == ["finished", "stopped"]


def test_a_wrong_name_in_any_job_stops_a_sweep_before_the_first_one(sweep, capsys) -> None:
    assert sweep(lambda cfg: pytest.fail("it ran"), "tokenizer=none,tomee") == 1
    assert "Did you mean `tokenizer=tome`" in capsys.readouterr().err


def test_sweep_names_the_directory_of_a_sweep(sweep, monkeypatch, capsys, tmp_path: Path) -> None:
    assert sweep(lambda cfg: None, "sweep=elsewhere") == 1
    assert "must be the directory of a sweep, which contains sweep.csv, got elsewhere" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["train.py", "sweep=elsewhere"])
    with pytest.raises(SystemExit):
        cli.command("train", lambda cfg: None)
    assert "`sweep` must be null without -m" in capsys.readouterr().err


def test_how_a_job_ended_is_read_from_its_directory(tmp_path: Path) -> None:
    def read(status: str | None, *files: str, state: str = "missing") -> tuple[str, str]:
        run = tmp_path / str(len(list(tmp_path.iterdir())))
        (run / "checkpoints").mkdir(parents=True)
        if status:
            (run / "run.json").write_text(json.dumps({"status": status, "reason": "it"} if status else {}))
        for name in files:
            (run / name).write_text('{"a": 1}')
        job = SweepJob([], path=run.name, state=state)
        job.read(tmp_path)
        return job.state, job.reason

    assert read(None) == ("missing", "")
    assert read(None, state="finished") == ("finished", "")
    assert read("started") == ("stopped", "its process was killed")
    assert read("started", "report.json", "checkpoints/last.ckpt") == ("stopped", "its process was killed")
    assert read("started", "report.json") == ("finished", "")
    assert read("failed", "report.json") == ("failed", "it")
    assert read("finished", "report.json") == ("finished", "")


def test_tables_are_read_as_they_were_written(tmp_path: Path) -> None:
    jobs = [SweepJob(["a='x y'", "seed=1"], "0", "finished", "", {"val/loss": 0.5}), SweepJob(["b=2"], "1")]
    write_table(jobs, tmp_path)
    assert read_table(tmp_path) == jobs


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    head = "overrides,state,reason,val/loss,path\n"
    for content in (
        b"a,b\n1,2\n",
        head + "seed=0\n",
        head + "'seed=0,finished,,1,0\n",
        head + "a,b,,x,0\n",
        b"\xff\xfe",
    ):
        (tmp_path / "sweep.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(FewtokensError, match=r"Cannot read .*sweep\.csv: .* Correct it, or start another sweep"):
            read_table(tmp_path)


def test_seeds_are_grouped_and_averaged() -> None:
    jobs = [SweepJob([f"seed={seed}", f"a={a}"], state="finished") for a in (1, 2) for seed in (0, 1)]
    jobs.append(SweepJob(["seed=2", "a=1"], state="failed"))
    assert {key: len(group) for key, group in by_seed(jobs).items()} == {("a=1",): 2, ("a=2",): 2}
    assert mean_and_interval([1.0, 2.0, 3.0]) == "2 ± 2.5"  # 4.303 * 1 / sqrt(3)
    assert (mean_and_interval([1.0]), mean_and_interval([])) == ("1", "")


def test_a_job_returns_the_number_to_optimize(composed) -> None:
    from fewtokens.runs.train import optimized

    cfg = composed()
    assert optimized(cfg, {"val/loss": 2.0}) is None
    cfg.optimized_metric = "val/loss"
    assert optimized(cfg, {"val/loss": 2.0}) == 2.0
    cfg.optimized_metric = "val/los"
    with pytest.raises(FewtokensError, match="`optimized_metric` must be 'val/loss'"):
        optimized(cfg, {"val/loss": 2.0})


@pytest.mark.slow
def test_a_sweep_that_is_killed_at_random_moments_ends_with_the_same_table(tmp_path: Path) -> None:
    jobs = ["seed=0,1", "tokenizer=none,token_learner_v11", "trainer.max_epochs=40", "trainer.limit_train_batches=10"]
    command = [sys.executable, str(ROOT / "train.py"), "-m", *[part for part in TINY if part[:8] != "trainer."], *jobs]
    env = environment(FEWTOKENS_OUTPUTS=str(tmp_path))

    def table(name: str) -> list[tuple[str, ...]]:
        columns = ("overrides", "state", "test/top1", "test/loss", "val/loss", "train/epochs", "path")
        return [tuple(row[column] for column in columns) for row in rows(tmp_path / name)]

    directory = tmp_path / "killed"
    done = subprocess.run([*command, f"hydra.sweep.dir={tmp_path / 'whole'}"], env=env, capture_output=True, check=True)
    assert b"over seeds" in done.stdout
    kills, moments = 0, random.Random(0)
    while kills < 20:
        begun = (directory / "sweep.csv").exists()
        where = f"sweep={directory}" if begun else f"hydra.sweep.dir={directory}"
        process = subprocess.Popen([*command, where], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=moments.uniform(2, 10))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    subprocess.run([*command, f"sweep={directory}"], env=env, capture_output=True, check=True)
    assert table("killed") == table("whole")
    assert kills == 20, "the sweep ended before: it must be longer"
