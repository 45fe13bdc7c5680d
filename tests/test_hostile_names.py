"""Names that strangers chose: in the terminal, in CSV and on pages they are text, whatever is in them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from make_hostile import change_json, write_finished, write_model, write_photos
from make_page import Page
from typer.testing import CliRunner

from cli.console import LongTable, Screen, print_error, print_lines, print_table, printable
from cli.main import app
from cli.predict import plain_cell
from finetune.compare import compare
from finetune.compare_page import write_page
from finetune.report import rebuild_report

MARKUP = ("[bold]red[/bold]", "[/]", "\\[/]", "\\\\[bold]x", "[link=file:///etc/passwd]x", ":bomb:", "[#ff0000]")
COMMANDS = "\x1b[2J\x1b]0;title\x07\x9b31m\r\n\u202egnp.exe\u2028"
ESCAPED = "\\x1b[2J\\x1b]0;title\\x07\\x9b31m\\r\\n\\u202egnp.exe\\u2028"
TAG = '"><script>alert(1)</script>'


def test_markup_in_names_is_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    for name in MARKUP:
        print_table(f"title {name}", [(f"column {name}", "left")], [[f"cell {name}"]])
        table = LongTable(f"title {name}", [("class", "left", [name])])
        table.add([[name]])
        with Screen() as screen:
            screen.note(f"note {name}")
            screen.progress(f"task {name}", 1, 2)
        print_error(f"error {name}")
        shown = capsys.readouterr()
        for words in ("title", "column", "cell"):
            assert f"{words} {name}" in shown.out
        assert shown.out.count(name) == 5
        for words in ("note", "error"):
            assert f"{words} {name}" in shown.err


def test_commands_for_the_terminal_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(COMMANDS, [(COMMANDS, "left")], [[COMMANDS]])
    LongTable(COMMANDS, [("class", "left", [COMMANDS])]).add([[COMMANDS]])
    print_lines([COMMANDS])
    print_error(COMMANDS)
    with Screen() as screen:
        screen.note(COMMANDS)
        screen.progress(COMMANDS, 1, 1)
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert not any(sign in text for sign in "\x1b\x07\x9b\r\u202e\u2028")
        assert ESCAPED in text.replace("\n", "")
    assert printable("naïve 写真 👩‍🔬 a\\b") == "naïve 写真 👩‍🔬 a\\b"


def test_a_spreadsheet_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formula = '=HYPERLINK("http://x","y")'
    for given in (formula, "@SUM(1)", "+1", "-1"):
        assert plain_cell(given) == f"'{given}"
    assert plain_cell("a-1") == "a-1"
    model = write_model(tmp_path / "model", label_names=[formula, "\x1b[31m", "cow"])
    write_photos(tmp_path / "photos", 1)
    (tmp_path / "photos" / "cat" / "0.png").rename(tmp_path / "photos" / "=1+1.png")
    monkeypatch.chdir(tmp_path / "photos")
    done = CliRunner().invoke(app, ["predict", str(model), "=1+1.png", "--csv", "--device", "cpu"])
    assert done.exit_code == 0, done.stderr
    _, row = csv.reader(io.StringIO(done.stdout))
    assert row[0] == "'=1+1.png"
    assert sorted(row[1::2]) == sorted([f"'{formula}", "\\x1b[31m", "cow"])
    done = CliRunner().invoke(app, ["predict", str(model), "=1+1.png", "--json", "--device", "cpu"])
    (found,) = json.loads(done.stdout)
    assert found["path"] == "=1+1.png"
    assert {one["class"] for one in found["topk"]} == {formula, "\x1b[31m", "cow"}


def test_pages_show_every_name_as_text(tmp_path: Path) -> None:
    changes = {"arch": TAG, "data__name": TAG, "trained_layers": [TAG], "weights__source": TAG, "device": TAG}
    runs = [write_finished(tmp_path / name, **changes) for name in ("<b>", "other")]
    for run in runs:
        change_json(run / "config.json", {"label_names": [TAG, f"{TAG}2", f"{TAG}3"]})
        recipe = run / "recipe.toml"
        recipe.write_text(recipe.read_text() + f"new = {json.dumps(TAG + run.name)}\n")
    report = rebuild_report(runs[0]).read_text()
    write_page(tmp_path / "compare.html", compare(runs))
    for source in (report, (tmp_path / "compare.html").read_text()):
        page = Page(source)
        assert "<script" not in source
        assert TAG in page.text
        assert page.open == []
    assert "<b>" in page.text
