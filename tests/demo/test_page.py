"""The page, through its API and with requests that nobody should send. Skipped without Gradio."""

import base64
import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("gradio")
client = pytest.importorskip("gradio_client")
from gradio_client.exceptions import AppError  # noqa: E402

from fewtokens.demo import page  # noqa: E402


@pytest.fixture
def url(predictor, picture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    blocks = page.build(predictor(), [picture], "a small model")
    page.launch(blocks, "127.0.0.1", None, max_megabytes=0.1)
    yield blocks.local_url.rstrip("/")
    blocks.close(verbose=False)


def ask(url: str, data: bytes | None = None, **headers: str) -> tuple[int, str, dict[str, str]]:
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode(errors="replace"), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace"), dict(error.headers)


def raw(url: str, picture: dict[str, object]) -> str:
    """Return the answer to a call that the client would not send: it uploads the files that it is given."""
    body = {"data": [{**picture, "meta": {"_type": "gradio.FileData"}}, "top_k", 0.3]}
    _, text, _ = ask(
        f"{url}/gradio_api/call/predict", json.dumps(body).encode(), **{"Content-Type": "application/json"}
    )
    return ask(f"{url}/gradio_api/call/predict/{json.loads(text)['event_id']}")[1]


def test_the_api_answers_and_gives_nothing_away(url: str, hostile, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (40, 40), "blue").save(secret)
    api = client.Client(url, verbose=False, analytics_enabled=False, download_files=str(tmp_path / "down"))
    setting, top, dense, table, stages, legend, record = api.predict(
        client.handle_file(str(secret)), "top_k", 0.3, api_name="/predict"
    )
    assert setting == "`tokenizer=top_k tokenizer.build.keep_rate=0.669`"
    assert top["label"] in {"cat", "dog", "crane (2)", "crane (3)", "hen"}
    assert len(dense["confidences"]) == 5
    assert "GMACs" in table
    assert "dropped patches" in legend
    assert len(stages) == 4
    assert record["reduced"]["tokens"] == [65, 65, 44, 30, 21]
    assert record["dense"]["tokens"] == [65] * 5

    def refused(sent: object, method: object = "top_k", budget: object = 0.3) -> str:
        with pytest.raises((AppError, ValueError)) as error:
            api.predict(sent, method, budget, api_name="/predict")
        return str(error.value)

    # Files: hostile ones, and those of the machine that nobody has uploaded.
    assert "and at most 25 million pixels" in refused(client.handle_file(str(hostile["large.png"])))
    assert "pixels" in refused(client.handle_file(str(hostile["bomb.png"])))
    assert "no picture that can be read" in refused(client.handle_file(str(hostile["script.svg"])))
    for path in (str(secret), "/etc/passwd", f"{tmp_path}/uploads/../secret.png"):
        assert raw(url, {"path": path}).startswith("event: error")
        for query in (f"file={path}", f"file/{path}", f"file=../../..{path}", f"file=%2e%2e{path}"):
            assert ask(f"{url}/gradio_api/{query}")[0] in (403, 404, 405)
    pixel = base64.b64encode(secret.read_bytes()).decode()
    assert raw(url, {"path": None, "url": f"data:image/png;base64,{pixel}"}).startswith("event: error")
    assert raw(url, {"path": f"{url}/gradio_api/heartbeat/x"}).startswith("event: error")
    refused(client.handle_file(str(secret)), method="../../etc")
    refused(client.handle_file(str(secret)), budget=9)
    # Requests: large bodies, other names of this machine, endpoints that skip the queue.
    for size, target in ((200_000, "upload"), (2_000_000, "upload"), (2_000_000, "call/predict")):
        start = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        form = {"Content-Type": "multipart/form-data; boundary=b"}
        status, _, _ = ask(f"{url}/gradio_api/{target}", start + b"x" * size + b"\r\n--b--\r\n", **form)
        assert status >= 400, (size, target)
    kept = [path.stat().st_size for path in (tmp_path / "uploads").rglob("*") if path.is_file()]
    assert max(kept) < 150_000
    assert ask(f"{url}/config", Host="evil.example")[0] == 400
    body = json.dumps({"data": [None, "top_k", 0.3]}).encode()
    assert ask(f"{url}/gradio_api/run/predict", body, **{"Content-Type": "application/json"})[0] >= 400
    status, text, headers = ask(url)
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "fonts.googleapis" not in text
    assert not json.loads(ask(f"{url}/config")[1])["analytics_enabled"]
