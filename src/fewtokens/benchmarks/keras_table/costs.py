"""What the models of the Keras example cost, in both counts, without training them."""

from collections.abc import Iterable

import torch
from hydra import compose, initialize_config_dir

from fewtokens.analysis.cost import macs
from fewtokens.benchmarks.keras_table.profiler_count import keras_flops
from fewtokens.runs.cli import CONFIGS
from fewtokens.runs.targets import instantiate


def costs(rows: Iterable[str]) -> dict[str, tuple[float, float]]:
    """GMACs per image, and the example's count of them, of each experiment in configs/experiment/cifar10/."""
    found = {}
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for row in rows:
            cfg = compose("train", [f"experiment=cifar10/{row}"])
            model = instantiate(cfg.backbone).eval()
            image = torch.zeros(1, cfg.data.channels, cfg.data.image_size, cfg.data.image_size)
            found[row] = (macs(model, image) / 1e9, keras_flops(model) // 2 / 1e9)
    return found
