"""Small data made on the spot: nothing here reads the real data sets."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewtokens.data.video import decoders, records
from fewtokens.errors import FewtokensError

MakeFolders = Callable[..., Path]


@pytest.fixture(params=sorted(records.DECODERS))
def decoder(request: pytest.FixtureRequest) -> str:
    """Every decoder that is installed."""
    if importlib.util.find_spec(records.DECODERS[request.param][0]) is None:
        pytest.skip(f"{request.param} is not installed")
    if request.param != "pyav":
        try:
            decoders.load(request.param)
        except FewtokensError as error:
            pytest.skip(str(error))
    return request.param


@pytest.fixture
def make_folders(tmp_path: Path) -> MakeFolders:
    """Writes pictures as <root>/<part>/<class>/<n>.<suffix> and returns the root."""

    def make(
        parts: tuple[str, ...] = ("train", "test"),
        classes: tuple[str, ...] = ("a", "b", "c"),
        count: int = 8,
        size: tuple[int, int] = (32, 32),
        suffix: str = "png",
    ) -> Path:
        rng = np.random.default_rng(0)
        for part in parts:
            for name in classes:
                folder = tmp_path / "set" / part / name
                folder.mkdir(parents=True)
                for index in range(count):
                    pixels = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
                    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
                    image.save(folder / f"{index:04d}.{suffix}")
        return tmp_path / "set"

    return make
