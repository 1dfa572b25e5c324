from functools import partial

import pytest
import torch
from timm.layers.attention import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock

from fewtokens.analysis.cost import macs
from fewtokens.benchmarks.timing import Setting, compiled_copy, in_batches, time_models, timm_reference
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.ats import ATS
from fewtokens.tokenizers.top_k import TopK


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 8, 12, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_timms_own_forward_shares_the_weights_and_gives_the_same_numbers(make, pool):
    model = make(pool=pool, options={"init_values": 0.1, "drop_path_rate": 0.2}).eval()
    theirs = timm_reference(model).eval()
    assert {type(block) for block in theirs.blocks} == {TimmBlock}
    assert {type(block.attn) for block in theirs.blocks} == {TimmAttention}
    assert torch.equal(theirs(images(2)), model(images(2)))
    assert {id(p) for p in theirs.parameters()} == {id(p) for p in model.parameters()}
    assert len(model.encoder.blocks) == 3
    assert type(model.encoder.blocks[0]) is not TimmBlock


@pytest.mark.parametrize(
    "setting",
    [
        Setting(batch=1),
        Setting(batch=3, mode="training"),
        Setting(batch=2, precision="bf16-true"),
        Setting(batch=2, precision="bf16-mixed", mode="training"),
    ],
    ids=str,
)
def test_records_of_models_timed_in_turns(make, setting):
    dense, fewer = make(pool="token"), make(partial(TopK, keep_rate=0.5), at=[1], pool="token")
    fewer.load_state_dict(dense.state_dict(), assign=True)
    before = {name: p.clone() for name, p in dense.state_dict().items()}
    records = time_models({"none": dense, "top_k": fewer}, images(4), setting, 0.1)
    assert [record["tokenizer"] for record in records] == ["none", "top_k"]
    plain, reduced = records
    for record in records:
        assert (record["batch"], record["precision"]) == (setting.batch, setting.precision)
        assert (record["mode"], record["compiled"]) == (setting.mode, setting.compiled)
        assert record["images_per_s"] > 0
        assert record["rounds"] >= 1
        assert (record["peak_mib"] is None) == (setting.compiled != "none")
        ratio = record["gmacs_dense"] / record["gmacs"]
        assert record["realised_over_theoretical"] == pytest.approx(record["speedup_vs_dense"] / ratio)
    assert plain["speedup_vs_dense"] == 1
    assert plain["gmacs"] == plain["gmacs_dense"] == macs(dense, images(1)) / 1e9
    assert reduced["gmacs"] == reduced["gmacs_padded"] == macs(fewer, images(1)) / 1e9 < plain["gmacs"]
    assert all(torch.equal(p, before[name]) for name, p in dense.state_dict().items()), "timing must not train"


def test_padding_costs_what_a_batch_computes(make):
    dense, adaptive = make(pool="token"), make(ATS, at=[1, 2], pool="token")
    adaptive.load_state_dict(dense.state_dict(), assign=True)
    for block in adaptive.encoder.blocks:
        block.attn.qkv.weight.data[:16] *= 200  # peaked attention keeps different numbers
    record = time_models({"none": dense, "ats": adaptive}, images(8), Setting(batch=8), 0.05)[1]
    assert record["gmacs"] == pytest.approx(record["gmacs_padded"]), "a CPU computes no padding"
    assert record["gmacs"] < record["gmacs_dense"]
    alone = [macs(adaptive, image) / 1e9 for image in images(20).split(1)]
    assert len(set(alone)) > 1
    record = time_models({"none": dense, "ats": adaptive}, images(20), Setting(batch=5), 0.05, min_images=20)[1]
    assert record["gmacs"] == pytest.approx(sum(alone) / 20)


def test_batches_are_whole_and_small_ones_are_several():
    assert [len(batch) for batch in in_batches(images(3), 1)] == [1] * 8
    assert [len(batch) for batch in in_batches(images(9), 4)] == [4, 4]
    assert [len(batch) for batch in in_batches(images(9), 2, min_images=1)] == [2]
    [batch] = in_batches(images(3), 10)
    assert torch.equal(batch[3:6], images(3))
    assert len(batch) == 10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch": 0}, r"`batch` must be .*batch=\[1,32\], got 0"),
        ({"precision": "float8"}, "`precision` must be '32-true' or .*, got 'float8'"),
        ({"mode": "testing"}, "`mode` must be 'inference' or 'training', got 'testing'"),
    ],
)
def test_invalid_settings(wrong, message):
    with pytest.raises(FewtokensError, match=message):
        Setting(**wrong)


def test_a_graph_needs_a_gpu_and_is_for_inference(make):
    with pytest.raises(FewtokensError, match=r"`compiled` must be no graph with mode=training, got 'graph'"):
        Setting(compiled="graph", mode="training")
    with pytest.raises(FewtokensError, match="records a CUDA graph and needs a GPU"):
        time_models({"none": make()}, images(2), Setting(batch=2, compiled="graph"), 0.1)


def test_a_compiled_copy_shares_the_parameters_and_leaves_the_model_alone(make):
    model = make(partial(TopK, keep_rate=0.5), at=[1], pool="token")
    for how in ("layers", "model"):
        compiled = compiled_copy(model, how)
        assert all(a is b for a, b in zip(model.parameters(), compiled.parameters(), strict=True))
        assert all(module._compiled_call_impl is None for module in model.modules())
    assert compiled_copy(model, "none") is model
    layers = compiled_copy(timm_reference(model), "layers").blocks
    assert all(block._compiled_call_impl is not None for block in layers)
