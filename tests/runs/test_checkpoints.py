"""Checkpoints: read without executing code, written completely or not at all, and loaded into models that fit."""

from pathlib import Path

import pytest
import torch

from conftest import CONFIGS, TINY
from fewtokens.errors import FewtokensError
from fewtokens.runs import checkpoints
from fewtokens.runs.config import instantiate


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"a": Harmful()}}, tmp_path / "bad.ckpt")
    with pytest.raises(FewtokensError, match="weights_only"):
        checkpoints.read(tmp_path / "bad.ckpt")
    assert "executed" not in capsys.readouterr().out


def test_an_incomplete_checkpoint_is_refused_and_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, path = checkpoints.AtomicCheckpointIO(), tmp_path / "deep" / "last.ckpt"
    io.save_checkpoint({"state_dict": {"w": torch.ones(1000)}}, path)
    complete = path.read_bytes()
    path.write_bytes(complete[: len(complete) // 2])
    with pytest.raises(FewtokensError, match="not a complete checkpoint"):
        io.load_checkpoint(path)
    path.write_bytes(complete)

    def killed(content: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        io.save_checkpoint({"state_dict": {}}, path)
    assert path.read_bytes() == complete
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_is_an_error_with_a_sentence_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    io, path = checkpoints.AtomicCheckpointIO(), tmp_path / "last.ckpt"
    path.write_text("old")
    (tmp_path / ".last.ckpt.part").symlink_to("/dev/full")
    with pytest.raises(FewtokensError, match=r"Cannot write .*last\.ckpt: No space left on device"):
        io.save_checkpoint({"state_dict": {"w": torch.ones(1000)}}, path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("last.ckpt", "old")]


@pytest.mark.parametrize("tokenizer", sorted(path.stem for path in (CONFIGS / "tokenizer").glob("*.yaml")))
def test_the_weights_of_a_dense_run_fit_every_method_without_parameters(
    composed, tmp_path: Path, tokenizer: str
) -> None:
    dense = instantiate(composed(*TINY, "backbone.pool=token", "tokenizer=none", "tokenizer.at=[]").task)
    torch.save({"state_dict": dense.state_dict()}, tmp_path / "a.ckpt")
    at = [] if tokenizer == "none" else 1
    task = instantiate(composed(*TINY, "backbone.pool=token", f"tokenizer={tokenizer}", f"tokenizer.at={at}").task)
    if any(list(tokenizer.parameters()) for tokenizer in task.model.encoder.tokenizers):
        with pytest.raises(FewtokensError, match="A tokenizer with parameters must be trained first"):
            checkpoints.load_model(task, tmp_path / "a.ckpt")
    else:
        checkpoints.load_model(task, tmp_path / "a.ckpt")
        assert all(map(torch.equal, task.parameters(), dense.parameters()))


def test_weights_that_do_not_fit_are_named(composed, tmp_path: Path) -> None:
    task = instantiate(composed(*TINY).task)
    torch.save({"state_dict": task.state_dict()}, tmp_path / "a.ckpt")
    other = instantiate(composed(*TINY, "tokenizer=none").task)
    with pytest.raises(FewtokensError, match=r"unexpected model\.encoder\.layers\.1\.tokenizer"):
        checkpoints.load_model(other, tmp_path / "a.ckpt")
    with pytest.raises(FewtokensError, match=r"of another shape model\.encoder\.layers\.1\.tokenizer"):
        wider = instantiate(composed(*TINY, "tokenizer.build.num_tokens=3").task)
        checkpoints.load_model(wider, tmp_path / "a.ckpt")
    for p in task.parameters():
        torch.nn.init.zeros_(p)
    checkpoints.load_model(task, tmp_path / "a.ckpt")
    assert any(p.abs().sum() > 0 for p in task.parameters())


def test_another_grid_and_other_classes_start_from_the_same_weights(
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
    with pytest.raises(FewtokensError, match="same width and depth"):
        checkpoints.start_from(instantiate(composed(*few, "backbone.dim=32").task), tmp_path / "a.ckpt")
