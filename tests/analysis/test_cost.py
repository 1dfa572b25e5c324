import csv
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewtokens.analysis.cost import Cost, macs, tokens_per_block
from fewtokens.analysis.evaluation import evaluating, load_test_images
from fewtokens.backbones.keras_mini_vit import keras_mini_vit
from fewtokens.backbones.vit import vit
from fewtokens.tokenizers.base import Tokenizer
from fewtokens.tokenizers.token_fuser import TokenFuser
from fewtokens.tokenizers.token_learner import TokenLearner, TokenLearnerV11, TokenLearnerV11Grouped

PLAIN = {"at": [], "build": Tokenizer}


def closed_form(dim: int, depth: int, classes: int, patches: int, patch: int, prefix: int = 1) -> int:
    n = patches + prefix
    projections = 4 * n * dim**2  # queries, keys, values, output
    attention = 2 * n * n * dim  # QK^T and AV
    mlp = 2 * n * dim * 4 * dim
    return patches * 3 * patch**2 * dim + depth * (projections + attention + mlp) + dim * classes


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("size", [(8, 2, 16, 1, 1), (8, 1, 32, 3, 4), (32, 4, 48, 2, 3), (48, 6, 64, 4, 2)], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_macs_of_a_vit_are_the_closed_form(size, pool, device):
    side, patch, dim, depth, heads = size
    sizes = {"image_size": side, "patch_size": patch, "dim": dim, "depth": depth, "heads": heads, "num_classes": 7}
    with torch.device(device):
        found = macs(vit(**sizes, pool=pool, tokenizer=PLAIN), torch.zeros(1, 3, side, side))
    assert found == closed_form(dim, depth, 7, (side // patch) ** 2, patch, prefix=int(pool == "token"))


@pytest.mark.parametrize(("dim", "heads", "published"), [(384, 6, 4.6), (768, 12, 17.6)])
def test_known_models(dim, heads, published):
    with torch.device("meta"):
        model = vit(image_size=224, patch_size=16, num_classes=1000, dim=dim, depth=12, heads=heads, tokenizer=PLAIN)
        found = macs(model, torch.zeros(1, 3, 224, 224))
    assert found == closed_form(dim, 12, 1000, 196, 16)
    assert round(found / 1e9, 1) == published  # DeiT-S and ViT-B/16


@pytest.mark.parametrize(
    ("at", "build", "depth", "gmacs"),
    [
        ([], Tokenizer, 4, 0.1015),
        (3, partial(TokenLearner, num_tokens=8, pooling="mean", gelu="none"), 4, 0.0798),
        (3, partial(TokenLearner, num_tokens=4, pooling="mean", gelu="none"), 4, 0.0781),
        ([], Tokenizer, 8, 0.2022),
        (3, partial(TokenLearnerV11Grouped, num_tokens=4, groups=4), 4, 0.0783),
        (3, partial(TokenLearnerV11Grouped, num_tokens=4, groups=8), 4, 0.0780),
        (3, partial(TokenLearnerV11Grouped, num_tokens=8, groups=8), 4, 0.0795),
        (3, partial(TokenLearnerV11Grouped, num_tokens=8, groups=4), 4, 0.0797),
    ],
)
def test_true_cost_of_the_keras_example(at, build, depth, gmacs):
    with torch.device("meta"):
        model = keras_mini_vit(
            image_size=48, patch_size=6, num_classes=10, depth=depth, tokenizer={"at": at, "build": build}
        )
        assert round(macs(model, torch.zeros(1, 3, 48, 48)) / 1e9, 4) == gmacs


class Sdpa(nn.Module):
    def __init__(self, dtype, masked):
        super().__init__()
        self.dtype, self.masked = dtype, masked

    def forward(self, x):
        query, key, value = (torch.zeros(1, 3, n, 16, dtype=self.dtype) for n in (5, 10, 10))
        return F.scaled_dot_product_attention(
            query, key, value, torch.zeros(1, 1, 1, 10).to(query) if self.masked else None
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backends", [[SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], [SDPBackend.MATH]])
def test_attention_counts_whichever_kernel_runs_it(dtype, masked, backends):
    with sdpa_kernel(backends):
        assert macs(Sdpa(dtype, masked), torch.zeros(1, 3, 2, 2)) == 2 * 3 * 5 * 10 * 16


def test_products_with_vectors_count():
    class Vector(nn.Module):
        def forward(self, x):
            return (
                torch.ones(5, 7) @ torch.ones(7),
                torch.ones(4) @ torch.ones(4),
                torch.addmv(torch.ones(2), torch.ones(2, 3), torch.ones(3)),
            )

    assert macs(Vector(), torch.zeros(1, 3, 2, 2)) == 5 * 7 + 4 + 6


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_counts_the_same(in_place):
    class Net(nn.Module):  # torch 2.11 compiles no module that consists of torch's own code alone
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 5)

        def forward(self, x):
            return nn.functional.gelu(self.layer(x))

    model, image, ran = Net(), torch.zeros(1, 3, 8, 12), []

    def backend(graph, inputs):
        def run(*args):
            ran.append(True)
            return graph.forward(*args)

        return run

    compiled = model.compile(backend=backend) or model if in_place else torch.compile(model, backend=backend)
    compiled(image)
    calls = len(ran)
    assert calls > 0
    assert macs(compiled, image) == 3 * 8 * 12 * 5
    assert len(ran) == calls


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_macs_in_any_mode_leave_the_model_as_it_was(make, context):
    model = make()
    model.train()
    model.encoder.blocks[0].eval()
    before = [module.training for module in model.modules()]
    with context():
        assert macs(model, torch.zeros(1, 3, 8, 12)) == macs(model.to("meta"), torch.zeros(1, 3, 8, 12, device="meta"))
    assert [module.training for module in model.modules()] == before


def test_evaluating_restores_after_an_error(make):
    model = make().train()

    def fail():
        with evaluating(model):
            assert not model.encoder.training
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(module.training for module in model.modules())


def test_tokens_after_every_block(make, methods):
    images = torch.randn(4, 3, 8, 12)
    assert tokens_per_block(make(), images) == [25, 25, 25]
    assert tokens_per_block(make(methods["selection"], at=[1, 2]), images) == [25, 17, 12]
    assert tokens_per_block(make(partial(TokenLearner, num_tokens=4), at=[1]), images) == [25, 5, 5]
    adaptive = make(methods["adaptive"], at=[1])
    alone = [tokens_per_block(adaptive, image)[-1] for image in images.split(1)]
    assert tokens_per_block(adaptive, images)[-1] == pytest.approx(sum(alone) / 4)
    assert 1 < alone[0] < 25


def test_measure(make, measured, tmp_path):
    model = make(partial(TokenLearnerV11, num_tokens=4), at=[1])
    task, data = measured(model)
    model.vit.pos_embed.requires_grad_(False)
    measure = Cost(num_images=2)
    found = measure(task, data, tmp_path)
    params = sum(p.numel() for p in model.parameters())
    image = torch.zeros(1, 3, 8, 12)
    gmacs = macs(model, image) / 1e9
    peaks = {name: found.pop(name) for name in ("cost/peak_mib", "cost/peak_mib_dense")}
    assert 0 < peaks["cost/peak_mib"] <= peaks["cost/peak_mib_dense"]
    assert found == {
        **dict.fromkeys(("cost/gmacs", "cost/gmacs_min", "cost/gmacs_max", "cost/gmacs_padded"), gmacs),
        "cost/gmacs_std": 0.0,
        "cost/gmacs_dense": macs(make(), image) / 1e9,
        "cost/images": 2.0,
        "cost/views": 2.0,
        "cost/gmacs_all_views": 2 * gmacs,
        "cost/batch_size": 2.0,
        "cost/params": params,
        "cost/params_trainable": params - 25 * 16,
        "cost/tokens_block_00": 25.0,
        "cost/tokens_block_01": 5.0,
        "cost/tokens_block_02": 5.0,
        "cost/tokens_last_block": 5.0,
    }
    assert all(isinstance(value, float) for value in found.values())
    assert measure.picture is None, "all cost the same"
    assert (tmp_path / "cost_histogram.csv").read_text() == f"gmacs_from,gmacs_to,images\n{gmacs:.9g},{gmacs:.9g},2\n"


def test_an_adaptive_tokenizer_costs_the_mean_over_the_whole_test_set(adaptive, measured, tmp_path):
    task, data = measured(adaptive, count=31)
    measure = Cost()
    found = measure(task, data, tmp_path)
    each = torch.tensor([macs(adaptive, image) for image in load_test_images(task, data, 100).split(1)]).double() / 1e9
    assert found["cost/images"] == len(each) == 31
    for name, value in {
        "": each.mean(),
        "_std": each.std(correction=0),
        "_min": each.min(),
        "_max": each.max(),
    }.items():
        assert found[f"cost/gmacs{name}"] == pytest.approx(value.item())
    assert found["cost/gmacs_std"] > 0
    padded = [macs(adaptive, part) for part in load_test_images(task, data, 100).split(3)]
    assert found["cost/gmacs_padded"] == pytest.approx(sum(padded) / 31 / 1e9)
    assert found["cost/gmacs"] == pytest.approx(found["cost/gmacs_padded"]), "a CPU computes no padding"
    assert found["cost/gmacs"] < found["cost/gmacs_dense"] * 1.05
    with (tmp_path / "cost_histogram.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["images"]) for row in rows) == 31
    assert float(rows[0]["gmacs_from"]) == pytest.approx(found["cost/gmacs_min"])
    assert float(rows[-1]["gmacs_to"]) == pytest.approx(found["cost/gmacs_max"])
    assert measure.picture == tmp_path / "pictures" / "cost.png"
    assert imread(measure.picture).shape[:2] == (360, 1080)


@pytest.mark.parametrize("num_images", [None, 5])
def test_a_static_tokenizer_is_counted_on_one_batch(make, measured, tmp_path, num_images):
    task, data = measured(make(partial(TokenLearner, num_tokens=4), at=[1]))
    found = Cost(num_images)(task, data, tmp_path)
    assert found["cost/images"] == 3
    assert found["cost/gmacs"] == macs(task.model, torch.zeros(1, 3, 8, 12)) / 1e9


def test_an_adaptive_tokenizer_is_counted_on_all_images_even_if_the_first_are_equal(make, measured, tmp_path):
    class Alike(Tokenizer):
        adaptive = True

    assert Cost()(*measured(make(Alike, at=[1])), tmp_path)["cost/images"] == 7


def test_images_that_differ_are_all_counted_even_if_the_tokenizer_is_not_called_adaptive(
    make, methods, measured, tmp_path, monkeypatch
):
    monkeypatch.setattr(methods["adaptive"], "adaptive", False)
    assert Cost()(*measured(make(methods["adaptive"], at=[1])), tmp_path)["cost/images"] == 7


def test_the_tail_of_a_batch_that_is_not_asked_for_is_not_counted(adaptive, measured, tmp_path):
    task, data = measured(adaptive)
    found = Cost(4)(task, data, tmp_path)
    pictures = load_test_images(task, data, 4)
    assert found["cost/images"] == 4
    assert found["cost/gmacs_padded"] == pytest.approx(
        (macs(adaptive, pictures[:3]) + macs(adaptive, pictures[3:])) / 4e9
    )


def test_fewer_tokens_need_less_memory(make, measured, tmp_path):
    large = {"patch_size": 1, "depth": 4}
    dense = Cost(2)(*measured(make(**large)), tmp_path)
    few = Cost(2)(*measured(make(partial(TokenLearnerV11, num_tokens=4), at=[0], **large)), tmp_path)
    assert dense["cost/peak_mib"] == dense["cost/peak_mib_dense"] == few["cost/peak_mib_dense"]
    assert few["cost/peak_mib"] < dense["cost/peak_mib"]
    hidden = 2 * 97 * 4 * 16 * 4  # the widest tensor: batch, tokens, MLP ratio, width, bytes
    assert 2 * hidden <= dense["cost/peak_mib"] * 2**20 <= 4 * hidden


def test_a_fuser_costs_less_than_dense(make, measured, tmp_path):
    inner = partial(TokenLearnerV11, num_tokens=2, hidden=8)
    found = Cost(1)(*measured(make(partial(TokenFuser, inner=inner, hidden=8), at=[1, 2])), tmp_path)
    assert found["cost/gmacs"] < found["cost/gmacs_dense"]


def test_load_test_images_returns_the_first_views_of_as_many_as_asked(make, measured):
    task, data = measured(make().bfloat16())
    images = load_test_images(task, data, 5)
    assert images.shape == (5, 3, 8, 12)
    assert images.dtype == torch.bfloat16
    torch.testing.assert_close(images, (data.images[:5].float() / 128 - 1).bfloat16())
    assert len(load_test_images(task, data, 100)) == 7
