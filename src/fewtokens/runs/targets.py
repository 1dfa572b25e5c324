"""What a config may call: nothing but what is on this list, so that a config from elsewhere runs no foreign code."""

import difflib
import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fewtokens.errors import FewtokensError

# Hydra's own block-list lets torch.load, torch.hub.load, numpy.load and others through.
ALLOWED = (
    "fewtokens.analysis.",
    "fewtokens.backbones.",
    "fewtokens.callbacks.",
    "fewtokens.data.",
    "fewtokens.layers.",
    "fewtokens.tasks.",
    "fewtokens.tokenizers.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.",
    "lightning.pytorch.profilers.",
    "lightning.pytorch.strategies.",
    "lightning.pytorch.Trainer",
    "timm.layers.",
    "timm.optim.",
    "torch.nn.modules.",
    "torch.nn.",
    "torch.optim.",
    "torchvision.transforms.",
)
OF_HYDRA = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
VARIABLE = "FEWTOKENS_ALLOW_TARGETS"  # an environment variable, since a config must not be able to extend the list


def instantiate(node: DictConfig | dict[str, Any], **arguments: Any) -> Any:
    """Hydra's instantiate, after every `_target_` in the resolved node was checked.

    Args:
        node: A node of the config.
        arguments: Further arguments of its target.

    Raises:
        FewtokensError: A target that is not allowed or not there, an unresolvable value, or wrong arguments.
    """
    try:
        plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except OmegaConfBaseException as error:
        raise FewtokensError(
            "Values of the config refer to other values that are there",
            expected="an existing key",
            got=str(error).splitlines()[0],
            fix="look at the composed config with: python train.py --cfg job",
        ) from error
    for call in calls(plain):
        check_arguments(check(str(call["_target_"])), call)
    try:
        return hydra.utils.instantiate(plain, _convert_="all", **arguments)
    except InstantiationException as error:
        raise _reason(error) from error


def calls(node: Any) -> Iterator[dict[str, Any]]:
    """Every node with a `_target_` in a tree of dicts and lists."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from calls(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from calls(value)


def check_arguments(found: Callable[..., Any], call: dict[str, Any]) -> None:
    """Refuse names that the target does not take, now and not when a recipe is at last called.

    Raises:
        FewtokensError: There are such names.
    """
    taken = inspect.signature(found).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        return
    names = {parameter.name for parameter in taken}
    unknown = [str(name) for name in call if name not in names and name not in OF_HYDRA]
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, n=1)
        raise FewtokensError(
            f"{call['_target_']} has names for its arguments",
            expected=", ".join(sorted(names)),
            got=", ".join(unknown),
            fix=f"did you mean {near[0]}" if near else "leave it out",
        )


def check(target: str) -> Callable[..., Any]:
    """The class or function that a target names, if it is defined in an allowed package.

    A prefix alone is no boundary: `fewtokens.data.samplers.os.system` has one too. So the object is looked up, and must
    be defined, at the top of a module, where the list allows.

    Raises:
        FewtokensError: It is not.
    """
    allowed = ALLOWED + tuple(p for p in os.environ.get(VARIABLE, "").split(",") if p)
    module, _, name = target.rpartition(".")
    found: Any = None
    if module and any(f"{target}.".startswith(prefix if prefix.endswith(".") else f"{prefix}.") for prefix in allowed):
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            found = None
        if found is None:
            raise FewtokensError(
                "_target_ names something that exists",
                expected=f"a class or function {name!r} in {module}",
                got=f"_target_: {target}",
                fix="check the spelling; saved runs of an older version may need that version",
            )
    home = f"{getattr(found, '__module__', '')}."
    local = "." in getattr(found, "__qualname__", ".")
    packages = {prefix.partition(".")[0] for prefix in allowed if target.startswith(prefix)}
    defined = (
        any(home.startswith(_package(prefix)) for prefix in allowed) and home.split(".", maxsplit=1)[0] in packages
    )
    if found is None or local or not defined or not (inspect.isclass(found) or inspect.isfunction(found)):
        raise FewtokensError(
            "A config calls only what is on the list of allowed targets",
            expected=f"a class or function defined in {', '.join(p.rstrip('.') for p in allowed)}",
            got=f"_target_: {target}",
            fix=f"if you trust it: {VARIABLE}=your.package. python train.py ...",
        )
    return found


def _package(prefix: str) -> str:
    # lightning.pytorch.Trainer is defined in lightning.pytorch.trainer.trainer
    return "lightning.pytorch.trainer." if prefix == "lightning.pytorch.Trainer" else prefix


def _reason(error: BaseException) -> FewtokensError:
    """The FewtokensError inside, or one that says which call failed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, FewtokensError):
            return cause
        deepest, cause = cause, cause.__cause__
    if not isinstance(deepest, TypeError | ValueError | InstantiationException):
        raise deepest  # not about the arguments: a bug, or the machine, and the traceback is wanted
    where = next((line for line in str(error).splitlines() if line.startswith("full_key")), "")
    return FewtokensError(
        "A node of the config holds the arguments of its target",
        expected="arguments that it takes",
        got=f"{str(error).splitlines()[0]} {str(deepest).splitlines()[0]} {where}".strip(),
        fix="compare with the yaml files in configs/, or with the docstring of the target",
    )
