"""Fixtures for the demo: a predictor of a small model, and files that nobody should send."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewtokens.data.transforms.normalize import Pipeline
from fewtokens.demo.inference import Predictor
from small_models import make, one_thread, small  # noqa: F401


@pytest.fixture
def picture() -> Image.Image:
    y, x = np.mgrid[:60, :90]
    return Image.fromarray(np.stack([x * 2, y * 3, x + y], axis=2).astype(np.uint8))


@pytest.fixture
def predictor() -> Callable[..., Predictor]:
    def build(**settings) -> Predictor:
        model = small(**({"size": (16, 16), "depth": 4} | settings))
        channels = model.sample_shape[0]
        pipeline = Pipeline((), [0.5] * channels, [0.25] * channels)
        return Predictor(model, pipeline, ["cat", "dog", "crane", "crane", "hen"], seconds=0.01)

    return build


@pytest.fixture
def hostile(tmp_path: Path) -> dict[str, Path]:
    """Return files by what is wrong with them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(b"\0" * 10_000_000, 9)
    bomb = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", rows)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    contents = {
        "bomb.png": b"\x89PNG\r\n\x1a\n" + bomb + chunk(b"IEND", b""),
        "large.png": b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 6000, 5000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b""),
        "text.png": b"no picture",
        "empty.png": b"",
        "cut.png": buffer.getvalue()[:-40],
        "script.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "code.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in contents}
