"""The demo's answer to a picture: predictions, token pictures, cost and time, with a method and without."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from threading import Lock
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fewtokens.analysis.evaluation import evaluating_eagerly
from fewtokens.analysis.flops import GIGA, count
from fewtokens.analysis.pictures.sheet import as_image
from fewtokens.analysis.pictures.token_maps import token_picture
from fewtokens.analysis.throughput import seconds_on, time_in_turns
from fewtokens.backbones.vit import ViT
from fewtokens.data import seeding
from fewtokens.data.image.folders import fit
from fewtokens.data.transforms.normalize import Pipeline
from fewtokens.demo.methods import Methods
from fewtokens.errors import check, check_choice
from fewtokens.tokenizers.base import Tokenizer

TOP = 5
WIDTH = 256  # of a token picture in pixels
MAX_STAGES = 16


@dataclass(frozen=True)
class Side:
    """The output of the model for a picture, with a method or without.

    Args:
        top: The five most probable classes and their probabilities; none if the head is not trained.
        tokens: Number of tokens before the first block and after every block, class and register tokens included.
        gmacs: 1e9 multiply-adds of the picture.
        milliseconds: Time of a forward pass of this picture alone: the median of several.
    """

    top: dict[str, float]
    tokens: list[int]
    gmacs: float
    milliseconds: float


@dataclass(frozen=True)
class Result:
    """The answer to a picture.

    Args:
        setting: The method and its argument, as they are written on the command line.
        reduced: The model with the method.
        dense: The same weights with all tokens.
        stages: A picture and a caption for every stage, or for every token of a method that mixes all patches. The
            first is the picture as the model sees it.
        legend: Sentences about the stages and their colors, each with a swatch of the color, if it is about one.
    """

    setting: str
    reduced: Side
    dense: Side
    stages: list[tuple[Image.Image, str]]
    legend: list[tuple[str, Image.Image | None]]


class Predictor:
    """A model, and the methods that work with its weights. Calls from several threads run one after the other.

    Args:
        model: A model of images with one or three channels. Its tokenizers are the method "own".
        pipeline: The normalization of its training.
        names: The names of its classes; None if its head is not trained, so that there is nothing to predict.
        seconds: Time to measure per picture, both sides together.

    Raises:
        FewtokensError: The model takes clips, or has another number of channels.
    """

    def __init__(self, model: ViT, pipeline: Pipeline, names: Sequence[str] | None, seconds: float = 0.5) -> None:
        shape = model.sample_shape
        check(len(shape) == 3, "checkpoint", "a model of images; the demo shows no clips", f"one of clips {shape}")
        check(shape[0] in (1, 3), "data.channels", "1 or 3", shape[0])
        self.model, self.pipeline, self.seconds = model.eval(), pipeline, seconds
        self.names = None if names is None else _distinct(names)
        self.methods = Methods(model)
        check(len(self.methods.found) > 0, "backbone", "a model for which a method works", self.methods.skipped)
        self._lock = Lock()

    def predict(self, picture: Image.Image, method: str, budget: float | int) -> Result:
        """Run the model on a picture, with a method and without.

        Args:
            picture: A picture of any size; the middle of it is used.
            method: The name of one of `methods.found`.
            budget: The share of the patches that is left at the end, above 0 and at most 1.

        Raises:
            FewtokensError: The method or the budget is invalid, or the picture is too small for the method.
        """
        check_choice("method", method, self.methods.found)
        valid = isinstance(budget, int | float) and math.isfinite(budget) and 0 < budget <= 1
        check(valid, "budget", "a share of the patches, above 0 and at most 1", budget)
        image = self.pipeline(fit(picture, self.model.sample_shape)[None], seeding.generator(0))
        image = image.to(next(self.model.parameters()).device)
        with self._lock:
            reducing, setting = self.methods.build(method, float(budget))
            device = image.device
            reducing = [each.to(device).eval() for each in reducing]
            plain = [Tokenizer(each.context) for each in reducing]
            try:
                sides = self._sides({"reduced": reducing, "dense": plain}, image)
                self.model.encoder.replace_tokenizers(reducing)
                pictures = self._stages(image)
            finally:
                self.model.encoder.replace_tokenizers(self.methods.own)
        return Result(setting, sides["reduced"], sides["dense"], **pictures)

    def _sides(self, variants: dict[str, list[Tokenizer]], image: Float[Tensor, "1 c h w"]) -> dict[str, Side]:
        """Return what each list of tokenizers makes of an image. They are timed in turns."""

        def forward(tokenizers: list[Tokenizer]) -> Float[Tensor, "1 classes"]:
            self.model.encoder.replace_tokenizers(tokenizers)
            return self.model(image)

        def run(tokenizers: list[Tokenizer]) -> None:
            forward(tokenizers)

        with evaluating_eagerly(self.model), torch.inference_mode():
            logits = {name: forward(tokenizers) for name, tokenizers in variants.items()}
            runs = {name: partial(run, tokenizers) for name, tokenizers in variants.items()}
            times = time_in_turns(runs, self.seconds, partial(seconds_on, device=image.device))
        found = {}
        for name, tokenizers in variants.items():
            self.model.encoder.replace_tokenizers(tokenizers)
            counts = count(self.model, [image])
            found[name] = Side(
                top=self._top(logits[name][0]),
                tokens=counts.tokens[0].tolist(),
                gmacs=counts.macs.item() / GIGA,
                milliseconds=1e3 * median(times[name]),
            )
        return found

    def _top(self, logits: Float[Tensor, " classes"]) -> dict[str, float]:
        if self.names is None:
            return {}
        shares, indices = logits.float().softmax(dim=0).topk(min(TOP, len(logits)))
        return {self.names[index]: share for index, share in zip(indices.tolist(), shares.tolist(), strict=True)}

    def _stages(self, image: Float[Tensor, "1 c h w"]) -> dict[str, Any]:
        """Return the pictures and the legend of the model as it is."""
        found = token_picture(self.model, image, MAX_STAGES, width=WIDTH)
        if found is None:
            return {"stages": [], "legend": [("With this budget, all tokens are kept.", None)]}
        captions = ["as the model sees it", *(_one_line(column.title) for column in found.columns[1:])]
        pictures = [as_image(column.pictures[0]) for column in found.columns]
        marks = [(key.text, None if key.swatch is None else as_image(key.swatch)) for key in found.marks]
        content = found.content.replace("A column", "A picture")
        return {"stages": list(zip(pictures, captions, strict=True)), "legend": [(content, None), *marks]}


def _distinct(names: Sequence[str]) -> list[str]:
    """Add the class number to names that several classes have, such as the two cranes of ImageNet."""
    return [f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names)]


def _one_line(title: str) -> str:
    block, _, rest = title.partition("\n")
    return f"{block}: {rest}" if rest else block
