"""Vision Transformers that learn, sample or merge their tokens.

    model = fewtokens.reduce(timm.create_model("deit_small_patch16_224", pretrained=True), "tome", r=13)

`methods` lists the methods, `cost` counts what a model computes, and `trace` tells what became of every patch. torch
and timm are imported when one of them is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewtokens.analysis.reduced import cost, trace
    from fewtokens.backbones.in_place import reduce
    from fewtokens.errors import FewtokensError
    from fewtokens.tokenizers.recipes import methods

__all__ = ["FewtokensError", "cost", "methods", "reduce", "trace"]

_MODULES = {
    "FewtokensError": "errors",
    "cost": "analysis.reduced",
    "methods": "tokenizers.recipes",
    "reduce": "backbones.in_place",
    "trace": "analysis.reduced",
}


def __getattr__(name: str) -> Any:
    """Import one of the public names when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'fewtokens' has no attribute {name!r}")
    return getattr(import_module(f"fewtokens.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
