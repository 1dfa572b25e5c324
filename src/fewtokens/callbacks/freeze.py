"""Training of a part of the model only: of the head, of the tokenizers, or of the last layers."""

import re
from collections.abc import Iterator

from lightning.pytorch import Callback, LightningModule, Trainer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fewtokens.analysis.evaluation import unwrap_compiled
from fewtokens.backbones.vit import ViT
from fewtokens.errors import FewtokensError

LAYER = re.compile(r"^encoder\.layers\.(\d+)\.")


class Freeze(Callback):
    """Keeps the parameters of a part of the model as they are, and this part in evaluation mode.

    Dropout and stochastic depth are off in frozen modules.

    Args:
        part: "backbone": all but the head (linear probing). "blocks": all but the head and the tokenizers.
            "encoder[:4]": the embedding and the first four layers, with their tokenizers. In a model with a second
            encoder over time, "encoder" is the first one.
    """

    def __init__(self, part: str) -> None:
        self.part = part
        self.frozen: list[nn.Module] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze the parameters, before the optimizer gets those that are left.

        Raises:
            FewtokensError: The part has another name, or nothing would be left to train.
        """
        if stage != "fit":
            return
        model = unwrap_compiled(pl_module.model)
        names = frozen_names(model, self.part)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name not in names)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise FewtokensError(f"`callbacks.freeze.part` leaves nothing to train, got {self.part!r}.")
        modules = [(module, list(module.parameters())) for module in model.modules()]
        self.frozen = [module for module, own in modules if own and not any(p.requires_grad for p in own)]
        self.frozen += _dropouts_of_frozen_embeddings(model)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the frozen modules to evaluation mode, after Lightning has set all modules to training mode."""
        for module in self.frozen:
            module.eval()


def _dropouts_of_frozen_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the dropout of positions and patches, which is no part of a module with frozen parameters only."""
    for vit in model.modules():
        if isinstance(vit, VisionTransformer):
            stem = str(vit.group_matcher()["stem"])
            embedding = [parameter for name, parameter in vit.named_parameters() if re.match(stem, name)]
            if not any(parameter.requires_grad for parameter in embedding):
                yield from (vit.pos_drop, vit.patch_drop)


def frozen_names(model: ViT, part: str) -> set[str]:
    """Return the names of the parameters in a part of the model.

    Args:
        model: The model.
        part: See `Freeze`.

    Raises:
        FewtokensError: There is no such part.
    """
    names = {name for name, _ in model.named_parameters() if ".head" not in name}
    if part == "backbone":
        return names
    if part == "blocks":
        return {name for name in names if ".tokenizer." not in name}
    if found := re.fullmatch(r"encoder\[:(\d+)\]", part):
        layers, stem = int(found.group(1)), str(model.group_matcher()["stem"])
        of_layers = {name: int(layer.group(1)) for name in names if (layer := LAYER.match(name))}
        return {name for name in names if re.match(stem, name) or of_layers.get(name, layers) < layers}
    raise FewtokensError(
        f"`callbacks.freeze.part` must be 'backbone', 'blocks' or 'encoder[:<number of layers>]', got {part!r}."
    )
