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

from finetune.chart import line_chart, reliability_chart
from finetune.examples import choose_examples
from finetune.metrics import (
    BINS,
    UNEVEN,
    Calibration,
    calibrate,
    confusion_matrix,
    no_test,
    top_k_accuracy,
    uneven_recall,
)
from finetune.page import bar, contents, head, html_page, html_table, number, row_head, scrolling, section
from finetune.placement import size
from finetune.plan import duration
from finetune.predictions import Predictions, read_predictions
from finetune.report_classes import Album, class_tables, matrix_part, mistakes_part, pairs_part
from finetune.results import no_run, read_classes, read_results
from finetune.rundir import CONFIG, PREDICTIONS, RECIPE
from weights.atomic import write_atomically
from weights.errors import RunError

REPORT = "report.html"
SAME = 0.01  # points by which accuracy from stored logits may differ from the summary's, which is rounded


def write_report(
    folder: Path,
    summary: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    classes: Sequence[str],
    predictions: Predictions | None,
) -> None:
    """Write a run's report.html.

    Args:
        folder: the run directory.
        summary: as in summary.json.
        rows: metrics.jsonl's rows, one per epoch.
        classes: C names in label order.
        predictions: of the test split; None without one.

    Raises:
        RunError: the file cannot be written.
    """
    page = html_page(_title(summary), _parts(summary, rows, classes, predictions))
    write_atomically(folder / REPORT, page.encode())


def rebuild_report(folder: Path) -> Path:
    """Write a finished run's report.html again from the other files of its folder, and return its path.

    Raises:
        RunError: the folder holds no finished run, a file of it is damaged, or the predictions are of other images.
    """
    summary, rows = read_results(folder)
    classes, predictions = read_classes(folder), read_predictions(folder / PREDICTIONS)
    if predictions is not None and predictions.logits.shape[1] != len(classes):
        raise no_run(
            folder,
            CONFIG,
            ValueError(f"{len(classes)} label_names, but {PREDICTIONS} has {predictions.logits.shape[1]} classes"),
        )
    if predictions is not None and summary["test_accuracy"] is not None:
        images, accuracy = len(predictions.labels), top_k_accuracy(predictions.logits, predictions.labels, 1)
        tested, right = summary["data"]["test"], summary["test_accuracy"]
        if images != tested or abs(accuracy - right) > SAME:
            path = folder / PREDICTIONS
            raise RunError(
                f"{path} has {images:,} images, {accuracy:.2f} % right, and the run was tested on {tested:,}, "
                f"{right:.2f} % right; a page would mix the two. Bring the run's own back with finetune eval {folder} "
                f"--output {path}."
            )
    write_report(folder, summary, rows, classes, predictions)
    return folder / REPORT


def _parts(
    summary: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    classes: Sequence[str],
    predictions: Predictions | None,
) -> list[str]:
    """The page's body: the head, links to the sections, the sections."""
    sections = [("training", "Training", _curves(rows, summary))]
    if predictions is not None and len(predictions.labels):
        matrix = confusion_matrix(predictions.logits.argmax(1), predictions.labels, len(classes))
        examples, album = choose_examples(predictions.logits, predictions.labels), Album(predictions)
        sections += [
            ("classes", "Test accuracy by class", class_tables(matrix, classes)),
            ("pairs", "Most confused pairs", pairs_part(examples, classes, album)),
            ("mistakes", "Most confident mistakes", mistakes_part(examples, classes, album)),
            ("matrix", "Confusion matrix", matrix_part(matrix, classes)),
            ("calibration", "Calibration", _calibration(summary, predictions)),
        ]
    sections += [
        ("trained", "What trained", _frozen(summary)),
        ("time", "Time", _time(summary)),
        ("facts", "Data, weights and environment", _facts(summary)),
    ]
    sections = [(key, title, body) for key, title, body in sections if body]
    links = contents((key, title) for key, title, _ in sections)
    return [_head(summary), links, *(section(key, title, body) for key, title, body in sections)]


def _title(summary: dict[str, Any]) -> str:
    return escape(f"{summary['arch']} on {summary['data']['name']}")


def _head(summary: dict[str, Any]) -> str:
    """The result, and how to get it again; of uneven classes the mean recall is the result."""
    data, test, recall = summary["data"], summary["test_accuracy"], uneven_recall(summary)
    if test is not None:
        result = f"{test:.2f} %"
        told = f"test accuracy on {data['test']:,} images, read once at the end; loss {summary['test_loss']:.3f}"
    elif summary["val_accuracy"] is not None:
        result = f"{summary['val_accuracy']:.2f} %"
        told = f"validation accuracy on {data['val']:,} images; {no_test(summary)}"
    else:
        result = f"{summary['train_accuracy']:.2f} %"
        told = f"training accuracy; there are no validation images, and {no_test(summary)}, so this says little"
    if recall is not None:
        result = f"{recall:.2f} %"
        told = (
            f"mean per-class recall on {data['test']:,} test images, read once at the end: every class counts the "
            f"same here, because the largest has more than {UNEVEN} times as many images as the smallest. Over all "
            f"images, test accuracy is {test:.2f} %; loss {summary['test_loss']:.3f}"
        )
    return (
        f'<h1>{_title(summary)}</h1>\n<p class="result">{result}</p>\n<p class="soft">{told}</p>\n{_figures(summary)}'
        "<p>Repeat this run, in the folder of this page:</p>\n"
        f"<pre><code>finetune run --config {RECIPE}</code></pre>"
    )


def _figures(summary: dict[str, Any]) -> str:
    """The other figures of the test in one line each; nothing without a test."""
    calibration = summary.get("calibration") or {}
    figures = [
        ("top-5 accuracy", summary.get("test_top5_accuracy"), " %"),
        ("mean per-class recall", summary.get("test_mean_recall"), " %"),
        ("calibration error", calibration.get("test_error"), " points"),
    ]
    if calibration.get("temperature", 1) != 1:
        figures.append(("calibration error with temperature", calibration.get("test_error_scaled"), " points"))
    rows = [[row_head(name), number(f"{value:.2f}{unit}")] for name, value, unit in figures if value is not None]
    return f'<div class="narrow">\n{html_table("", [], rows)}</div>\n' if rows else ""


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
    columns = {name: texts for name, texts in columns.items() if any(texts)}
    heads = [head(name, number=True) for name in columns]
    table = html_table("", heads, [[number(text) for text in line] for line in zip(*columns.values(), strict=True)])
    told = "Training figures are means over each epoch, taken in passing while the network learns"
    if rows[-1]["val_loss"] is not None:
        told += "; validation is measured after the epoch"
    ended = summary.get("ended_by_budget")
    early = "" if ended is None else f"<p>{escape(_ended(ended))}</p>\n"
    return (
        f'{early}<div class="pair">\n{"".join(charts)}</div>\n'
        f'<p class="soft">{told}. The weights are those of epoch {summary["kept_epoch"]}.</p>\n'
        f"<details><summary>Figures of every epoch</summary>\n{scrolling('Figures of every epoch', table)}</details>"
    )


def _ended(ended: dict[str, Any]) -> str:
    """Return how far a budget let training come."""
    return f"--budget {ended['budget']} ended training after {ended['epochs']:.1f} of {ended['of']} epochs."


def _calibration(summary: dict[str, Any], predictions: Predictions) -> str:
    """Whether confidence can be believed, with and without the temperature."""
    own = summary.get("calibration") or {"temperature": 1.0, "reason": "this run is older than it"}
    temperature = float(own["temperature"])
    plain = calibrate(predictions.logits, predictions.labels)
    scaled = calibrate(predictions.logits, predictions.labels, temperature)
    lines = [("a", "as they are", *_filled(plain))]
    told = (
        f"Accuracy and confidence of the test images lie {plain.error:.2f} percentage points apart, over {BINS} bins "
        "of confidence (expected calibration error)."
    )
    if temperature == 1:
        told += f" The temperature is 1: {escape(str(own['reason']))}."
    else:
        lines.append(("b", "with temperature", *_filled(scaled)))
        told += (
            f" With the logits divided by the temperature {temperature:g} ({escape(str(own['reason']))}) it is "
            f"{scaled.error:.2f}."
        )
    rows = [
        [row_head(f"{100 * place / BINS:.0f} to {100 * (place + 1) / BINS:.0f} %", name=True)]
        + [number(text) for curve in ([plain, scaled] if temperature != 1 else [plain]) for text in _bin(curve, place)]
        for place in range(BINS)
    ]
    heads = [head("confidence"), *(head(name, number=True) for name in ("images", "mean", "right"))]
    if temperature != 1:
        heads += [head(f"{name}, with temperature", number=True) for name in ("images", "mean", "right")]
    table = scrolling("Calibration by bins", html_table("", heads, rows))
    return (
        f'<p>{told}</p>\n<div class="narrow">\n{reliability_chart(lines)}</div>\n'
        f"<details><summary>Figures of every bin</summary>\n{table}</details>"
    )


def _filled(curve: Calibration) -> tuple[list[float], list[float]]:
    """Confidence and accuracy of the bins that hold images."""
    places = [place for place in range(BINS) if curve.counts[place]]
    return [curve.confidence[place] for place in places], [curve.accuracy[place] for place in places]


def _bin(curve: Calibration, place: int) -> list[str]:
    if not curve.counts[place]:
        return ["0", "", ""]
    return [f"{curve.counts[place]:,}", f"{curve.confidence[place]:.1f} %", f"{curve.accuracy[place]:.1f} %"]


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
    return f"<p>{names}: {parameters['trained']:,} of {parameters['total']:,} parameters ({share:.1f} %). {proof}</p>"


def _time(summary: dict[str, Any]) -> str:
    """Where the time went, beside what the plan expected where it was written down."""
    seconds = summary["seconds"]
    expected = (summary.get("estimate") or {}).get("seconds") or {}
    names = {
        "prefix": "frozen part, computed once",
        "train": "training",
        "eval": "evaluation",
        "total": "whole run, with reading data and weights",
    }
    longest = max(*(seconds[key] for key in names), *expected.values(), 1e-9)
    heads = [head("phase"), head("took", number=True)]
    heads += [head("expected", number=True)] if expected else []
    rows = []
    for key, name in names.items():
        row = [row_head(name, name=True), number(f"{seconds[key]:,.1f} s")]
        if expected:
            row.append(number(f"{expected[key]:,.1f} s" if key in expected else ""))
        rows.append([*row, bar(100 * seconds[key] / longest)])
    processes = summary.get("processes", 1)  # older runs do not say
    shared = f" in {processes:,} processes" if processes > 1 else ""
    return (
        f"<p>{duration(seconds['total'])} on {escape(summary['device'])}{shared}, {summary['epochs']} epochs, "
        f"{summary['images_seen']:,} images seen.</p>\n" + html_table("", [*heads, head("")], rows)
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
        ("versions", ", ".join(f"{name} {release}" for name, release in summary["versions"].items())),
    ]
    rows = [[row_head(name), f"<td>{escape(str(value))}</td>"] for name, value in facts if value is not None]
    return html_table("", [], rows)
