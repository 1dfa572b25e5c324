"""The answers of the demo, without its page: methods, budgets, pictures, limits."""

import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewtokens.data.image import folders
from fewtokens.demo import images
from fewtokens.demo.inference import WIDTH
from fewtokens.demo.methods import OWN, Methods
from fewtokens.errors import FewtokensError
from fewtokens.tokenizers.evit import EViT
from fewtokens.tokenizers.token_learner import TokenLearner
from small_models import small
from vivits import build as clip_model

LEARNED = {"token_learner", "token_learner_v11", "token_learner_v11_grouped", "patch_merger", "sinkhorn", "sit"}


def test_methods_without_parameters_are_offered_and_the_others_named_with_the_reason() -> None:
    methods = Methods(small(size=(16, 16), depth=4))
    assert {"ats", "evit", "tome", "top_k", "random_drop", "pool", "dpc_knn", "k_medoids"} <= set(methods.found)
    assert LEARNED | {"dynamic_vit", "token_fuser"} <= set(methods.skipped)
    assert OWN not in methods.found, "the model is dense"
    assert methods.found["ats"].title.startswith("Adaptive Token Sampling")
    pooled = Methods(small(size=(16, 16), depth=4, pool="avg"))
    assert "tome" in pooled.found
    assert "class token" in pooled.skipped["ats"]


@pytest.mark.parametrize("method", ["tome", "evit", "top_k", "random_drop", "dpc_knn", "k_medoids", "pool"])
def test_a_budget_is_the_share_of_patches_that_is_left(predictor, picture, method: str) -> None:
    found = predictor().predict(picture, method, 0.25)
    extra = 3 if method == "evit" else 1  # its fused tokens, and rounding up at every block
    assert found.dense.tokens == [65] * 5
    assert 17 - 1 <= found.reduced.tokens[-1] <= 17 + extra + 1
    if method != "k_medoids":  # for a model this small, its distances cost more than the blocks
        assert found.reduced.gmacs < found.dense.gmacs
    assert 0 < found.reduced.milliseconds < 1000
    assert f"tokenizer={method} tokenizer.build." in found.setting


def test_a_budget_bounds_an_adaptive_method(predictor, picture) -> None:
    small_budget, large = (predictor().predict(picture, "ats", budget) for budget in (0.1, 1.0))
    assert small_budget.reduced.tokens[-1] <= 1 + 7
    assert small_budget.reduced.tokens[-1] <= large.reduced.tokens[-1] <= 65


def test_the_answer_has_classes_pictures_and_a_legend(predictor, picture) -> None:
    found = predictor().predict(picture, "top_k", 0.3)
    for side in (found.reduced, found.dense):
        assert list(side.top.values()) == sorted(side.top.values(), reverse=True)
        assert sum(side.top.values()) == pytest.approx(1, abs=1e-5)
        assert set(side.top) == {"cat", "dog", "crane (2)", "crane (3)", "hen"}
    pictures, captions = zip(*found.stages, strict=True)
    assert {each.size for each in pictures} == {(WIDTH, WIDTH)}
    assert captions[0] == "as the model sees it"
    assert captions[1:] == tuple(f"block {block}: {found.reduced.tokens[block + 1] - 1} tokens" for block in (1, 2, 3))
    assert [swatch is None for _, swatch in found.legend] == [True, False]


def test_with_all_tokens_both_sides_are_equal(predictor, picture) -> None:
    found = predictor().predict(picture, "top_k", 1.0)
    assert found.reduced.top == found.dense.top
    assert found.reduced.gmacs == found.dense.gmacs
    assert found.stages == []


def test_the_models_own_method_needs_no_budget_and_stays(predictor, picture) -> None:
    trained = predictor(build=lambda context: TokenLearner(context, num_tokens=4), at=[2])
    before = trained.model.encoder.tokenizers
    assert next(iter(trained.methods.found)) == OWN
    own = trained.predict(picture, OWN, 0.3)
    assert own.reduced.tokens == [65, 65, 65, 5, 5]
    assert len(own.stages) == 5, "the picture and four tokens"
    trained.predict(picture, "tome", 0.3)
    assert trained.model.encoder.tokenizers == before
    image = trained.pipeline(folders.fit(picture, (3, 16, 16))[None], torch.Generator())
    shares = trained.model(image).softmax(dim=1)[0].sort(descending=True).values
    assert list(own.reduced.top.values()) == pytest.approx(shares.tolist(), abs=1e-5)


def test_threads_wait_for_each_other(predictor, picture) -> None:
    shared = predictor(build=lambda context: EViT(context, keep_rate=0.5), at=[2])
    expected = {name: shared.predict(picture, name, 0.5).reduced.tokens for name in ("own", "tome", "top_k")}
    found: list[bool] = []

    def visit(name: str) -> None:
        found.append(shared.predict(picture, name, 0.5).reduced.tokens == expected[name])

    threads = [threading.Thread(target=visit, args=(name,)) for name in expected for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 6


def test_wrong_methods_budgets_and_models_are_refused_with_a_sentence(predictor, picture) -> None:
    demo = predictor()
    for method, budget, text in (
        ("../none", 0.5, "`method` must be"),
        ("token_learner", 0.5, "`method` must be"),
        ("tome", 0.0, "`budget` must be"),
        ("tome", float("nan"), "`budget` must be"),
        ("tome", 7.0, "`budget` must be"),
    ):
        with pytest.raises(FewtokensError, match=text):
            demo.predict(picture, method, budget)
    with pytest.raises(FewtokensError, match="no clips"):
        type(demo)(clip_model(), demo.pipeline, None)


def test_a_gray_model_takes_pictures_of_any_kind(predictor, tmp_path: Path) -> None:
    demo = predictor(channels=1)
    for mode, size in (("L", (16, 16)), ("RGBA", (300, 7)), ("P", (1, 1)), ("I;16", (20, 20))):
        Image.new(mode, size).save(tmp_path / "a.png")
        found = demo.predict(images.read_picture(tmp_path / "a.png", 1), "pool", 0.25)
        assert found.reduced.tokens[-1] == 17


def test_hostile_files_are_refused_with_a_sentence_before_they_are_decoded(hostile) -> None:
    for name, path in hostile.items():
        with pytest.raises(FewtokensError) as refused:
            images.read_picture(path, megapixels=25)
        assert str(path.parent) not in str(refused.value), name
        assert str(refused.value).endswith("."), name
    with pytest.raises(FewtokensError, match="pixels"):
        images.read_picture(hostile["bomb.png"], megapixels=25)
    with pytest.raises(FewtokensError, match="6000 x 5000 pixels, and at most 25 million"):
        images.read_picture(hostile["large.png"], megapixels=25)
