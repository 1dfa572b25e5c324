"""Commands in processes of their own: several ranks, signals, kills, and what a run leaves behind."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from PIL import Image

from conftest import ROOT, TINY, environment
from fewtokens.runs import distributed

# All sources of randomness, which a resumed run must repeat.
RANDOM = [
    *TINY,
    "trainer.max_epochs=3",
    "trainer.limit_train_batches=null",
    "backbone.options.proj_drop_rate=0.1",
    "backbone.options.drop_path_rate=0.1",
    "task.mix.mixup=0.8",
    "callbacks=ema",
]


def report(run: Path) -> dict[str, float]:
    return json.loads((run / "report.json").read_text())


def weights(run: Path) -> dict[str, torch.Tensor]:
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return content["state_dict"] | {f"now.{k}": v for k, v in content["current_model_state"].items()}


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(
        torch.equal(left[k], right[k]) for k in left if "train_" not in k and "metrics" not in k
    )


def record(run: Path) -> dict[str, str]:
    return json.loads((run / "run.json").read_text())


def step(run: Path) -> int:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env=environment(FEWTOKENS_OUTPUTS=str(tmp_path / "outputs")),
        start_new_session=True,
    )


def pictures(root: Path, test: int) -> Path:
    """Class folders with an odd number of test pictures."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 20), ("test", test)):
        for index in range(count):
            folder = root / part / ("cat" if index % 2 else "dog")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{index:04d}.png")
    return root


LAUNCHERS = ("RANK", "LOCAL_RANK", "NODE_RANK", "TORCHELASTIC_RUN_ID", distributed.TIMESTAMP)


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Hide the launcher variables of the tests' own environment."""
    for name in (*LAUNCHERS, *distributed.LAUNCHER_VARIABLES, *(name for name in os.environ if "SLURM" in name)):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "zero"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),  # torchrun on the second machine
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "1"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # started by Lightning inside of srun --ntasks=1
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
    ],
)
def test_a_single_process_is_rank_zero(no_launcher, variables: dict[str, str], zero: bool) -> None:
    for name, value in variables.items():
        no_launcher.setenv(name, value)
    assert distributed.is_rank_zero() is zero


@pytest.mark.parametrize(
    ("variables", "stamp"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, None),  # python in a batch script, without srun: a single process
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "2"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "slurm-7.0"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1", "SLURM_NTASKS": "2"}, "slurm-7.1"),  # a second run of the job
        (
            {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_RESTART_COUNT": "1"},
            "slurm-7.0-restart1",
        ),
    ],
)
def test_only_the_processes_of_a_step_share_a_directory(no_launcher, variables: dict[str, str], stamp: str) -> None:
    no_launcher.setattr(sys, "argv", ["train.py"])
    for name, value in variables.items():
        no_launcher.setenv(name, value)
    distributed.share_timestamp()
    assert os.environ.get(distributed.TIMESTAMP) == stamp
    no_launcher.delenv(distributed.TIMESTAMP, raising=False)


@pytest.mark.parametrize(
    ("variables", "stamp"),
    [
        ({"SLURM_JOB_ID": "7"}, "slurm-7"),  # a single process in a batch script
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_RESTART_COUNT": "1"}, "slurm-7.0"),
    ],
)
def test_a_restarted_slurm_job_finds_its_directory_with_resume_auto(
    no_launcher, variables: dict[str, str], stamp: str
) -> None:
    no_launcher.setattr(sys, "argv", ["train.py", "resume=auto"])
    for name, value in variables.items():
        no_launcher.setenv(name, value)
    distributed.share_timestamp()
    assert os.environ.get(distributed.TIMESTAMP) == stamp
    no_launcher.delenv(distributed.TIMESTAMP, raising=False)


@pytest.mark.parametrize(("state", "calls"), [("RUNNING", 2), ("CANCELLED", 1)])
def test_only_a_running_slurm_job_is_requeued(no_launcher, tmp_path: Path, state: str, calls: int) -> None:
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho "   JobState={state} Reason=None"\n')
    program.chmod(0o755)
    no_launcher.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    distributed.requeue()
    assert not (tmp_path / "calls").exists(), "not in a SLURM job"
    no_launcher.setenv("SLURM_JOB_ID", "7")
    distributed.requeue()
    assert (tmp_path / "calls").read_text().splitlines() == ["show job 7", "requeue 7"][:calls]


def test_a_job_that_cannot_be_requeued_ends_with_a_warning(no_launcher, tmp_path: Path, caplog) -> None:
    no_launcher.setenv("PATH", str(tmp_path))
    no_launcher.setenv("SLURM_JOB_ID", "7")
    distributed.requeue()
    assert "SLURM job 7 cannot be requeued" in caplog.text


class Trainer:
    """A trainer with the attributes that `lost_process` reads."""

    def __init__(self, *codes: int | None) -> None:
        self.world_size, self.global_rank, self.strategy = 3, 0, self
        self.launcher = self
        self.procs = [Process(code) for code in codes]


class Process(subprocess.Popen):
    """A process that has ended with a code, or still runs."""

    def __init__(self, code: int | None) -> None:
        self.returncode, self.pid = code, 123  # type: ignore[assignment]

    def poll(self) -> int | None:
        return self.returncode


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        ((1, -9), "Rank 2 (process 123) was ended by SIGKILL, as by a system that is out of memory, and"),
        ((None, 1), "Rank 2 (process 123) failed with exit code 1, see above, and the others"),
        (
            (),
            "Rank 0 has lost another process of the job, which torchrun or srun names with its exit code: [gloo] Conn",
        ),
    ],
)
def test_the_message_names_the_process_that_died(codes: tuple[int | None, ...], words: str) -> None:
    error = RuntimeError("[gloo] Connection closed by peer")
    assert (distributed.lost_process(Trainer(*codes), error) or "").startswith(words)  # type: ignore[arg-type]
    assert distributed.lost_process(Trainer(*codes), RuntimeError("a bug")) is None  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(tmp_path, *TINY, "trainer=ddp_cpu", "trainer.max_epochs=3000", f"hydra.run.dir={run}")
    _wait(lambda: (run / "checkpoints" / "last.ckpt").is_file(), process)
    children = [path.read_text().split() for path in Path(f"/proc/{process.pid}/task").glob("*/children")]
    for child in (pid for part in children for pid in part):
        if b"train.py" in Path("/proc", child, "cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode in (1, -signal.SIGKILL)
    assert "Rank 1 (process" in output or "[rank: 1] Child process" in output, output


def test_child_processes_run_one_job_of_a_sweep(composed, no_launcher, tmp_path: Path) -> None:
    composed("seed=1", "tokenizer=tome", "hydra.sweep.dir=x")
    command = ["train.py", "-m", "seed=0,1", "tokenizer=tome", "--config-dir", "mine"]
    no_launcher.setattr(sys, "argv", command)

    def inside() -> None:
        with distributed.child_processes_run_this_job(tmp_path, Trainer()):  # type: ignore[arg-type]
            job = ["seed=1", "tokenizer=tome"]
            assert sys.argv == ["train.py", "--config-dir=mine", "hydra.sweep.dir=x", *job, "hydra/job_logging=stdout"]
            assert os.environ[distributed.RUN_DIR] == str(tmp_path)
            os.environ["LOCAL_RANK"] = "0"  # as Lightning does
            raise RuntimeError

    with pytest.raises(RuntimeError):
        inside()
    assert sys.argv == command
    assert "LOCAL_RANK" not in os.environ
    assert distributed.RUN_DIR not in os.environ


def test_a_failed_job_ends_its_processes_and_not_the_next_jobs(no_launcher, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(distributed, "SECONDS_TO_DIE", 0.5)
    monkeypatch.setattr(distributed, "_job_arguments", lambda arguments: arguments)
    trainer = Trainer()
    commands = ("import sys; sys.exit(1)", "import time; time.sleep(60)")  # one has failed, one waits for others
    processes = [subprocess.Popen([sys.executable, "-c", command]) for command in commands]
    watched = trainer.procs = list(processes)  # type: ignore[assignment]
    observer = _ChildProcessObserver(os.getpid(), watched)

    def inside() -> None:
        with distributed.child_processes_run_this_job(tmp_path, trainer):  # type: ignore[arg-type]
            processes[0].wait()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        inside()
    assert observer._run()  # it has finished, and would have killed this process
    distributed.end_children(trainer)  # type: ignore[arg-type]
    assert [process.returncode for process in processes] == [1, -signal.SIGKILL]


# A measure, which rank 0 runs alone
ALONE = """
import os, time
from pathlib import Path
from torch.distributed import is_initialized

def children():
    parts = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    commands = [Path("/proc", pid, "cmdline") for part in parts for pid in part]
    return [path for path in commands if path.exists() and b"train.py" in path.read_bytes()]

class Alone:
    def __call__(self, task, data, directory):
        until = time.monotonic() + 60
        while children() and time.monotonic() < until:
            time.sleep(0.1)
        return {"alone/group": float(is_initialized()), "alone/children": float(len(children()))}
"""


def alone(folder: Path) -> dict[str, str]:
    """Write a module with a measure, and return the environment in which a config can use it."""
    folder.mkdir()
    (folder / "alone.py").write_text(ALONE)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "FEWTOKENS_ALLOW_TARGETS": "alone."}


def test_two_ranks_share_one_directory_and_count_every_sample_once(
    script, command, monkeypatch, tmp_path: Path
) -> None:
    root = pictures(tmp_path / "data", test=11)
    data = ["data=cifar10", f"data.root={root}", "data.num_classes=2", "data.val_images=5", "data.batch_size=3"]
    sizes = ["data.image_size=32", "backbone.patch_size=8", "data.eval_batch_size=2"]
    options = [*TINY, *data, *sizes, "trainer=ddp_cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=null"]
    (tmp_path / "tmp").mkdir()
    options += ["+measure.alone._target_=alone.Alone"]
    env = alone(tmp_path / "package") | {"TMPDIR": str(tmp_path / "tmp")}
    script("train.py", "-m", *options, "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}", **env)
    left = {path.name.partition("_")[0] for path in (tmp_path / "tmp").iterdir()}
    assert left <= {"torchinductor"}, "no file is left in the temporary directory"
    for job in ("0", "1"):
        run = tmp_path / "sweep" / job
        numbers = report(run)
        assert (numbers["alone/group"], numbers["alone/children"]) == (0, 0), "rank 0 measures when the others are gone"
        with (run / "metrics.csv").open() as file:
            steps = [int(row["step"]) for row in csv.DictReader(file)]
        assert max(steps) == 3, "15 samples over 2 ranks in batches of 3 are 3 steps: sharded once"
    assert not (tmp_path / "outputs").exists(), "no second directory"
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["0", "1", "multirun.yaml", "sweep.csv"]
    run = tmp_path / "sweep" / "0"
    one = tmp_path / "one"
    monkeypatch.setenv("FEWTOKENS_ALLOW_TARGETS", env["FEWTOKENS_ALLOW_TARGETS"])
    command("eval.py", f"checkpoint={run}", "trainer=cpu", "~measure.alone", f"hydra.run.dir={one}")
    assert report(one)["test/top1"] == pytest.approx(report(run)["test/top1"])
    assert report(one)["test/loss"] == pytest.approx(report(run)["test/loss"], abs=1e-5)
    assert (report(one)["test/top1"] * 11) % 1 == pytest.approx(0, abs=1e-4), "11 samples, none twice"


@pytest.mark.slow
def test_torchrun_agrees_on_one_directory(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = environment(FEWTOKENS_OUTPUTS=str(tmp_path / "outputs"), **alone(tmp_path / "package"))
    measure = "+measure.alone._target_=alone.Alone"
    command = [*torchrun, str(ROOT / "train.py"), *TINY, "trainer=ddp_cpu", measure]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "outputs" / "digits").iterdir()
    assert report(run)["alone/group"] == 0


def test_sigterm_saves_at_a_step_and_resume_goes_on_exactly(command, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    torch.set_num_threads(1)  # as in the processes that are started
    command("train.py", *RANDOM, f"hydra.run.dir={whole}")
    process = start(tmp_path, *RANDOM, "trainer.max_epochs=300", f"hydra.run.dir={cut}")
    _wait(lambda: (cut / "checkpoints" / "last.ckpt").is_file(), process)
    assert record(cut)["status"] == "started"
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert f"Stopped by SIGTERM after step {step(cut)}. Continue with resume={cut}" in output
    assert record(cut)["status"] == "stopped"
    assert step(cut) > 0
    shutil.rmtree(cut)
    # The same again with the right length. Whether it is stopped in time or not, it must end with the same weights.
    process = start(tmp_path, *RANDOM, f"hydra.run.dir={cut}")
    _wait(lambda: (cut / "checkpoints" / "last.ckpt").is_file(), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    if process.returncode != 0:
        command("train.py", f"resume={cut}")
    assert same(whole, cut)
    for name in ("test/top1", "test/loss", "val/top1"):
        assert report(whole)[name] == report(cut)[name]


def test_a_command_that_fails_prints_one_sentence(command, script, tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    for name, arguments, words in (
        ("train.py", ["data=cifar10", "data.root=nowhere"], "nowhere"),
        ("eval.py", [f"checkpoint={tmp_path / 'x.ckpt'}"], "comes without the config of its run"),
        ("eval.py", ["checkpoint=nowhere"], "but nowhere does not exist"),
        ("train.py", ["tokenizer.at=99"], "`tokenizer.at` must be a block index from 0 to 3"),
    ):
        done = command(name, *arguments, code=1)
        assert done.stderr.startswith("Error: ")
        assert "Traceback" not in done.stderr
        assert words in done.stderr
    done = script("train.py", "tokenizer.at=99", code=1, HYDRA_FULL_ERROR="1")
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(other, marks=pytest.mark.slow) for other in (signal.SIGINT, signal.SIGHUP))],
)
def test_a_signal_to_all_processes_of_a_job_saves_too(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, a closed terminal, SLURM and systemd send it to the workers that load data, too."""
    run, root = tmp_path / "run", pictures(tmp_path / "data", 4)
    (root / "test").rename(root / "val")
    data = ["data=imagenet", f"data.root={root}", "data.num_classes=2", "data.num_workers=1", "data.batch_size=4"]
    process = start(tmp_path, *TINY, *data, "trainer.max_epochs=3000", f"hydra.run.dir={run}")
    _wait(lambda: (run / "checkpoints" / "last.ckpt").is_file(), process)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number, output
    assert f"Stopped by {number.name} after step {step(run)}. Continue with resume={run}" in output
    assert "Traceback" not in output
    assert record(run)["status"] == "stopped"
    assert record(run)["reason"] == f"stopped by {number.name}"


@pytest.mark.slow
def test_kills_at_any_moment_change_nothing(script, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    script("train.py", *RANDOM, f"hydra.run.dir={whole}")
    for moment in (1, 2, 3, 4):
        process = start(tmp_path, *(RANDOM if moment == 1 else []), *_run(cut, moment))
        seen = _stamp(cut)
        _wait(lambda seen=seen: _stamp(cut) != seen, process)  # a checkpoint is being written, or just was
        time.sleep(0.05 * moment)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=120)
        torch.load(cut / "checkpoints" / "last.ckpt", weights_only=True)  # never half a file
    if not (cut / "report.json").is_file():
        script("train.py", f"resume={cut}")
    assert same(whole, cut)


def _run(cut: Path, moment: int) -> list[str]:
    return [f"hydra.run.dir={cut}"] if moment == 1 else [f"resume={cut}"]


def _stamp(cut: Path) -> int:
    path = cut / "checkpoints" / "last.ckpt"
    return path.stat().st_mtime_ns if path.is_file() else 0


def _wait(done, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not done() and process.poll() is None:
        assert time.monotonic() < until, "waited 120 s"
        time.sleep(0.01)
