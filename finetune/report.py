"""report.html: a finished run on one page that needs no network and no script.

Every figure comes from the run's summary, its metrics rows and its test logits. Everything that somebody else may have
named (classes, data sets, files) is escaped on its way into the page.

Legend: N test images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from finetune.chart import line_chart
from finetune.page import html_page
from finetune.plan import duration, size
from weights.save import write_atomically

REPORT = "report.html"
SHOWN = 10  # worst classes, best classes and confused pairs in the page


def write_report(
    folder: Path,
    summary: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    classes: Sequence[str],
    logits: torch.Tensor | None,
    labels: torch.Tensor | None,
    command: str,
) -> None:
    """Write a run's report.html.

    Args:
        folder: the run directory.
        summary: as in summary.json.
        rows: metrics.jsonl's rows, one per epoch.
        classes: C names in label order.
        logits: float32 (N, C) of the test split; None without one.
        labels: int64 (N,); None without a test split.
        command: what repeats the run.

    Raises:
        RunError: the file cannot be written.
    """
    parts = [_head(summary, command), _curves(rows, summary)]
    if logits is not None and labels is not None and len(labels):
        parts.append(_classes(classes, logits.argmax(1), labels))
    parts += [_frozen(summary), _time(summary), _facts(summary)]
    page = html_page(_title(summary), parts)
    write_atomically(folder / REPORT, page.encode())


def _title(summary: dict[str, Any]) -> str:
    return escape(f"{summary['arch']} on {summary['data']['name']}")


def _head(summary: dict[str, Any], command: str) -> str:
    """The result, and how to get it again."""
    data, test = summary["data"], summary["test_accuracy"]
    if test is not None:
        result = f"{test:.2f} %"
        told = f"test accuracy on {data['test']:,} images, read once at the end; loss {summary['test_loss']:.3f}"
    elif summary["val_accuracy"] is not None:
        result = f"{summary['val_accuracy']:.2f} %"
        told = f"validation accuracy on {data['val']:,} images; the data bring no test split"
    else:
        result = f"{summary['train_accuracy']:.2f} %"
        told = "training accuracy; the data bring neither a test nor a validation split, so this says little"
    return (
        f'<h1>{_title(summary)}</h1>\n<p class="result">{result}</p>\n<p class="soft">{told}</p>\n'
        f"<p>Repeat this run, in the folder of this page:</p>\n<pre><code>{escape(command)}</code></pre>"
    )


def _curves(rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> str:
    """Loss and accuracy per epoch."""
    if not rows:
        return ""
    charts = [line_chart("loss", "Loss", "", rows), line_chart("accuracy", "Accuracy", " %", rows)]
    columns = {
        "epoch": [str(row["epoch"]) for row in rows],
        "train loss": [f"{row['train_loss']:.4f}" for row in rows],
        "train %": [f"{row['train_accuracy']:.2f}" for row in rows],
        "val loss": ["" if row["val_loss"] is None else f"{row['val_loss']:.4f}" for row in rows],
        "val %": ["" if row["val_accuracy"] is None else f"{row['val_accuracy']:.2f}" for row in rows],
        "lr": [f"{row['lr']:.2e}" for row in rows],
        "seconds": [f"{row['seconds']:.1f}" for row in rows],
    }
    heads = "".join(f'<th scope="col" class="number">{name}</th>' for name in columns)
    lines = zip(*columns.values(), strict=True)
    cells = ("".join(f'<td class="number">{cell}</td>' for cell in line) for line in lines)
    table = "".join(f"<tr>{line}</tr>\n" for line in cells)
    told = "Training figures are means over each epoch, taken in passing while the network learns"
    if rows[-1]["val_loss"] is not None:
        told += "; validation is measured after the epoch"
    return (
        f'<h2>Training</h2>\n<div class="pair">\n{"".join(charts)}</div>\n'
        f'<p class="soft">{told}. The weights are those of epoch {summary["kept_epoch"]}.</p>\n'
        '<details><summary>Figures of every epoch</summary>\n<div class="wide"><table>\n'
        f"<tr>{heads}</tr>\n{table}</table></div></details>"
    )


def _classes(classes: Sequence[str], predicted: torch.Tensor, labels: torch.Tensor) -> str:
    """Accuracy of each class, and which classes are taken for which."""
    count = len(classes)
    # (C, C): rows are what the images are, columns what they were taken for
    table = torch.bincount(labels * count + predicted, minlength=count * count).reshape(count, count)
    total = table.sum(1)
    present = [index for index in range(count) if total[index]]
    right = {index: int(table[index, index]) for index in present}
    ordered = sorted(present, key=lambda index: (right[index] / int(total[index]), index))

    def listed(title: str, indices: Sequence[int]) -> str:
        rows = ""
        for index in indices:
            share = 100 * right[index] / int(total[index])
            rows += (
                f"<tr><td>{escape(classes[index])}</td>"
                f'<td class="number">{right[index]:,} of {int(total[index]):,}</td>'
                f'<td class="number">{share:.1f} %</td>'
                f'<td class="bar"><div style="width: {share:.1f}%"></div></td></tr>\n'
            )
        return f"<table>\n<caption>{title}</caption>\n{rows}</table>\n"

    if len(ordered) <= 2 * SHOWN:
        tables = listed("all classes, the worst first", ordered)
    else:
        tables = listed(f"the {SHOWN} worst", ordered[:SHOWN]) + listed(f"the {SHOWN} best", ordered[: -SHOWN - 1 : -1])
    mistakes = [(int(table[a, b]), a, b) for a, b in table.nonzero().tolist() if a != b]
    mistakes.sort(key=lambda item: (-item[0], item[1], item[2]))
    pairs = "".join(
        f"<tr><td>{escape(classes[a])}</td><td>{escape(classes[b])}</td>"
        f'<td class="number">{n:,} of {int(total[a]):,}</td></tr>\n'
        for n, a, b in mistakes[:SHOWN]
    )
    heads = '<tr><th scope="col">is</th><th scope="col">taken for</th><th scope="col" class="number">images</th></tr>\n'
    table_of_pairs = f'<table class="pairs">\n{heads}{pairs}</table>'
    confused = f"<h2>Most confused pairs</h2>\n{table_of_pairs}" if pairs else ""
    return f'<h2>Test accuracy by class</h2>\n<div class="pair">\n{tables}</div>\n{confused}'


def _frozen(summary: dict[str, Any]) -> str:
    """What trained, what did not, and the proof."""
    parameters = summary["parameters"]
    share = 100 * parameters["trained"] / parameters["total"]
    names = escape(", ".join(summary["trained_layers"]))
    proof = (
        f"Nothing else moved: the {summary['frozen_tensors']:,} frozen tensors and buffers had the same SHA-256 after "
        "training as before."
        if summary["frozen_tensors"] and summary["frozen_unchanged"]
        else "No layer was frozen."
    )
    return (
        f"<h2>What trained</h2>\n<p>{names}: {parameters['trained']:,} of {parameters['total']:,} parameters "
        f"({share:.1f} %). {proof}</p>"
    )


def _time(summary: dict[str, Any]) -> str:
    """Where the time went."""
    seconds = summary["seconds"]
    names = {"prefix": "frozen part, computed once", "train": "training", "eval": "evaluation"}
    longest = max(*(seconds[key] for key in names), seconds["total"], 1e-9)
    rows = "".join(
        f'<tr><td>{name}</td><td class="number">{seconds[key]:,.1f} s</td>'
        f'<td class="bar"><div style="width: {100 * seconds[key] / longest:.1f}%"></div></td></tr>\n'
        for key, name in {**names, "total": "whole run, with reading data and weights"}.items()
    )
    return (
        f"<h2>Time</h2>\n<p>{duration(seconds['total'])} on {escape(summary['device'])}, {summary['epochs']} epochs, "
        f"{summary['images_seen']:,} images seen.</p>\n<table>\n{rows}</table>"
    )


def _facts(summary: dict[str, Any]) -> str:
    """Identity of data and weights, and what the run was made with."""
    data, weights, features = summary["data"], summary["weights"], summary["features"]
    counts = f"{data['train']:,} train, {data['val']:,} validation, {data['test']:,} test images"
    facts = [
        ("data", f"{data['name']}: {data['classes']:,} classes, {counts}"),
        ("data SHA-256", data["sha256"]),
        ("weights", "random at the start" if weights["sha256"] is None else weights["source"]),
        ("weights SHA-256", weights["sha256"]),
        ("accuracy on train", f"{summary['train_accuracy']:.2f} %"),
        ("computed in", f"{summary['precision']}, {'compiled' if summary['compile'] else 'not compiled'}"),
        ("features", f"{size(features['bytes'])} ({features['where']})" if features["bytes"] else None),
        ("versions", ", ".join(f"{name} {number}" for name, number in summary["versions"].items())),
    ]
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td>{escape(str(value))}</td></tr>\n'
        for name, value in facts
        if value is not None
    )
    return f"<h2>Data, weights and environment</h2>\n<table>\n{rows}</table>"
