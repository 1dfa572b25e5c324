"""Count the memory that a training step holds, without computing it: which models need FSDP?

    python -m fewtokens.benchmarks.training_memory          (out=docs/results/training_memory.json)

Torch's fake tensors have shapes but no data, so that models of any size are counted on any machine, as they would run
on a CPU: attention is fused, and what a kernel allocates for itself is not included.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fewtokens.analysis.memory import peak_bytes
from fewtokens.analysis.throughput import autocast
from fewtokens.files import CONFIGS, write_json
from fewtokens.runs import report
from fewtokens.runs.config import instantiate
from fewtokens.tasks.optim import parameter_groups

GIB = 2**30
MODELS = {
    "ViT-B/16": ["data=imagenet", "backbone=vit_base"],
    "ViT-L/16": ["data=imagenet", "backbone=vit_large"],
    "ViViT-B/16x2": ["data=kinetics400", "backbone=vivit_base"],
    "ViViT-L/16x2": ["data=kinetics400", "backbone=vivit_large"],
    "ViViT-L/16x2, TokenLearner": ["data=kinetics400", "backbone=vivit_large", "tokenizer=token_learner"],
}
BATCHES = (8, 16)  # sizes, from which the memory of a sample and of what does not depend on it follow


def build(overrides: list[str]) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a model and the shape of one sample.

    Args:
        overrides: Options of the config.
    """
    plain = [] if any(part.startswith("tokenizer=") for part in overrides) else ["tokenizer=none"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", [*overrides, *plain])
    frames = [cfg.data.frames] if cfg.data.frames > 1 else []
    return instantiate(cfg.backbone), (cfg.data.channels, *frames, cfg.data.image_size, cfg.data.image_size)


def without_data(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Replace the parameters and buffers of a model by fake ones. Timm's constructors need real numbers."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: mode.from_tensor(t) for name, t in tensors.items() if t is not None})  # type: ignore[arg-type]
    return model


def count(overrides: list[str], checkpointing: bool, precision: str) -> dict[str, Any]:
    """Return the bytes of a training step: parameters, gradients, AdamW's state, and activations of a sample.

    Args:
        overrides: Options of the config, which name the model.
        checkpointing: Whether activations are recomputed in the backward pass.
        precision: "32-true" or "bf16-mixed".
    """
    device = torch.device("cpu")
    model, shape = build([*overrides, f"backbone.grad_checkpointing={str(checkpointing).lower()}"])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        without_data(model, mode).train()
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.05))

        def step(images: torch.Tensor) -> None:
            with autocast(device, precision):
                loss = model(images).float().square().mean()
            loss.backward()

        peaks = [peak_bytes(lambda size=size: step(torch.zeros(size, *shape)), device) for size in BATCHES]  # type: ignore[misc]
        optimizer.step()
        state = [value for entries in optimizer.state.values() for value in entries.values()]
        parameters = list(model.parameters())
    per_sample = (peaks[1] - peaks[0]) // (BATCHES[1] - BATCHES[0])
    return {
        "overrides": overrides,
        "checkpointing": checkpointing,
        "precision": precision,
        "parameters": sum(p.numel() for p in parameters),
        "parameter_bytes": sum(p.nbytes for p in parameters),
        "gradient_bytes": sum(p.grad.nbytes for p in parameters if p.grad is not None),
        "optimizer_bytes": sum(value.nbytes for value in state if isinstance(value, torch.Tensor)),
        "bytes_per_sample": per_sample,
        "other_bytes": peaks[0] - BATCHES[0] * per_sample,  # such as copies of the weights in bfloat16
    }


def table(records: list[dict[str, Any]]) -> str:
    """Return the records as a Markdown table, in GiB."""
    lines = [
        "| model | parameters | weights, gradients, AdamW | a sample | with checkpointing |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(record["model"] for record in records):
        plain, saved = sorted((r for r in records if r["model"] == name), key=lambda r: r["checkpointing"])
        fixed = sum(plain[f"{part}_bytes"] for part in ("parameter", "gradient", "optimizer")) / GIB
        samples = [f"{record['bytes_per_sample'] / GIB:.2f}" for record in (plain, saved)]
        lines.append(f"| {name} | {plain['parameters'] / 1e6:.1f} M | {fixed:.2f} | {samples[0]} | {samples[1]} |")
    return "\n".join(lines)


def main() -> int:
    """Count all models, print the table, and write the records."""
    settings = {"out": "docs/results/training_memory.json"} | dict(OmegaConf.from_cli())
    records = [
        {"model": name, **count(overrides, checkpointing, "bf16-mixed")}
        for name, overrides in MODELS.items()
        for checkpointing in (False, True)
    ]
    origin = {"command": "python -m fewtokens.benchmarks.training_memory", "versions": report.versions()}
    write_json({**origin, "commit": report.commit(), "records": records}, Path(str(settings["out"])))
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
