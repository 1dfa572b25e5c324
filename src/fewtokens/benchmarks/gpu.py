"""Run everything that needs a GPU, in a few minutes and without a network: make gpu.

    python -m fewtokens.benchmarks.gpu                      (root=data/cifar10 out=docs/results/gpu minutes=8)
    python -m fewtokens.benchmarks.gpu smoke=true           (everything at toy size, on a CPU too)

1. The tests marked `gpu`.
2. Throughput of the DeiT-S shape in bfloat16: batch 1 eager and as a CUDA graph, batch 32 and 256 eager and compiled.
3. The training step of `experiment=cifar10/strong_base`, through Lightning and through a reference loop.
4. A training run of that recipe, with as many epochs as fit into the remaining time.

Every step is a process of its own. A step that fails or exceeds its time is recorded as such, and the next one starts.
The records are written to `<out>/*.json`, and the page `<out>.md` is generated from them.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fewtokens.benchmarks.children import HOME
from fewtokens.errors import FewtokensError, check
from fewtokens.files import write_json
from fewtokens.masking import mask
from fewtokens.runs import report

DEFAULTS = {"root": "data/cifar10", "out": "docs/results/gpu", "minutes": 8.0, "smoke": False}
TOKENIZERS = ["ats", "tome build.r=13", "evit at=[3,6,9]", "top_k at=[3,6,9]", "token_learner at=0.5"]
# With these, random weights let ATS keep as many tokens as in docs/results/throughput_cpu.json: 2.96 GMACs.
SHARPEN = "[149,135,126,108,99,90,81,70,58]"
TRAIN_IMAGES = 45_000
Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 1 if a step failed."""
    try:
        settings = parse(sys.argv[1:] if arguments is None else arguments)
    except FewtokensError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    out = Path(settings["out"]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * settings["minutes"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    records: dict[str, Record] = {}
    for name, step in STEPS.items():
        record = step(settings, out, deadline - time.monotonic(), records)
        records[name] = record | report.environment(device, ("fewtokens", "torch", "timm", "lightning"))
        write_json(records[name], out / f"{name}.json")
        print(f"{name}: {records[name]['status']} after {records[name]['seconds']:.0f} s", flush=True)
    out.with_suffix(".md").write_text(page(records))
    print(f"Results: {out.with_suffix('.md')}")
    return 0 if all(record["status"] in ("finished", "skipped") for record in records.values()) else 1


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the command line.

    Raises:
        FewtokensError: A key is unknown, a value is out of range, or there is no GPU.
    """
    try:
        given = OmegaConf.to_container(OmegaConf.from_dotlist(list(arguments)))
    except (OmegaConfBaseException, ValueError) as error:
        raise FewtokensError(f"Arguments are key=value, got {shlex.join(arguments)}: {error}.") from error
    assert isinstance(given, dict)
    if unknown := [str(key) for key in given if key not in DEFAULTS]:
        raise FewtokensError(f"Unknown setting {unknown[0]!r}. The settings are {', '.join(DEFAULTS)}.")
    settings = {**DEFAULTS, **given}
    minutes, smoke = settings["minutes"], settings["smoke"]
    check(isinstance(minutes, int | float) and minutes > 0, "minutes", "a number > 0", minutes)
    check(isinstance(smoke, bool), "smoke", "true or false", smoke)
    if not smoke and not torch.cuda.is_available():
        raise FewtokensError("There is no GPU. Set smoke=true to run everything at toy size on the CPU.")
    return settings


def run_tests(settings: dict[str, Any], out: Path, left: float, records: dict[str, Record]) -> Record:
    """Run the tests marked `gpu`, and record how many passed, failed or were skipped."""
    results = out / "tests.xml"
    results.unlink(missing_ok=True)
    # Without the type checks of the test configuration, which torch.compile cannot trace.
    options = ["-m", "gpu", "-q", "-o", "addopts=", "--import-mode=importlib", f"--junitxml={results}"]
    record = run_command(["-m", "pytest", "tests/gpu", *options], min(left, 240.0))
    if results.is_file():
        suite = ET.parse(results).getroot()[0]
        record |= {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
        cases = [case for case in suite if any(part.tag in ("failure", "error") for part in case)]
        record["failed"] = [f"{case.attrib['classname']}::{case.attrib['name']}" for case in cases]
        results.unlink()
    return record


def time_inference(settings: dict[str, Any], out: Path, left: float, records: dict[str, Record]) -> Record:
    """Time the tokenizers on the DeiT-S shape, and record the records of the throughput command."""
    variants = [(1, "none"), (1, "graph"), (32, "none"), (32, "layers"), (256, "none"), (256, "layers")]
    fixed = ["backbone=vit_small", "backbone.pool=token", f"sharpen={SHARPEN}", "precision=[bf16-mixed]", "seconds=6"]
    tokenizers = TOKENIZERS
    if settings["smoke"]:
        fixed = ["data=digits", "backbone=vit_mini", "backbone.pool=token", "precision=[32-true]", "seconds=0.2"]
        variants, tokenizers = [(1, "none"), (2, "none")], ["ats"]
    record: Record = {"command": [], "status": "finished", "seconds": 0.0, "records": []}
    for batch, compiled in variants:
        folder = out / f".throughput_{batch}_{compiled}"
        overrides = [*fixed, f"batch=[{batch}]", f"compiled=[{compiled}]", f"tokenizers={json.dumps(tokenizers)}"]
        command = ["-m", "fewtokens.benchmarks.throughput", *overrides, f"hydra.run.dir={folder}"]
        done = run_command(command, min(left - record["seconds"], 120.0))
        record["command"].append(done["command"])
        record["seconds"] += done["seconds"]
        if done["status"] != "finished":
            record["status"] = f"batch {batch}, {compiled}: {done['status']}"
        if (folder / "throughput.json").is_file():
            record["records"] += json.loads((folder / "throughput.json").read_text())
        shutil.rmtree(folder, ignore_errors=True)
    return record


def time_training_step(settings: dict[str, Any], out: Path, left: float, records: dict[str, Record]) -> Record:
    """Time the training step of the strong recipe on CIFAR-10, and record the record of the command."""
    target = out / ".train_step.json"
    target.unlink(missing_ok=True)
    if settings["smoke"]:
        arguments = ["--data", "digits", "--rounds", "1", "--steps", "4"]
    elif not Path(settings["root"]).is_dir():
        return skipped(settings)
    else:
        arguments = ["--data", "cifar10_strong", "--root", str(settings["root"]), "--rounds", "2", "--steps", "40"]
    record = run_command(
        ["-m", "fewtokens.benchmarks.train_step", *arguments, "--write", str(target)], min(left, 180.0)
    )
    if target.is_file():
        record |= json.loads(target.read_text())
        target.unlink()
    return record


def train_recipe(settings: dict[str, Any], out: Path, left: float, records: dict[str, Record]) -> Record:
    """Train the strong recipe for as many epochs as fit into the time, with its complete schedule."""
    folder, limit = out / ".train", max(left, 60.0)
    shutil.rmtree(folder, ignore_errors=True)
    if settings["smoke"]:
        arguments = ["trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=2"]
    elif not Path(settings["root"]).is_dir():
        return skipped(settings)
    else:
        epochs = affordable_epochs(left, records["train_step"])
        recipe = ["experiment=cifar10/strong_base", f"data.root={settings['root']}", "trainer=gpu"]
        arguments = [*recipe, f"trainer.max_epochs={epochs}"]
    record = run_command([str(HOME / "train.py"), *arguments, "measure=none", f"hydra.run.dir={folder}"], limit)
    if (numbers := report.read(folder)) is not None:
        record["report"] = numbers
    shutil.rmtree(folder, ignore_errors=True)
    return record


def affordable_epochs(seconds: float, step: Record) -> int:
    """Return how many epochs fit into the time, at the measured time per training step: from 1 to 100.

    A fifth of the time is kept for compilation, validation and the test.
    """
    timings = step.get("seconds_per_step", {}).get("Lightning", [])
    if not timings:
        return 1
    epoch = min(timing["wall"] for timing in timings) * TRAIN_IMAGES / step["batch_size"]
    return max(1, min(100, int(0.8 * seconds / epoch)))


def run_command(command: Sequence[str], limit: float) -> Record:
    """Run a Python command with a time limit in seconds, and return its command line, status and duration."""
    shown = shlex.join(["python", *(mask(part.replace(f"{HOME}/", "")) for part in command)])
    if limit <= 0:
        return {"command": shown, "status": "no time left", "seconds": 0.0}
    started = time.monotonic()
    try:
        code = subprocess.run([sys.executable, *command], cwd=HOME, timeout=limit, check=False).returncode
        status = "finished" if code == 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        status = f"stopped after {limit:.0f} s"
    return {"command": shown, "status": status, "seconds": time.monotonic() - started}


def skipped(settings: dict[str, Any]) -> Record:
    """Return the record of a step that needs CIFAR-10."""
    return {"command": None, "status": "skipped", "seconds": 0.0, "reason": f"no CIFAR-10 at root={settings['root']}"}


def page(records: dict[str, Record]) -> str:
    """Return the page in Markdown."""
    first = next(iter(records.values()))
    versions = ", ".join(f"{name} {value}" for name, value in first["versions"].items())
    lines = ["# Results on a GPU", "", f"Written by `python -m fewtokens.benchmarks.gpu` on {first['date']}."]
    lines += ["", f"Device: {first['device']}. Versions: {versions}. Commit: {first['commit']}."]
    for name, record in records.items():
        reason = f" ({record['reason']})" if "reason" in record else ""
        lines += ["", f"## {name}", "", f"Status: {record['status']}{reason}.", "", *SECTIONS[name](record)]
    return "\n".join(lines).rstrip() + "\n"


def _tests_section(record: Record) -> list[str]:
    if "tests" not in record:
        return []
    passed = record["tests"] - record["failures"] - record["errors"] - record["skipped"]
    failed = [f"- {name}" for name in record["failed"]]
    return [f"{passed} passed, {len(failed)} failed, {record['skipped']} skipped.", *failed]


def _throughput_section(record: Record) -> list[str]:
    lines = ["| batch | compiled | tokenizer | images/s | speed-up | GMACs | realised/theoretical |", "|---" * 7 + "|"]
    for row in record["records"]:
        names = [str(row[name]) for name in ("batch", "compiled", "tokenizer")]
        numbers = [f"{row['images_per_s']:,.0f}", f"{row['speedup_vs_dense']:.2f}", f"{row['gmacs']:.2f}"]
        numbers.append(f"{row['realised_over_theoretical']:.2f}")
        lines.append(f"| {' | '.join([*names, *numbers])} |")
    return lines


def _step_section(record: Record) -> list[str]:
    timings: dict[str, list[dict[str, float]]] = record.get("seconds_per_step", {})
    fastest = {name: min(timing["wall"] for timing in found) for name, found in timings.items()}
    return [f"- {name}: {record['batch_size'] / seconds:,.0f} images/s" for name, seconds in fastest.items()]


def _training_section(record: Record) -> list[str]:
    numbers = record.get("report", {})
    names = ("train/epochs", "train/seconds", "val/top1", "test/top1")
    return [f"- {name}: {numbers[name]:.4g}" for name in names if name in numbers]


STEPS: dict[str, Callable[..., Record]] = {
    "tests": run_tests,
    "throughput": time_inference,
    "train_step": time_training_step,
    "training": train_recipe,
}
SECTIONS: dict[str, Callable[[Record], list[str]]] = {
    "tests": _tests_section,
    "throughput": _throughput_section,
    "train_step": _step_section,
    "training": _training_section,
}

if __name__ == "__main__":
    sys.exit(main())
