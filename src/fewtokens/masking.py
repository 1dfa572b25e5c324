"""Masking of secrets in whatever is written or printed: by the name of a key, and by the value."""

import logging
import os
import re
import sys
from typing import Any

MASK = "***"
SHORTEST = 8  # characters; a shorter value, such as 1 or true, stands for other things too
_NAME = (
    r"(?:\w*_)?(?:passw(?:or)?d|secret|credentials?"
    r"|(?:api|access|private|secret|auth)_?key|(?:hf|hub|api|access|auth|bearer|refresh|wandb|secret)_?token)"
)
_KEY = re.compile(_NAME, re.IGNORECASE)
_SETTING = re.compile(rf"(?<!\w)({_NAME}(?:=|: +))('[^']*'|\"[^\"]*\"|[^\s'\"]+)", re.IGNORECASE)
_VARIABLE = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_HARMLESS = re.compile(r"FEWTOKENS_|TOKENIZERS_", re.IGNORECASE)  # prefixes that contain "TOKEN"


def mask(text: str) -> str:
    """Return a text with secrets replaced by asterisks.

    Secrets are the values of environment variables such as WANDB_API_KEY and HF_TOKEN, and those of keys such as
    `api_key` on the command line, wherever they stand; and what follows `api_key=` or `api_key: `.
    """
    return _replaced(text, _known())


def masked(node: Any) -> Any:
    """Return the same tree of mappings, lists and values, with secrets masked in keys' values and in all texts."""
    return _masked(node, {*_known(), *_secrets_in(node)})


def mask_logs() -> None:
    """Mask the messages of all loggers from now on, also those of other packages."""
    make = logging.getLogRecordFactory()
    if getattr(make, "masks", False):
        return

    def make_masked(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            message = record.getMessage()
        except Exception:  # the arguments do not fit the message, which the logging module reports itself
            return record
        shown = mask(message)
        if shown != message:
            record.msg, record.args = shown, ()
        return record

    make_masked.masks = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_masked)


def _known() -> set[str]:
    """Return the secrets in the environment and on the command line."""
    names = {name: _HARMLESS.sub("", name) for name in os.environ}
    found = {os.environ[name] for name, rest in names.items() if _VARIABLE.search(rest)}
    given = (argument.partition("=") for argument in sys.argv[1:])
    found |= {value.strip("'\"") for key, _, value in given if _is_secret(key)}
    return {value for value in found if len(value) >= SHORTEST and not value.startswith(("/", "~"))}  # files of keys


def _is_secret(key: str) -> bool:
    return _KEY.fullmatch(key.rpartition(".")[2].lstrip("+~")) is not None


def _secrets_in(node: Any) -> set[str]:
    """Return the values of secret keys in a tree, which may stand elsewhere in it, too."""
    items = (
        node.items() if isinstance(node, dict) else [("", value) for value in node] if isinstance(node, list) else []
    )
    found = {
        value for key, value in items if _is_secret(str(key)) and isinstance(value, str) and len(value) >= SHORTEST
    }
    return found.union(*(_secrets_in(value) for _, value in items))


def _masked(node: Any, values: set[str]) -> Any:
    if isinstance(node, dict):
        return {
            key: MASK if _is_secret(str(key)) and value is not None else _masked(value, values)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [_masked(value, values) for value in node]
    return _replaced(node, values) if isinstance(node, str) else node


def _replaced(text: str, values: set[str]) -> str:
    for value in sorted(values, key=len, reverse=True):  # one may contain another
        text = text.replace(value, MASK)
    return _SETTING.sub(rf"\1{MASK}", text)
