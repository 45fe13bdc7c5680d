"""Where commands write what they were asked for: never over something else, and a full disk is a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cli.main import app
from cli.options import require_page, require_predictions
from finetune.page import html_page
from finetune.predictions import Predictions, write_predictions
from weights.errors import UsageError

ROOT = Path(__file__).parents[1]
FULL = Path("/dev/full")


def predictions() -> Predictions:
    empty = torch.zeros(0, dtype=torch.int64)
    return Predictions(torch.eye(2), torch.arange(2), empty, torch.zeros((0, 3, 1, 1), dtype=torch.uint8))


def test_earlier_pages_and_predictions_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(html_page("a", ["<p>b</p>"]))
    write_predictions(tmp_path / "some.safetensors", predictions())
    for path in (tmp_path / "page.html", tmp_path / "new.html"):
        require_page(path, "--html")
    for path in (tmp_path / "some.safetensors", tmp_path / "new.safetensors"):
        require_predictions(path, "--output")


def test_anything_else_is_kept(tmp_path: Path) -> None:
    (tmp_path / "other.html").write_text("<!doctype html><p>finetune</p>")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "empty").touch()
    write_predictions(tmp_path / "some.safetensors", predictions())
    for name in ("other.html", "photo.jpg", "empty", "some.safetensors"):
        with pytest.raises(UsageError) as error:
            require_page(tmp_path / name, "--html")
        assert str(error.value) == (
            f"--html {tmp_path / name} is there already and is not known as a page of this version, so it is kept; "
            "give another name."
        )
    (tmp_path / "page.html").write_text(html_page("a", ["<p>b</p>"]))
    for name in ("other.html", "photo.jpg", "empty", "page.html"):
        with pytest.raises(
            UsageError, match="is there already and is not known as a file of predictions, so it is kept"
        ):
            require_predictions(tmp_path / name, "--output")
    for require in (require_page, require_predictions):
        with pytest.raises(UsageError, match="is a folder; give the name of a file"):
            require(tmp_path, "--output")


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "no-such-run", "--output"),
        ("check", "no-such-data", "--html"),
        ("compare", "no-such-run", "another", "--html"),
    ],
)
def test_commands_ask_before_they_begin(tmp_path: Path, words: tuple[str, ...]) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"weights")
    done = CliRunner().invoke(app, [*words, str(model)])
    assert done.exit_code == 2
    assert "is there already and is not known as a" in done.stderr
    assert model.read_bytes() == b"weights"


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, which Linux has")
@pytest.mark.parametrize("words", [("list",), ("list", "--json"), ("--version",)])
def test_a_full_disk_behind_standard_output(words: tuple[str, ...]) -> None:
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cli", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
    assert done.returncode == 1
    told = "Standard output cannot be written (No space left on device); send it elsewhere, or make room."
    assert " ".join(done.stderr.split()) == f"Error: {told} Files that were written are kept."


@pytest.mark.skipif(os.name != "posix", reason="needs a shell that closes a stream")
def test_a_standard_output_that_is_closed() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m cli list --search test_resnet >&-"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_has_seen_enough() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "cli", "--version"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
