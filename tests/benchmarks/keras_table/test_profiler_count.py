from functools import partial

import pytest
import torch

from fewtokens.analysis.cost import Cost
from fewtokens.backbones.keras_mini_vit import keras_mini_vit
from fewtokens.benchmarks.keras_table.profiler_count import is_keras_example, keras_flops
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.base import Tokenizer
from fewtokens.tokenizers.token_learner import TokenLearner, TokenLearnerV11, TokenLearnerV11Grouped


def example(build=Tokenizer, depth=4):
    at = [] if build is Tokenizer else depth // 2 + 1
    return keras_mini_vit(
        image_size=48, patch_size=6, num_classes=10, depth=depth, tokenizer={"at": at, "build": build}
    )


def v10(tokens, **settings):
    return partial(TokenLearner, num_tokens=tokens, **({"pooling": "mean", "gelu": "none"} | settings))


def v11(groups, tokens):
    return partial(TokenLearnerV11Grouped, num_tokens=tokens, groups=groups)


@pytest.mark.parametrize(
    ("build", "depth", "profiler", "published"),
    [
        (Tokenizer, 4, 36_788_924, 0.0184),
        (v10(8), 4, 30_676_204, 0.0153),
        (v10(4), 4, 29_306_388, 0.0147),
        (Tokenizer, 8, 71_720_636, 0.0359),
        (v11(4, 4), 4, 29_708_820, 0.0149),
        (v11(8, 4), 4, 29_184_532, 0.0146),
        (v11(8, 8), 4, 29_797_612, 0.0149),
        (v11(4, 8), 4, 30_321_900, 0.0152),
    ],
)
def test_the_profilers_totals_to_the_last_integer(build, depth, profiler, published):
    flops = keras_flops(example(build, depth))
    assert flops == profiler
    assert round(flops // 2 / 1e9, 4) == published


@pytest.mark.parametrize("build", [v10(8, pooling="sum"), v10(8, gelu="tanh"), TokenLearnerV11])
def test_other_tokenizers_are_not_the_examples(build):
    model = example(build)
    assert not is_keras_example(model)
    with pytest.raises(FewtokensError, match="cost/gmacs"):
        keras_flops(model)


def test_other_blocks_are_not_the_examples(make):
    assert not is_keras_example(make())
    assert not is_keras_example(torch.nn.Linear(2, 2))


def test_both_counts_of_one_model(measured, tmp_path):
    model = example(v10(8))
    found = Cost(1)(*measured(model, size=(48, 48)), tmp_path)
    assert keras_flops(model) // 2 / 1e9 == 0.015338102
    assert "cost/gmacs_keras" not in found
    assert round(found["cost/gmacs"], 4) == 0.0798
    assert found["cost/params_trainable"] == 1_336_458 + 11_200
