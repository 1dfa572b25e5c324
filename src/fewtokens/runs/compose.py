"""Composition of configs on top of saved runs, and reading of what a run has saved.

If `resume` or `checkpoint` names a run, Hydra composes on top of its `config.yaml`: the file is read as plain data, and
its groups become the default choices in place of the present ones. Experiments and overrides then apply as usual,
`tokenizer=tome` and `tokenizer.build.r=4` alike.
"""

import copy
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import hydra._internal.hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fewtokens.errors import FewtokensError, check
from fewtokens.files import checkpoint_in
from fewtokens.runs.config import CONFIG, CONFIGS
from fewtokens.runs.distributed import RUN_DIR, by_slurm
from fewtokens.runs.saved_config import check_saved

AUTO = "auto"  # value of `resume`


def compose_on_saved_runs() -> None:
    """Let `hydra.main` and `hydra.compose` compose on top of the run that `resume` or `checkpoint` names."""
    Plugins.instance().register(SavedRun)
    # Hydra 1.3 has no hook for each composition, and every job of a sweep may name another run.
    hydra._internal.hydra.ConfigLoaderImpl = ConfigLoader  # type: ignore[attr-defined]


def reference_overrides(overrides: Iterable[str], loader: ConfigLoaderImpl | None = None) -> list[str]:
    """Return the overrides that may name a saved run, directly or in an experiment; the first value of a sweep.

    They can be composed without the others, which may use keys that only the saved run has.

    Args:
        overrides: All overrides.
        loader: Finds the options that `glob` means. Without one, such overrides are not returned.
    """
    return first_values(overrides, ("experiment", "resume", "checkpoint", "hydra.searchpath"), loader)


def first_values(overrides: Iterable[str], keys: Collection[str], loader: ConfigLoaderImpl | None = None) -> list[str]:
    """Return the overrides of some keys and groups, those that a sweep varies with their first value.

    Args:
        overrides: All overrides.
        keys: The keys and groups.
        loader: Finds the options that `glob` means. Without one, such overrides are not returned.
    """
    found = []
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(overrides)):
        known = loader is not None or override.value_type != ValueType.GLOB_CHOICE_SWEEP
        if override.key_or_group in keys and not override.is_delete() and known:
            swept = override.is_sweep_override()
            value = next(override.sweep_string_iterator()) if swept else override.get_value_string()
            found.append(f"{override.get_key_element()}={value}")
    return found


class ConfigLoader(ConfigLoaderImpl):
    """Hydra's config loader, which composes on top of a saved run if the config names one."""

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Return the composed config, as Hydra's own method does."""
        _check_choices(overrides)
        search_path = copy.deepcopy(self.config_search_path)
        first = _compose_references(search_path, config_name, tuple(reference_overrides(overrides, self)))
        resume, checkpoint = (OmegaConf.select(first, key) for key in ("resume", "checkpoint"))
        if resume is not None and "checkpoint" in first:
            raise FewtokensError("`resume` continues a training run with train.py. Use checkpoint=<run> here.")
        automatic = resume == AUTO  # the command composes the run, as it did when the run started
        resume = None if automatic else resume
        if resume is not None or checkpoint is not None:
            path = run_to_resume(resume) if resume is not None else checkpoint_of(checkpoint)
            search_path.prepend("saved run", f"{SavedRun.scheme()}://{path}?{'&'.join(_keys_of(overrides))}")
        loader = ConfigLoaderImpl(search_path)
        cfg = loader.load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        if resume is not None and run_mode == RunMode.RUN:
            _write_into(Path(resume), cfg)
        if automatic and run_mode == RunMode.RUN:
            _write_into_newest(cfg)
        if (sweep := OmegaConf.select(cfg, "sweep")) is not None:
            check(run_mode == RunMode.MULTIRUN, "sweep", "null without -m, since it continues a sweep", sweep)
            cfg.hydra.sweep.dir = str(sweep)
        return cfg

    def get_group_options(
        self,
        group_name: str,
        results_filter: ObjectType | None = ObjectType.CONFIG,
        config_name: str | None = None,
        overrides: list[str] | None = None,
    ) -> list[str]:
        """Return the options of a group, also those in its folders, as in `experiment=glob(cifar10/*)`."""
        options = super().get_group_options(group_name, results_filter, config_name, overrides)
        if results_filter == ObjectType.CONFIG and not group_name.startswith("hydra"):
            for folder in super().get_group_options(group_name, ObjectType.GROUP):
                options += [f"{folder}/{option}" for option in self.get_group_options(f"{group_name}/{folder}")]
        return options


def _check_choices(overrides: Iterable[str]) -> None:
    """Raise an error if a group is set to anything but names, which Hydra does not name or does not expect."""
    for part in OverridesParser.create().parse_overrides(list(overrides)):
        if part.is_delete() or part.is_sweep_override() or not (CONFIGS / part.key_or_group).is_dir():
            continue
        value = part.value()
        if not all(isinstance(name, str) for name in (value if isinstance(value, list) else [value])):
            raise FewtokensError(
                f"A group of the config must be the name of an option, got {part.input_line}. See --help."
            )


def _compose_references(search_path: ConfigSearchPath, name: str | None, overrides: tuple[str, ...]) -> DictConfig:
    """Compose the config with the overrides that may name a saved run, once for all jobs of a sweep."""
    key = (str(search_path), name, overrides)
    if key not in _REFERENCES:
        _REFERENCES[key] = ConfigLoaderImpl(search_path).load_configuration(name, list(overrides), RunMode.RUN)
    return _REFERENCES[key]


_REFERENCES: dict[tuple[str, str | None, tuple[str, ...]], DictConfig] = {}


class SavedRun(ConfigSource):
    """Hydra's source of a saved config: the groups of the run, each with the single option `run`.

    It also has the primary configs (train, eval ...), which choose this option.

    Args:
        provider: Name of the source in Hydra's messages.
        path: `run://`, the path of a checkpoint, `?`, and the groups and keys that the command line sets.
    """

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        checkpoint, _, replaced = self.path.rpartition("?")
        saved = config_of(Path(checkpoint), replaced.split("&"))
        known = {name for entry in _load("train.yaml")["defaults"] if isinstance(entry, dict) for name in entry}
        self.groups = {key: node for key, node in saved.items() if key in known and isinstance(node, dict)}
        self.others = {key: node for key, node in saved.items() if key not in known}
        # A job must not write into the files of another one, even if `paths.run` was set there.
        self.groups["paths"] = _load("paths/default.yaml") | self.groups.get("paths", {})

    @staticmethod
    def scheme() -> str:
        """Return the prefix of the paths that belong to this source."""
        return "run"

    def load_config(self, config_path: str) -> ConfigResult:
        """Return a group of the run, or a primary config that chooses the groups of the run."""
        group, _, name = config_path.rpartition("/")
        content = self.groups[group] if group else self._primary(name)
        return ConfigResult(self.provider, self.full_path(), OmegaConf.create(content), {"package": None})

    def _primary(self, name: str) -> dict[str, Any]:
        content = _load(f"{name}.yaml")
        for entry in content["defaults"]:
            for key in entry if isinstance(entry, dict) else ():
                if key.removeprefix("override ") in self.groups:
                    entry[key] = "run"
        return content | self.others if name == "train" else content

    def is_group(self, config_path: str) -> bool:
        """Return whether the run has this group."""
        return config_path.rstrip("/") in self.groups

    def is_config(self, config_path: str) -> bool:
        """Return whether `load_config` has this config."""
        group, _, name = config_path.rpartition("/")
        return (group in self.groups and name == "run") if group else (CONFIGS / f"{name}.yaml").is_file()

    def available(self) -> bool:
        """Return True, since the config was read by the constructor."""
        return True

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return the options of a group."""
        return ["run"] if self.is_group(config_path) and results_filter != ObjectType.GROUP else []


def _keys_of(overrides: Iterable[str]) -> list[str]:
    """Return the groups and keys that overrides set, or with a prefix `~` delete.

    `tokenizer=run` sets nothing: it chooses the tokenizer of the run.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    replaced = [part for part in parsed if part.is_delete() or part.get_value_string() != "run"]
    return [("~" if part.is_delete() else "") + part.key_or_group for part in replaced]


def _write_into(run: Path, cfg: DictConfig) -> None:
    """Let a resumed run, also as a job of a sweep, write into the directory where it began."""
    chosen = [
        part.partition("=")[2].strip("'\"") for part in cfg.hydra.overrides.hydra if part.startswith("hydra.run.dir=")
    ]
    if any(Path(directory).resolve() != run.resolve() for directory in chosen):
        raise FewtokensError(f"A resumed run stays in its directory, {run}, got hydra.run.dir={chosen[-1]}. Remove it.")
    cfg.hydra.run.dir, cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir = str(run), str(run.parent), run.name


def _write_into_newest(cfg: DictConfig) -> None:
    """Let `resume=auto` continue the newest run of its folder, if that is not finished and no directory is given."""
    given = any(part.startswith("hydra.run.dir=") for part in cfg.hydra.overrides.hydra)
    if given or RUN_DIR in os.environ or by_slurm():
        return
    config = HydraConfig.instance()
    before = config.cfg
    config.set_config(copy.deepcopy(cfg))  # which the name of the folder refers to
    folder = Path(HydraConfig.get().run.dir).parent
    config.cfg = before
    runs = sorted(folder.glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime)
    if runs and checkpoint_in(runs[-1].parent) and not (runs[-1].parent / "report.json").exists():
        cfg.hydra.run.dir = str(runs[-1].parent)


def _load(name: str) -> Any:
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / name))  # PyYAML reads 1e-4 as a string


def checkpoint_of(reference: object) -> Path:
    """Return the checkpoint that a run directory or a file names: the best one, or the last if there is no best.

    Raises:
        FewtokensError: There is none.
    """
    check(isinstance(reference, str | Path), "checkpoint or init_from", "a run directory or a checkpoint", reference)
    path = Path(str(reference))
    found = checkpoint_in(path)
    if found is not None:
        return found
    reason = "has neither checkpoints/best.ckpt nor checkpoints/last.ckpt" if path.is_dir() else "does not exist"
    raise FewtokensError(
        f"A checkpoint must be a file, or the directory of a run that train.py has written, but {path} {reason}."
    )


def run_to_resume(reference: object) -> Path:
    """Return the last checkpoint of the run that `resume` names.

    Raises:
        FewtokensError: It is not the directory of a run, or the run has no checkpoint yet.
    """
    check(isinstance(reference, str | Path), "resume", "a run directory", reference)
    run, path = Path(str(reference)), Path(str(reference)) / "checkpoints" / "last.ckpt"
    if not (run / CONFIG).is_file():
        raise FewtokensError(
            f"`resume` must be the directory of a run, which contains {CONFIG}, got {run}. To start from the weights "
            "of a checkpoint, use init_from=<file>."
        )
    if not path.is_file():
        raise FewtokensError(f"{run} cannot be resumed: it ended before its first checkpoint, {path}. Start a new run.")
    return path


def run_of(checkpoint: Path) -> Path | None:
    """Return the run directory that contains a checkpoint, or None."""
    run = checkpoint.resolve().parent.parent
    return run if (run / CONFIG).is_file() else None


def config_of(checkpoint: Path, replaced: Collection[str] = ()) -> dict[str, Any]:
    """Return what `saved_config` returns, after the check that a command may compose on it.

    Args:
        checkpoint: The checkpoint.
        replaced: Groups and keys that the command line sets, see `check_saved`.

    Raises:
        FewtokensError: There is none, or it is not the config of a run.
    """
    return check_saved(saved_config(checkpoint), checkpoint, replaced)


def saved_config(checkpoint: Path) -> dict[str, Any]:
    """Return the saved config of a run as plain data, or the copy inside the checkpoint if it was moved elsewhere.

    Raises:
        FewtokensError: There is none, or it is not the config of a run.
    """
    run = run_of(checkpoint)
    if run is not None:
        text = (run / CONFIG).read_bytes()
    else:
        from fewtokens.runs.checkpoints import read  # torch takes seconds to import

        text = read(checkpoint).get("config", "")
    try:
        config = yaml.safe_load(text) if isinstance(text, str | bytes) else None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: neither UTF-8 nor UTF-16, or no date
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("backbone"), dict):
        raise FewtokensError(
            f"{checkpoint} comes without the config of its run, which train.py writes beside and into checkpoints. "
            "Weights from elsewhere are loaded with backbone.weights=<file>."
        )
    return config
