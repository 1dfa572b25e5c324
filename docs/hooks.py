"""Hooks of the documentation site: start page, API reference, pages for linked source files, and a check of all links.

Pages link to files of the repository as GitHub needs it (`../configs/train.yaml`). On the site, such a link leads to a
page that shows the file, so that the site is complete without a network.
"""

import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from posixpath import dirname, relpath
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks")
ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "src" / "fewtokens"
LINK = re.compile(r'(\]\(|(?:src|srcset|href)=")([^)#"\s]+)')
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "bash", ".json": "json"}


def on_config(config: MkDocsConfig) -> None:
    """Append the API reference to the navigation."""
    packages = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))
    titles = [_dotted(package).removeprefix("fewtokens.") for package in packages]
    pages = [{title: _reference_uri(package)} for title, package in zip(titles, packages, strict=True)]
    config.nav.append({"API reference": pages})


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the start page, a reference page per package, and a page per source file that a page links to."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    for init in PACKAGE.rglob("__init__.py"):
        uri = _reference_uri(init.parent)
        files.append(File.generated(config, uri, content=_reference_page(init.parent)))
    linked = {
        path
        for file in files.documentation_pages()
        for _, link in LINK.findall(file.content_string)
        if (path := _outside_docs(link, file.src_uri)) and path != ROOT / "README.md"
    }
    for path in sorted(linked):
        page = File.generated(
            config, _source_uri(path), content=_source_page(path), inclusion=InclusionLevel.NOT_IN_NAV
        )
        files.append(page)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files outside docs/, and the links of the README, to their pages on the site."""
    uri = page.file.src_uri

    def replace(match: re.Match[str]) -> str:
        before, link = match.groups()
        if path := _outside_docs(link, uri):
            link = relpath(_source_uri(path), dirname(uri) or ".")
        elif uri == "index.md":
            link = link.removeprefix("docs/")
        return before + link

    return LINK.sub(replace, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Check the links of the built pages, raw HTML and the API reference included, and that nothing else is loaded."""
    site = Path(config.site_dir)
    pages = {path: _Links(path) for path in site.resolve().rglob("*.html") if path.name != "404.html"}
    for path, page in pages.items():
        for link, loaded in sorted(page.links):
            parts = urlsplit(link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            problem = None
            if parts.scheme or parts.netloc:
                problem = "is loaded from another host" if loaded else None
            elif not target.is_file():
                problem = "leads to no file"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                problem = "leads to no such anchor"
            if problem:
                log.warning("%s: %s %s", path.relative_to(site.resolve()), link, problem)


class _Links(HTMLParser):
    """The links and anchors of a built page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[tuple[str, bool]] = set()  # the address, and whether the browser loads it with the page
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the addresses and the anchor of a tag."""
        found = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}
        for name in ("href", "src", "srcset"):
            value = found.get(name) or ""
            for link in [part.split()[0] for part in value.split(", ")] if name == "srcset" and value else [value]:
                if link and not link.startswith(("mailto:", "data:")):
                    self.links.add((link, tag != "a" and found.get("rel") != "canonical"))


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def _reference_uri(package: Path) -> str:
    return f"reference/{_dotted(package)}.md"


def _source_uri(path: Path) -> str:
    return "index.md" if path == ROOT / "README.md" else f"source/{path.relative_to(ROOT).as_posix()}.md"


def _outside_docs(link: str, uri: str) -> Path | None:
    """Return the file or folder of the repository that a link of a page names, or None if it is in docs/ or absent."""
    if ":" in link:
        return None
    path = (ROOT if uri == "index.md" else (DOCS / uri).parent).joinpath(link).resolve()
    return path if path.exists() and path.is_relative_to(ROOT) and not path.is_relative_to(DOCS) else None


def _reference_page(package: Path) -> str:
    modules = sorted(path for path in package.glob("*.py") if path.name != "__init__.py")
    own = [package] if (package / "__init__.py").read_text().strip() else []
    return "\n\n".join([f"# {_dotted(package)}", *(f"::: {_dotted(path)}" for path in own + modules)])


def _source_page(path: Path) -> str:
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    text = [f"# {path.relative_to(ROOT)}"]
    for file in files:
        text += [f"## {file.name}"] if path.is_dir() else []
        text += [f"``````{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text(errors='replace')}\n``````"]
    return "\n\n".join(text)
