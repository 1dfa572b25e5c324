"""A run's own config: saved beside its checkpoints and inside them, and laid under new overrides."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from fewtokens.errors import FewtokensError

CONFIG = "config.yaml"
SECRET = re.compile(r"(^|_)(api_?key|password|passwd|secret|access_token|auth_token|credentials?)$", re.IGNORECASE)
NOT_OF_THE_RUN = ("hydra", "resume", "checkpoint", "experiment")


def save(cfg: DictConfig, directory: Path) -> None:
    """Write the composed config, interpolations kept, so that overrides on top still flow; a changed one is kept too.

    Args:
        cfg: The job's config.
        directory: Of the run.
    """
    text = OmegaConf.to_yaml(OmegaConf.create(plain(cfg)))
    path = directory / CONFIG
    if path.exists() and path.read_text() != text:
        count = len(list(directory.glob("config.*.yaml")))
        shutil.copy(path, directory / f"config.{count}.yaml")
    path.write_text(text)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain values, interpolations as text, secrets masked."""
    container = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(container, dict)
    return masked({str(key): value for key, value in container.items() if key not in NOT_OF_THE_RUN})


def masked(node: Any) -> Any:
    """The same tree with the values of keys such as api_key or password replaced."""
    if isinstance(node, dict):
        return {k: "***" if SECRET.search(str(k)) and v is not None else masked(v) for k, v in node.items()}
    return [masked(value) for value in node] if isinstance(node, list) else node


def checkpoint_of(reference: str) -> Path:
    """The checkpoint file that a run directory or a file names: the best one, or the last where there is no best.

    Raises:
        FewtokensError: There is none.
    """
    path = Path(reference)
    candidates = [path] if path.is_file() else [path / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FewtokensError(
        "A checkpoint is a file, or a run directory with checkpoints/best.ckpt or last.ckpt",
        expected=" or ".join(map(str, candidates)),
        got=f"{path} ({'a directory without them' if path.is_dir() else 'not there'})",
        fix="give a directory below outputs/ that a finished epoch of train.py wrote",
    )


def run_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint lies in, if it lies in one."""
    run = checkpoint.resolve().parent.parent
    return run if (run / CONFIG).is_file() else None


def config_of(checkpoint: Path) -> dict[str, Any]:
    """The run's saved config, or, where the file was moved away from its run, the copy inside.

    Raises:
        FewtokensError: Neither is there, or it is no config.
    """
    run = run_of(checkpoint)
    if run is not None:
        text = (run / CONFIG).read_text()
    else:
        from fewtokens.runs.checkpoints import read  # torch takes seconds to import

        text = read(checkpoint).get("config", "")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict) or "backbone" not in config:
        raise FewtokensError(
            "A checkpoint comes with the config of its run",
            expected=f"{CONFIG} in the run directory, or a copy inside the checkpoint",
            got=f"none for {checkpoint}",
            fix="give a checkpoint that train.py wrote; weights of others go into backbone.weights=<file>",
        )
    return config


def overlay(config: dict[str, Any], base: str, configs: Path) -> Path:
    """A folder of configs in which the saved one stands under the present ones.

    Its `job.yaml` is the present `base` with every group replaced by the saved node, as option `run` of the group:
    overrides then work as ever, `tokenizer=ats` and `tokenizer.build.num_tokens=4` alike.

    Args:
        config: The saved config.
        base: Name of the present primary config.
        configs: The folder of the present configs.

    Returns:
        The folder; Hydra's primary config in it is `job`.
    """
    folder = Path(tempfile.mkdtemp(prefix="fewtokens-config-"))
    known = _groups(configs / "train.yaml")
    defaults: list[Any] = [base]
    rest = {}
    # Not where that run wrote, even if it was told where: this job would write into its files.
    own = yaml.safe_load((configs / "paths" / "default.yaml").read_text())["run"]
    config = config | {"paths": config.get("paths", {}) | {"run": own}}
    for key, value in config.items():
        if isinstance(value, dict):
            (folder / key).mkdir()
            (folder / key / "run.yaml").write_text(yaml.safe_dump(value, sort_keys=False))
            defaults.append({f"override {key}": "run"} if key in known else {key: "run"})
        else:
            rest[key] = value
    job = {"defaults": [*defaults, "_self_"], "hydra": {"searchpath": [f"file://{configs}"]}, **rest}
    (folder / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    return folder


def _groups(primary: Path) -> set[str]:
    entries = yaml.safe_load(primary.read_text())["defaults"]
    return {name for entry in entries if isinstance(entry, dict) for name in entry}
