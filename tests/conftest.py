"""Fixtures and settings for tests that run whole jobs."""

import logging
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from fewtokens.runs.compose import compose_on_saved_runs

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
# A real run that takes seconds.
TINY = [
    "data.image_size=8",
    "backbone.patch_size=2",
    "backbone.dim=16",
    "backbone.heads=2",
    "backbone.depth=2",
    "tokenizer.at=1",
    "trainer=cpu",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=3",
    "measure=none",
]

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two test processes share two cores
if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup ignores this one


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a command under test: no W&B account, no launcher, one thread."""
    hidden = ("HYDRA_", "WANDB_", "SLURM_", "FEWTOKENS_", "LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    return kept | {"OMP_NUM_THREADS": "1", "NETRC": os.devnull, **more}


def run_without_type_checks(*arguments: str) -> str:
    """Run tests in a process without jaxtyping's hook, whose checks torch.compile cannot trace, and return its output.

    Args:
        *arguments: Files and options of pytest.
    """
    quiet = ["-q", "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *quiet, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def multirun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Run train.py -m in this process, with a function that stands for the job, and return its exit code."""
    from fewtokens.runs import cli

    monkeypatch.chdir(tmp_path)

    def run(setting: str, job: Callable, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", "-m", setting, *arguments])
        try:
            cli.command("train", job)
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run train.py, eval.py or a module (fewtokens...) as a command, with outputs in tmp_path."""

    def run(name: str, *arguments: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *(["-m", name] if name.startswith("fewtokens.") else [str(ROOT / name)]), *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=tmp_path,
            env=environment(FEWTOKENS_OUTPUTS=str(tmp_path / "outputs"), **more),
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable]:
    """Run a command as `script` does, but in this process: a process of its own needs seconds to import torch."""
    handlers = logging.root.handlers[:]  # Hydra's write to the captured output, which is closed after the test
    monkeypatch.chdir(tmp_path)
    for name in os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("FEWTOKENS_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("FEWTOKENS_TRACEBACK", "0")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def run(name: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        found = 0
        try:
            if name.startswith("fewtokens."):
                monkeypatch.delitem(sys.modules, name, raising=False)  # or runpy warns
                runpy.run_module(name, run_name="__main__")
            else:
                runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as stop:
            found = stop.code
        printed, errors = capsys.readouterr()
        assert found == code, printed + errors
        return subprocess.CompletedProcess([name, *arguments], code, printed, errors)

    yield run
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    logging.root.handlers[:] = handlers


@pytest.fixture
def composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., DictConfig]]:
    """Compose a job's config in this process, as a command does, with a run directory in tmp_path."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    compose_on_saved_runs()

    def make(*overrides: str, base: str = "train", directory: str = "run") -> DictConfig:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = compose(base, list(overrides), return_hydra_config=True)
        with open_dict(cfg):
            cfg.hydra.runtime.output_dir = str(tmp_path / directory)
            cfg.hydra.job.num, cfg.hydra.job.id = 0, "test"
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        return cfg

    yield make
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


@pytest.fixture(scope="session")
def all_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of moving_digits with one short video of every digit; processes of pytest-xdist share it."""
    from fewtokens.data.video import moving_digits

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "moving_digits"
    moving_digits.write_once(root, moving_digits.Recipe(video_frames=8, copies=1))
    return root
