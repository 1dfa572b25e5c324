from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from fewtokens.callbacks.freeze import Freeze, frozen_names
from fewtokens.errors import FewtokensError
from fewtokens.tasks.classification import Classifier
from fewtokens.tokenizers.token_learner import TokenLearnerV11
from small_models import small

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}


def model(**settings):
    return small(partial(TokenLearnerV11, num_tokens=4), at=[1], **settings)


@pytest.mark.parametrize(
    ("part", "trained"),
    [
        ("backbone", {"vit.head"}),
        ("blocks", {"vit.head", "encoder.layers.1.tokenizer"}),
        ("encoder[:2]", {"vit.head", "vit.norm", "encoder.layers.2.block"}),
        ("encoder[:0]", {"vit.head", "vit.norm", *(f"encoder.layers.{i}.block" for i in range(3)),
                         "encoder.layers.1.tokenizer"}),
    ],
)  # fmt: skip
def test_the_parts_of_a_model(part, trained):
    net = model()
    left = {name for name, _ in net.named_parameters()} - frozen_names(net, part)
    found = {next((prefix for prefix in trained if name.startswith(prefix)), name) for name in left}
    assert found - {"vit.fc_norm.weight", "vit.fc_norm.bias"} == trained - {"vit.norm"} | (found & {"vit.norm"})
    assert not any("patch_embed" in name or "pos_embed" in name for name in left)
    pooled = small(pool="map")
    assert any(
        "attn_pool" in name for name in {n for n, _ in pooled.named_parameters()} - frozen_names(pooled, "encoder[:2]")
    )


def test_frozen_parameters_stay_and_frozen_modules_do_not_drop():
    net = model(options={"proj_drop_rate": 0.5, "pos_drop_rate": 0.5, "drop_rate": 0.5})
    task = Classifier(net, 5, optimizer=partial(torch.optim.SGD, lr=0.1))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = []
    parts = (net.encoder.layers[0], net.vit.pos_drop, net.vit.patch_drop, net.vit.head, net.vit.head_drop)
    task.on_train_batch_end = lambda *_: modes.append(tuple(part.training for part in parts))
    batches = DataLoader([(torch.randn(4, 1, 3, 8, 12), torch.arange(4))] * 2, batch_size=None, collate_fn=tuple)
    trainer = Trainer(max_epochs=2, callbacks=[Freeze("blocks")], enable_progress_bar=False, **QUIET)
    trainer.fit(task, batches)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert all(".head" in name or ".tokenizer." in name for name in changed)
    assert {"vit.head.weight"} < changed
    assert set(modes) == {(False, False, False, True, True)}


def test_a_wrong_part_is_an_error():
    with pytest.raises(FewtokensError, match=r"must be 'backbone', 'blocks' or 'encoder\[:<number of layers>\]'"):
        frozen_names(model(), "encoder[2]")
    net = small()
    net.vit.head.requires_grad_(False)
    task = Classifier(net, 5, optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(FewtokensError, match="leaves nothing to train"):
        Freeze("backbone").setup(Trainer(**QUIET), task, "fit")
