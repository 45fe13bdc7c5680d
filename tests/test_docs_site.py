"""The site: every page is in its navigation once, whoever adds it, and nothing is loaded from the network."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from make_pages import ROOT, load


@pytest.fixture(scope="module")
def hooks() -> Any:
    return load("docs/site/hooks.py")


def listed(navigation: list[dict[str, list[str]]]) -> list[str]:
    return [page for section in navigation for pages in section.values() for page in pages]


def test_every_page_is_in_the_navigation_once(hooks: Any) -> None:
    pages = listed(hooks.navigation(ROOT))
    assert [page for page, times in Counter(pages).items() if times > 1] == []
    assert set(pages) == set(hooks.pages(ROOT))
    written = {file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").rglob("*.md")}
    assert written - set(pages) == set()
    for section in hooks.SECTIONS.values():
        for pattern in section:
            assert list(ROOT.glob(pattern)), f"{pattern} in docs/site/hooks.py names nothing"


def test_pages_that_are_added_later_find_a_place(hooks: Any, tmp_path: Path) -> None:
    for name in ("guide-new.md", "commands/made-up.md", "commands/run.md", "decisions/0001-a.md", "evaluation.md"):
        (tmp_path / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "docs" / name).write_text("# A page\n")
    (tmp_path / "docs" / "cli.md").write_text("| [finetune run](commands/run.md) | Run. |\n")
    sections = {title: pages for section in hooks.navigation(tmp_path) for title, pages in section.items()}
    assert sections["Commands"] == ["docs/cli.md", "docs/commands/run.md", "docs/commands/made-up.md"]
    assert sections["Guides"] == ["docs/evaluation.md", "docs/guide-new.md"]
    assert sections["How it works"] == ["docs/decisions/0001-a.md"]


def test_what_a_page_would_load_from_the_network_is_found(hooks: Any) -> None:
    page = (
        '<link rel="canonical" href="https://a.org/"><a href="https://b.org">read</a><img src="pictures/a.png">'
        '<script src="https://c.org/x.js"></script><link rel="stylesheet" href="//d.org/x.css">'
        '<img srcset="https://e.org/a.png 2x"><p style="background: url(https://f.org/a.png)">'
    )
    found = ["https://c.org/x.js", "//d.org/x.css", "https://e.org/a.png 2x", "https://f.org/a.png"]
    assert hooks.remote(page) == found
    assert hooks.remote_styles("@import 'https://g.org/x.css'; a { src: url(data:font/woff2;base64,AA) }") == [
        "https://g.org/x.css"
    ]
