from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fewtokens.analysis.throughput import Throughput, interquartile_range, time_in_turns
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.token_learner import TokenLearnerV11

KEYS = {"images_per_s", "images_per_s_dense", "speedup", "speedup_spread", "batch_size"}


def test_time_in_turns_takes_turns_and_rotates():
    order = []
    candidates = {name: partial(order.append, name) for name in "abc"}

    def clock(run, times):
        run()
        return times * {"a": 1.0, "b": 2.0, "c": 3.0}[order[-1]]

    times = time_in_turns(candidates, 18.0, clock)
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [3.0] * 3}
    assert "".join(order[-9:]) == "abcbcacab"


def test_time_in_turns_repeats_short_calls_and_warms_up():
    seen = []

    def clock(run, times):
        seen.append(times)
        return 0.001 * times

    times = time_in_turns({"short": lambda: None}, 1.0, clock, sample=0.02)
    assert seen[0] == 1
    assert set(seen[3:]) == {20}
    assert times["short"] == pytest.approx([0.001] * len(times["short"]))
    assert 0.001 * sum(seen) == pytest.approx(1.2, abs=0.05)


def test_time_in_turns_times_a_slow_candidate_once():
    times = time_in_turns({"slow": lambda: None, "slower": lambda: None}, 1.0, lambda run, times: 30.0 * times)
    assert times == {"slow": [30.0], "slower": [30.0]}


def test_interquartile_range():
    assert interquartile_range([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
    assert interquartile_range([7.0]) == 0.0


@pytest.mark.parametrize("wrong", [{"seconds": 0.0}, {"batch_size": 0}, {"seconds": -1.0}, {"precision": "float8"}])
def test_settings_out_of_range(wrong):
    with pytest.raises(FewtokensError, match=rf"`measure\.throughput\.{next(iter(wrong))}` must be"):
        Throughput(**wrong)


@pytest.mark.parametrize("precision", [None, "32-true", "bf16-mixed"])
def test_measure_leaves_the_model_as_it_was(make, measured, tmp_path, precision):
    model = make(partial(TokenLearnerV11, num_tokens=4), at=[1]).train()
    reducing = model.encoder.tokenizers
    seen = []
    model.vit.head.register_forward_hook(lambda module, args, out: seen.append((out.dtype, module.training, len(out))))
    found = Throughput(seconds=0.05, batch_size=5, precision=precision)(*measured(model), tmp_path)
    assert found.keys() == {f"throughput/{key}" for key in KEYS}
    assert found["throughput/batch_size"] == 5
    assert set(seen) == {(torch.bfloat16 if precision == "bf16-mixed" else torch.float32, False, 5)}
    assert model.encoder.tokenizers == reducing
    assert all(module.training for module in model.modules())


def test_measure_times_the_tokenizer_and_the_dense_model(make, measured, tmp_path):
    tokens = set()
    model = make(partial(TokenLearnerV11, num_tokens=4), at=[1])
    model.vit.norm.register_forward_hook(lambda module, args, out: tokens.add(out.shape[1]))
    Throughput(seconds=0.02, batch_size=2)(*measured(model), tmp_path)
    assert tokens == {5, 25}


def test_measure_restores_the_tokenizer_after_an_error(make, measured, tmp_path):
    model = make(partial(TokenLearnerV11, num_tokens=4), at=[1])
    reducing = model.encoder.tokenizers
    with pytest.raises(FewtokensError):
        Throughput(seconds=0.02)(*measured(model, size=(4, 4)), tmp_path)
    assert model.encoder.tokenizers == reducing


def test_precision_of_the_trainer(make, measured, tmp_path):
    model, seen = make(), set()
    task, data = measured(model)
    task._trainer = SimpleNamespace(precision="bf16-mixed")
    model.vit.head.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    Throughput(seconds=0.02)(task, data, tmp_path)
    assert seen == {torch.bfloat16}
