"""The Keras TokenLearner example's table, made again: every row with several seeds, then one csv and one page from it.

    python -m fewtokens.benchmarks.keras_table --seeds 0,1,2,3,4 --root data/cifar10       (or --table-only)

Finished runs are left as they are, interrupted ones go on. Lines of docs/results/cifar10_keras.csv that come from other
machines stay; the page beside it is written from the csv and from the costs of the models, counted anew.
"""

import argparse
import itertools
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from fewtokens.benchmarks.keras_table import table as keras_table
from fewtokens.errors import FewtokensError
from fewtokens.runs import report

HOME = Path(__file__).parents[4]
TABLE = HOME / "docs" / "results" / "cifar10_keras.csv"


def decide(row: str, seed: int, args: argparse.Namespace) -> list[str] | None:
    """Arguments of train.py: to start the run, to go on with it, or None where it is finished.

    Raises:
        FewtokensError: The folder holds a run of another precision.
    """
    folder = args.outputs / row / str(seed)
    if (folder / "config.yaml").is_file():
        found = str(OmegaConf.load(folder / "config.yaml").trainer.precision)
        if found != args.precision:
            raise FewtokensError(
                "A folder holds one run",
                expected=args.precision,
                got=f"{found} in {folder}",
                fix="set another --outputs",
            )
    if report.read(folder) is not None:
        return None
    if (folder / "checkpoints" / "last.ckpt").is_file():
        return [f"resume={folder}"]
    (folder / "metrics.csv").unlink(missing_ok=True)  # of a run that broke off in its first epoch: the new one appends
    fixed = [
        f"experiment=cifar10/{row}",
        f"seed={seed}",
        f"data.root={args.root}",
        f"trainer.precision={args.precision}",
    ]
    return [*fixed, "measure=cost", f"hydra.run.dir={folder}", *args.overrides]


def run(arguments: Sequence[str]) -> int:
    """Run train.py; an interruption asks it to save at the next step and waits for that.

    Returns:
        Its exit code.
    """
    # A stop that comes while the child is being started must find a child to pass it on to: noted, and raised below.
    noted: list[int] = []
    handlers = {n: signal.signal(n, lambda number, _: noted.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    # In a session of its own Ctrl-C does not reach the child, which would lose the epoch; on SIGTERM it saves.
    child = subprocess.Popen([sys.executable, str(HOME / "train.py"), *arguments], cwd=HOME, start_new_session=True)
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if noted:
            raise KeyboardInterrupt
        return child.wait()
    except KeyboardInterrupt:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise


def train_all(rows: Sequence[str], seeds: Sequence[int], args: argparse.Namespace) -> list[str]:
    """Run what is missing, seed by seed, so that an early stop leaves every row with as many seeds.

    Returns:
        A sentence for each run that failed.
    """
    failures = []
    for seed, row in itertools.product(seeds, rows):
        try:
            arguments = decide(row, seed, args)
            print(f"{row}, seed {seed}: {'finished before' if arguments is None else ' '.join(arguments)}", flush=True)
            if arguments is not None and (code := run(arguments)):
                failures.append(f"{row}, seed {seed}: train.py ended with exit code {code}")
        except FewtokensError as error:
            failures.append(f"{row}, seed {seed}: {error}")
    return failures


def tabulate(args: argparse.Namespace) -> list[str]:
    """Write the csv and the page; a sentence for each finished run that could not be read."""
    new, failures = [], []
    for path in sorted(args.outputs.glob("keras_*/*/report.json")):
        try:
            new.append(keras_table.collect(path.parent, args.data_name))
        except (FewtokensError, OSError, KeyError, ValueError, AttributeError) as error:
            failures.append(f"{path.parent}: {error}")
    keras_table.write(keras_table.merge(keras_table.read(args.table), new), args.table)
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, run, write the table; 1 if a run failed, 130 if interrupted."""
    args = _parser().parse_args(argv)
    args.root, args.outputs = args.root.expanduser().resolve(), args.outputs.resolve()
    failures: list[str] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    try:
        rows = args.rows.split(",") if args.rows else list(keras_table.PUBLISHED)
        if unknown := [row for row in rows if row not in keras_table.PUBLISHED]:
            known = ", ".join(keras_table.PUBLISHED)
            raise FewtokensError(
                "--rows names rows of the table", expected=known, got=unknown, fix="check the spelling"
            )
        if not args.table_only:
            keras_table.dataset_name(args.root)  # now, and not once per run
            failures += train_all(rows, [int(seed) for seed in args.seeds.split(",")], args)
        failures += tabulate(args)
    except FewtokensError as error:
        failures.append(str(error))
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    for failure in failures:
        print(f"Error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--root", type=Path, default=Path("data/cifar10"), help="folder of CIFAR-10")
    parser.add_argument("--rows", help=f"some of {', '.join(keras_table.PUBLISHED)}; all by default")
    parser.add_argument("--precision", default="32-true", help="32-true, as the example, or bf16-mixed")
    parser.add_argument("--outputs", type=Path, default=Path("outputs/cifar10_keras"), help="folder of the runs")
    parser.add_argument("--table", type=Path, default=TABLE, help="the csv; the page lies beside it")
    parser.add_argument("--table-only", action="store_true", help="collect what is finished, run nothing")
    parser.add_argument("--data-name", help="name of the data in the table; by default from what --root holds")
    parser.add_argument(
        "overrides", nargs="*", help="of all new runs: data.split=tail, with the archive, is the example's"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
