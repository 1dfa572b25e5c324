from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from conftest import CONFIGS, TINY
from fewtokens.errors import FewtokensError
from fewtokens.runs import checkpoints
from fewtokens.runs import config as saved
from fewtokens.runs.targets import instantiate


def test_an_overlay_stands_under_new_overrides(composed, tmp_path: Path) -> None:
    run = composed("tokenizer=token_learner_v11", "tokenizer.build.num_tokens=3", "seed=5", *TINY)
    folder = saved.overlay(saved.plain(run), "eval", CONFIGS)
    again = composed(base="job", folder=folder)
    assert again.tokenizer.build.num_tokens == 3
    assert again.seed == 5
    assert again.backbone.dim == 16
    assert again.checkpoint is None
    changed = composed("tokenizer.build.num_tokens=4", "seed=6", base="job", folder=folder)
    assert (changed.tokenizer.build.num_tokens, changed.seed) == (4, 6)
    swapped = composed("tokenizer=none", base="job", folder=folder)
    assert "num_tokens" not in swapped.tokenizer.build
    assert swapped.backbone.dim == 16
    elsewhere = saved.overlay(saved.plain(run) | {"paths": {"run": "/there", "data": "d"}}, "eval", CONFIGS)
    here = composed(base="job", folder=elsewhere)
    assert (here.paths.run, here.paths.data) == (str(tmp_path / "run"), "d"), "a job writes into its own directory"
    # interpolations are kept, so a new fact flows
    assert composed("data.num_classes=3", base="job", folder=folder).backbone.num_classes == 3


def test_a_changed_config_keeps_the_one_before(composed, tmp_path: Path) -> None:
    saved.save(composed("seed=1", "name=x"), tmp_path)
    saved.save(composed("seed=1", "name=x"), tmp_path)
    assert not list(tmp_path.glob("config.*.yaml"))
    saved.save(composed("seed=2", "name=x"), tmp_path)
    assert yaml.safe_load((tmp_path / "config.0.yaml").read_text())["seed"] == 1
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 2


def test_secrets_are_masked_and_tokens_are_not() -> None:
    cfg = OmegaConf.create(
        {"logger": {"wandb": {"api_key": "s3cret", "password": None}}, "num_tokens": 8, "list": [{"SECRET": "s"}]}
    )
    plain = saved.plain(cfg)
    assert "s3cret" not in str(plain)
    assert plain["num_tokens"] == 8
    assert plain["list"] == [{"SECRET": "***"}]
    assert plain["logger"]["wandb"]["password"] is None


def test_a_checkpoint_is_found_by_run_or_file(tmp_path: Path) -> None:
    with pytest.raises(FewtokensError, match="not there"):
        saved.checkpoint_of(str(tmp_path / "gone"))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FewtokensError, match="directory without"):
        saved.checkpoint_of(str(tmp_path))
    last, best = (tmp_path / "checkpoints" / name for name in ("last.ckpt", "best.ckpt"))
    last.touch()
    assert saved.checkpoint_of(str(tmp_path)) == last
    best.touch()
    assert saved.checkpoint_of(str(tmp_path)) == best
    assert saved.checkpoint_of(str(last)) == last


def test_a_checkpoint_without_config_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "bare.ckpt")
    with pytest.raises(FewtokensError, match="comes with the config"):
        saved.config_of(tmp_path / "bare.ckpt")


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"a": Harmful()}}, tmp_path / "bad.ckpt")
    with pytest.raises(FewtokensError, match="weights_only"):
        checkpoints.read(tmp_path / "bad.ckpt")
    assert "executed" not in capsys.readouterr().out


def test_half_a_checkpoint_is_refused_and_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, path = checkpoints.AtomicCheckpointIO(), tmp_path / "deep" / "last.ckpt"
    io.save_checkpoint({"state_dict": {"w": torch.ones(1000)}}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FewtokensError, match="whole file"):
        io.load_checkpoint(path)
    path.write_bytes(whole)

    def killed(content: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        io.save_checkpoint({"state_dict": {}}, path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("tokenizer", sorted(path.stem for path in (CONFIGS / "tokenizer").glob("*.yaml")))
def test_the_weights_of_a_dense_run_fit_every_method_without_parameters(
    composed, tmp_path: Path, tokenizer: str
) -> None:
    dense = instantiate(composed(*TINY, "backbone.pool=token", "tokenizer=none", "tokenizer.at=[]").task)
    torch.save({"state_dict": dense.state_dict()}, tmp_path / "a.ckpt")
    at = [] if tokenizer == "none" else 1
    task = instantiate(composed(*TINY, "backbone.pool=token", f"tokenizer={tokenizer}", f"tokenizer.at={at}").task)
    if any(list(tokenizer.parameters()) for tokenizer in task.model.encoder.tokenizers):
        with pytest.raises(FewtokensError, match="a method with parameters must be trained first"):
            checkpoints.load_model(task, tmp_path / "a.ckpt")
    else:
        checkpoints.load_model(task, tmp_path / "a.ckpt")
        assert all(map(torch.equal, task.parameters(), dense.parameters()))


def test_weights_that_do_not_fit_are_named(composed, tmp_path: Path) -> None:
    task = instantiate(composed(*TINY).task)
    torch.save({"state_dict": task.state_dict()}, tmp_path / "a.ckpt")
    other = instantiate(composed(*TINY, "tokenizer=none").task)
    with pytest.raises(FewtokensError, match=r"unexpected model\.encoder\.tokenizers\.1"):
        checkpoints.load_model(other, tmp_path / "a.ckpt")
    with pytest.raises(FewtokensError, match="another shape"):
        wider = instantiate(composed(*TINY, "tokenizer.build.num_tokens=3").task)
        checkpoints.load_model(wider, tmp_path / "a.ckpt")
    for p in task.parameters():
        torch.nn.init.zeros_(p)
    checkpoints.load_model(task, tmp_path / "a.ckpt")
    assert any(p.abs().sum() > 0 for p in task.parameters())


def test_another_lattice_and_other_classes_start_from_the_same_weights(
    composed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = [part for part in TINY if "tokenizer" not in part] + ["tokenizer=none", "backbone.pool=token"]
    task = instantiate(composed(*few).task)
    torch.save({"state_dict": task.state_dict()}, tmp_path / "a.ckpt")
    larger = instantiate(composed(*few, "data.image_size=12", "data.num_classes=3").task)
    head = larger.model.vit.head.weight.clone()
    counts = checkpoints.start_from(larger, tmp_path / "a.ckpt")
    assert counts["init/missing"] == 2
    assert "model.vit.head.weight" in caplog.text
    assert torch.equal(larger.model.vit.head.weight, head)
    table, resampled = task.model.vit.pos_embed, larger.model.vit.pos_embed
    assert resampled.shape == (1, 1 + 36, 16)
    assert torch.equal(resampled[:, 0], table[:, 0])
    assert (resampled[:, 1] - table[:, 1]).abs().max() < (table[:, 1] - table[:, -1]).abs().max()
    assert torch.equal(larger.model.encoder.blocks[0].mlp.fc1.weight, task.model.encoder.blocks[0].mlp.fc1.weight)
    with pytest.raises(FewtokensError, match="same kind and width"):
        checkpoints.start_from(instantiate(composed(*few, "backbone.dim=32").task), tmp_path / "a.ckpt")
