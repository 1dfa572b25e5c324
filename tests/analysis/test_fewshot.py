"""Few-shot transfer: the probes on cases with a known solution, and the features that they get."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from PIL import Image
from sklearn.linear_model import Ridge

from fewtokens.analysis.fewshot import Fewshot, choose, regress, vote, without_head
from fewtokens.backbones.keras_mini_vit import keras_mini_vit
from fewtokens.backbones.pretrained import timm_vit
from fewtokens.backbones.vit import vit
from fewtokens.backbones.vivit import PLAIN, vivit
from fewtokens.data.image.digits import Digits
from fewtokens.data.image.imagenet import ImageNet
from fewtokens.errors import FewtokensError
from fewtokens.layers.embedding import Tubelets
from fewtokens.runs import train as training
from fewtokens.tokenizers.tome import ToMe
from small_models import Task


def test_regression_of_two_points_is_the_solution_on_paper() -> None:
    """Whitened, the points are s and -s. The bias is orthogonal to the feature, and the targets have no mean."""
    few, test, l2 = torch.tensor([[5.0], [1.0]]), torch.tensor([[7.0], [3.0], [2.0]]), 10.0
    s = 2 / (2 + 1e-5)
    expected = torch.tensor([2.0, 0.0, -0.5]).double() * s * (2 * s / (2 * s**2 + l2))
    found = regress(few, torch.tensor([0, 1]), test, l2)
    torch.testing.assert_close(found, torch.stack([expected, -expected], dim=1), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("count", "dim"), [(40, 6), (12, 30)], ids=["more images", "more features"])
def test_regression_is_ridge_regression_on_whitened_features_with_a_bias(count: int, dim: int) -> None:
    few, test = torch.randn(count, dim) * 3 + 1, torch.randn(9, dim)
    labels = torch.arange(count) % 4
    x, z = ((part - few.mean(0)) / (few.std(0, correction=0) + 1e-5) for part in (few, test))
    x, z = (np.hstack([part.double().numpy(), np.full((len(part), 1), 100.0)]) for part in (x, z))
    ridge = Ridge(alpha=64.0, fit_intercept=False, solver="svd").fit(x, 2.0 * F.one_hot(labels).numpy() - 1)
    np.testing.assert_allclose(regress(few, labels, test, 64.0).numpy(), ridge.predict(z), atol=1e-4)


def test_neighbors_vote_and_the_nearer_ones_break_ties() -> None:
    angles = torch.tensor([0.0, 0.3, 0.35, 2.0])
    few, labels = (
        torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1.0], [9.0], [2.0], [1.0]]),
        [0, 1, 1, 2],
    )
    test = torch.tensor([[5.0, 0.01]])
    found = {k: vote(few, torch.tensor(labels), test, k)[0] for k in (1, 2, 3, 9)}
    assert [int(scores.argmax()) for scores in found.values()] == [0, 0, 1, 1], "with 2 neighbors there is a tie"
    assert found[9].round().tolist() == [1, 2, 1], "of 4 images at most 4 vote"


def test_draws_are_stratified_reproducible_and_different() -> None:
    labels = torch.tensor([2, 0, 0, 2, 2, 0, 7, 7, 7, 0])
    one, again, other = (choose(labels, 3, 5, draw) for draw in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert labels[one].tolist() == [[0] * 3, [2] * 3, [7] * 3]
    assert all(len(set(row)) == 3 for row in one.tolist())
    with pytest.raises(FewtokensError, match="needs 4 images of every class, but class 2 has 3"):
        choose(labels, 4, 5, 0)


SIZES = {"num_classes": 5, "dim": 16, "depth": 2, "heads": 2}
CLIPS = Tubelets(clip_frames=4, image_size=8, frames=2, height=4, width=4)
REDUCED = {"at": [0, 1], "build": partial(ToMe, r=1)}
MODELS = {
    "vit, class token": partial(vit, image_size=8, patch_size=2, tokenizer=REDUCED, **SIZES),
    "vit, mean": partial(vit, image_size=8, patch_size=2, pool="avg", tokenizer=REDUCED, **SIZES),
    "vit, norm before the mean": partial(
        vit, image_size=8, patch_size=2, pool="avg", norm="before_pool", tokenizer=PLAIN, **SIZES
    ),
    "timm": partial(timm_vit, name="vit_tiny_patch16_224", image_size=32, num_classes=5, tokenizer=PLAIN),
    "keras": partial(keras_mini_vit, image_size=8, patch_size=2, num_classes=5, dim=16, key_dim=8, tokenizer=PLAIN),
    "vivit, model 1": partial(vivit, tubelets=CLIPS, tokenizer=REDUCED, **SIZES),
    "vivit, model 2": partial(vivit, tubelets=CLIPS, model="factorised_encoder", tokenizer=PLAIN, **SIZES),
    "vivit, model 4": partial(vivit, tubelets=CLIPS, model="factorised_dot_product", tokenizer=PLAIN, **SIZES),
}


@pytest.mark.parametrize("name", MODELS)
def test_features_are_what_the_head_sees(name: str) -> None:
    model = MODELS[name]().eval()
    head = model.temporal.vit.head if name == "vivit, model 2" else model.vit.head
    samples = torch.randn(2, *model.sample_shape)
    with torch.no_grad():
        with without_head(model):
            features = model(samples)
        assert features.shape == (2, head.in_features)
        assert torch.equal(head(features), model(samples)), "the head is back, too"


def test_features_of_a_distilled_model_and_of_means_over_time() -> None:
    distilled = timm_vit(name="deit_tiny_distilled_patch16_224", image_size=32, num_classes=5, tokenizer=PLAIN).eval()
    with torch.no_grad(), without_head(distilled):
        tokens = distilled.vit.norm(distilled.encoder(distilled.embed(torch.ones(1, 3, 32, 32))).x)
        assert torch.allclose(distilled(torch.ones(1, 3, 32, 32)), tokens[:, :2].mean(dim=1))
    mean = vivit(tubelets=CLIPS, model="factorised_encoder", temporal_depth=0, tokenizer=PLAIN, **SIZES).eval()
    clips = torch.randn(2, *mean.sample_shape)
    with torch.no_grad():
        with without_head(mean):
            features = mean(clips)
        torch.testing.assert_close(mean.vit.head(features), mean(clips))


def digits(**settings) -> Digits:
    return Digits(num_classes=10, image_size=8, channels=1, batch_size=64, **settings)


class Clustered(torch.nn.Module):
    """Stands for a model whose features tell the class: one that looks the class of every image up."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def probe(self, measure: Fewshot) -> dict[str, list[float]]:
        images = measure.choose(digits())
        generator = torch.Generator().manual_seed(0)
        few, test = (
            F.one_hot(y, 10) + self.noise * torch.randn(len(y), 10, generator=generator)
            for y in (images.labels, images.truth)
        )
        return measure.probe(images, few.float(), test.float())


def test_classes_that_features_tell_apart_are_found_and_noise_is_chance() -> None:
    measure = Fewshot(shots=(1, 5), draws=3)
    found = Clustered(0.01).probe(measure)
    assert found == {"1shot": [1.0] * 3, "5shot": [1.0] * 3, "knn": [1.0] * 3}
    noisy = Clustered(1e6).probe(measure)
    assert all(abs(value - 0.1) < 0.08 for values in noisy.values() for value in values)


def test_the_measure_is_that_of_its_model_and_reproducible(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = vit(image_size=8, patch_size=2, channels=1, pool="avg", tokenizer=REDUCED, **(SIZES | {"num_classes": 10}))
    measure = Fewshot(shots=[5, 1], draws=2, test_per_class=7)
    one, again = (measure(Task(model), digits(), tmp_path) for _ in range(2))
    assert one == again
    assert one.keys() == {f"fewshot/{n}{i}" for n in ("1shot", "5shot", "knn") for i in ("", "_interval")} | {
        "fewshot/draws",
        "fewshot/test_images",
    }
    assert one["fewshot/test_images"] == 70
    assert 0.12 < one["fewshot/1shot"] < one["fewshot/5shot"] <= 1, "even random features tell digits apart"
    single = Fewshot(shots=[1], draws=1, test_per_class=7)(Task(model), digits(), tmp_path)
    assert "fewshot/1shot_interval" not in single
    images = measure.choose(digits())
    assert len(images.few) == len(set(images.few.tolist())) <= 2 * 10 * 5
    assert torch.equal(images.labels[images.draws], torch.arange(10)[None, :, None].expand(2, 10, 5))


def test_training_pictures_are_preprocessed_as_in_evaluation(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name, value in (("a", 50), ("b", 200)):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(2):
                y, x = np.mgrid[:40, :60]
                picture = np.stack([x * 4, y * 5, np.full_like(x, value + 10 * index)], axis=2).astype(np.uint8)
                Image.fromarray(picture).save(tmp_path / part / name / f"{index}.png")
    (tmp_path / "val").rename(tmp_path / "other")
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    data = ImageNet(tmp_path, num_classes=2, image_size=32, batch_size=2, parts={"test": "other"})
    images = Fewshot(shots=[2], draws=1).choose(data)
    few, test = (
        torch.cat(list(images.batches(samples, positions, torch.device("cpu"))))
        for samples, positions in ((images.train_set, images.few), (images.test_set, images.test))
    )
    assert torch.equal(few, test), "the same pictures in both parts"
    assert data.dataset("train").transform is data.train_crop, "training still has its random crops"
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"")
    with pytest.raises(FewtokensError, match=r"Cannot read the picture .*a/0\.png"):  # and not replaced
        list(images.batches(images.train_set, images.few, torch.device("cpu")))


def test_a_run_measures_it(composed) -> None:
    small = ["data.image_size=8", "backbone.patch_size=2", "backbone.dim=16", "backbone.heads=2", "backbone.depth=2"]
    shots = ["measure=fewshot", "measure.cost=null", "measure.fewshot.shots=[1,3]", "measure.fewshot.test_per_class=5"]
    short = ["trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "logger=none"]
    numbers = training.run(composed(*small, *short, *shots, "tokenizer.at=1"))
    assert {"fewshot/1shot", "fewshot/3shot", "fewshot/knn", "test/top1"} <= numbers.keys()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"shots": []}, "`measure.fewshot.shots` must be a list of ints >= 1"),
        ({"shots": [0]}, "`measure.fewshot.shots` must be a list of ints >= 1"),
        ({"draws": 0}, "`measure.fewshot.draws` must be an int >= 1"),
        ({"l2": 0.0}, "`measure.fewshot.l2` must be a number > 0"),
        ({"test_per_class": 0}, "`measure.fewshot.test_per_class` must be an int >= 1 or null"),
    ],
)
def test_wrong_settings_are_named(settings, says: str) -> None:
    with pytest.raises(FewtokensError, match=says):
        Fewshot(**settings)


class Clips(LightningDataModule):
    frames, dataset = 8, dict


def test_data_that_cannot_be_probed_are_refused() -> None:
    with pytest.raises(FewtokensError, match="needs 200 images of every class, but class 0"):
        Fewshot(shots=[200]).choose(digits())
    with pytest.raises(FewtokensError, match="measured on images, but the data are a Clips"):
        Fewshot().choose(Clips())
