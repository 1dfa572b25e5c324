"""The command line: composes the config, imports what is heavy only then, and answers errors with a sentence."""

import atexit
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fewtokens.errors import FewtokensError
from fewtokens.runs import config as saved
from fewtokens.runs import distributed as processes
from fewtokens.runs.suggestions import explain

CONFIGS = Path(__file__).parents[3] / "configs"


def command(base: str, job: Callable[[DictConfig], Any]) -> None:
    """Run a job from the command line: `python train.py [group=option ...] [key=value ...]`.

    Args:
        base: Name of the primary config, and of the job.
        job: What is done with the composed config; it imports what it needs itself.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and the sentence below is ours
    # Idle OpenMP threads sleep instead of spinning: where cores are shared, spinning was measured 14 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    folder, name = CONFIGS, base
    try:
        reference = saved_run(sys.argv[1:])
        if reference:
            folder, name = _on_top_of(reference, base), "job"
        processes.agree_on_stamp()
        hydra.main(version_base="1.3", config_path=str(folder), config_name=name)(job)()
    except FewtokensError as error:
        _leave(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _leave(str(explain(error, folder, name)))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # python train.py --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
        sys.exit(141)


def saved_run(arguments: list[str]) -> str | None:
    """What `resume=` or `checkpoint=` names on the command line; None in a child, whose config is complete."""
    if any(argument in ("--config-path", "-cp") for argument in arguments):
        return None
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key in ("resume", "checkpoint") and value not in ("", "null"):
            return value.strip("'\"")
    return None


def _on_top_of(reference: str, base: str) -> Path:
    """The folder of configs in which the run's own config stands under the overrides."""
    checkpoint = saved.checkpoint_of(reference)
    folder = saved.overlay(saved.config_of(checkpoint), base, CONFIGS)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if base == "train":
        run = saved.run_of(checkpoint)
        if run is None or not Path(reference).is_dir():
            raise FewtokensError(
                "resume continues a run in its own directory",
                expected="the directory of a run",
                got=reference,
                fix="give the run's directory; for a bare checkpoint file use init_from or eval.py",
            )
        os.environ.setdefault(processes.RUN_DIR, str(run))
    return folder


def _leave(message: str) -> NoReturn:
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(1)
