"""Fully sharded data parallel training (FSDP2): every process holds a part of the parameters and of their state.

Every `EncoderLayer` is gathered when it is needed, and the model is sharded in training only: evaluation, in which a
process may have more batches than another one, runs with the whole model in every process.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from fewtokens.backbones.encoder import EncoderLayer
from fewtokens.errors import FewtokensError, check_choice

NAME = (
    "fsdp2"  # value of `trainer.strategy`; "fsdp" is Lightning's name for the older FSDP, which has other checkpoints
)


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with the checkpoints of a single process.

    Rank 0 gathers the state and writes one file, as without sharding. It has neither the pickled metadata of torch's
    sharded checkpoints nor their dependence on the number of processes, and every command reads it.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)
        self._whole: nn.Module | None = None

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Return True: Lightning restores the optimizer from the loaded checkpoint, as it does in one process."""
        return True

    def setup_environment(self) -> None:
        """Start the process group, and shard over all its processes."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def shard(self, model: nn.Module) -> None:
        """Shard a model before training.

        Parameters are gathered in float32, and automatic mixed precision computes with them as it does with DDP. In
        bfloat16, half as many bytes would travel, but norms would not accept their weights on every device, and
        positions would turn the whole residual stream into bfloat16.
        """
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING or isinstance(model, FSDPModule):
            return
        self._whole = _without_parameters(model)
        model.to(self.root_device)
        self.shard_layers(model)

    def shard_layers(self, model: nn.Module) -> None:
        """Shard every layer of a model, and what is outside of the layers."""
        mesh = self.device_mesh["data_parallel"]
        for layer in model.modules():
            if isinstance(layer, EncoderLayer):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def on_validation_start(self) -> None:
        """Gather the parameters and keep them, so that a forward pass waits for no other process."""
        for module in self._sharded():
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()

    def on_validation_end(self) -> None:
        """Free the gathered parameters."""
        for module in self._sharded():
            module.set_reshard_after_forward(isinstance(module, EncoderLayer), recurse=False)
            module.reshard()

    def on_train_end(self) -> None:
        """Replace the sharded model of the task by a whole one."""
        if self._whole is not None:
            task, whole = self.lightning_module, self._whole
            state = {name: value.full_tensor() if isinstance(value, DTensor) else value
                     for name, value in task.model.state_dict().items()}  # fmt: skip
            whole.load_state_dict(state, assign=True)
            task.model, self._whole = whole.to(self.root_device), None

    def _sharded(self) -> list[FSDPModule]:
        return [module for module in self.lightning_module.modules() if isinstance(module, FSDPModule)]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the state of the task, complete on rank 0."""
        return self._gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimizer, complete on rank 0."""
        return self._gathered(optimizer.state_dict())

    def _gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        def gather(value: DTensor) -> Tensor | None:
            whole = value.full_tensor()
            return whole.cpu() if self.is_global_zero else None

        return tree_map_only(DTensor, gather, state)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> dict[str, Any]:
        """Return the content of a checkpoint, which every process reads by itself."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this process's part of the task's state."""
        own = self.lightning_module.state_dict()
        state = {name: _part_of(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this process's part of the state of the optimizers."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            own = dict(zip(numbers, parameters, strict=True))
            state = {
                number: {name: _part_of(value, own[number]) for name, value in entries.items()}
                for number, entries in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


StrategyRegistry.register(NAME, FullySharded, description="FSDP2 with checkpoints in one file")


def check_settings(trainer: DictConfig, callbacks: Sequence[Callback]) -> None:
    """Raise an error for settings that do not work with a sharded model.

    Args:
        trainer: `trainer` of the config.
        callbacks: Callbacks of the run.

    Raises:
        FewtokensError: One of them cannot be used.
    """
    if trainer.strategy != NAME:
        return
    check_choice("trainer.precision", str(trainer.precision), ("32-true", "32", "bf16-mixed"))
    check_choice("trainer.num_sanity_val_steps", trainer.num_sanity_val_steps, (0,))
    if any(isinstance(callback, WeightAveraging) for callback in callbacks):
        raise FewtokensError("`callbacks.ema` does not work with a sharded model. Use trainer=ddp, or ~callbacks.ema.")


def _without_parameters(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which parameters take no memory. What is compiled in place is compiled there, too."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    whole = copy.deepcopy(model, memo)
    for module, other in zip(model.modules(), whole.modules(), strict=True):
        if module._compiled_call_impl is not None:
            other.compile()
    return whole


def _part_of(value: Any, own: Any) -> Any:
    """Return this process's part of a tensor that is stored like `own`; other values as they are."""
    if not (isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
