"""Runs side by side: the same data only, and a conclusion that follows from the numbers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from make_data import write_image_folder
from make_page import Page, browse, needs_chromium
from make_run import tiny_recipe, write_weights
from typer.testing import CliRunner

from cli.main import app
from finetune.compare import Comparison, Explained, compare, equal_time
from finetune.compare_page import write_page
from finetune.pipeline import run
from finetune.recipe import from_table, read_toml, to_toml
from weights.errors import RunError, UsageError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs on the same photos that differ in learning rate and epochs."""
    root = tmp_path_factory.mktemp("compare")
    write_image_folder(root / "photos")
    weights = write_weights(root / "test_resnet.safetensors")
    recipe = tiny_recipe(root / "photos", weights, root / "cache")
    run(recipe, root / "short")
    run(dataclasses.replace(recipe, lr=0.05, epochs=3), root / "<long>")
    return [root / "short", root / "<long>"]


def test_what_differs_and_what_it_brought(runs: list[Path]) -> None:
    result = compare(runs)
    assert [one.name for one in result.runs] == ["short", "<long>"]
    assert set(result.differing) == {"lr", "epochs"}
    assert result.differing["epochs"] == [2, 3]
    plain = json.loads(json.dumps(result.as_dict()))
    assert [len(one["train_loss"]) for one in plain["runs"]] == [2, 3]
    assert plain["runs"][1]["seconds"]["total"] > 0
    (why,) = result.explained
    assert why.points == pytest.approx(why.fit + why.gap)


def test_accuracy_at_equal_time(runs: list[Path]) -> None:
    result = compare(runs)
    equal = equal_time(result.runs)
    assert equal is not None
    curves = [run.by_time() for run in result.runs]
    assert equal.seconds == min(seconds[-1] for seconds, _, _ in curves)
    for (seconds, values, _), reached in zip(curves, equal.accuracies, strict=True):
        assert (
            reached
            == max(((s, v) for s, v in zip(seconds, values, strict=True) if s <= equal.seconds), default=(0, None))[1]
        )
    assert result.as_dict()["equal_time"]["accuracies"] == equal.accuracies


def test_a_setting_that_came_later_is_no_difference(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "older").mkdir()
    for name in ("metrics.jsonl", "summary.json"):
        (tmp_path / "older" / name).write_bytes((runs[0] / name).read_bytes())
    lines = (runs[0] / "recipe.toml").read_text().splitlines()
    (tmp_path / "older" / "recipe.toml").write_text("\n".join(line for line in lines if "class_weights" not in line))
    assert compare([runs[0], tmp_path / "older"]).differing == {}


def test_settings_are_those_that_were_used(runs: list[Path], tmp_path: Path) -> None:
    """recipe.toml keeps `auto` where it was not given; what it came to is known."""
    assert compare(runs).differing["lr"] == [0.01, 0.05]
    changed = (
        ("adam", {"optimizer": "adam"}),
        ("crop", {"augment": "crop"}),
        ("muon", {"optimizer": "muon", "lr": 0.01}),
        ("decay", {"optimizer": "muon", "lr": 0.01, "weight_decay": 0.02}),
    )
    for name, changes in changed:
        (tmp_path / name).mkdir()
        for file in ("metrics.jsonl", "summary.json"):
            (tmp_path / name / file).write_bytes((runs[0] / file).read_bytes())
        settings = from_table({**read_toml(runs[0] / "recipe.toml"), **changes}, "")
        (tmp_path / name / "recipe.toml").write_text(to_toml(settings))
    assert compare([runs[0], tmp_path / "adam"]).differing == {"lr": [0.01, 0.001], "optimizer": ["sgd", "adam"]}
    assert compare([runs[0], tmp_path / "crop"]).differing == {"augment": ["flip", "crop"]}  # two epochs, two views
    assert compare([tmp_path / "muon", tmp_path / "decay"]).differing == {}
    summary = json.loads((runs[0] / "summary.json").read_text())
    (tmp_path / "crop" / "summary.json").write_text(json.dumps({**summary, "windows": {"map": 14, "sides": [10, 12]}}))
    both = {"augment": ["flip", "crop"], "windows": ["off", [10, 12]]}
    assert compare([runs[0], tmp_path / "crop"]).differing == both


def test_other_weights_are_a_difference(runs: list[Path], tmp_path: Path) -> None:
    summary = json.loads((runs[1] / "summary.json").read_text())
    summary["weights"] = {"source": "none", "sha256": None}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "summary.json").write_text(json.dumps(summary))
    for name in ("metrics.jsonl", "recipe.toml"):
        (tmp_path / "other" / name).write_bytes((runs[1] / name).read_bytes())
    result = compare([runs[1], tmp_path / "other"])
    assert set(result.differing) == {"weights"}
    assert result.differing["weights"][1] == "none"


def test_time_runs_on_from_the_features(runs: list[Path]) -> None:
    one = compare(runs).runs[0]
    seconds, values, of = one.by_time()
    prefix, test = one.summary["seconds"]["prefix"], one.summary["features"]["test_seconds"]
    assert 0 < test < prefix
    one.summary["seconds"]["compile"] = 3.0
    (seconds, values, of), before = one.by_time(), seconds
    assert seconds == pytest.approx([second + 3 for second in before]), "choosing and compiling are waited for too"
    trained = 3 + prefix - test + one.rows[0]["seconds"] + one.rows[0]["eval_seconds"]
    assert seconds[0] == pytest.approx(trained), "the test's features come after the last epoch"
    assert of == "validation"
    assert len(seconds) == len(values) == 2
    assert seconds[0] < seconds[1]


@pytest.mark.parametrize(
    ("fit", "gap", "why"),
    [
        (8.0, -2.0, "less under-fitting."),
        (0.0, 5.0, "less over-fitting."),
        (-1.0, 6.0, "less over-fitting."),
        (3.0, 2.0, "less under-fitting and less over-fitting."),
        (2.0, 3.0, "less over-fitting and less under-fitting."),
    ],
)
def test_the_conclusion_follows_from_the_numbers(fit: float, gap: float, why: str) -> None:
    one = Explained("a", "b", fit + gap, fit, gap)
    assert one.sentence.endswith(why)
    assert f"{fit + gap:.1f} points more" in one.sentence


def test_runs_that_are_equal() -> None:
    assert "0.0" not in Explained("a", "b", 0.04, 0.05, -0.01).sentence
    assert Explained("a", "b", 0.0, 1.0, -1.0).sentence == "a and b get the same share of the test images right."


@pytest.mark.parametrize(("key", "what"), [("sha256", "data"), ("test_sha256", "test images")])
def test_other_data_are_refused(runs: list[Path], tmp_path: Path, key: str, what: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("metrics.jsonl", "recipe.toml"):
        (other / name).write_bytes((runs[0] / name).read_bytes())
    summary = json.loads((runs[0] / "summary.json").read_text())
    summary["data"] |= {key: "0" * 64, "name": "cats"}
    (other / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UsageError) as error:
        compare([runs[0], other])
    assert str(error.value) == (
        f"{runs[0]} and {other} were made on different {what} (photos and cats), so their results cannot be compared; "
        "give runs on the same data."
    )


def test_photos_at_two_sizes_are_told(runs: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    summary, recipe = other / "summary.json", other / "recipe.toml"
    told = json.loads(summary.read_text())
    told["data"]["sha256"] = "0" * 64
    summary.write_text(json.dumps(told))
    before = next(line for line in recipe.read_text().splitlines() if line.startswith("image_size"))
    recipe.write_text(recipe.read_text().replace(before, "image_size = 96"))
    with pytest.raises(UsageError) as error:
        compare([runs[0], other])
    assert (
        "and photos at --image-size 96), so their results cannot be compared; give runs on the same data, at one"
        in (str(error.value))
    )


def test_what_is_no_finished_run(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is no finished run .* give a folder that finetune run"):
        compare([runs[0], tmp_path])
    with pytest.raises(UsageError, match="got 1 run directory; give at least two"):
        compare(runs[:1])
    with pytest.raises(UsageError, match="is given twice"):
        compare([runs[0], runs[0]])


class Reader(HTMLParser):
    """Counts elements, and sees that every one is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(result: Comparison, path: Path) -> str:
    write_page(path, result)
    text = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.seen.count("polyline") == 2 * len(result.runs)
    return text


def test_the_page(runs: list[Path], tmp_path: Path) -> None:
    result = compare(runs)
    text = page_of(result, tmp_path / "compare.html")
    assert "<long>" not in text  # names are text
    assert "&lt;long&gt;" in text
    assert "http" not in text.replace("http-equiv", "")
    assert "Accuracy at equal time" in text
    for one in result.runs:
        assert f"{one.accuracy:.2f} %" in text


@needs_chromium
def test_a_browser_finds_the_summaries_in_the_page(runs: list[Path], tmp_path: Path) -> None:
    result = compare(runs)
    write_page(tmp_path / "compare.html", result)
    dom, console, requests = browse(tmp_path / "compare.html", tmp_path)
    page = Page(dom)
    for run_ in result.runs:
        assert f"{run_.summary['test_accuracy']:.2f} %" in page.text
        assert f"{run_.rows[-1]['train_loss']:.4f}" in page.text
    assert "<long>" in page.text
    assert "CONSOLE" not in console
    assert requests == []


def test_the_command(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["compare", *map(str, runs)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert "mean training loss" in done.stdout
    assert list(tmp_path.iterdir()) == [], "no page unless it is asked for"
    paged = CliRunner().invoke(app, [*words, "--html", "page.html"])
    assert paged.stdout == done.stdout + "page: page.html\n"
    assert Path("page.html").exists()
    as_json = json.loads(CliRunner().invoke(app, [*words, "--output", "old.html", "--json"]).stdout)
    assert (as_json["differing"]["epochs"], as_json["page"]) == ([2, 3], "old.html")
    nowhere = CliRunner().invoke(app, [*words, "--html", "no/page.html"])
    assert nowhere.exit_code == 2
    assert "--html no/page.html lies in a folder that does not exist; make no, or give another." in nowhere.stderr
