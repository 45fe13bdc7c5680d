"""report.html: the summary's figures, on a page that needs nothing else and trusts no name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from make_page import Page

from finetune.chart import overlay, ticks, whole_ticks
from finetune.metrics import calibrate
from finetune.predictions import Predictions, illustrate
from finetune.report import write_report

CLASSES = [f"class {number}" for number in range(30)]


def rows_of(epochs: int, *, val: bool = True) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "train_loss": 3 / epoch,
            "train_accuracy": 100 - 60 / epoch,
            "val_loss": 3.5 / epoch if val else None,
            "val_accuracy": 90 - 60 / epoch if val else None,
            "lr": 0.01,
            "seconds": 1.25,
        }
        for epoch in range(1, epochs + 1)
    ]


def summary_of(**changes: Any) -> dict[str, Any]:
    return {
        "arch": "resnet18.tv_in1k",
        "test_accuracy": 71.2345,
        "test_loss": 1.0625,
        "train_accuracy": 88.125,
        "val_accuracy": 70.5,
        "test_top5_accuracy": 93.0625,
        "test_mean_recall": 65.4321,
        "calibration": {
            "temperature": 0.5,
            "reason": "fitted on 500 validation images",
            "test_error": 9.875,
            "test_error_scaled": 4.5,
        },
        "epochs": 5,
        "kept_epoch": 5,
        "images_seen": 12_345,
        "seconds": {"total": 305.0, "compile": 0.0, "prefix": 211.5, "train": 61.75, "eval": 8.5},
        "parameters": {"total": 11_227_812, "trained": 8_445_028},
        "trained_layers": ["layer4", "fc"],
        "frozen_unchanged": True,
        "frozen_tensors": 90,
        "weights": {"source": "local file resnet18.pth", "sha256": "ab" * 32},
        "data": {
            "name": "cifar100",
            "sha256": "cd" * 32,
            "classes": 30,
            "train": 4500,
            "val": 500,
            "test": 600,
            "uneven": False,
        },
        "device": "cpu",
        "precision": "bf16",
        "compile": False,
        "features": {"where": "ram", "bytes": 1_500_000},
        "versions": {"python": "3.12.1", "torch": "2.9.0"},
        **changes,
    }


def guesses() -> tuple[torch.Tensor, torch.Tensor]:
    """20 test images of each of 30 classes; class c has c % 20 of them taken for class c + 1."""
    labels = torch.arange(30).repeat_interleave(20)
    wrong = torch.arange(20).repeat(30) < labels % 20
    logits = torch.zeros(600, 30)
    logits[torch.arange(600), (labels + wrong) % 30] = 1.0
    return logits, labels


def predictions_of(logits: torch.Tensor, labels: torch.Tensor) -> Predictions:
    """With pictures of one colour, which is the image's place."""
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)
    return illustrate(logits, labels, images)


def page_of(folder: Path, **given: Any) -> tuple[str, Page]:
    settings = {
        "summary": summary_of(),
        "rows": rows_of(5),
        "classes": CLASSES,
        "predictions": predictions_of(*guesses()),
    }
    write_report(folder, **{**settings, **given})
    source = (folder / "report.html").read_text(encoding="utf-8")
    return source, Page(source)


def test_the_figures_are_those_of_the_summary(tmp_path: Path) -> None:
    _, page = page_of(tmp_path)
    for figure in (
        "resnet18.tv_in1k on cifar100",
        "71.23 % test accuracy on 600 images",
        "loss 1.062",
        "Repeat this run, in the folder of this page: finetune run --config recipe.toml",
        "top-5 accuracy 93.06 %",
        "mean per-class recall 65.43 %",
        "calibration error 9.88 points",
        "calibration error with temperature 4.50 points",
        "layer4, fc: 8,445,028 of 11,227,812 parameters (75.2 %)",
        "the 90 frozen tensors and buffers had the same SHA-256 after training as before",
        "5 min 5 s on cpu, 5 epochs, 12,345 images seen",
        "frozen part, computed once 211.5 s",
        "training 61.8 s",
        "evaluation 8.5 s",
        "30 classes, 4,500 train, 500 validation, 600 test images",
        "ab" * 32,
        "cd" * 32,
        "local file resnet18.pth",
        "88.12 %",
        "bf16, not compiled",
        "1.5 MB (ram)",
        "python 3.12.1, torch 2.9.0",
    ):
        assert figure in page.text


def test_the_page_is_well_formed_and_needs_nothing_else(tmp_path: Path) -> None:
    source, page = page_of(tmp_path)
    assert page.open == []
    assert not re.search(r"https?:|//|url\(|@import", re.sub(r'src="data:image/png;base64,[\w+/=]+"', "", source))
    tags = {tag for tag, _ in page.elements}
    assert tags.isdisjoint({"script", "link", "iframe", "object"})
    used = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(used) == len(set(used))
    assert {(attributes["href"] or "")[1:] for attributes in page.all("a")} <= set(used)


def test_who_cannot_see_it_can_read_it(tmp_path: Path) -> None:
    """Pictures have words, tables have heads, headings come in order, what scrolls can be reached by keyboard."""
    _, page = page_of(tmp_path)
    assert all(attributes.get("alt") for attributes in page.all("img"))
    assert len(page.all("img")) > 20
    assert all(attributes.get("scope") in ("row", "col") for attributes in page.all("th"))
    assert all("scope" in attributes or attributes.get("aria-hidden") for attributes in page.all("th"))
    headings = [tag for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert headings == ["h1"] + ["h2"] * (len(headings) - 1)
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in page.all("div") if box.get("role") == "region")
    named = [attributes for attributes in page.all("svg") if attributes.get("aria-hidden") != "true"]
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert named
    assert all(set((attributes["aria-labelledby"] or "").split()) <= ids for attributes in named)


def test_every_name_is_text(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>'
    summary = summary_of(
        arch=evil,
        weights={"source": evil, "sha256": evil},
        data={**summary_of()["data"], "name": evil, "sha256": evil},
        trained_layers=[evil],
        versions={evil: evil},
        device=evil,
    )
    summary["calibration"]["reason"] = evil
    source, page = page_of(tmp_path, summary=summary, classes=[evil] * 30)
    assert "<script" not in source
    assert any(evil in (attributes["alt"] or "") for attributes in page.all("img"))
    assert page.open == []
    assert page.text.count(evil) >= 30


@pytest.mark.parametrize(("epochs", "val"), [(1, True), (7, True), (7, False), (90, True)])
def test_curves_have_a_point_for_every_epoch(tmp_path: Path, epochs: int, val: bool) -> None:
    _, page = page_of(tmp_path, rows=rows_of(epochs, val=val))
    *lines, _, _ = page.all("polyline")  # the last two are of calibration
    assert len(lines) == (4 if val else 2)
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in (line["points"] or "").split()]
        assert len(points) == epochs
        assert all(0 <= x <= 420 and 0 <= y <= 250 for x, y in points)
        assert sorted(points) == points
    titles = [attributes["aria-labelledby"] for attributes in page.all("svg") if "aria-labelledby" in attributes]
    assert titles[:2] == ["loss-title loss-desc", "accuracy-title accuracy-desc"]
    assert f"training from 40.00 % in epoch 1 to {100 - 60 / epochs:.2f} % in epoch {epochs}" in page.text


def test_a_curve_goes_where_its_figures_are(tmp_path: Path) -> None:
    _, page = page_of(tmp_path, rows=rows_of(3, val=False))
    falling, rising = (
        [float(point.split(",")[1]) for point in (line["points"] or "").split()] for line in page.all("polyline")[:2]
    )
    assert falling[0] < falling[1] < falling[2]  # a loss of 3, 1.5, 1: downwards, so y grows
    assert (falling[1] - falling[0]) / (falling[2] - falling[1]) == pytest.approx(3, abs=0.01)
    assert rising[0] > rising[1] > rising[2]


def test_the_ten_worst_and_the_ten_best_classes(tmp_path: Path) -> None:
    _, page = page_of(tmp_path)
    worst, best = page.text.index("the 10 worst"), page.text.index("the 10 best")
    assert page.text[worst:].startswith(
        "the 10 worst class right recall class 19 1 of 20 5.0 % class 18 2 of 20 10.0 % class 17"
    )
    assert page.text[best:].startswith(
        "the 10 best class right recall class 20 20 of 20 100.0 % class 0 20 of 20 100.0 % class 21 19 of 20"
    )
    assert "class 10 10 of 20" in page.text[worst:best]
    assert "All 30 classes, and what each was taken for" in page.text
    assert (
        "class 19 20 5.0 % 5.3 % class 20 19" in page.text
    )  # 1 right of the 19 that class 18 and itself were taken for
    assert "class 19 taken for class 20 : 19 of 20 beside one that is class 20: class 18 taken for" in page.text


def test_few_classes_are_all_shown_and_absent_ones_left_out(tmp_path: Path) -> None:
    labels = torch.tensor([0, 0, 2, 2])
    logits = torch.eye(3)[torch.tensor([0, 2, 2, 2])]
    _, page = page_of(tmp_path, classes=["ant", "bee", "fly"], predictions=predictions_of(logits, labels))
    assert "all classes, the worst first class right recall ant 1 of 2 50.0 % fly 2 of 2 100.0 %" in page.text
    assert "bee" not in page.text.partition("Confusion matrix")[0].partition("by class")[2]
    assert "ant taken for fly : 1 of 2" in page.text


def test_nothing_confused_nothing_frozen_nothing_loaded(tmp_path: Path) -> None:
    summary = summary_of(
        frozen_tensors=0, weights={"source": "none", "sha256": None}, features={"where": "uncut", "bytes": 0}
    )
    _, page = page_of(tmp_path, summary=summary, predictions=predictions_of(torch.eye(30), torch.arange(30)))
    assert "confused" not in page.text
    assert "mistakes" not in page.text.partition("Confusion matrix")[0]
    assert "No layer was frozen." in page.text
    assert "weights random at the start" in page.text
    assert "features" not in page.text


@pytest.mark.parametrize(
    ("val_accuracy", "told"),
    [(70.5, "70.50 % validation accuracy on 500 images"), (None, "88.12 % training accuracy")],
)
def test_without_a_test_split(tmp_path: Path, val_accuracy: float | None, told: str) -> None:
    summary = summary_of(test_accuracy=None, test_loss=None, val_accuracy=val_accuracy)
    summary |= {"test_top5_accuracy": None, "test_mean_recall": None}
    summary["calibration"] |= {"test_error": None, "test_error_scaled": None}
    _, page = page_of(tmp_path, summary=summary, predictions=None)
    assert told in page.text
    assert "by class" not in page.text
    assert "recall" not in page.text
    assert page.open == []


def test_of_uneven_classes_the_mean_recall_is_the_result(tmp_path: Path) -> None:
    summary = summary_of(data={**summary_of()["data"], "uneven": True})
    _, page = page_of(tmp_path, summary=summary)
    assert "65.43 % mean per-class recall on 600 test images" in page.text
    assert "the largest has more than 2 times as many images as the smallest" in page.text
    assert "Over all images, test accuracy is 71.23 %; loss 1.062" in page.text


def test_time_stands_beside_what_was_expected(tmp_path: Path) -> None:
    _, page = page_of(
        tmp_path, summary=summary_of(estimate={"seconds": {"prefix": 200.0, "train": 60.0, "total": 290.5}})
    )
    assert "phase took expected frozen part, computed once 211.5 s 200.0 s training 61.8 s 60.0 s" in page.text
    assert "evaluation 8.5 s whole run, with reading data and weights 305.0 s 290.5 s" in page.text


def test_a_budget_that_ended_training_is_named(tmp_path: Path) -> None:
    ended = {"budget": "20m", "epochs": 3.52, "of": 8}
    _, page = page_of(tmp_path, summary=summary_of(ended_by_budget=ended))
    assert "--budget 20m ended training after 3.5 of 8 epochs." in page.text


def test_calibration_with_a_temperature_and_without(tmp_path: Path) -> None:
    _, page = page_of(tmp_path)
    logits, labels = guesses()
    plain, scaled = calibrate(logits, labels), calibrate(logits, labels, 0.5)
    assert f"lie {plain.error:.2f} percentage points apart, over 15 bins" in page.text
    assert f"temperature 0.5 (fitted on 500 validation images) it is {scaled.error:.2f}" in page.text
    own = {
        "temperature": 1.0,
        "reason": "no validation images to fit it on",
        "test_error": 1.0,
        "test_error_scaled": 1.0,
    }
    _, page = page_of(tmp_path, summary=summary_of(calibration=own))
    assert "The temperature is 1: no validation images to fit it on." in page.text


def test_light_dark_and_print_are_styled(tmp_path: Path) -> None:
    source, page = page_of(tmp_path)
    assert {"name": "color-scheme", "content": "light dark"} in page.all("meta")
    assert "@media screen and (prefers-color-scheme: dark)" in source  # on screen only: paper is white
    assert "@media print" in source
    used = set(re.findall(r"var\((--\w+)\)", source))
    assert used == set(re.findall(r"(--\w+): ", source))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.13, 3.9, [0, 1, 2, 3, 4]),
        (41.2, 99.9, [40, 60, 80, 100]),
        (100.0, 100.0, [99.0, 99.2, 99.4, 99.6, 99.8, 100.0]),
        (0.0, 0.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.101, 0.102, [0.101, 0.1012, 0.1014, 0.1016, 0.1018, 0.102]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_runs_of_less_than_a_second_have_an_axis_that_tells_times_apart() -> None:
    figure = overlay("time", "Accuracy", "seconds", " %", [("a", [0.2, 0.9], [10.0, 20.0])])
    labels = re.findall(r'text-anchor="middle">([0-9.,]+)<', figure)
    assert len(labels) > 2
    assert labels == sorted(set(labels), key=float)
    assert ">5,000<" in overlay("time", "Accuracy", "seconds", " %", [("a", [1000.5, 4900.0], [10.0, 20.0])])


def test_epoch_ticks_are_whole_and_few() -> None:
    assert whole_ticks(1, 1) == [1]
    assert whole_ticks(1, 9) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert whole_ticks(1, 30) == [5, 10, 15, 20, 25, 30]
    assert whole_ticks(1, 1000) == [200, 400, 600, 800, 1000]
