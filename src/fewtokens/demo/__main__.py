"""Show a model in the browser: python -m fewtokens.demo [key=value ...]."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from fewtokens.errors import FewtokensError, check
from fewtokens.runs.cli import command
from fewtokens.runs.config import CONFIGS

IMAGENET_CLASSES = 1000


def main() -> None:
    """Run the command."""
    command("demo", run)


def run(cfg: DictConfig) -> None:
    """Serve the page until Ctrl-C.

    Args:
        cfg: The composed config, see configs/demo.yaml.

    Raises:
        FewtokensError: Gradio is not installed, a setting is invalid, or the model cannot be shown.
    """
    _check(cfg)
    if importlib.util.find_spec("gradio") is None:
        raise FewtokensError("The demo needs Gradio. Install it with: pip install -e '.[demo]', or run: make demo")
    overrides = list(HydraConfig.get().overrides.task)
    if cfg.checkpoint is None and not any(part.startswith(("backbone", "experiment=")) for part in overrides):
        found = default_run(Path(cfg.paths.outputs)) or train_default(Path(cfg.paths.outputs))
        print(f"Model: {found} (another one with checkpoint=<run>, or backbone=timm backbone.weights=<file>)")
        cfg = hydra.compose("demo", [*overrides, f'checkpoint="{found}"'])
    from fewtokens.demo import page  # imports torch and gradio, which takes seconds

    page.serve(cfg, *build(cfg))


def build(cfg: DictConfig) -> tuple[Any, list[Any], str]:
    """Return the predictor of a config, its example pictures, and a description of the model.

    Args:
        cfg: The composed config.
    """
    import torch

    from fewtokens.analysis.evaluation import unwrap_compiled
    from fewtokens.data.transforms.normalize import Pipeline
    from fewtokens.demo import images
    from fewtokens.demo.inference import Predictor
    from fewtokens.runs import eval as evaluation
    from fewtokens.runs.config import instantiate
    from fewtokens.runs.job import start

    start(cfg)
    task, data = instantiate(cfg.task), instantiate(cfg.data)
    evaluation.load_weights(cfg, task)
    task.to("cuda" if torch.cuda.is_available() else "cpu")
    model, pipeline = unwrap_compiled(task.model), Pipeline((), data.mean, data.std)
    check(len(model.sample_shape) == 3, "checkpoint", "a model of images; the demo shows no clips", "one of clips")
    pictures = images.examples(task, data, pipeline)
    predictor = Predictor(model, pipeline, class_names(cfg, data), float(cfg.seconds))
    channels, height, width = model.sample_shape
    side = model.encoder.tokenizers[0].context.grid
    source = cfg.checkpoint or cfg.backbone.get("weights") or ("pretrained" if cfg.backbone.get("pretrained") else "")
    named = Path(str(source)).name if source else "random weights"
    kind = cfg.backbone.get("name") or cfg.backbone._target_.rpartition(".")[2]
    about = (
        f"{kind} ({named}): pictures of {height} x {width} pixels with {channels} channel{'s' * (channels > 1)}, "
        f"{side[0]} x {side[1]} patches, {len(model.encoder.layers)} blocks"
    )
    return predictor, pictures, about


def class_names(cfg: DictConfig, data: Any) -> list[str] | None:
    """Return the names of the classes, or None if the weights come without a head that was trained for them."""
    count = int(cfg.data.num_classes)
    if cfg.checkpoint is None and cfg.backbone.get("weights"):
        from fewtokens.backbones.pretrained import read_weights

        head = read_weights(Path(cfg.backbone.weights)).get("head.weight")
        if head is None or len(head) != count:
            return None
    from fewtokens.analysis import evaluation

    if count == IMAGENET_CLASSES and not data.class_names:
        from timm.data import ImageNetInfo

        return [ImageNetInfo().index_to_description(index) for index in range(count)]
    return evaluation.class_names(data, count)


def default_run(outputs: Path) -> Path | None:
    """Return the newest finished run of the default job below a folder, or None."""
    from fewtokens.files import checkpoint_in
    from fewtokens.runs.pages import record

    defaults = _default_choices()
    found = []
    for path in (outputs / defaults["data"]).glob("*/run.json"):
        run = record.read_run(path.parent)
        same = all(run.choices.get(group) == option for group, option in defaults.items())
        if run.status == "finished" and same and checkpoint_in(path.parent) is not None:
            found.append((run.about.get("started", ""), path.parent))
    return max(found)[1] if found else None


def train_default(outputs: Path) -> Path:
    """Train the default job, with its progress in the terminal, and return the directory of the run.

    Raises:
        FewtokensError: The training fails.
    """
    print("There is no finished run of the default job yet, so it is trained first. This takes about two minutes.")
    root = CONFIGS.parent
    paths = [str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The stamp and run directory of this command are not those of the training.
    inherited = {k: v for k, v in os.environ.items() if k not in ("FEWTOKENS_STAMP", "FEWTOKENS_RUN_DIR")}
    environment = inherited | {"PYTHONPATH": os.pathsep.join(paths)}
    arguments = [sys.executable, str(root / "train.py"), f'paths.outputs="{outputs}"']
    code = subprocess.run(arguments, check=False, env=environment).returncode
    found = default_run(outputs) if code == 0 else None
    if found is None:
        raise FewtokensError(
            f"The training of the default job ended with exit code {code} and left no finished run in {outputs}. Run "
            "python train.py, or give a model with checkpoint=<run>."
        )
    return found


def _default_choices() -> dict[str, str]:
    """Return the options of the default job that make up its model and its data."""
    entries: Sequence[Any] = OmegaConf.to_container(OmegaConf.load(CONFIGS / "train.yaml"))["defaults"]  # type: ignore
    chosen = {group: option for entry in entries if isinstance(entry, dict) for group, option in entry.items()}
    return {group: chosen[group] for group in ("backbone", "tokenizer", "data")}


def _check(cfg: DictConfig) -> None:
    check(isinstance(cfg.host, str) and cfg.host != "", "host", "an address such as 127.0.0.1", cfg.host)
    check(isinstance(cfg.port, int) and 0 < cfg.port < 65536, "port", "an int from 1 to 65535", cfg.port)
    waiting = cfg.max_waiting
    check(isinstance(waiting, int) and waiting >= 1, "max_waiting", "an int >= 1", waiting)
    for name in ("max_megabytes", "max_megapixels", "seconds"):
        valid = isinstance(cfg[name], int | float) and 0 < cfg[name] <= 1000
        check(valid, name, "a number above 0 and at most 1000", cfg[name])


if __name__ == "__main__":
    main()
