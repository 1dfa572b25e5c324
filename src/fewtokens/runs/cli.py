"""The command line: compose the config, run the job, and answer errors with a sentence."""

import contextlib
import difflib
import functools
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fewtokens.errors import FewtokensError, first_line
from fewtokens.files import replace_file
from fewtokens.masking import mask, mask_logs, masked
from fewtokens.runs.allocator import keep_freed_memory
from fewtokens.runs.compose import compose_on_saved_runs, first_values, reference_overrides
from fewtokens.runs.config import CONFIGS
from fewtokens.runs.distributed import end_with_parent, is_rank_zero, rank, share_timestamp
from fewtokens.runs.search import install_sweepers

TRACEBACK = "FEWTOKENS_TRACEBACK"
WRONG_KEY = re.compile(
    r"(?:Could not override|Could not append to config. An item is already at|Could not delete.*?) '([^']+)'"
)
WRONG_OPTION = re.compile(
    r"Could not find '([^']+)'|Cannot find primary config '([^']+)'|In '[^']*': Could not (?:find|load) '([^']+)'"
)
UNKNOWN = "This is a wrong setting that was not recognized, or a bug"
HINTS = {
    "model": "A model is a backbone with a tokenizer: backbone=vit_tiny tokenizer=token_learner.",
    "train": "train.py always trains. Evaluate a run with eval.py checkpoint=<run>.",
}


def command(name: str, job: Callable[[DictConfig], Any]) -> None:
    """Run a job from the command line: `python train.py [group=option ...] [key=value ...]`.

    Errors end with one sentence and exit code 1. With HYDRA_FULL_ERROR=1 they print their traceback, too.

    Args:
        name: Name of the primary config.
        job: Called with the composed config. It imports slow packages itself.
    """
    # What the user has set, also for child processes.
    os.environ.setdefault(TRACEBACK, os.environ.get("HYDRA_FULL_ERROR", "0"))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them
    # Idle OpenMP threads spin only shortly before they sleep. An epoch of the default job on two cores took 1.1 s with
    # libgomp's own 300,000 turns, 1.3 s with these and 2.0 s with none; beside a second such job 75, 2.9 and 1.9 s.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of other runtimes than libgomp
    keep_freed_memory()
    try:
        read_env_file(CONFIGS.resolve().parent / ".env")
        sys.argv[1:] = [translated(argument, name) for argument in sys.argv[1:]]
        mask_logs()
        end_with_parent()
        share_timestamp()
        compose_on_saved_runs()
        install_sweepers()
        with _masked_config():
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)(_describing_errors(job, name))()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # python train.py --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's flush at exit fails again
        sys.exit(141)
    except Exception as error:
        _print(error, name)
        sys.exit(1)


@contextlib.contextmanager
def _masked_config() -> Iterator[None]:
    """Mask the secrets in what Hydra prints of the config with --cfg or --info. A job prints as usual."""
    options = get_args_parser().parse_args()
    if options.cfg is None and options.info is None:
        yield
        return
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        sys.stdout.write(mask(printed.getvalue()))


def read_env_file(path: Path) -> None:
    """Set the environment variables that a file `.env` has (NAME=value), unless they are set already."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        name, _, value = line.strip().removeprefix("export ").partition("=")
        if value and not name.startswith("#"):
            os.environ.setdefault(name.strip(), value.strip().strip("'\""))


def translated(argument: str, name: str) -> str:
    """Return an argument with the name that a key of lightning-hydra-template has here.

    Args:
        argument: An argument of the command line.
        name: Name of the primary config.
    """
    key, equals, value = argument.partition("=")
    if equals and key == "ckpt_path" and name == "train":
        return f"resume={re.sub(r'/checkpoints/last[.]ckpt', '', value)}"
    return {"ckpt_path": "checkpoint", "task_name": "name"}.get(key, key) + equals + value


def _describing_errors(job: Callable[[DictConfig], Any], name: str) -> Callable[[DictConfig], Any]:
    """Return the job with its errors printed at once. The other jobs of a sweep run nevertheless.

    Args:
        job: The job.
        name: Name of the primary config.
    """

    @functools.wraps(job)
    def run(cfg: DictConfig) -> Any:
        try:
            _mask_sweep()
            return job(cfg)
        except Exception as error:
            _print(error, name)
            if HydraConfig.get().mode == RunMode.RUN:
                sys.exit(1)
            # For the table of the sweep. Another process can send a text, but not any exception.
            raise FewtokensError(mask(describe(error, name))) from None

    return run


def _mask_sweep() -> None:
    """Mask the secrets in `multirun.yaml`, which Hydra writes with all overrides before the first job of a sweep."""
    path = Path(HydraConfig.get().sweep.dir) / "multirun.yaml"
    if HydraConfig.get().mode == RunMode.MULTIRUN and is_rank_zero() and path.is_file():
        content = yaml.safe_load(path.read_text())
        if masked(content) != content:
            with replace_file(path) as file:
                yaml.safe_dump(masked(content), file, sort_keys=False)


def _print(error: Exception, name: str) -> None:
    lines = traceback.format_exception(error) if os.environ[TRACEBACK] == "1" else []
    where = "" if is_rank_zero() else f" (rank {rank()})"
    print(mask(f"{''.join(lines)}Error{where}: {describe(error, name)}"), file=sys.stderr, flush=True)


def describe(error: Exception, name: str) -> str:
    """Return one or two sentences about an error.

    Args:
        error: Any error that ended a command.
        name: Name of the primary config.
    """
    cause, frames = error.__cause__, traceback.extract_tb(error.__traceback__)
    if isinstance(cause, FewtokensError | OSError) and not isinstance(error, FewtokensError):
        error = cause  # what a library made of it says less
    text = str(error)
    if isinstance(error, FewtokensError):
        return text
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _describe_override(text, name)
    first = first_line(error)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    by_lightning = "/lightning/" in place and isinstance(error, ValueError | TypeError)
    if type(error).__name__ == "MisconfigurationException" or by_lightning:
        return f"Lightning does not accept the settings: {first} Check the overrides of `trainer`."
    if isinstance(error, OSError) and error.strerror:
        file = error.filename or "A file"
        return f"{file}: {error.strerror}. Check that the path exists, is writable, and has free space."
    what = "A package is missing that these settings need" if isinstance(error, ModuleNotFoundError) else UNKNOWN
    return f"{type(error).__name__}: {first}{place}. {what}. Set HYDRA_FULL_ERROR=1 to see the traceback."


def _describe_override(text: str, name: str) -> str:
    """Return a sentence about an error of Hydra, with the nearest valid name."""
    if found := WRONG_OPTION.search(text):
        return _describe_option(next(part for part in found.groups() if part))
    if found := WRONG_KEY.search(text):
        return _describe_key(found.group(1), name)
    first = " ".join(line.strip() for line in text.splitlines()[:2])
    return (
        f"{first} Overrides are group=option or key=value. Quote lists and special characters: 'tokenizer.at=[3,6,9]'"
    )


def _describe_option(path: str) -> str:
    if path.startswith("hydra/launcher/submitit"):
        return "`launcher=slurm` needs hydra-submitit-launcher. Install it with pip install -e '.[slurm]'."
    group, _, option = path.partition("/")
    folder = CONFIGS / group
    options = sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))
    hint = _did_you_mean(option, options, f"{group}=")
    return (
        f"`{group}={option}`: there is no configs/{group}/{option}.yaml. {hint} The options are {', '.join(options)}."
    )


def _describe_key(key: str, name: str) -> str:
    name_only = key.partition("@")[0]
    if name_only in HINTS:
        return f"There is no key `{key}` in the config. {HINTS[name_only]}"
    groups = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*") if path.is_dir())
    keys = sorted({*_keys(_composed(name)), *groups})
    siblings = [k for k in keys if k.rpartition(".")[0] == name_only.rpartition(".")[0]]
    hint = _did_you_mean(name_only, keys, "")
    return (
        f"There is no key `{key}` in the config. {hint} The keys there are {', '.join(siblings or groups)}. "
        "A new key is added with +key=value."
    )


def _did_you_mean(wrong: str, names: list[str], prefix: str) -> str:
    leaf = wrong.rpartition(".")[2]
    near = [name for name in names if name.rpartition(".")[2] == leaf]  # the right name in the wrong place
    near = near or difflib.get_close_matches(wrong, names, n=1, cutoff=0.4)
    return f"Did you mean `{prefix}{near[0]}`?" if near else "See python train.py --help."


def _composed(name: str) -> DictConfig:
    """Return the config with the options that the command line chooses, without its values."""
    given = get_args_parser().parse_args().overrides
    groups = [str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*") if path.is_dir()]
    overrides = list(dict.fromkeys([*reference_overrides(given), *first_values(given, groups)]))
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, overrides)


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a config, without resolving values."""
    for key in map(str, node):
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not (child._is_interpolation() or child._is_none() or child._is_missing()):
            yield from _keys(child, f"{prefix}{key}.")
