"""The methods that the demo offers for a model, and what a budget means for each of them."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fewtokens.backbones.encoder import block_indices, build_tokenizers
from fewtokens.backbones.vit import ViT
from fewtokens.errors import FewtokensError
from fewtokens.runs.config import CONFIGS, instantiate
from fewtokens.tokenizers.base import Tokenizer

OWN = "own"
DEFAULT_BUDGET = 0.5


@dataclass(frozen=True)
class Method:
    """A method that works with the weights of the model.

    Args:
        name: The option of configs/tokenizer, or "own" for what the model was trained with.
        title: A sentence about it.
        argument: The argument that the budget sets, or None if it sets none.
    """

    name: str
    title: str
    argument: str | None


class Methods:
    """The methods that need no parameters beyond the weights of a model, and the model's own.

    Args:
        model: Its own tokenizers are kept as the method "own", unless they are the plain transformer.
        folder: Folder of the configs of the methods.

    Attributes:
        found: The methods by name, the model's own first.
        skipped: The reason for every other method.
    """

    def __init__(self, model: ViT, folder: Path = CONFIGS / "tokenizer") -> None:
        self.own = model.encoder.tokenizers
        self.grid = self.own[0].context.grid
        self.found: dict[str, Method] = {}
        self.skipped: dict[str, str] = {}
        self._configs: dict[str, Any] = {}
        names = list(dict.fromkeys(type(each).__name__ for each in self.own if type(each) is not Tokenizer))
        if names:
            self.found[OWN] = Method(OWN, f"{', '.join(names)}, as the model was trained.", None)
        for path in sorted(folder.glob("*.yaml")):
            if path.stem != "none":
                self._add(path)

    def build(self, name: str, budget: float) -> tuple[list[Tokenizer], str]:
        """Return a tokenizer for every block, and the settings as they are written on the command line.

        Args:
            name: One of `found`.
            budget: The share of the patches that is left after the last block, above 0 and at most 1. Methods reach it
                up to rounding; an adaptive one may keep fewer.
        """
        if name == OWN:
            return self.own, "the model's own tokenizer"
        cfg: Any = OmegaConf.to_container(self._configs[name])
        argument = self.found[name].argument
        settings = [f"tokenizer={name}"]
        if argument is not None:
            stages = len(block_indices(cfg["at"], len(self.own)))
            cfg["build"][argument] = BUDGETS[argument](budget, stages, prod(self.grid))
            settings.append(f"tokenizer.build.{argument}={cfg['build'][argument]}")
        return build_tokenizers(instantiate(cfg["build"]), cfg["at"], self.own[0].context), " ".join(settings)

    def _add(self, path: Path) -> None:
        """Add a method, or the reason why it is skipped."""
        cfg = OmegaConf.load(path)
        if "defaults" in cfg:
            self.skipped[path.stem] = "It wraps another method and has parameters of its own."
            return
        argument = next((str(key) for key in cfg.build if key in BUDGETS), None)
        title = path.read_text().partition("\n")[0].removeprefix("# ")
        self.found[path.stem], self._configs[path.stem] = Method(path.stem, title, argument), cfg
        try:
            tokenizers, _ = self.build(path.stem, DEFAULT_BUDGET)
            reason = "It has parameters, which the weights lack." if any(_parameters(tokenizers)) else ""
        except FewtokensError as error:
            reason = str(error)
        if reason:
            self.skipped[path.stem] = reason
            del self.found[path.stem]


def _parameters(tokenizers: list[Tokenizer]) -> list[int]:
    return [1 for tokenizer in tokenizers for _ in tokenizer.state_dict()]


def _keep_rate(budget: float, stages: int, patches: int) -> float:
    return round(budget ** (1 / stages), 3)


def _merged_per_block(budget: float, stages: int, patches: int) -> int:
    return round((1 - budget) * patches / stages)


def _window(budget: float, stages: int, patches: int) -> int:
    return max(1, round(budget**-0.5))


def _share(budget: float, stages: int, patches: int) -> float:
    return round(budget, 3)


# From the share that is left at the end, the number of blocks and the number of patches to an argument's value.
BUDGETS: dict[str, Callable[[float, int, int], float | int]] = {
    "keep_rate": _keep_rate,
    "r": _merged_per_block,
    "window": _window,
    "budget": _share,
}
