"""sweep.html: the choice, accuracy against time, every run, and what the images of a class are worth, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from finetune.chart import LINES, overlay
from finetune.frontier_chart import Point, frontier_chart
from finetune.page import cell, contents, head, html_page, html_table, number, row_head, scrolling, section
from finetune.plan import duration
from weights.atomic import write_atomically

PAGE = "sweep.html"
Run = dict[str, Any]


def write_page(folder: Path, result: dict[str, Any]) -> None:
    """Write a sweep's page as one self-contained HTML file.

    Args:
        folder: the sweep's.
        result: the sweep as plain values, as `Sweep.as_dict` returns it.

    Raises:
        RunError: the file cannot be written.
    """
    title = escape(f"Sweep of {result['arch']} on {result['data']}")
    runs = sorted(result["runs"], key=lambda run: (bool(run["diverged"]), run["seconds"]))
    layers = list(dict.fromkeys(tuple(run["train_layers"]) for run in result["runs"]))
    sections = [
        ("frontier", "Accuracy against time", _frontier(runs, layers)),
        ("runs", "Every run", _table(result, runs, layers)),
        ("shots", "Images of every class", _shots(result["runs"], layers)),
        ("made", "How it was made", _made(result)),
    ]
    sections = [(key, name, body) for key, name, body in sections if body]
    parts = [_head(title, result), contents((key, name) for key, name, _ in sections)]
    parts += [section(key, name, body) for key, name, body in sections]
    write_atomically(folder / PAGE, html_page(title, parts).encode())


def _head(title: str, result: dict[str, Any]) -> str:
    """The choice in large, then the advice."""
    said = "".join(f"<p>{escape(sentence)}</p>\n" for sentence in result["recommendation"])
    chosen = next((run for run in result["runs"] if run["name"] == result["chosen"]), None)
    if chosen is None:
        return f"<h1>{title}</h1>\n{said}"
    if chosen["test_accuracy"] is not None:
        large, told = chosen["test_accuracy"], "test accuracy of the chosen run; no other run was tested"
    else:
        large, told = chosen["val_accuracy"], "validation accuracy of the chosen run; no run was tested"
    return f'<h1>{title}</h1>\n<p class="result">{large:.2f} %</p>\n<p class="soft">{told}</p>\n{said}'


def _key(style: int) -> str:
    return (
        '<svg class="key swatch" viewBox="0 0 12 12" aria-hidden="true">'
        f'<circle class="s s{style % LINES}" cx="6" cy="6" r="4"/></svg>'
    )


def _line_key(style: int) -> str:
    return (
        f'<svg class="key" viewBox="0 0 40 10" aria-hidden="true"><line class="s s{style % LINES}" x1="0" x2="40" '
        'y1="5" y2="5"/></svg>'
    )


def _frontier(runs: Sequence[Run], layers: Sequence[tuple[str, ...]]) -> str:
    """Finished runs as circles, of images of every class those with the most; what the colours and the line mean."""
    counts = [run["shots"] for run in runs]
    most = None if None in counts else max(counts, default=None)
    points = [
        Point(
            place,
            escape(f"{run['name']}: {run['val_accuracy']:.2f} % in {duration(run['seconds'])}"),
            layers.index(tuple(run["train_layers"])),
            max(run["seconds"], 1e-3),
            run["val_accuracy"],
            run["on_frontier"],
        )
        for place, run in enumerate(runs, start=1)
        if not run["diverged"] and run["shots"] == most
    ]
    if not points:
        return ""
    keys = ", ".join(f'<span class="keep">{_key(style)} {_names(cut)}</span>' for style, cut in enumerate(layers))
    return (
        scrolling("Accuracy against time", frontier_chart(points))
        + f'<p class="soft">What trains: {keys}. Along the dotted line lie the runs that no other beats without taking '
        "longer, with their numbers in the table. Time is that of a run with its features at hand.</p>"
    )


def _table(result: dict[str, Any], runs: Sequence[Run], layers: Sequence[tuple[str, ...]]) -> str:
    """The runs, the quickest first; only settings that differ have a column."""
    swept = {"lr": "lr", "weight_decay": "weight decay", "shots": "images of every class"}
    swept = {key: name for key, name in swept.items() if len({run[key] for run in result["runs"]}) > 1}
    heads = [head("run"), *(head(name, number=True) for name in swept.values())]
    heads += [head(name, number=True) for name in ("validation", "train", "time", "epochs")] + [head("remark")]
    rows = []
    for place, run in enumerate(runs, start=1):
        key = _key(layers.index(tuple(run["train_layers"])))
        cells = [row_head(f'<span class="keep">{place} {key} {escape(run["name"])}</span>', name=True)]
        cells += [number(_told(name, run[name])) for name in swept]
        if run["diverged"]:
            cells += [number("")] * 4
        else:
            cells += [number(f"{run['val_accuracy']:.2f} %"), number(f"{run['train_accuracy']:.2f} %")]
            cells += [number(duration(run["seconds"])), number(str(run["epochs"]))]
        rows.append([*cells, cell(escape(remark(run, result)), long=bool(run["diverged"]))])
    return scrolling("Every run", html_table("", heads, rows))


def _told(name: str, value: float | None) -> str:
    """Return a setting as the command line takes it."""
    return f"{value:g}" if value is not None else "all" if name == "shots" else "auto"


def remark(run: Run, result: dict[str, Any]) -> str:
    """Return what the tables say of a run beside its figures."""
    if run["diverged"]:
        return "diverged: " + str(run["diverged"]).split(";")[0].split(". ")[0]
    if run["name"] == result["chosen"]:
        tested = run["test_accuracy"]
        return "chosen" if tested is None else f"chosen; test {tested:.2f} %"
    if run["name"] == result["quicker"]:
        return "in a hurry"
    return "on the frontier" if run["on_frontier"] else ""


def _shots(runs: Sequence[Run], layers: Sequence[tuple[str, ...]]) -> str:
    """Accuracy by images of every class: of each cut, the best of its runs for each number."""
    counts = list(dict.fromkeys(run["shots"] for run in runs))
    if len(counts) < 2:
        return ""
    best: dict[tuple[tuple[str, ...], int | None], Run] = {}
    for run in runs:
        key = (tuple(run["train_layers"]), run["shots"])
        if not run["diverged"] and (key not in best or run["val_accuracy"] > best[key]["val_accuracy"]):
            best[key] = run
    shown = [cut for cut in layers if any((cut, count) in best for count in counts)]
    if not shown:
        return ""
    lines = []
    for cut in shown:
        drawn = [best[cut, count] for count in counts if (cut, count) in best]
        # All images have no number of their own: their mean of every class stands for it.
        along = [float(run["shots"] or run["images"] / run["classes"]) for run in drawn]
        lines.append((_names(cut), along, [float(run["val_accuracy"]) for run in drawn]))
    keys = [head(f"{_line_key(place)} {_names(cut)}", number=True) for place, cut in enumerate(shown)]
    heads = [head("images of every class"), *keys]
    rows = [
        [row_head("all" if count is None else f"{count:,}")]
        + [number(f"{best[cut, count]['val_accuracy']:.2f} %" if (cut, count) in best else "") for cut in shown]
        for count in counts
    ]
    told = "Of each cut the run with the highest validation accuracy; fewer images are among more."
    return (
        f'<div class="pair">\n{overlay("shots-curve", "Validation accuracy", "images of every class", " %", lines)}'
        f'<div>{html_table("", heads, rows)}</div></div>\n<p class="soft">{told}</p>'
    )


def _made(result: dict[str, Any]) -> str:
    seconds = result["seconds"]
    rows = [
        ("runs", f"{len(result['runs'])} of {result['planned']}"),
        (
            "features",
            f"{duration(seconds['features'])}, computed once for all runs" if seconds["features"] else "none shared",
        ),
        ("time in all", duration(seconds["total"])),
        ("chosen by", f"{result['val_images']:,} validation images"),
    ]
    return html_table("", [], [[row_head(name), cell(escape(text))] for name, text in rows])


def _names(layers: Sequence[str]) -> str:
    return escape(", ".join(layers))
