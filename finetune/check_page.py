"""The page of `finetune check`: findings, counts, and pictures of what is there twice."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from finetune.check import Check
from finetune.page import bar, cell, contents, head, html_page, html_table, number, row_head, scrolling, section
from weights.atomic import write_atomically

SIDE = 96  # pixels of an example picture, at most
SMALLEST = 64  # pictures smaller than this are shown at this side, their pixels enlarged by whole numbers
ROWS = 24  # examples of each kind: with PNG pictures of this size the page stays below 2 MB
MEMBERS = 4  # pictures of one group
SIDE_BY_SIDE = "display: flex; flex-wrap: wrap; gap: .75rem; margin: .5rem 0 1rem"
FRAME = "margin: 0; width: 9rem; font-size: .85rem; line-height: 1.35"
PICTURE = "display: block; width: auto; height: auto; margin-bottom: .25rem"


def write_page(path: Path, result: Check) -> None:
    """Write a check as one self-contained HTML file.

    Args:
        path: the file; what is there is replaced.
        result: the check.

    Raises:
        RunError: the file cannot be written.
    """
    title = escape(f"{result.originals.name}: data check")
    sections = [
        ("findings", "Findings", _findings(result)),
        ("leaks", "Test images that were trained on, pixel for pixel", _leaks(result)),
        ("near", "Pictures that look alike, from training to test first", _near(result)),
        ("identical", "The same picture more than once", _identical(result)),
        ("splits", "Splits", _splits(result)),
        ("classes", "Classes", _classes(result)),
        ("unreadable", "Files that cannot be read", _listed(result)),
    ]
    sections = [(key, name, body) for key, name, body in sections if body]
    parts = [f"<h1>{title}</h1>", contents((key, name) for key, name, _ in sections)]
    parts += [section(key, name, body) for key, name, body in sections]
    write_atomically(path, html_page(title, parts).encode())


def _findings(result: Check) -> str:
    if not result.findings:
        return "<p>Nothing was found that could spoil a result.</p>"
    return html_table("", [], [[row_head(one.level), cell(escape(one.text))] for one in result.findings])


def _leaks(result: Check) -> str:
    """Test images that are training images."""
    pairs = [(train, test) for test, train in result.duplicates.leaks]
    return _examples(result, pairs, [""] * len(pairs))


def _near(result: Check) -> str:
    pairs = [(pair.first, pair.second) for pair in result.duplicates.near]
    told = [f"likeness {pair.likeness:.2f}, {pair.distance} bits apart" for pair in result.duplicates.near]
    return _examples(result, pairs, told)


def _identical(result: Check) -> str:
    """Groups with the same pixels that are not from training to test."""
    leaked = {test for test, _ in result.duplicates.leaks}
    groups = [members for members in result.duplicates.groups if not leaked & set(members)]
    told = [f"{len(members)} times" for members in groups]
    return _examples(result, groups, told)


def _examples(result: Check, groups: Sequence[Sequence[int]], told: Sequence[str]) -> str:
    """Return the pictures of the first groups."""
    if not groups:
        return ""
    figures = []
    for members, words in list(zip(groups, told, strict=True))[:ROWS]:
        pictures = "".join(_picture(result, image) for image in members[:MEMBERS])
        note = f'<p class="soft" style="margin: 0">{escape(words)}</p>' if words else ""
        figures.append(f'<div>{note}<div style="{SIDE_BY_SIDE}">{pictures}</div></div>\n')
    more = f'<p class="soft">{ROWS} of {len(groups):,} are shown.</p>' if len(groups) > ROWS else ""
    return f'{more}<div class="pair">\n{"".join(figures)}</div>'


def _picture(result: Check, image: int) -> str:
    """Return an image as a figure that names its place and class."""
    found = result.originals
    place, name = escape(found.places[image]), escape(found.class_of(image))
    try:
        source = data_uri(found.picture(image))
    except Exception:  # it was read a moment ago: removed or changed since, by whatever means
        return f'<figure style="{FRAME}"><figcaption>{place} ({name}), gone since</figcaption></figure>'
    return (
        f'<figure style="{FRAME}"><img src="{source}" alt="{name}" style="{PICTURE}">'
        f"<figcaption>{place} ({name})</figcaption></figure>"
    )


def data_uri(picture: Image.Image) -> str:
    """Return a picture as the address of a small PNG that needs no file: `data:image/png;base64,...`."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    if max(small.size) < SMALLEST:
        times = SMALLEST // max(small.size)
        small = small.resize((small.width * times, small.height * times), Image.Resampling.NEAREST)
    file = io.BytesIO()
    small.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _splits(result: Check) -> str:
    """Images, sizes and modes of each split."""
    rows = []
    for split, counts in result.originals.counts().items():
        sizes = result.sizes(split).most_common(4)
        listed = ", ".join(f"{width} × {height} ({count:,})" for (width, height), count in sizes)
        more = len(result.sizes(split)) - len(sizes)
        listed += f" and {more:,} more" if more else ""
        modes = ", ".join(f"{mode} ({count:,})" for mode, count in result.modes(split).most_common())
        rows.append([row_head(split), number(f"{sum(counts):,}"), cell(listed), cell(escape(modes))])
    heads = [head(""), head("images", number=True), head("sizes"), head("modes")]
    return scrolling("Images of each split", html_table("", heads, rows))


def _classes(result: Check) -> str:
    """Images of each class in each split, the smallest class of train first."""
    counts, names = result.originals.counts(), result.originals.classes
    order = sorted(range(len(names)), key=lambda label: (counts["train"][label], names[label]))
    most = max(1, *counts["train"])
    others = [split for split in counts if split != "train"]
    heads = [head(""), head("train", number=True), head(""), *(head(split, number=True) for split in others)]
    rows = [
        [
            row_head(escape(names[label])),
            number(f"{counts['train'][label]:,}"),
            bar(100 * counts["train"][label] / most),
            *(number(f"{counts[split][label]:,}") for split in others),
        ]
        for label in order
    ]
    return scrolling("Images of each class", html_table("", heads, rows))


def _listed(result: Check) -> str:
    """Everything that is damaged, in full."""
    rows = [[cell(escape(place)), cell(escape(reason))] for place, reason in result.originals.unreadable]
    return html_table("", [head("file"), head("reason")], rows) if rows else ""
