"""The table of costs beside published numbers."""

import json
from pathlib import Path

import pytest

from fewtokens.benchmarks import cost_table
from fewtokens.benchmarks.cost_table import LOCATIONS, PUBLISHED, Model, all_models, compare, count


def test_models_are_counted_by_hand() -> None:
    dim, patches = 768, 196
    dense = 12 * patches * dim**2 + 2 * patches**2 * dim
    short = 12 * 8 * dim**2 + 2 * 8**2 * dim
    learn = 9 * patches * dim * 8 + 3 * 9 * patches * 8 * 8 + patches * dim * 8
    expected = patches * 768 * dim + 3 * dense + 9 * short + learn + dim * 1000
    found = count(Model("B/16", 224, 8, 3))
    assert found["gmacs"] == pytest.approx(expected / 1e9)
    assert count(Model("B/16", 224))["mparams"] == pytest.approx(86.57, abs=0.01)


def test_every_model_is_there_at_every_location() -> None:
    models = all_models()
    assert len(models) == 6 * 2 * (1 + 2 * len(LOCATIONS)) == len(set(models))
    assert {m.side for m in models if m.name == "L/10"} == {220, 380}, "patches of 10 tile 220 of 224 pixels"
    assert [m.at for m in models if m.name == "L/16" and m.side == 224 and m.tokens == 8] == [0, 6, 12, 18]


SMALL = [p if p.model.name[0] != "L" else pytest.param(p, marks=pytest.mark.slow) for p in PUBLISHED]


@pytest.mark.parametrize("published", SMALL, ids=lambda p: f"{p.model} {p.value}")
def test_published_numbers_agree_or_the_difference_is_explained(published) -> None:
    found = compare(published)
    assert found["agrees"] != bool(published.note), found


def test_the_page_and_the_file_have_the_same_numbers(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cost_table, "all_models", lambda: all_models()[:9])
    monkeypatch.setattr(cost_table, "PUBLISHED", PUBLISHED[:3])
    assert cost_table.main(["--write", str(tmp_path / "cost")]) == 0
    found = json.loads((tmp_path / "cost.json").read_text())
    assert len(found["models"]) == 9
    assert [row["agrees"] for row in found["published"]] == [False, True, True]
    page = (tmp_path / "cost.md").read_text()
    assert f"| {found['models'][0]['gmacs']:.2f} |" in page
    assert "13.04 | -34.1%" in page
    assert "17.56" in capsys.readouterr().out
