"""Secrets are masked by the name of their key and by their value."""

import logging
import sys

import pytest

from fewtokens.masking import mask, mask_logs, masked


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "WANDB_API_KEY": "0123456789abcdef",
        "HF_TOKEN": "hf_abcdefgh",
        "DB_PASSWORD": "correct horse",
        "SHORT_KEY": "true",
        "KEY_FILE": "/home/me/key.pem",
        "FEWTOKENS_OUTPUTS": "outputs_of_mine",
        "TOKENIZERS_PARALLELISM": "false but longer",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", "+logger.wandb.secret='from the command line'"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("got 0123456789abcdef and hf_abcdefgh.", "got *** and ***."),
        ("a correct horse", "a ***"),
        ("xx from the command line", "xx ***"),
        ("python train.py +api_key=k seed=1", "python train.py +api_key=*** seed=1"),
        ("'+x.password=a b' seed=1", "'+x.password=*** b' seed=1"),
        ("x.hf_token='a b' y=1", "x.hf_token=*** y=1"),
        ("logger:\n  api_key: k\n  hf_token: 'a b'\n", "logger:\n  api_key: ***\n  hf_token: ***\n"),
        ("num_tokens: 8\nkey_dim: 16\nclass_token: true", None),
        ("num_tokens=8 key_dim=16 pool=token backbone.options.class_token=true", None),
        ("true, /home/me/key.pem, outputs_of_mine, false but longer", None),
    ],
)
def test_texts(text: str, shown: str | None) -> None:
    assert mask(text) == (text if shown is None else shown)


def test_trees() -> None:
    tree = {
        "api_key": "short",
        "hf_token": "own-token-of-this-config",
        "url": "https://own-token-of-this-config@host",
        "list": [{"SECRET": 3}, "hf_abcdefgh"],
        "password": None,
        "num_tokens": 8,
    }
    assert masked(tree) == {
        "api_key": "***",
        "hf_token": "***",
        "url": "https://***@host",
        "list": [{"SECRET": "***"}, "***"],
        "password": None,
        "num_tokens": 8,
    }


def test_logs(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    before = logging.getLogRecordFactory()
    try:
        mask_logs()
        mask_logs()
        logging.getLogger("any").warning("key %s, %d", "hf_abcdefgh", 3)
    finally:
        logging.setLogRecordFactory(before)
    assert caplog.messages == ["key ***, 3"]
