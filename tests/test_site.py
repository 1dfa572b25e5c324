"""The documentation site: what the strict build accepts and refuses. `make docs` builds the real pages."""

import logging
from pathlib import Path

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

from conftest import ROOT


def project(root: Path, page: str, nav: list[str]) -> Path:
    """Write a small project with the settings and hooks of this one, and return its .mkdocs.yml."""
    files = {
        "README.md": "# Start\n\n[the page](docs/page.md#heading), [settings](configs/a.yaml)\n",
        "docs/page.md": page,
        "docs/hooks.py": (ROOT / "docs" / "hooks.py").read_text(),
        "configs/a.yaml": "key: value\n",
        "src/fewtokens/__init__.py": "",
        "src/fewtokens/part.py": 'def run(n: int) -> None:\n    """Run.\n\n    Args:\n        n: A number.\n    """\n',
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    settings = yaml.safe_load((ROOT / ".mkdocs.yml").read_text()) | {"nav": nav, "watch": [], "extra_css": []}
    (root / ".mkdocs.yml").write_text(yaml.safe_dump(settings))
    return root / ".mkdocs.yml"


def test_pages_reference_and_linked_source_files(tmp_path: Path) -> None:
    page = "# Page\n\n## Heading\n\n[start](../README.md), [code](../src/fewtokens/part.py), [all](../configs)\n"
    build(load_config(str(project(tmp_path, page, ["index.md", "page.md"])), strict=True))
    site = tmp_path / "site"
    assert 'href="page.html#heading"' in (site / "index.html").read_text()
    assert 'href="source/configs/a.yaml.html"' in (site / "index.html").read_text()
    assert 'href="index.html"' in (site / "page.html").read_text()
    assert "def" in (site / "source/src/fewtokens/part.py.html").read_text()
    assert "a.yaml" in (site / "source/configs.html").read_text()
    assert 'id="fewtokens.part.run"' in (site / "reference/fewtokens.html").read_text()


def test_refuses_dead_links_hidden_pages_and_other_hosts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    page = (
        "# Page\n\n[a](absent.md) [b](../README.md#absent) [c](../src/absent.py)\n\n"
        '<img src="absent.png"><script src="https://example.org/x.js"></script>\n'
    )
    config = project(tmp_path, page, ["index.md"])
    (tmp_path / "src/fewtokens/part.py").write_text(
        'def run(n):\n    """Run.\n\n    Args:\n        m: None.\n    """\n'
    )
    with caplog.at_level(logging.WARNING), pytest.raises(Abort):
        build(load_config(str(config), strict=True))
    for problem in (
        'not included in the "nav" configuration:\n  - page.md',
        "a link 'absent.md'",
        "a link '../src/absent.py'",
        "index.html#absent leads to no such anchor",
        "absent.png leads to no file",
        "https://example.org/x.js is loaded from another host",
        "Parameter 'm' does not appear in the function signature",
    ):
        assert problem in caplog.text, problem
