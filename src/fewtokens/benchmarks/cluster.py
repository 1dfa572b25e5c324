"""Run jobs as clusters do, on one machine with Debian and as root: make setup-cluster, make test-cluster.

    python -m fewtokens.benchmarks.cluster         (out=docs/results/cluster.json only=slurm_job,elastic_restart)

A SLURM of one node is started in a temporary folder, and two network namespaces stand for two hosts. Every step is a
tiny training. It is recorded with its command, its duration and what was checked; paths and host names are not.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from fewtokens.benchmarks.children import HOME
from fewtokens.errors import FewtokensError, check
from fewtokens.files import write_json
from fewtokens.runs import report

TOOLS = ("sbatch", "srun", "scontrol", "slurmctld", "slurmd", "munged", "ip")
TINY = (
    "data.image_size=8 backbone.patch_size=2 backbone.dim=16 backbone.heads=2 backbone.depth=2 tokenizer.at=1 "
    "measure=none"
)
# Long enough to be interrupted, and so short that what is left ends in SECONDS where other jobs take most of the cores.
SHORT, LONG = f"{TINY} trainer.max_epochs=2", f"{TINY} trainer.max_epochs=40"
SECONDS = 300.0  # limit of each wait
SLURM_CONF = """ClusterName=test
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=10
SlurmdParameters=config_overrides
NodeName={host} CPUs=4 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""
Checks = dict[str, Any]


class Cluster:
    """Runs commands in a folder, as a user would.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "WANDB"))
        }
        paths = {"FEWTOKENS_OUTPUTS": str(folder / "outputs"), "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment |= paths | {"PYTHON": sys.executable, "TRAINER": "ddp_cpu", "OMP_NUM_THREADS": "1"}
        self.commands: list[str] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, command: str, log: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command, whose output goes to a file of the folder."""
        self.commands.append(command)
        words = [sys.executable if word == "python" else word for word in command.split(" ")]
        if words[0] == "torchrun":
            words[:1] = [sys.executable, "-m", "torch.distributed.run"]
        with (self.folder / log).open("ab") as output:
            process = subprocess.Popen(
                words, cwd=HOME, env=self.environment | environment, stdout=output, stderr=output
            )
        self.processes.append(process)
        return process

    def run(self, command: str) -> str:
        """Run a command to its end and return what it prints."""
        self.commands.append(command)
        words = [sys.executable if word == "python" else word for word in command.split(" ")]
        done = subprocess.run(
            words, cwd=HOME, env=self.environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        if done.returncode != 0:
            raise FewtokensError(f"{command}: exit code {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def log(self, name: str) -> str:
        """Return what a command has printed so far."""
        return (self.folder / name).read_text(errors="replace")

    def runs(self) -> list[Path]:
        """Return the run directories."""
        return sorted(path.parent for path in (self.folder / "outputs").glob("**/config.yaml"))


def wait(done: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    """Return the first true result of a function that is called until then.

    Raises:
        FewtokensError: There was none in time.
    """
    until = time.monotonic() + seconds
    while not (result := done()):
        if time.monotonic() > until:
            raise FewtokensError(f"Waited {seconds:.0f} s for {what}")
        time.sleep(0.2)
    return result


def finished(run: Path) -> Checks:
    """Return how a run ended."""
    record = json.loads((run / "run.json").read_text())
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return {"status": record["status"], "steps": content["global_step"], "report": (run / "report.json").is_file()}


@contextmanager
def slurm(cluster: Cluster) -> Iterator[None]:
    """Return a context in which a SLURM of one node runs."""
    folder, host = cluster.folder, os.uname().nodename.split(".")[0]
    (folder / "slurm.conf").write_text(SLURM_CONF.format(host=host, folder=folder))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    files = " ".join(f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed"))
    daemons = [cluster.start(f"munged --foreground --force --socket={folder}/munge.socket {files}", "munged.log")]
    daemons += [cluster.start(f"{name} -D -f {folder}/slurm.conf", f"{name}.log") for name in ("slurmctld", "slurmd")]
    try:
        wait(lambda: "idle" in cluster.run("sinfo --noheader"), "SLURM's node")
        cluster.commands.clear()
        yield
        queued = ["squeue", "--noheader"]  # a job has a result before it ends, and would wait for SLURM for ever
        wait(lambda: not subprocess.check_output(queued, env=cluster.environment).strip(), "an empty queue")
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)


def submit(cluster: Cluster, *overrides: str) -> str:
    """Submit docs/train.sbatch with two tasks on this node, and return the number of the job."""
    options = f"--nodes=1 --ntasks-per-node=2 --cpus-per-task=1 --time=10 --output={cluster.folder}/job-%j.log"
    script = cluster.folder / "train.sbatch"  # without the line of GPUs, which this node does not have
    lines = (HOME / "docs" / "train.sbatch").read_text().splitlines(keepends=True)
    script.write_text("".join(line for line in lines if "--gpus" not in line))
    return re.findall(r"\d+", cluster.run(f"sbatch {options} {script} {' '.join(overrides)}"))[0]


def state_of(cluster: Cluster, job: str) -> dict[str, str]:
    """Return the properties of a SLURM job."""
    shown = subprocess.run(
        ["scontrol", "show", "job", job], env=cluster.environment, capture_output=True, text=True, check=True
    )
    return dict(part.split("=", 1) for part in shown.stdout.split() if "=" in part)


def has_ended(cluster: Cluster, job: str) -> str | None:
    """Return the state of a SLURM job that has ended."""
    state = state_of(cluster, job)["JobState"]
    return None if state in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED") else state


def slurm_job(cluster: Cluster) -> Checks:
    """Two tasks of one job."""
    with slurm(cluster):
        job = submit(cluster, *SHORT.split(" "))
        state = wait(lambda: has_ended(cluster, job), "the job")
        (run,) = cluster.runs()
        return {"state": state, "runs": 1, "directory": run.name.replace(job, "<job>"), **finished(run)}


def slurm_sweep(cluster: Cluster) -> Checks:
    """Three jobs of a sweep by submitit."""
    small = "hydra.launcher.cpus_per_task=1 hydra.launcher.timeout_min=10"
    with slurm(cluster):
        cluster.run(f"python train.py -m launcher=slurm {small} seed=0,1,2 trainer=cpu {SHORT}")
        states = [finished(run)["status"] for run in cluster.runs()]
        return {"states": states, "reports": sum((run / "report.json").is_file() for run in cluster.runs())}


def slurm_requeue(cluster: Cluster) -> Checks:
    """USR1 saves, the job goes back into the queue and continues its run."""
    with slurm(cluster):
        job = submit(cluster, "logger=wandb", "logger.wandb.mode=offline", *LONG.split(" "))
        run = wait(
            lambda: [run for run in cluster.runs() if (run / "checkpoints" / "last.ckpt").is_file()], "a checkpoint"
        )[0]
        first = (run / "wandb_run_id").read_text()
        cluster.run(f"scancel --signal=USR1 {job}")
        wait(lambda: int(state_of(cluster, job)["Restarts"]) == 1, "the restart")
        stopped = json.loads((run / "run.json").read_text())["reason"]
        steps = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
        # SLURM waits two minutes before it starts a job again.
        wait(lambda: state_of(cluster, job)["JobState"] == "PENDING", "the queue")
        cluster.run(f"scontrol update JobId={job} StartTime=now")
        state = wait(lambda: has_ended(cluster, job), "the job")
        same = (run / "wandb_run_id").read_text() == first
        return {"state": state, "reason": stopped, "stopped_after_steps": steps, "runs": len(cluster.runs()),
                "same_wandb_id": same, **finished(run)}  # fmt: skip


def two_hosts(cluster: Cluster) -> Checks:
    """Two network namespaces, joined by a cable, with one process each."""
    with ExitStack() as stack:
        for command in ("ip netns add ft0", "ip netns add ft1",
                        "ip link add ftv0 netns ft0 type veth peer name ftv1 netns ft1"):  # fmt: skip
            cluster.run(command)
            if "netns add" in command:
                stack.callback(subprocess.run, ["ip", "netns", "del", command[-3:]], check=False)
        for host in range(2):
            for command in (
                f"addr add 10.77.0.{host + 1}/24 dev ftv{host}",
                f"link set ftv{host} up",
                "link set lo up",
            ):
                cluster.run(f"ip -n ft{host} {command}")
        common = "--nnodes 2 --nproc_per_node 1 --master_addr 10.77.0.1 --master_port 29511"
        hosts = [
            cluster.start(
                f"ip netns exec ft{host} python -m torch.distributed.run {common} --node_rank {host} "
                f"train.py trainer=ddp_cpu trainer.devices=1 trainer.num_nodes=2 {SHORT}",
                f"host{host}.log",
                GLOO_SOCKET_IFNAME=f"ftv{host}",
            )
            for host in range(2)
        ]  # fmt: skip
        codes = [host.wait(timeout=SECONDS) for host in hosts]
        (run,) = cluster.runs()
        return {"exit_codes": codes, "runs": 1, **finished(run)}


def workers(parent: int) -> dict[str, int]:
    """Return the process ids of the ranks that a process has started, by local rank."""
    found: dict[str, int] = {}
    for children in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in children.read_text().split():
            with suppress(OSError):  # it has ended since
                variables = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
                found |= {value: int(child) for name, _, value in (v.partition("=") for v in variables)
                          if name == "LOCAL_RANK"}  # fmt: skip
    return found


def killed(cluster: Cluster, command: str) -> tuple[subprocess.Popen[bytes], Path, float]:
    """Kill rank 1 of a job after its first checkpoint. Return the job, its directory and the time."""
    process = cluster.start(command, "job.log")
    run = wait(
        lambda: [run for run in cluster.runs() if (run / "checkpoints" / "last.ckpt").is_file()], "a checkpoint"
    )[0]
    os.kill(workers(process.pid)["1"], signal.SIGKILL)
    return process, run, time.monotonic()


def elastic_restart(cluster: Cluster) -> Checks:
    """Torchrun starts all processes again after SIGKILL of rank 1, and they continue the run."""
    torchrun = "torchrun --standalone --nproc_per_node 2 --max-restarts 1"
    process, run, began = killed(cluster, f"{torchrun} train.py resume=auto trainer=ddp_cpu {LONG}")
    first = set(workers(process.pid).values())
    wait(lambda: len(set(workers(process.pid).values()) - first) == 2, "new processes")
    seconds = time.monotonic() - began
    code = process.wait(timeout=SECONDS)
    return {"exit_code": code, "seconds_to_restart": round(seconds, 1), "runs": len(cluster.runs()), **finished(run)}


def dead_rank(command: str) -> Callable[[Cluster], Checks]:
    """Return the step in which SIGKILL of rank 1 ends a job, whose output names the rank."""

    def step(cluster: Cluster) -> Checks:
        process, run, began = killed(cluster, f"{command} train.py trainer=ddp_cpu {LONG}")
        code = process.wait(timeout=60)
        seconds = time.monotonic() - began
        printed = (
            cluster.log("job.log")
            .replace(str(cluster.folder), "<folder>")
            .replace(sys.executable, "python")
            .splitlines()
        )
        lines = [line.strip() for line in printed if "SIGKILL" in line or "rank" in line.lower()]
        named = any("SIGKILL" in line for line in lines) and any(
            re.search("rank *: *1|rank 1", line.lower()) for line in lines
        )
        status = json.loads((run / "run.json").read_text())["status"]
        return {
            "exit_code": code,
            "seconds_to_end": round(seconds, 1),
            "named": named,
            "message": lines,
            "status": status,
        }

    return step


STEPS: dict[str, Callable[[Cluster], Checks]] = {
    "slurm_job": slurm_job,
    "slurm_sweep": slurm_sweep,
    "slurm_requeue": slurm_requeue,
    "two_hosts": two_hosts,
    "elastic_restart": elastic_restart,
    "dead_rank_of_torchrun": dead_rank("torchrun --standalone --nproc_per_node 2"),
    "dead_rank_of_lightning": dead_rank("python"),
}
EXPECTED: dict[str, Checks] = {
    "slurm_job": {"state": "COMPLETED", "report": True},
    "slurm_sweep": {"states": ["finished"] * 3, "reports": 3},
    "slurm_requeue": {"state": "COMPLETED", "runs": 1, "same_wandb_id": True, "report": True},
    "two_hosts": {"exit_codes": [0, 0], "report": True},
    "elastic_restart": {"exit_code": 0, "runs": 1, "report": True},
    "dead_rank_of_torchrun": {"named": True},
    "dead_rank_of_lightning": {"named": True},
}


def attempt(name: str) -> dict[str, Any]:
    """Run a step in a folder of its own and return its record. If it fails, print what its commands printed."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder))
        try:
            checks = STEPS[name](cluster)
            passed = all(checks[key] == value for key, value in EXPECTED[name].items())
        except (FewtokensError, OSError, LookupError, ValueError, subprocess.SubprocessError) as error:
            checks, passed = {"error": f"{type(error).__name__}: {error}"}, False
        for process in cluster.processes:
            process.kill()
        for path in [] if passed else sorted(cluster.folder.glob("**/*.log")):
            print(f"--- {path.name}\n{path.read_text(errors='replace')[-6000:]}", file=sys.stderr)
        commands = [c.replace(folder, "<folder>").replace(sys.executable, "python") for c in cluster.commands]
    seconds = round(time.monotonic() - began, 1)
    print(f"{name}: {'passed' if passed else 'FAILED'} after {seconds:.0f} s  {checks}", flush=True)
    return {"passed": passed, "seconds": seconds, "commit": report.commit(), "commands": commands, "checks": checks}


def main() -> int:
    """Run the steps and write their records, those of other steps stay. Return 0, or 1 if a step failed."""
    settings = {"out": "docs/results/cluster.json", "only": ",".join(STEPS)} | dict(OmegaConf.from_cli())
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        packages = "Install Debian's packages with make setup-cluster."
        print(f"Error: {', '.join(missing)} not found. {packages}", file=sys.stderr)
        return 1
    out, chosen = Path(str(settings["out"])), str(settings["only"]).split(",")
    check(all(name in STEPS for name in chosen), "only", f"some of {','.join(STEPS)}", settings["only"])
    steps = json.loads(out.read_text())["steps"] if out.is_file() else {}
    slurm = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=True).stdout.strip()
    versions = {name: report.version_of(name) for name in ("torch", "lightning", "hydra-core", "submitit")}
    origin = {"command": "python -m fewtokens.benchmarks.cluster", "versions": versions | {"slurm": slurm}}
    for name in chosen:
        steps[name] = attempt(name)
        write_json(origin | {"steps": {step: steps[step] for step in STEPS if step in steps}}, out)
    return 0 if all(steps[name]["passed"] for name in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
