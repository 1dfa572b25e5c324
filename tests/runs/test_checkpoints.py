"""Checkpoints: read without executing code, written completely or not at all, and loaded into models that fit."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from conftest import CONFIGS, TINY
from fewtokens.errors import FewtokensError
from fewtokens.runs import checkpoints, config
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


def test_only_the_tokenizer_is_named_if_only_its_parameters_differ(composed, tmp_path: Path) -> None:
    task, dense = (instantiate(composed(*TINY, *more).task) for more in ([], ["tokenizer=none", "tokenizer.at=[]"]))
    torch.save({"state_dict": task.state_dict()}, tmp_path / "a.ckpt")
    torch.save({"state_dict": dense.state_dict()}, tmp_path / "dense.ckpt")
    said = r"trained with another tokenizer than the configured one.*tokenizer=run.*dense run.*init_from"
    for model, file in ((dense, "a.ckpt"), (task, "dense.ckpt")):
        with pytest.raises(FewtokensError, match=said):
            checkpoints.load_model(model, tmp_path / file)
    other = instantiate(composed(*TINY, "backbone.depth=3", "tokenizer=none", "tokenizer.at=[]").task)
    with pytest.raises(FewtokensError, match="Remove overrides that change the parameters"):
        checkpoints.load_model(other, tmp_path / "a.ckpt")


@pytest.mark.parametrize(("size", "patches"), [("[4,16]", "2x8"), ("16", "8x8")])
def test_another_grid_of_patches_is_refused(composed, size: str, patches: str, tmp_path: Path) -> None:
    cfg = composed(*TINY, f"backbone.image_size={size}")
    task = instantiate(cfg.task)
    torch.save({"state_dict": task.state_dict(), "config": OmegaConf.to_yaml(cfg)}, tmp_path / "a.ckpt")
    checkpoints.load_model(task, tmp_path / "a.ckpt")
    said = rf"belong to {patches} patches, and the configured model has 4x4\. .*init_from="
    with pytest.raises(FewtokensError, match=said):
        checkpoints.load_model(instantiate(composed(*TINY).task), tmp_path / "a.ckpt")


@pytest.mark.parametrize("state", [5, [1], {"model.a": "text"}])
def test_a_state_that_is_no_mapping_of_tensors_is_refused(composed, tmp_path: Path, state: object) -> None:
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    task = instantiate(composed(*TINY).task)
    for load in (checkpoints.load_model, checkpoints.start_from):
        with pytest.raises(FewtokensError, match="its `state_dict` does not map names to tensors"):
            load(task, tmp_path / "a.ckpt")


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


CLIPS = [
    "data=moving_digits",
    "data.image_size=8",
    "backbone=vivit_mini",
    "backbone.tubelets.height=4",
    "backbone.tubelets.width=4",
    "backbone.dim=16",
    "backbone.heads=2",
    "backbone.depth=1",
    "backbone.temporal_depth=1",
    "tokenizer=none",
]


def video_run(composed, directory: Path, *overrides: str):
    """Save a model with positions of some size as a run, and return its config, the model and the checkpoint."""
    cfg = composed(*CLIPS, "data.frames=8", *overrides)
    task, path = instantiate(cfg.task), directory / "run" / "checkpoints" / "last.ckpt"
    for name, table in task.model.named_parameters():
        if name.endswith("pos_embed"):
            torch.nn.init.normal_(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": task.state_dict()}, path)
    config.save(cfg, directory / "run")
    return cfg, task.model, path


def changed(cfg, **data: int):
    """Return a new task for clips of another size."""
    return instantiate(OmegaConf.merge(cfg, {"data": data}).task)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_positions_of_clips_are_resampled_within_time_steps_and_then_along_time(composed, tmp_path, pool: str) -> None:
    cfg, model, path = video_run(composed, tmp_path, f"backbone.pool={pool}")
    prefix = int(pool == "token")
    old = model.vit.pos_embed[:, prefix:].unflatten(1, (4, 2, 2))

    def started(**data: int) -> torch.Tensor:
        task = changed(cfg, **data)
        checkpoints.start_from(task, path)
        assert torch.equal(task.model.vit.pos_embed[:, :prefix], model.vit.pos_embed[:, :prefix])
        return task.model.vit.pos_embed[:, prefix:]

    assert torch.equal(started(), old.flatten(1, 3))
    larger = started(image_size=16).unflatten(1, (4, 4, 4))  # 4 steps of 4 x 4 are 64, which is a square of 8 x 8, too
    for step in range(4):
        alone = torch.nn.functional.interpolate(
            old[:, step].permute(0, 3, 1, 2), (4, 4), mode="bicubic", antialias=True, align_corners=False
        )
        torch.testing.assert_close(larger[:, step], alone.permute(0, 2, 3, 1))
    shorter = started(frames=4).unflatten(1, (2, 2, 2))
    torch.testing.assert_close(shorter, old.unflatten(1, (2, 2)).mean(dim=2))
    assert started(frames=16, image_size=12).shape == (1, 8 * 9, 16)
    assert not torch.equal(started(frames=2, image_size=16), old.flatten(1, 3)), "as many, with another meaning"


@torch.no_grad()
def test_the_encoder_over_time_starts_with_positions_for_its_time_steps(composed, tmp_path: Path) -> None:
    cfg, model, path = video_run(composed, tmp_path, "backbone.model=factorised_encoder")
    task = changed(cfg, frames=4)
    assert checkpoints.start_from(task, path)["init/missing"] == 0
    old, new = model.temporal.vit.pos_embed, task.model.temporal.vit.pos_embed
    assert torch.equal(task.model.vit.pos_embed, model.vit.pos_embed)
    assert torch.equal(new[:, 0], old[:, 0])
    torch.testing.assert_close(new[:, 1:], old[:, 1:].unflatten(1, (2, 2)).mean(dim=2))


def test_positions_of_unknown_layout_are_refused(composed, tmp_path: Path) -> None:
    cfg, _, path = video_run(composed, tmp_path)
    (tmp_path / "run" / "config.yaml").unlink()
    checkpoints.start_from(changed(cfg), path)
    for other in ({"frames": 4}, {"image_size": 16}):
        with pytest.raises(FewtokensError, match="positions are laid out"):
            checkpoints.start_from(changed(cfg, **other), path)


def test_the_grid_of_a_run_need_not_be_square(composed, tmp_path: Path) -> None:
    few = [part for part in TINY if "tokenizer" not in part] + ["tokenizer=none", "backbone.patch_size=[2,4]"]
    cfg, path = composed(*few), tmp_path / "last.ckpt"
    torch.save({"state_dict": instantiate(cfg.task).state_dict(), "config": OmegaConf.to_yaml(cfg)}, path)
    task = changed(cfg, image_size=16)
    checkpoints.start_from(task, path)
    assert task.model.vit.pos_embed.shape[1] == 8 * 4
