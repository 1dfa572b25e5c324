"""Measures and pictures of clips: every time step is a row, whatever the model."""

from functools import partial
from typing import Any, get_args

import pytest
import torch
from matplotlib.image import imread
from torch import nn

from fewtokens.analysis.cost import Cost, macs, tokens_per_block
from fewtokens.analysis.flops import count
from fewtokens.analysis.pictures.drawing import CELL
from fewtokens.analysis.pictures.token_maps import TokenMaps, origin_by_step, token_picture
from fewtokens.analysis.throughput import Throughput
from fewtokens.backbones.vivit import Model, ViViT
from fewtokens.tokenizers.ats import ATS
from fewtokens.tokenizers.evit import EViT
from fewtokens.tokenizers.token_fuser import TokenFuser
from fewtokens.tokenizers.token_learner import TokenLearnerV11
from fewtokens.tokenizers.tome import ToMe
from fewtokens.tokenizers.top_k import TopK
from vivits import Data, Task, build, clips

MODELS = get_args(Model)
learner = partial(TokenLearnerV11, num_tokens=4)


@pytest.mark.parametrize("model", MODELS)
def test_measures_of_clips(model: Model, tmp_path: Any) -> None:
    net = build(model, learner, at=[1])
    found = Cost(num_images=2)(Task(net), Data(), tmp_path)
    assert (
        found["cost/gmacs"]
        == macs(net, clips(1)) / 1e9
        < found["cost/gmacs_dense"]
        == macs(build(model), clips(1)) / 1e9
    )
    assert (found["cost/frames"], found["cost/views"]) == (6, 2)
    assert found["cost/gmacs_all_views"] == 2 * found["cost/gmacs"]
    token = {"spatio_temporal": 1, "factorised_encoder": 3}.get(model, 0)
    assert found["cost/tokens_last_block"] == 3 * 4 + token
    assert macs(net.to("meta"), clips(1).to("meta")) / 1e9 == found["cost/gmacs"]


def sharp(model: str) -> ViViT:
    """ATS in every block, with attention that is not flat: clips and time steps keep different numbers of tokens."""
    net = build(model, ATS, at=[0, 1, 2])
    for block in net.encoder.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.5)
    return net


@pytest.mark.parametrize("model", MODELS[:2])
def test_an_adaptive_tokenizer_costs_every_clip_its_own(model: Model) -> None:
    net, many = sharp(model), clips(8)
    found = count(net, many.split(5))
    assert found.macs.tolist() == [macs(net, clip) for clip in many.split(1)]
    assert len(set(found.macs.tolist())) > 3
    padded = [macs(net, part) / len(part) for part in many.split(5)]
    assert found.padded.tolist() == [padded[0]] * 5 + [padded[1]] * 3
    assert found.padded.mean() == pytest.approx(found.macs.double().mean().item()), "a CPU computes no padding"
    # Of a clip the tokens of all its time steps together, each of which keeps its own number.
    with torch.no_grad():
        masks = [tokens.mask for tokens in net.eval().trace(many)]
    kept = [mask.sum(dim=1).reshape(len(many), -1) for mask in masks]
    assert found.tokens[:, 1:].tolist() == torch.stack([each.sum(dim=1) for each in kept], dim=1).tolist()
    if model == "factorised_encoder":
        assert (kept[0].amax(dim=1) > kept[0].amin(dim=1)).any()


def test_speed_of_clips(tmp_path: Any) -> None:
    found = Throughput(seconds=0.05, batch_size=2)(Task(build("factorised_encoder", learner, at=[1])), Data(), tmp_path)
    assert found["throughput/images_per_s"] > 0


def test_tokens_of_a_clip_are_those_of_all_its_time_steps() -> None:
    assert tokens_per_block(build(), clips()) == [73, 73, 73]
    assert tokens_per_block(build("factorised_encoder"), clips()) == [75, 75, 75]
    assert tokens_per_block(build("factorised_encoder", partial(TopK, keep_rate=0.5)), clips()) == [75, 39, 21]
    assert tokens_per_block(build(tokenizer=partial(TopK, keep_rate=0.5)), clips()) == [73, 37, 19]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("fused", [False, True])
def test_a_row_per_time_step_and_a_column_per_token(model: Model, fused: bool, tmp_path: Any) -> None:
    build_ = partial(TokenFuser, inner=learner) if fused else learner
    columns = token_picture(build(model, build_, at=[1]), clips()).columns
    assert [column.title for column in columns] == ["frame", "block 1\ntoken 1", "token 2", "token 3", "token 4"]
    assert all(column.pictures.shape[0] == len(column.notes) == 2 * 3 for column in columns)
    measure = TokenMaps(num_images=4)
    measure(Task(build(model, build_, at=[1])), Data(), tmp_path)
    height, width = imread(measure.picture).shape[:2]
    assert 5 * CELL < width < 8 * CELL
    assert 3 * CELL * 8 / 12 < height < 6 * CELL * 8 / 12, "the three steps of one clip, and a legend"


def test_the_first_column_shows_the_middle_frame_of_every_step() -> None:
    moving = torch.zeros(1, 3, 6, 8, 12)
    for frame in range(6):
        moving[0, :, frame, frame] = 1
    pictures = token_picture(build(tokenizer=learner, at=[1]), moving).columns[0].pictures
    rows = pictures.sum(dim=(1, 3)).argmax(dim=1) * 8 // pictures.shape[2]
    assert rows.tolist() == [1, 3, 5]


@pytest.mark.parametrize("model", MODELS[:2])
@pytest.mark.parametrize("method", [partial(TopK, keep_rate=0.5), partial(EViT, keep_rate=0.5), partial(ToMe, r=6)])
def test_a_column_per_stage_with_the_tokens_of_every_step(model: Model, method: Any) -> None:
    net = build(model, method)
    columns = token_picture(net, clips()).columns
    assert [column.title.split("\n")[0] for column in columns] == ["frame", "block 1", "block 2"]
    assert all(len(column.pictures) == 6 for column in columns)
    if method.func is TopK and model == "spatio_temporal":
        counts = [int(note) for note in columns[1].notes]
        assert sum(counts[:3]) == sum(counts[3:]) == 36  # of a clip, spread over its steps as attention has it
        assert len(set(counts)) > 1


@torch.no_grad()
def test_origins_by_step_are_the_parts_of_those_of_the_clip() -> None:
    net = build(tokenizer=learner, at=[1]).eval()
    tokens = net.trace(clips())[1]
    by_step, whole = origin_by_step(tokens, 3), tokens.origin
    assert by_step.shape == (6, 4, 24)
    for clip in range(2):
        for step in range(3):
            part = whole[clip, 4 * step : 4 * step + 4, 24 * step : 24 * step + 24]
            assert torch.equal(by_step[3 * clip + step], part)
    tokens = build(tokenizer=partial(TopK, keep_rate=0.5)).eval().trace(clips())[1]
    assert torch.equal(origin_by_step(tokens, 3)[4], tokens.origin[1, :, 24:48])
