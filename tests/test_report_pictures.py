"""The report's pictures, its size at 100 classes, the page made again, and what a browser finds in it."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from make_data import make_images, write_image_folder
from make_page import Page, browse, needs_chromium
from make_run import tiny_recipe, write_weights
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import cli.report
from cli.main import app
from finetune.examples import SIDE, choose_examples, png, shrink
from finetune.matrix_chart import confusion_chart, shade_of
from finetune.metrics import confusion_matrix
from finetune.pipeline import run
from finetune.predictions import illustrate, read_predictions
from finetune.report import rebuild_report, write_report
from weights.errors import RunError

EVIL = "<script>alert(1)</script>"


def guesses(classes: int, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions that are right about two times in three and else anything."""
    random = np.random.default_rng(0)
    labels = np.arange(images) % classes
    logits = random.normal(size=(images, classes)).astype(np.float32)
    logits[np.arange(images), labels] += 3
    return torch.tensor(logits), torch.tensor(labels)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on photos of six classes, one with a name that is no HTML."""
    root = tmp_path_factory.mktemp("pictures")
    made = make_images(60, 36, classes=6)
    names = (*made.classes[:5], EVIL.replace("/", "∕"))
    write_image_folder(
        root / "photos", made=type(made)(made.train, made.train_labels, made.test, made.test_labels, names)
    )
    weights = write_weights(root / "w.safetensors")
    run(tiny_recipe(root / "photos", weights, root / "cache", epochs=1), root / "run")
    return root / "run"


def test_the_most_confused_and_the_surest_mistakes_are_chosen() -> None:
    logits, labels = guesses(5, 400)
    found = choose_examples(logits, labels)
    chances = logits.double().softmax(1)
    sure, predicted = chances.max(1)
    wrong = (predicted != labels).nonzero().flatten().tolist()
    assert [one.row for one in found.mistakes] == sorted(wrong, key=lambda row: -sure[row])[:20]
    assert found.mistakes[0].confidence == pytest.approx(100 * float(sure[found.mistakes[0].row]))
    counts = confusion_matrix(predicted, labels, 5).fill_diagonal_(0).flatten().sort(descending=True).values
    assert [pair.count for pair in found.pairs] == counts[:10].tolist()
    for pair in found.pairs:
        assert all((labels[row], predicted[row]) == (pair.label, pair.taken) for row in pair.rows)
        assert len(pair.rows) == min(3, pair.count)
        assert pair.right is not None
        assert labels[pair.right] == predicted[pair.right] == pair.taken
    shown = {row for pair in found.pairs for row in (*pair.rows, pair.right)} | {one.row for one in found.mistakes}
    assert found.rows == sorted(row for row in shown if row is not None)


def test_a_picture_is_the_image() -> None:
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert shrink(images) is images
    address = png(images[1])
    assert address.startswith("data:image/png;base64,")
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))
    assert np.array_equal(decoded, images[1].permute(1, 2, 0).numpy())
    assert shrink(torch.full((2, 3, 200, 100), 7, dtype=torch.uint8)).shape == (2, 3, SIDE, SIDE // 2)
    assert shrink(torch.full((2, 3, 200, 100), 7, dtype=torch.uint8)).unique().tolist() == [7]


def test_every_square_of_the_matrix_says_its_figures() -> None:
    matrix = torch.tensor([[8, 2, 0], [0, 0, 0], [1, 99, 900]])
    chart = Page(f"<div>{confusion_chart(matrix, ['ant', 'bee', EVIL])}</div>")
    squares = [(one["x"], one["y"], one["class"]) for one in chart.all("rect")]
    assert squares == [("0", "0", "right m5"), ("1", "0", "wrong m3"), ("1", "2", "wrong m2"), ("2", "2", "right m5")]
    assert "ant, right: 8 of 10 ant taken for bee: 2 of 10" in chart.text
    assert "<script>alert(1)</scrip… taken for bee: 99 of 1,000" in chart.text
    traces = [one["d"] for one in chart.all("path") if one["class"] == "wrong m1"]
    assert traces == ["M0 2h1v1h-1z"]
    assert chart.text.endswith("8 2 1 99 900"), "with few classes each square shows its number"
    assert [shade_of(share) for share in (0.1, 2, 4.9, 5, 10, 25, 49, 50, 100)] == [1, 1, 1, 2, 3, 4, 4, 5, 5]


def test_more_classes_than_a_picture_can_show() -> None:
    assert confusion_chart(torch.eye(151, dtype=torch.int64), [str(n) for n in range(151)]) == ""


def test_a_report_of_100_classes_stays_below_2_mb(finished: Path, tmp_path: Path) -> None:
    """The worst there is: every pair of classes was met, names are long, pictures are noise and of full size."""
    logits, labels = guesses(100, 20_000)
    predicted = torch.arange(20_000) // 100 % 100
    logits[torch.arange(20_000), predicted] += 20
    noise = torch.randint(0, 256, (200, 3, SIDE, SIDE), dtype=torch.uint8)
    images = noise[torch.arange(20_000) % 200]
    summary = json.loads((finished / "summary.json").read_text())
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    names = [f"a class with quite a long name {number}" for number in range(100)]
    write_report(tmp_path, summary, rows, names, illustrate(logits, labels, images))
    page = Page((tmp_path / "report.html").read_text())
    assert (confusion_matrix(logits.argmax(1), labels, 100) > 0).all()
    assert len(page.all("img")) == 50, "for each of ten pairs two mistakes and one right, and twenty mistakes"
    assert sum("rotate" in (one.get("transform") or "") for one in page.all("text")) == 100, "each column has its name"
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_the_page_is_made_again_from_the_folder(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    before = (copy / "report.html").read_bytes()
    (copy / "report.html").unlink()
    done = CliRunner().invoke(app, ["report", str(copy)])
    assert (done.exit_code, done.stdout) == (0, f"{copy / 'report.html'}\n")
    assert (copy / "report.html").read_bytes() == before

    old = json.loads((copy / "summary.json").read_text())  # of a run before there were these figures
    for name in ("calibration", "test_top5_accuracy", "test_mean_recall"):
        del old[name]
    (copy / "summary.json").write_text(json.dumps(old))
    saved = read_predictions(copy / "predictions.safetensors")
    assert saved is not None
    save_file({"logits": saved.logits, "labels": saved.labels}, copy / "predictions.safetensors")
    page = Page(rebuild_report(copy).read_text())
    assert "Most confident mistakes" in page.text
    assert page.all("img") == []


def test_a_page_does_not_mix_the_run_with_other_images(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    path = copy / "predictions.safetensors"
    saved = read_predictions(path)
    assert saved is not None
    page = (copy / "report.html").read_bytes()
    for logits, labels in ((saved.logits[:-1], saved.labels[:-1]), (torch.eye(6)[saved.labels], saved.labels)):
        save_file({"logits": logits.contiguous(), "labels": labels.contiguous()}, path)
        with pytest.raises(RunError) as error:
            rebuild_report(copy)
        assert f"{path} has {len(labels)} images, " in str(error.value)
        assert str(error.value).endswith(
            f"a page would mix the two. Bring the run's own back with finetune eval {copy} --output {path}."
        )
    assert (copy / "report.html").read_bytes() == page


def test_what_is_no_run_has_no_report(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is no finished run .*summary.json.* give a folder that finetune run"):
        rebuild_report(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "predictions.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(RunError, match=r"predictions.safetensors is damaged .*; make it again with finetune eval"):
        rebuild_report(copy)
    (copy / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r"is no finished run \(config.json: label_names is missing\)"):
        rebuild_report(copy)


def test_open_shows_the_page(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    answers = iter([True, False])
    monkeypatch.setattr(cli.report.webbrowser, "open", lambda address: shown.append(address) or next(answers))
    assert CliRunner().invoke(app, ["report", str(finished), "--open"]).stderr == ""
    assert shown == [(finished / "report.html").resolve().as_uri()]
    told = CliRunner().invoke(app, ["report", str(finished), "--open"])
    assert told.stderr == f"No browser was found; the page is {shown[0]}\n"


@needs_chromium
def test_a_browser_finds_the_summary_in_the_page(finished: Path, tmp_path: Path) -> None:
    dom, console, requests = browse(finished / "report.html", tmp_path)
    page = Page(dom)
    summary = json.loads((finished / "summary.json").read_text())
    for figure in (
        f"{summary['test_accuracy']:.2f} % test accuracy on 36 images",
        f"loss {summary['test_loss']:.3f}",
        f"top-5 accuracy {summary['test_top5_accuracy']:.2f} %",
        f"mean per-class recall {summary['test_mean_recall']:.2f} %",
        f"calibration error {summary['calibration']['test_error']:.2f} points",
        f"{summary['parameters']['trained']:,} of {summary['parameters']['total']:,} parameters",
        f"training {summary['seconds']['train']:,.1f} s",
        summary["data"]["sha256"],
        summary["weights"]["sha256"],
        "<script>alert(1)<∕script>",
    ):
        assert figure in page.text, figure
    assert page.all("script") == []
    assert "CONSOLE" not in console
    assert requests == []


@needs_chromium
def test_a_request_and_an_error_would_be_noticed(tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text('<p>page</p><img src="http://pictures.invalid/a.png" alt=""><script>nothing.there()</script>')
    dom, console, requests = browse(spoilt, tmp_path)
    assert "page" in dom
    assert "CONSOLE" in console
    assert set(requests) == {"http://pictures.invalid/a.png"}
