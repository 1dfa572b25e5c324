"""Reproduce the table of the Keras TokenLearner example: train every row with several seeds, then write csv and page.

    python -m fewtokens.benchmarks.keras_table --seeds 0,1,2,3,4 --root data/cifar10       (or --table-only)

Finished runs are skipped, and interrupted ones are resumed. Rows of docs/results/cifar10_keras.csv that come from other
machines are kept. The page beside the csv is written from it and from the models, whose cost is counted.
"""

import argparse
import itertools
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from fewtokens.benchmarks.children import HOME, run_child
from fewtokens.benchmarks.keras_table import table as keras_table
from fewtokens.errors import FewtokensError
from fewtokens.runs import report

TABLE = HOME / "docs" / "results" / "cifar10_keras.csv"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, 1 if a run failed, or 130 if the command was interrupted."""
    args = _parser().parse_args(argv)
    args.root, args.outputs = args.root.expanduser().resolve(), args.outputs.resolve()
    failures: list[str] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is handled like Ctrl-C
    try:
        rows = _rows(args.rows)
        if not args.table_only:
            keras_table.dataset_name(args.root)  # raises an error before the first run, if there are no data
            failures += train_all(rows, [int(seed) for seed in args.seeds.split(",")], args)
        failures += tabulate(args)
    except FewtokensError as error:
        failures.append(str(error))
    except KeyboardInterrupt:
        print("Interrupted. The same command continues from here.", file=sys.stderr)
        return 130
    for failure in failures:
        print(f"Error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def train_all(rows: Sequence[str], seeds: Sequence[int], args: argparse.Namespace) -> list[str]:
    """Run what is missing. Each seed is run for all rows, so that an early stop leaves all rows with equal seeds.

    Returns:
        A sentence for each run that failed.
    """
    failures = []
    for seed, row in itertools.product(seeds, rows):
        try:
            arguments = arguments_of(row, seed, args)
            print(f"{row}, seed {seed}: {'already finished' if arguments is None else ' '.join(arguments)}", flush=True)
            if arguments is not None and (code := run_child(["train.py", *arguments])):
                failures.append(f"{row}, seed {seed}: train.py ended with exit code {code}")
        except FewtokensError as error:
            failures.append(f"{row}, seed {seed}: {error}")
    return failures


def arguments_of(row: str, seed: int, args: argparse.Namespace) -> list[str] | None:
    """Return the arguments of train.py that start or resume a run, or None if it is finished.

    Raises:
        FewtokensError: The folder contains a run of another precision.
    """
    folder = args.outputs / row / str(seed)
    if (folder / "config.yaml").is_file():
        found = str(OmegaConf.load(folder / "config.yaml").trainer.precision)
        if found != args.precision:
            raise FewtokensError(
                f"{folder} contains a run in {found}, but `--precision` is {args.precision}. Set another `--outputs`."
            )
    if report.read(folder) is not None:
        return None
    if (folder / "checkpoints" / "last.ckpt").is_file():
        return [f"resume={folder}"]
    (folder / "metrics.csv").unlink(missing_ok=True)  # the new run would append to that of one killed in epoch 1
    fixed = [
        f"experiment=cifar10/{row}",
        f"seed={seed}",
        f"data.root={args.root}",
        f"trainer.precision={args.precision}",
    ]
    return [*fixed, "measure=cost", f"hydra.run.dir={folder}", *args.overrides]


def tabulate(args: argparse.Namespace) -> list[str]:
    """Write the csv and the page, and return a sentence for each finished run that cannot be read."""
    new, failures = [], []
    for path in sorted(args.outputs.glob("keras_*/*/report.json")):
        try:
            new.append(keras_table.collect(path.parent, args.data_name))
        except (FewtokensError, OSError, KeyError, ValueError, AttributeError) as error:
            failures.append(f"{path.parent}: {error}")
    keras_table.write(keras_table.merge(keras_table.read(args.table), new), args.table)
    return failures


def _rows(names: str | None) -> list[str]:
    rows = names.split(",") if names else list(keras_table.PUBLISHED)
    if unknown := [row for row in rows if row not in keras_table.PUBLISHED]:
        raise FewtokensError(f"`--rows` must be some of {', '.join(keras_table.PUBLISHED)}, got {', '.join(unknown)}.")
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2,3,4", help="seeds of every row (default: %(default)s)")
    parser.add_argument("--root", type=Path, default=Path("data/cifar10"), help="folder of CIFAR-10")
    parser.add_argument("--rows", help=f"some of {', '.join(keras_table.PUBLISHED)} (default: all)")
    parser.add_argument("--precision", default="32-true", help="32-true, as in the example, or bf16-mixed")
    parser.add_argument("--outputs", type=Path, default=Path("outputs/cifar10_keras"), help="folder of the runs")
    parser.add_argument("--table", type=Path, default=TABLE, help="csv file; the page is written beside it")
    parser.add_argument("--table-only", action="store_true", help="run nothing, only tabulate the finished runs")
    parser.add_argument("--data-name", help="name of the data in the table (default: from what --root contains)")
    parser.add_argument(
        "overrides",
        nargs="*",
        help="overrides of all new runs; data.split=tail, with the archive, is the example's split",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
