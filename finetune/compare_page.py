"""The page of `finetune compare`: finished runs side by side on one page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from finetune.chart import LINES, overlay
from finetune.compare import Comparison, RunResult, equal_time, in_words, percent
from finetune.metrics import uneven_recall
from finetune.page import contents, head, html_page, html_table, number, row_head, scrolling, section
from finetune.plan import duration
from weights.atomic import write_atomically


def write_page(path: Path, result: Comparison) -> None:
    """Write a comparison as one self-contained HTML file.

    Args:
        path: the file; what is there is replaced.
        result: the comparison.

    Raises:
        RunError: the file cannot be written.
    """
    title = escape(f"{len(result.runs)} runs on {result.runs[0].summary['data']['name']}")
    sections = [
        ("results", "Results", _results(result.runs)),
        ("curves", "Curves", _curves(result.runs)),
        ("equal", "Accuracy at equal time", _equal(result.runs)),
        ("settings", "Settings that differ", _settings(result)),
        ("losses", "Mean training loss of each epoch", _losses(result.runs)),
    ]
    sections = [(key, name, body) for key, name, body in sections if body]
    parts = [f"<h1>{title}</h1>", _conclusion(result), contents((key, name) for key, name, _ in sections)]
    parts += [section(key, name, body) for key, name, body in sections]
    write_atomically(path, html_page(title, parts).encode())


def _conclusion(result: Comparison) -> str:
    return "".join(f"<p>{escape(one.sentence)}</p>\n" for one in result.explained)


def _key(number: int) -> str:
    return (
        f'<svg class="key" viewBox="0 0 40 10" aria-hidden="true"><line class="s s{number % LINES}" x1="0" x2="40" '
        'y1="5" y2="5"/></svg>'
    )


def _table(label: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, first: str = "") -> str:
    """Return a table of escaped texts; the first column names the rows."""
    columns = [head(first), *(head(text, number=True) for text in heads)]
    body = [[row_head(name), *(number(text) for text in texts)] for name, *texts in rows]
    return scrolling(label, html_table("", columns, body))


def _names(runs: Sequence[RunResult]) -> list[str]:
    return [f"{_key(number)} {escape(run.name)}" for number, run in enumerate(runs)]


def _results(runs: Sequence[RunResult]) -> str:
    summaries = [run.summary for run in runs]
    rows = [
        ["network", *(escape(one["arch"]) for one in summaries)],
        ["test accuracy", *(percent(one["test_accuracy"]) for one in summaries)],
        ["mean per-class recall", *(percent(uneven_recall(one)) for one in summaries)],
        ["train accuracy", *(percent(one["train_accuracy"]) for one in summaries)],
        ["validation accuracy", *(percent(one["val_accuracy"]) for one in summaries)],
        ["parameters", *(f"{one['parameters']['total']:,}" for one in summaries)],
        ["of them trained", *(f"{one['parameters']['trained']:,}" for one in summaries)],
        ["epochs", *(str(one["epochs"]) for one in summaries)],
        ["images seen", *(f"{one['images_seen']:,}" for one in summaries)],
        ["time", *(duration(one["seconds"]["total"]) for one in summaries)],
    ]
    return _table("Results", _names(runs), [row for row in rows if any(row[1:])])


def _curves(runs: Sequence[RunResult]) -> str:
    """Training loss per epoch, and accuracy against time."""
    drawn = [run for run in runs if run.rows]
    if not drawn:
        return ""
    losses = [
        (escape(run.name), [float(row["epoch"]) for row in run.rows], [float(row["train_loss"]) for row in run.rows])
        for run in drawn
    ]
    accuracies = [(escape(run.name), run.by_time()[0], run.by_time()[1]) for run in drawn]
    kinds = {run.by_time()[2] for run in drawn}
    told = f"Accuracy is that of the {' or '.join(sorted(kinds))} images: the test images are read once, at the end."
    if len(kinds) > 1:
        told += " These are not the same thing: runs without validation images show training accuracy."
    charts = [
        overlay("loss", "Training loss", "epoch", "", losses),
        overlay("time", "Accuracy", "seconds, features and compiling included", " %", accuracies),
    ]
    return f'<div class="pair">\n{"".join(charts)}</div>\n<p class="soft">{told}</p>'


def _equal(runs: Sequence[RunResult]) -> str:
    """Accuracy of every run when the quickest one had ended."""
    equal = equal_time(runs)
    if equal is None:
        return ""
    cells = ["no epoch done yet" if value is None else f"{value:.2f} %" for value in equal.accuracies]
    rows = [[f"{equal.images} accuracy after {duration(equal.seconds)}", *cells]]
    return _table("Accuracy at equal time", _names(runs), rows)


def _settings(result: Comparison) -> str:
    rows = [[escape(name), *(escape(in_words(value)) for value in values)] for name, values in result.differing.items()]
    if not rows:
        return "<p>None.</p>"
    return _table("Settings that differ", _names(result.runs), rows)


def _losses(runs: Sequence[RunResult]) -> str:
    epochs = max(len(run.rows) for run in runs)
    rows = [
        [str(number + 1), *(f"{run.rows[number]['train_loss']:.4f}" if number < len(run.rows) else "" for run in runs)]
        for number in range(epochs)
    ]
    return _table("Mean training loss of each epoch", _names(runs), rows, first="epoch")
