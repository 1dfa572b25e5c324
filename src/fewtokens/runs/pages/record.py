"""What a run has written into its directory, read as data: files may be missing, cut short, or from somebody else."""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from fewtokens.errors import FewtokensError, first_line
from fewtokens.runs.config import CONFIG

Point = tuple[float, float]
FILES = ("run.json", "report.json", CONFIG)
# Real files are far smaller. Larger ones are not read, since parsing them could take minutes.
MAX_JSON, MAX_CONFIG, MAX_METRICS = 4 * 2**20, 256 * 2**10, 16 * 2**20
MAX_SETTINGS = 5000  # a small YAML file can name its parts often enough to describe billions of values
MAX_TEXT = 10_000  # characters


@dataclass(frozen=True)
class RunRecord:
    """A run as its directory describes it.

    Args:
        path: The directory.
        numbers: The finite numbers of report.json; none if the run has not finished.
        about: The texts and numbers of run.json, as texts: `name`, `status`, `command`, `commit`, `device` ...
        choices: The option that was chosen in each group of the config.
        versions: Versions of the packages.
        traceback: Lines of the traceback, if an unexpected error ended the run.
        problems: A sentence for each file or value that cannot be used.
    """

    path: Path
    numbers: dict[str, float] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    traceback: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return the name of the run, or of its directory if it has none."""
        return self.about.get("name") or self.path.resolve().name

    @property
    def status(self) -> str:
        """Return how the run ended: finished, stopped or failed; "started" if it has not ended; or "unknown"."""
        return self.about.get("status", "finished" if self.numbers else "unknown")

    def choice(self, group: str, settings: Mapping[str, str]) -> str:
        """Return the option of a group of the config, or the class that it builds if the command did not choose it.

        Args:
            group: Such as "tokenizer".
            settings: The config of the run, see `read_settings`.
        """
        chosen = self.choices.get(group, "run")  # "run": the choice of another run, whose checkpoint is evaluated
        target = settings.get(f"{group}.build._target_") or settings.get(f"{group}._target_", "")
        return chosen if chosen != "run" else target.rpartition(".")[2]

    @property
    def kind(self) -> str:
        """Return what the run did: training, evaluation, or just "run" if its command does not tell."""
        program = self.about.get("command", "").split(" ")[1:2]
        return {"train.py": "training", "eval.py": "evaluation"}.get("".join(program), "run")


def is_run(path: Path) -> bool:
    """Return whether a directory contains one of the files by which a run is known."""
    return any((path / name).is_file() for name in FILES)


def read_run(path: Path) -> RunRecord:
    """Read report.json and run.json of a run.

    Args:
        path: Directory of the run.

    Raises:
        FewtokensError: The directory does not exist, or contains none of the files of a run.
    """
    if not is_run(path):
        raise FewtokensError(
            f"{path} is not the directory of a run: it contains none of {', '.join(FILES)}. Give a directory that "
            "train.py or eval.py has written."
        )
    problems: list[str] = []
    report, about = (_read_json(path / name, problems) for name in ("report.json", "run.json"))
    plain = {name: value for name, value in report.items() if not isinstance(value, str)}
    numbers = {name: number for name, value in plain.items() if (number := _number(value)) is not None}
    if len(numbers) < len(report):
        count = len(report) - len(numbers)
        problems.append(f"{path / 'report.json'} has {count} values that are not finite numbers. They are not shown.")
    traceback = about.get("traceback")
    return RunRecord(
        path,
        numbers,
        _texts(about),
        _texts(about.get("choices")),
        _texts(about.get("versions")),
        [_short(line) for line in traceback[-200:]] if isinstance(traceback, list) else [],
        problems,
    )


def read_settings(path: Path) -> dict[str, str]:
    """Return the saved config of a run as dotted keys and texts, which is empty if the run has none.

    Raises:
        FewtokensError: The file is too large, or not a YAML mapping of plain data.
    """
    text = config_text(path)
    try:
        config = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if text else {}
        if not isinstance(config, dict):
            raise yaml.YAMLError("it is not a mapping")
        settings = {}
        for number, (key, value) in enumerate(_leaves(config, "")):
            if number >= MAX_SETTINGS:
                raise yaml.YAMLError(f"it has more than {MAX_SETTINGS} values")
            settings[key] = value
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FewtokensError(
            f"{path / CONFIG} must be the config that train.py or eval.py has written, but reading it failed: "
            f"{first_line(error)}. Restore the file, or remove it."
        ) from error
    return settings


def config_text(path: Path) -> str:
    """Return the text of the saved config of a run, or an empty text.

    Raises:
        FewtokensError: The file is too large.
    """
    file = path / CONFIG
    if not file.is_file():
        return ""
    if file.stat().st_size > MAX_CONFIG:
        raise FewtokensError(f"{file} must be the config of a run, of at most {MAX_CONFIG:,} bytes. Restore the file.")
    return file.read_text(encoding="utf-8", errors="replace")


def read_metrics(path: Path) -> dict[str, list[Point]]:
    """Return (training step, value) for every metric in the metrics.csv of a run, without values that are not finite.

    The first `MAX_METRICS` characters are read. What is no number is skipped, as in a row that a kill has cut short.
    """
    file = path / "metrics.csv"
    curves: dict[str, list[Point]] = {}
    if not file.is_file():
        return curves
    with file.open(newline="", encoding="utf-8", errors="replace") as opened:
        reader = csv.DictReader(_lines(opened))
        try:
            for row in reader:
                step = _number(row.get("step"))
                for name, text in row.items() if step is not None else ():
                    value = _number(text) if text and isinstance(name, str) else None
                    if value is not None and name not in ("step", "epoch"):
                        curves.setdefault(name, []).append((step, value))  # type: ignore[arg-type]
        except csv.Error:  # such as a field that is larger than any number
            pass
    return curves


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    """Return a JSON object, or an empty one after noting the problem of a file that is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes()) if path.stat().st_size <= MAX_JSON else None
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        problems.append(f"{path} must be a json object, as train.py and eval.py write it. Remove the file.")
        return {}
    return content


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _texts(node: Any) -> dict[str, str]:
    """Return the entries of a mapping that are texts or numbers, as texts."""
    items = node.items() if isinstance(node, dict) else ()
    return {str(key): _short(value) for key, value in items if isinstance(value, str | int | float)}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ..."


def _leaves(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the text of every value. Lists of plain values are one value."""
    if isinstance(node, list) and len(node) <= 100 and not any(isinstance(part, dict | list) for part in node):
        yield key, _short(f"[{', '.join(map(_text, node))}]")
    elif isinstance(node, dict | list) and node:
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(value, f"{key}.{_text(name)}" if key else _text(name))
    else:
        yield key, _short(_text(node))


def _text(value: Any) -> str:
    words = {True: "true", False: "false", None: "null"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _lines(file: IO[str]) -> Iterator[str]:
    """Yield the lines of a file up to `MAX_METRICS` characters. A line without an end is cut into several."""
    remaining = MAX_METRICS
    while remaining > 0 and (line := file.readline(min(remaining, 2**20))):
        remaining -= len(line)
        yield line
