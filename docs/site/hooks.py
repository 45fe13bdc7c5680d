"""What mkdocs asks while it builds the site (docs/site/mkdocs.yml): the pages, their order, and a look at the result.

The site has the repository's own layout, with README.md as its first page, so a link that works in the repository
works in the site. Pages are found and not listed: one that SECTIONS does not name is put into the section of guides,
or of commands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent

# Below the repository's root.
PAGES = ("README.md", "CHANGELOG.md", "docs/*.md", "docs/commands/*.md", "docs/decisions/*.md", "benchmarks/README.md",
         "benchmarks/results/*.md")  # fmt: skip
FILES = ("LICENSE", "docs/pictures/*", "benchmarks/results/*.json", "docs/site/*.css", "docs/site/*.js")

COMMANDS, GUIDES = "Commands", "Guides"
SECTIONS: dict[str, tuple[str, ...]] = {
    "Start": ("README.md", "docs/quickstart.md", "docs/guide-photos.md"),
    COMMANDS: ("docs/cli.md", "docs/commands/*.md"),
    GUIDES: ("docs/evaluation.md", "docs/assignments.md"),
    "Reference": (
        "docs/data.md", "docs/weights.md", "docs/networks.md", "docs/precision.md", "docs/gpu.md",
        "docs/reliability.md", "docs/supply.md",
    ),
    "Troubleshooting": ("docs/troubleshooting.md",),
    "Measurements": (
        "docs/results.md", "docs/benchmarks.md", "docs/scale.md", "docs/log.md", "benchmarks/README.md",
        "benchmarks/results/*.md",
    ),
    "How it works": ("docs/design.md", "docs/decisions/*.md", "docs/contributing.md", "CHANGELOG.md"),
}  # fmt: skip

LOADING = {"src", "srcset", "poster", "data", "background"}  # attributes that make a browser fetch something
NOT_LOADED = {"canonical", "next", "prev", "alternate", "license", "author"}  # relations of <link> that do not


def pages(root: Path) -> list[str]:
    """Return the paths of all pages of the site, below the repository's root."""
    return [path for pattern in PAGES for path in _matching(root, pattern)]


def contents(root: Path) -> list[str]:
    """Return the paths of everything that goes into the site: pages, pictures and what pages need."""
    return [*pages(root), *(path for pattern in FILES for path in _matching(root, pattern))]


def navigation(root: Path) -> list[dict[str, list[str]]]:
    """Return the site's navigation as mkdocs wants it; titles are the pages' own headings."""
    ordered = {
        title: [path for pattern in each for path in _matching(root, pattern)] for title, each in SECTIONS.items()
    }
    links = re.findall(r"\]\((commands/[\w-]+\.md)\)", (root / "docs/cli.md").read_text(encoding="utf-8"))
    order = ["docs/cli.md", *(f"docs/{link}" for link in links)]  # that of the help screen
    ordered[COMMANDS].sort(key=lambda path: order.index(path) if path in order else len(order))
    named = {path for section in ordered.values() for path in section}
    ordered[GUIDES] += [path for path in pages(root) if path not in named]
    return [{title: section} for title, section in ordered.items()]


def remote(html: str) -> list[str]:
    """Return the addresses that a page would load from the network when it is opened; links to follow do not count."""
    reader = _Loads()
    reader.feed(html)
    return reader.found


class _Loads(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        names = LOADING | ({"href"} if tag == "link" and values.get("rel") not in NOT_LOADED else set())
        self.found += [values[name] for name in sorted(names & values.keys()) if _afar(values[name])]
        self.found += remote_styles(values.get("style", ""))


def remote_styles(css: str) -> list[str]:
    """Return the addresses that a style sheet would load from the network."""
    return [found for found in re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s]+)""", css) if _afar(found)]


def _afar(address: str) -> bool:
    return re.match(r"\s*(https?:)?//", address) is not None


def _matching(root: Path, pattern: str) -> Iterator[str]:
    return (path.relative_to(root).as_posix() for path in sorted(root.glob(pattern)))


def on_config(config: Any) -> Any:
    """Set the navigation."""
    config.nav = navigation(ROOT)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Replace what mkdocs found below docs/ by the pages of the site, each at its path in the repository."""
    from mkdocs.structure.files import File

    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in contents(ROOT):
        target = "LICENSE.txt" if path == "LICENSE" else None  # a browser shows it instead of offering to save it
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls, dest_uri=target))
    return files


def on_post_build(config: Any) -> None:
    """Refuse a site that would load anything from the network."""
    from mkdocs.exceptions import PluginError

    site = Path(config.site_dir)
    found = {address for page in site.rglob("*.html") for address in remote(page.read_text(encoding="utf-8"))}
    found |= {address for sheet in site.rglob("*.css") for address in remote_styles(sheet.read_text(encoding="utf-8"))}
    if found:
        raise PluginError(f"The site would load {', '.join(sorted(found))} from the network; put it into docs/site.")
