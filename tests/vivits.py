"""Small video models, and clips without files."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from fewtokens.backbones.vivit import ViViT, vivit
from fewtokens.layers.embedding import Tubelets
from fewtokens.tokenizers.base import Tokenizer


def build(model: str = "spatio_temporal", tokenizer: Any = Tokenizer, at: Any = (1, 2)) -> ViViT:
    torch.manual_seed(0)
    cut = Tubelets(clip_frames=6, image_size=(8, 12), frames=2, height=2, width=2)  # 3 time steps of 4 x 6
    sizes = {"dim": 16, "depth": 3, "heads": 2, "num_classes": 5, "temporal_depth": 1}
    return vivit(tubelets=cut, tokenizer={"at": list(at), "build": tokenizer}, model=model, **sizes)


def clips(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 6, 8, 12, generator=torch.Generator().manual_seed(0))


class Data(L.LightningDataModule):
    """Two clips with two views each, the second of which is zero."""

    def test_dataloader(self) -> Any:
        return [(clips(2), torch.zeros(2).long())]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return torch.stack([batch[0], torch.zeros_like(batch[0])], dim=1), batch[1]


class Task(L.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
