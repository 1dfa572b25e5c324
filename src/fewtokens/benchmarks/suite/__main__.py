"""Run methods side by side on a trained model: python -m fewtokens.benchmarks.suite checkpoint=<run> [key=value ...].

Three parts: every method without parameters off the shelf, at several shares of the dense model's multiply-adds; every
method after the same short training, at one share; and the speed of all of them, in one process and in turns. The runs
are processes of their own, of eval.py, train.py and the throughput command. What is finished is not run again, and the
json file has a row as soon as its run has ended.
"""

import copy
import json
import logging
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from jaxtyping import Float
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor

from fewtokens.analysis.evaluation import images_at, unwrap_compiled
from fewtokens.backbones.vit import ViT
from fewtokens.benchmarks.budgets import BUDGETS, settings
from fewtokens.benchmarks.children import run_child
from fewtokens.benchmarks.suite import page
from fewtokens.benchmarks.suite.trials import FINE_TUNED, OFF_THE_SHELF, Trial, row_of, trial_of
from fewtokens.benchmarks.throughput import build_dense
from fewtokens.benchmarks.variants import DENSE, backbone_name, compose_with, sha256, with_method
from fewtokens.errors import FewtokensError, check, check_choice
from fewtokens.masking import mask
from fewtokens.runs import report
from fewtokens.runs.cli import command
from fewtokens.runs.compose import checkpoint_of
from fewtokens.runs.config import instantiate, save
from fewtokens.runs.job import start

log = logging.getLogger(__name__)
SPEED = "speed"
PARTS = (OFF_THE_SHELF, FINE_TUNED, SPEED)
METRIC = "test/top1"
# Overrides of this command that its runs get, too: where data and other configs are, and on what they run.
PASSED_ON = re.compile(r"\+*((data|trainer|paths)[.=]|hydra[.]searchpath=)")


def main() -> None:
    """Run the command."""
    command("suite", run)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Run what is missing, and write a json, a md and png files.

    Args:
        cfg: The composed config, see configs/suite.yaml.

    Returns:
        The content of the json file.

    Raises:
        FewtokensError: A setting is invalid, the file has rows of another dense model, or a run failed.
    """
    _check(cfg)
    directory = Path(HydraConfig.get().runtime.output_dir)
    output = directory / "suite" if cfg.output is None else Path(str(cfg.output))
    start(cfg)
    for part in (OFF_THE_SHELF, FINE_TUNED):
        for entry in _methods(cfg, part):
            compose_with(entry, part if cfg.method is None else "method")  # a wrong name ends here, not after hours
    task = build_dense(cfg)
    model, data = unwrap_compiled(task.model).eval(), instantiate(cfg.data)
    data.prepare_data()
    data.setup("test")
    content = _content(cfg, model, data, output.with_name(f"{output.name}.json"))
    save(cfg, directory)
    images = _images(data, cfg.counted_images)
    done, failed = {trial_of(row).key for row in content["rows"]}, []
    for trial in trials(cfg, model, images):
        if trial.key in done:
            continue
        done.add(trial.key)  # two shares may have the same setting
        try:
            content["rows"].append(_ran(cfg, trial))
        except FewtokensError as error:
            log.error("%s", error)
            failed.append(trial)
        page.write(content, output)
    if SPEED in cfg.parts:
        _time(cfg, content, directory)
        page.write(content, output)
    if failed:
        names = ", ".join(f"{trial.part} {trial.method}" for trial in failed)
        raise FewtokensError(f"{len(failed)} runs failed: {names}. The same command runs only these again.")
    print(f"Written: {output}.json, {output}.md and its plots")
    return content


def trials(cfg: DictConfig, model: ViT, images: Float[Tensor, "b c h w"]) -> Iterator[Trial]:
    """Yield the runs that the config asks for, with the setting of every method at its share.

    Args:
        cfg: The composed config.
        model: The dense model. It stays as it is.
        images: The images over which costs are averaged.
    """
    scratch = copy.deepcopy(model)
    for entry in (DENSE, *_methods(cfg, OFF_THE_SHELF)) if OFF_THE_SHELF in cfg.parts else ():
        if with_method(model, entry)[0] is None:  # has parameters
            continue
        found = list(settings(scratch, entry, cfg.shares, images, key=OFF_THE_SHELF))
        shares = [None] if found == [entry] else cfg.shares
        for exact, share in zip(found, shares, strict=True):
            yield Trial(OFF_THE_SHELF, exact, share)
    for entry in _methods(cfg, FINE_TUNED) if FINE_TUNED in cfg.parts else ():
        for exact in settings(scratch, entry, [cfg.fine_tuned_share], images, BUDGETS, FINE_TUNED):
            for seed in cfg.seeds:
                yield Trial(FINE_TUNED, exact, cfg.fine_tuned_share if exact != entry else None, seed)


def _methods(cfg: DictConfig, part: str) -> list[str]:
    """Return the methods of a part: those of its list, or the one that `method` names. Its gain needs the dense row."""
    if cfg.method is None:
        return [str(entry) for entry in cfg[part]]
    return [*([DENSE] if part == FINE_TUNED else []), str(cfg.method)]


def _ran(cfg: DictConfig, trial: Trial) -> dict[str, Any]:
    """Return the row of a run, after running it if it is not finished."""
    directory = Path(str(cfg.runs)).absolute() / trial.directory
    evaluate = [*map(str, cfg.evaluate), "logger=csv", *_passed_on()]
    arguments = trial.arguments(str(cfg.checkpoint), evaluate, [str(part) for part in cfg.train])
    if report.read(directory) is None:
        log.info("%s: %s", trial.part, trial.method)
        resumed = (directory / "checkpoints" / "last.ckpt").is_file()
        called = ["train.py", f"resume={directory}"] if resumed else [*arguments, f"hydra.run.dir={directory}"]
        if code := run_child(called):
            raise FewtokensError(f"{trial.part} {trial.method}: {called[0]} ended with exit code {code}, see above.")
    return row_of(trial, directory, _shown(cfg, arguments), METRIC)


def _time(cfg: DictConfig, content: dict[str, Any], directory: Path) -> None:
    """Time the methods of all rows that are not timed yet, in one process and in turns, and add the records."""
    timed = {record["tokenizer"] for record in content["speed"]}
    rows = sorted(content["rows"], key=lambda row: (row["part"] != OFF_THE_SHELF, row["method"]))
    entries = list(dict.fromkeys(row["method"] for row in rows if row["method"] not in {*timed, DENSE}))
    if not entries:
        return
    overrides = [f"batch=[{cfg.speed.batch}]", f"seconds={cfg.speed.seconds}", "timm=false", *_passed_on()]
    arguments = ["-m", "fewtokens.benchmarks.throughput", f"checkpoint={cfg.checkpoint}", "images=test", *overrides]
    target = (directory / SPEED).absolute()
    if code := run_child([*arguments, f"tokenizers={json.dumps(entries)}", f"hydra.run.dir={target}"]):
        raise FewtokensError(f"The throughput command ended with exit code {code}, see above.")
    shown = _shown(cfg, [*arguments, "tokenizers=[...]"])
    found = json.loads((target / "throughput.json").read_text())
    new = [record | {"command": shown, "checkpoint": "<dense>"} for record in found]
    content["speed"] += [record for record in new if record["tokenizer"] not in timed]


def _passed_on() -> list[str]:
    given = HydraConfig.get().overrides
    return [part for part in (*given.hydra, *given.task) if PASSED_ON.match(part)]


def _shown(cfg: DictConfig, arguments: list[str]) -> str:
    """Return a command line as it is published: without paths of this machine and without secrets."""
    named = {str(cfg.checkpoint): "<dense>", str(cfg.data.get("root", "")): "<data>"}
    parts = []
    for part in arguments:
        key, equals, value = part.partition("=")
        parts.append(f"{key}{equals}{named.get(value, value) if value else value}")
    return " ".join(["python", *(part if "<" in part else shlex.quote(mask(part)) for part in parts)])


def _content(cfg: DictConfig, model: ViT, data: Any, path: Path) -> dict[str, Any]:
    """Return the content of the json file, with the rows that it has already.

    Raises:
        FewtokensError: The rows are those of another model.
    """
    described = getattr(data, "description", type(data).__name__)
    protocol = {
        "title": cfg.title or f"Methods side by side: {described}, {backbone_name(cfg)}",
        "backbone": backbone_name(cfg),
        "weights": sha256(*model.state_dict().values()),
        "image_size": cfg.data.image_size,
        "data": described,
        "metric": METRIC,
        "test_images": len(data.dataset("test")),
        "counted_images": cfg.counted_images,
    }
    try:
        old = json.loads(path.read_text()) if path.is_file() else {}
        rows, speed = list(old.get("rows", [])), list(old.get("speed", []))
    except (OSError, ValueError, AttributeError) as error:
        raise FewtokensError(f"{path} must be a file of this command, but reading it failed: {error}.") from error
    if rows and old.get("weights") != protocol["weights"]:
        raise FewtokensError(
            f"{path} has the rows of another dense model. Set `output` to another path, or remove the file."
        )
    return {**protocol, "rows": rows, "speed": speed}


def _images(data: Any, count: int) -> Float[Tensor, "b c h w"]:
    """Return images spread evenly over the test set, as the model gets them."""
    samples = data.dataset("test")
    positions = range(0, len(samples), max(1, len(samples) // count))[:count]
    return next(images_at(data, samples, positions, count))


def _check(cfg: DictConfig) -> None:
    for name in ("parts", "off_the_shelf", "fine_tuned", "train", "evaluate", "seeds", "shares"):
        check(isinstance(cfg[name], ListConfig), name, "a list, as in '[a,b]'", cfg[name])
    for part in cfg.parts:
        check_choice("parts", part, PARTS)
    for name, shares in (("shares", cfg.shares), ("fine_tuned_share", [cfg.fine_tuned_share])):
        valid = all(isinstance(share, int | float) and 0 < share < 1 for share in shares)
        check(valid, name, "shares between 0 and 1", shares)
    check(all(isinstance(seed, int) for seed in cfg.seeds), "seeds", "a list of ints", cfg.seeds)
    counted = cfg.counted_images
    check(isinstance(counted, int) and counted >= 1, "counted_images", "an int >= 1", counted)
    limited = any("limit_test_batches" in str(part) for part in [*cfg.train, *cfg.evaluate])
    whole = cfg.trainer.get("limit_test_batches") is None and not limited
    check(
        whole,
        "trainer.limit_test_batches",
        "null: intervals and comparisons are those of the whole test set",
        "a limit",
    )
    check(not OmegaConf.is_missing(cfg, "checkpoint"), "checkpoint", "a run of a dense model", "nothing")
    checkpoint_of(cfg.checkpoint)


if __name__ == "__main__":
    main()
