"""The test for a server, directly or through a proxy."""

import socket
from collections.abc import Iterator

import pytest

from fewtokens.network import responds

CLOSED = "http://127.0.0.1:1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http", "https", "all", "no"):
        for variable in (f"{name}_proxy", f"{name}_proxy".upper()):
            monkeypatch.delenv(variable, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_without_a_proxy_the_server_is_asked(server: str) -> None:
    assert responds(f"http://{server}/path", 1.0)
    assert not responds(CLOSED, 1.0)
    assert not responds("no url", 1.0)
    assert not responds("http://127.0.0.1:port", 1.0)


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
@pytest.mark.parametrize("scheme", ["", "http://"])
def test_with_a_proxy_the_proxy_is_asked(monkeypatch, server: str, variable: str, scheme: str) -> None:
    monkeypatch.setenv(variable, scheme + server)
    assert responds(CLOSED, 1.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert not responds(CLOSED, 1.0)
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv(variable, f"{scheme}127.0.0.1:1")
    assert not responds(f"http://{server}", 1.0)
