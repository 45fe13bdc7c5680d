"""The page around a report or a comparison: one file, no network, no script, light and dark, on screen and on paper.

Pieces of a page are HTML: whoever puts a name into one escapes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

GENERATOR = '<meta name="generator" content="finetune">'
"""By this a page is known as one that may be replaced by another."""

STYLE = """
:root { --page: #fff; --ink: #1b1f24; --soft: #59636e; --line: #d5dbe1; --box: #f5f7f9; --mid: #1b1f24;
  --a: #1769aa; --b: #b3541e; --c: #237a4b; --d: #8447b8; --e: #8a7000; --f: #b83a75; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #14171a; --ink: #e8ebee; --soft: #a3adb8; --line: #363d45; --box: #1e2328; --mid: #14171a;
    --a: #6cb4f0; --b: #f0a070; --c: #5fc48d; --d: #bd8ee6; --e: #d3b948; --f: #ea86b4; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
p { margin: .5rem 0; max-width: 48rem; }
a { color: var(--a); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; margin: 1rem 0 0; list-style: none; }
:focus-visible { outline: 2px solid var(--a); outline-offset: 2px; }
.result { font-size: 2.6rem; line-height: 1.2; font-weight: 650; margin: .5rem 0 0; }
.soft, caption, th, figcaption { color: var(--soft); font-weight: 400; }
pre { background: var(--box); padding: .6rem .8rem; border-radius: 6px; white-space: pre-wrap; margin: .75rem 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: .5rem 2.5rem; }
.pair > * { min-width: 0; }
figure { margin: .5rem 0; break-inside: avoid; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 12px; fill: var(--soft); }
.names text { font-size: inherit; }
.grid { stroke: var(--line); }
.a { stroke: var(--a); fill: none; stroke-width: 2; }
.b { stroke: var(--b); fill: none; stroke-width: 2; stroke-dasharray: 6 3; }
.s { fill: none; stroke-width: 2; }
circle.s { stroke-dasharray: none; fill: var(--page); } circle.front { stroke-width: 5; }
.s0 { stroke: var(--a); } .s1 { stroke: var(--b); stroke-dasharray: 7 3; }
.s2 { stroke: var(--c); stroke-dasharray: 2 3; }
.s3 { stroke: var(--d); stroke-dasharray: 10 3 2 3; } .s4 { stroke: var(--e); stroke-dasharray: 4 4; }
.s5 { stroke: var(--f); stroke-dasharray: 12 4; }
svg.key { width: 2.5rem; height: .7rem; display: inline-block; vertical-align: middle; }
svg.swatch { width: .8rem; height: .8rem; }
circle.a { fill: var(--a); } circle.b { fill: var(--b); stroke-dasharray: none; }
.ideal { stroke: var(--soft); stroke-dasharray: 2 4; }
.right { fill: var(--a); } .wrong { fill: var(--b); }
.m1 { opacity: .2; } .m2 { opacity: .35; } .m3 { opacity: .5; } .m4 { opacity: .72; } .m5 { opacity: 1; }
svg .on { fill: var(--page); } svg .mid { fill: var(--mid); } svg .off { fill: var(--ink); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .25rem 0; }
th, td { text-align: left; vertical-align: baseline; padding: .2rem .75rem .2rem 0; border-top: 1px solid var(--line); }
tr { break-inside: avoid; }
th[scope=row] { width: 10.5rem; }
th.name { color: inherit; width: auto; }
.wide { overflow-x: auto; overflow-wrap: normal; } .wide th[scope=row] { min-width: 6rem; }
.wide td.long { min-width: 18rem; } .wide td.bar { width: 15%; min-width: 4rem; padding-right: .75rem; }
.number { text-align: right; white-space: nowrap; }
td.bar { width: 30%; padding-right: 0; }
td.bar div { height: .6rem; background: var(--a); min-width: 1px; print-color-adjust: exact; }
summary { cursor: pointer; padding: .25rem 0; color: var(--a); }
code { font-family: ui-monospace, monospace; font-size: .9em; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: .75rem; padding: 0;
  margin: .5rem 0; list-style: none; }
.pictures li { break-inside: avoid; font-size: .85rem; line-height: 1.35; }
.pictures img, .row img { display: block; width: 64px; height: 64px; object-fit: contain; margin-bottom: .25rem; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: .75rem 2.5rem;
  padding: 0; margin: .5rem 0; list-style: none; }
.pairs li { break-inside: avoid; } .pairs p { margin: 0 0 .25rem; }
.narrow { max-width: 26rem; } .narrow th[scope=row] { width: auto; } .keep { white-space: nowrap; }
.row { display: flex; flex-wrap: wrap; gap: .35rem; font-size: .8rem; line-height: 1.3; }
.row img { margin: 0; width: 48px; height: 48px; }
@media print, (max-width: 36rem) { td.bar { width: 15%; } }
@media (max-width: 36rem) { th[scope=row]:not(.name) { width: 7rem; } .wide th[scope=row] { width: auto; } }
@media print { body { max-width: none; padding: 0; font-size: .85rem; } h2 { break-after: avoid; }
  .pair { grid-template-columns: 1fr 1fr; } .pair table { break-inside: avoid; }
  .wide { overflow: visible; } .wide svg { min-width: 0 !important; }
  nav { display: none; } details::details-content { content-visibility: visible; height: auto; }
  rect, img { print-color-adjust: exact; } }
"""


def html_page(title: str, parts: Sequence[str]) -> str:
    """Return a whole page.

    Args:
        title: escaped already.
        parts: the body's pieces as HTML; empty ones are left out.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"{GENERATOR}\n"
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(key: str, title: str, *parts: str) -> str:
    """Return a part of the page under a heading.

    Args:
        key: its id, which links lead to.
        title: the heading.
        parts: what follows; a section without any is "".
    """
    held = [part for part in parts if part]
    if not held:
        return ""
    body = "\n".join(held)
    return f'<section aria-labelledby="{key}">\n<h2 id="{key}">{title}</h2>\n{body}\n</section>'


def contents(sections: Iterable[tuple[str, str]]) -> str:
    """Return links to the sections of a page, given as (key, title)."""
    links = "".join(f'<li><a href="#{key}">{title}</a></li>\n' for key, title in sections)
    return f'<nav aria-label="Contents">\n<ul>\n{links}</ul>\n</nav>'


def html_table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table.

    Args:
        caption: says what it is; "" leaves it out where a heading says so.
        heads: the columns' header cells, made by `head`; none leaves the row out.
        rows: each row's cells, made by `row_head`, `cell`, `number` and `bar`.
    """
    top = f"<thead><tr>{''.join(heads)}</tr></thead>\n" if heads else ""
    body = "".join(f"<tr>{''.join(cells)}</tr>\n" for cells in rows)
    said = f"<caption>{caption}</caption>\n" if caption else ""
    return f"<table>\n{said}{top}<tbody>\n{body}</tbody></table>\n"


def head(text: str, *, number: bool = False) -> str:
    """Return the header cell of a column; a column of bars has no text, because its figures stand beside it."""
    if not text:
        return "<td></td>"
    return f'<th scope="col"{" class=number" if number else ""}>{text}</th>'


def row_head(text: str, *, name: bool = False) -> str:
    """Return the header cell of a row; `name` shows it like what it names, and not like a label."""
    return f'<th scope="row"{" class=name" if name else ""}>{text}</th>'


def cell(text: str, *, long: bool = False) -> str:
    """Return a cell of text; a long one keeps room for it in a table that scrolls."""
    return f"<td{' class=long' if long else ''}>{text}</td>"


def number(text: str) -> str:
    """Return a cell that is aligned on the right."""
    return f'<td class="number">{text}</td>'


def bar(share: float) -> str:
    """Return a cell that holds a bar of 0 to 100 %; its figure stands in a cell beside it."""
    return f'<td class="bar"><div style="width: {share:.1f}%"></div></td>'


def scrolling(label: str, html: str) -> str:
    """Return something that may be wider than the page, in a region that scrolls, by keyboard as well."""
    return f'<div class="wide" role="region" aria-label="{label}" tabindex="0">\n{html}</div>\n'
