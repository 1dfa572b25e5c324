"""W&B with a server that goes away, or does not know the account: training goes on, and nothing is lost."""

import csv
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, TINY, environment
from wandb_server import Server, serving, stop

KEY = "a" * 40
OPTIONS = [*TINY, "logger=wandb", "trainer.max_epochs=30", "logger.wandb.finish_timeout=3"]


def epochs(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"] and not row["train/seconds"]]


@pytest.mark.slow
def test_a_server_that_goes_away_costs_no_data(script, tmp_path: Path) -> None:
    stopped = []

    def leave(server: Server) -> None:
        if not stopped:
            stopped.append(len(server.history))
            threading.Thread(target=stop, args=[server]).start()

    run = tmp_path / "run"
    options = [*OPTIONS, "tags=[one,two]", f"hydra.run.dir={run}", "measure=predictions", "measure.throughput=null"]
    with serving(Server(leave)) as server:
        done = script("train.py", *options, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    assert stopped, "it was reached"
    assert (run / "report.json").exists()
    losses = epochs(run)
    assert len(losses) == 30
    (folder,) = run.glob("wandb/run-*")
    with serving(Server()) as later:
        env = environment(WANDB_BASE_URL=later.url, WANDB_API_KEY=KEY)
        command = [sys.executable, "-m", "wandb", "sync", "--no-skip-online", str(folder)]
        subprocess.run(command, env=env, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    assert [row["val/loss"] for row in later.history if "val/loss" in row] == pytest.approx(losses)
    assert any("train/images_per_s" in row for row in later.history)
    config = later.configs[-1]
    assert config["choices"]["value"]["tokenizer"] == "token_learner_v11"
    assert any("token_maps" in name for name in later.files), later.files
    # A table is an artifact, which W&B does not take without its server.
    assert "Weights & Biases did not take the table" in done.stdout + done.stderr
    assert (run / "predictions.csv").exists()


@pytest.mark.slow
def test_a_wrong_key_turns_the_run_offline(script, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with serving(Server(known=False)) as server:
        options = [*OPTIONS, "trainer.max_epochs=2", f"hydra.run.dir={run}"]
        done = script("train.py", *options, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    assert "Weights & Biases goes offline" in done.stdout + done.stderr
    assert (run / "report.json").exists()
    assert list(run.glob("wandb/offline-run-*"))


def test_the_command_lines_of_an_agent_compose(composed) -> None:
    """With the file of the docs, and W&B's own code for the agent's arguments."""
    from wandb.sdk.launch.sweeps import utils

    text = (ROOT / "docs" / "running.md").read_text()
    (file,) = re.findall(r"```yaml\n(program: train\.py\n.*?)```", text, re.DOTALL)
    sweep = yaml.safe_load(file)
    assert sweep["command"][-2:] == ["logger=wandb", "${args_no_hyphens}"]
    choices = {key: node.get("values", [1.2e-05, 1, 0.01]) for key, node in sweep["parameters"].items()}
    choices |= {"tokenizer": ["tome", "none", "ats"], "trainer.deterministic": [True, False, "warn"]}
    for index in range(3):
        values = {key: node[index] for key, node in choices.items()}
        arguments = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
        cfg = composed("logger=wandb", *arguments["args_no_hyphens"])
        assert (cfg.optimizer.lr, cfg.trainer.deterministic) == (
            values["optimizer.lr"],
            values["trainer.deterministic"],
        )
        assert cfg.tokenizer.at == values["tokenizer.at"]
        assert cfg.task.layer_decay == (None if values["task.layer_decay"] == "null" else values["task.layer_decay"])
