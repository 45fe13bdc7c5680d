"""The page around a report or a comparison: one file, no network, no script, light and dark, on screen and on paper."""

from __future__ import annotations

from collections.abc import Sequence

STYLE = """
:root { --page: #fff; --ink: #1b1f24; --soft: #59636e; --line: #d5dbe1; --box: #f5f7f9;
  --a: #1769aa; --b: #b3541e; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #14171a; --ink: #e8ebee; --soft: #a3adb8; --line: #363d45; --box: #1e2328;
    --a: #6cb4f0; --b: #f0a070; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 64rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .5rem 0; }
.result { font-size: 2.6rem; line-height: 1.2; font-weight: 650; margin: .5rem 0 0; }
.soft, caption, th { color: var(--soft); font-weight: 400; }
pre { background: var(--box); padding: .6rem .8rem; border-radius: 6px; white-space: pre-wrap; margin: .75rem 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: .5rem 2.5rem; }
.pair > * { min-width: 0; }
figure { margin: .5rem 0; break-inside: avoid; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 12px; fill: var(--soft); }
.grid { stroke: var(--line); }
.a { stroke: var(--a); fill: none; stroke-width: 2; }
.b { stroke: var(--b); fill: none; stroke-width: 2; stroke-dasharray: 6 3; }
.s { fill: none; stroke-width: 2; }
.s0 { stroke: var(--a); } .s1 { stroke: var(--b); stroke-dasharray: 7 3; }
.s2 { stroke: #2f9e60; stroke-dasharray: 2 3; }
.s3 { stroke: #9b59d0; stroke-dasharray: 10 3 2 3; } .s4 { stroke: #c2a000; stroke-dasharray: 4 4; }
.s5 { stroke: #d0508c; stroke-dasharray: 12 4; }
svg.key { width: 2.5rem; height: .7rem; display: inline-block; vertical-align: middle; }
circle.a { fill: var(--a); } circle.b { fill: var(--b); stroke-dasharray: none; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .25rem 0; }
th, td { text-align: left; vertical-align: baseline; padding: .2rem .75rem .2rem 0; border-top: 1px solid var(--line); }
tr { break-inside: avoid; }
th[scope=row] { width: 10.5rem; }
.wide { overflow-x: auto; }
.number { text-align: right; white-space: nowrap; }
table.pairs td:not(.number) { width: 38%; }
td.bar { width: 30%; padding-right: 0; }
td.bar div { height: .6rem; background: var(--a); min-width: 1px; print-color-adjust: exact; }
code { font-family: ui-monospace, monospace; font-size: .9em; }
@media print, (max-width: 36rem) { td.bar { width: 15%; } }
@media print { body { max-width: none; padding: 0; font-size: .85rem; } h2 { break-after: avoid; }
  .pair { grid-template-columns: 1fr 1fr; } }
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
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )
