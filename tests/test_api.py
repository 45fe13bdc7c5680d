"""The Python interface: every keyword is the recipe's, and a run leaves the process as it was."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
import signal
import threading
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from make_data import make_images, write_cifar100_python, write_image_folder
from make_run import model_bytes, write_weights

import finetune
import finetune.allocator
import weights.errors
from finetune import pipeline
from finetune.api import BaselineSettings, RunSettings
from finetune.fit import Trainer
from finetune.recipe import Recipe
from finetune.scratch import DECIDED

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    """Keywords of a quick run."""
    root = tmp_path_factory.mktemp("api")
    write_cifar100_python(root / "cifar", made=make_images(48, 20))
    return {
        "arch": "test_resnet",
        "train_layers": "layer4, fc",
        "data": root / "cifar",
        "weights": write_weights(root / "test_resnet.safetensors"),
        "image_size": 32,
        "epochs": 1,
        "batch_size": 16,
        "device": "cpu",
        "precision": "fp32",
        "compile": "off",
        "cache_dir": root / "cache",
    }


def test_a_run_in_a_thread_is_silent_and_leaves_the_process_as_it_was(
    settings: RunSettings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    state = torch.get_rng_state()
    results: list[finetune.Result] = []
    thread = threading.Thread(target=lambda: results.append(finetune.run(**settings, output=str(tmp_path / "run"))))
    thread.start()
    thread.join()
    (result,) = results
    assert capfd.readouterr() == ("", "")
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert torch.equal(torch.get_rng_state(), state)

    assert result.folder == tmp_path / "run"
    assert result.checkpoint.is_file()
    assert result.report.is_file()
    summary = json.loads((result.folder / "summary.json").read_text())
    assert result.summary == {**summary, "output": str(result.folder)}
    names = {item.name for item in dataclasses.fields(result)} & set(summary) - {"seconds"}
    assert {name: getattr(result, name) for name in names} == {name: summary[name] for name in names}
    assert names == {"test_accuracy", "test_loss", "val_accuracy", "train_accuracy", "epochs"}
    assert result.seconds == summary["seconds"]["total"]
    assert [row["epoch"] for row in result.metrics] == [1]
    assert finetune.resume(result.folder) == result  # it is finished


def test_keywords_win_over_the_file_and_progress_is_printed(
    settings: RunSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.toml").write_text("epochs = 7\nlr = 0.02\n")
    result = finetune.run(config=tmp_path / "own.toml", output=tmp_path / "run", progress=True, **settings)
    made = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())
    assert (made["epochs"], made["lr"], made["train_layers"]) == (1, 0.02, ["layer4", "fc"])
    assert result.epochs == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "90 tensors loaded; the head (fc) starts fresh"
    assert "test_resnet.r160_in1k on cifar100: 43 train, 5 validation, 20 test images" in lines
    assert [line[:9] for line in lines if line.startswith("epoch")] == ["epoch 1/1"]


def test_an_interrupted_run_says_how_to_go_on(
    settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", interrupt)
    with pytest.raises(KeyboardInterrupt) as error:
        finetune.run(output=tmp_path / "run", **settings)
    monkeypatch.setattr(Trainer, "step", step)
    folder = str(tmp_path / "run")
    assert error.value.__notes__ == [f"What was finished is kept: finetune.resume({folder!r}) goes on."]
    assert finetune.resume(folder).epochs == 1


def test_a_baseline_and_the_numbers_that_loops_bring(settings: RunSettings, tmp_path: Path) -> None:
    result = finetune.baseline(
        arch="multistage",
        blocks=[1, 1, 1],
        data=settings["data"],
        epochs=np.int64(1),  # type: ignore[arg-type]
        lr=np.float32(0.125),  # type: ignore[arg-type]
        budget=None,
        precision="fp32",
        compile="off",
        cache_dir=settings["cache_dir"],
        output=tmp_path / "first",
    )
    made = tomllib.loads((result.folder / "recipe.toml").read_text())
    assert (made["arch"], made["train_layers"], made["weights"]) == ("finetune_multistage", ["all"], "none")
    assert (made["blocks"], made["epochs"], made["lr"], made["augment"]) == (["1", "1", "1"], 1, 0.125, "crop")
    again = finetune.baseline(config=result.folder / "recipe.toml", output=tmp_path / "again")
    assert model_bytes(again.folder) == model_bytes(result.folder)


@pytest.mark.parametrize(
    ("call", "keywords", "words"),
    [
        ("run", {"epoch": 3}, "finetune.run() takes no 'epoch'; did you mean epochs?"),
        ("run", {"ouput": "x"}, "finetune.run() takes no 'ouput'; did you mean output?"),
        ("run", {"verbosity": 2}, "finetune.run() takes no 'verbosity'; leave it out."),
        ("baseline", {"train_layers": ["fc"]}, "finetune.baseline() takes no 'train_layers'; leave it out."),
        ("run", {"epochs": 2.5}, 'finetune.run() has epochs = 2.5; it must be a whole number, or "auto".'),
        ("run", {"seed": None}, "finetune.run() has seed = None; it must be a whole number."),
        ("run", {"keep_head": 1}, "finetune.run() has keep_head = 1; it must be true or false."),
        ("baseline", {"data": 10}, "finetune.baseline() has data = 10; it must be text in quotes."),
        ("run", {"batch_size": 0}, "--batch-size is 0; give a whole number of at least 1."),
        ("baseline", {"recipe": "fats"}, "--recipe is 'fats'; did you mean fast? It can be fast or assignment."),
        (
            "run",
            {"config": "none.toml"},
            "The recipe none.toml cannot be read (No such file or directory); give the path of a recipe.toml.",
        ),
    ],
)
def test_a_wrong_call_is_one_sentence(call: str, keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(finetune.UsageError) as error:
        getattr(finetune, call)(**keywords)
    assert str(error.value) == words


def test_every_error_is_there() -> None:
    tree: list[type[finetune.FinetuneError]] = [finetune.FinetuneError, *finetune.FinetuneError.__subclasses__()]
    assert len(tree) == 7
    assert all(getattr(finetune, kind.__name__) is getattr(weights.errors, kind.__name__) for kind in tree)
    assert {kind.__name__ for kind in tree} < set(finetune.__all__)
    assert all(hasattr(finetune, name) for name in finetune.__all__)


# Keywords


def expected_type(name: str, hint: Any) -> Any:
    """What a keyword takes, by the recipe's type: paths may be texts, and lists as on the command line."""
    if name == "blocks":
        return str | Sequence[str] | Sequence[int]
    if hint == tuple[str, ...]:
        return str | Sequence[str]
    if hint == Path | None:
        return str | Path | None
    return str | Path if name in ("data", "weights") else hint


def test_a_process_that_does_not_see_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several, on another machine than the first one, where another run may lie at the same path."""
    figures = dict.fromkeys(("test_accuracy", "test_loss", "val_accuracy", "train_accuracy", "epochs"), 1)
    summary = {**figures, "seconds": {"total": 1.0}, "output": str(tmp_path / "there")}
    monkeypatch.setattr(pipeline, "resume", lambda folder, events: summary)
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    result = finetune.resume(tmp_path / "there")
    assert (result.folder, result.metrics, result.test_accuracy) == (tmp_path / "there", [], 1)
    result.folder.mkdir()
    (result.folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
    for test_loss, rows in ((2, []), (1, [{"epoch": 1}])):
        (result.folder / "summary.json").write_text(json.dumps({**figures, "test_loss": test_loss, "seconds": {}}))
        assert finetune.resume(tmp_path / "there").metrics == rows, "times are each process's own"


def test_the_keywords_are_the_recipes() -> None:
    wanted = {name: expected_type(name, hint) for name, hint in get_type_hints(Recipe).items()}
    assert get_type_hints(RunSettings) == wanted
    decided = (*DECIDED, "arch")
    assert get_type_hints(BaselineSettings) == {name: hint for name, hint in wanted.items() if name not in decided}


def test_signature_and_help_have_every_setting() -> None:
    defaults = {item.name: item.default for item in dataclasses.fields(Recipe)}
    seen = {name: one.default for name, one in inspect.signature(finetune.run).parameters.items()}
    assert seen == {"config": None, "output": None, "progress": False, **defaults}
    seen = {name: one.default for name, one in inspect.signature(finetune.baseline).parameters.items()}
    assert inspect.signature(finetune.run).parameters["train_layers"].annotation == str | Sequence[str]
    assert (seen["lr"], seen["weights"], seen["seed"], seen["arch"]) == (..., ..., 0, None)
    text = inspect.getdoc(finetune.run) or ""
    assert all(f"{item.name}: {item.metadata['help']}" in text for item in dataclasses.fields(Recipe))


def test_the_types_are_installed() -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package in ("finetune", "weights"):
        assert "py.typed" in shipped[package]
        assert (ROOT / package / "py.typed").is_file()


# docs/api.md


def test_the_examples_of_the_page_run(
    settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They name no network and no number format; here they get small and quick ones."""
    monkeypatch.chdir(tmp_path)
    write_image_folder(tmp_path / "photos", made=make_images(40, 10, classes=2))
    quick: dict[str, Any] = {"precision": "fp32", "compile": "off", "cache_dir": settings["cache_dir"]}
    small: dict[str, Any] = {"arch": settings["arch"], "weights": settings["weights"]}
    monkeypatch.setattr(finetune, "run", functools.partial(finetune.run, **quick, **small))
    monkeypatch.setattr(finetune.allocator, "tune_allocator", lambda: None)  # it would change this process for good
    monkeypatch.setattr(finetune, "baseline", functools.partial(finetune.baseline, **quick))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "did you mean layer4" in printed
    assert names["result"].checkpoint.is_file()
    assert names["best"] in names["runs"]
