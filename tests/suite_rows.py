"""Rows of the suite without its runs."""

from typing import Any

from fewtokens.benchmarks.suite.trials import FINE_TUNED, OFF_THE_SHELF


def row(part: str, method: str, accuracy: float, gmacs: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    """Return the row of a run."""
    known = {"part": part, "method": method, "wanted": None, "seed": seed, "accuracy": accuracy, "gmacs": gmacs,
             "gmacs_std": 0.0, "share": gmacs / 2, "commit": "c0ffee00", "date": "2026-01-01", "measured_on": "CPU",
             "command": f"python train.py tokenizer={method}"}  # fmt: skip
    return known | more


def suite_content() -> dict[str, Any]:
    """Return what a json file of the suite holds."""
    rows = [
        row(OFF_THE_SHELF, "none", 0.9, 2.0),
        row(OFF_THE_SHELF, "tome build.r=[1,2]", 0.85, 1.0),
        row(OFF_THE_SHELF, "ats build.budget=9", 0.7, 1.2, gmacs_std=0.1),
        row(FINE_TUNED, "none", 0.91, 2.0),
        row(FINE_TUNED, "tome build.r=[1,2]", 0.86, 1.0, seed=0),
        row(FINE_TUNED, "tome build.r=[1,2]", 0.88, 1.0, seed=1),
        row(FINE_TUNED, "token_learner at=3 build.num_tokens=8", 0.8, 0.6),
        row(FINE_TUNED, "token_learner at=6 build.num_tokens=8", 0.87, 1.1),
    ]
    speed = [{"tokenizer": name, "batch": 32, "precision": "32-true", "device": "CPU", "rounds": 7,
              "speedup_vs_dense": ratio, "images_per_s": 100 * ratio}
             for name, ratio in (("none", 1.0), ("tome build.r=[1,2]", 1.9))]  # fmt: skip
    protocol = {"title": "Methods on a model", "backbone": "vit", "weights": "ab" * 32, "image_size": 32,
                "data": "digits", "metric": "test/top1", "test_images": 100, "counted_images": 4}  # fmt: skip
    return {**protocol, "rows": rows, "speed": speed}
