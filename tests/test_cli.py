"""The command line: help, tables, JSON, exit codes, and the one line that an error becomes."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from make_data import make_images, write_cifar100_python, write_class_folders, write_image_folder
from make_run import write_weights
from typer.testing import CliRunner, Result

import cli.report
from cli.main import app
from cli.options import PANELS
from finetune.recipe import Recipe, flag, to_table

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "check", "init", "plan", "run", "sweep", "eval", "report", "layers", "demo", "cache", "cache list", "cache clear",
    "weights", "weights list", "weights fetch", "weights verify", "weights convert", "doctor",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cifar` and `weights/test_resnet.safetensors`, and a cache for all tests."""
    root = tmp_path_factory.mktemp("cli")
    write_cifar100_python(root / "cifar", made=make_images(48, 20))
    write_weights(root / "weights" / "test_resnet.safetensors")
    return root


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working folder, no settings of the user's, and signals as they were."""
    monkeypatch.chdir(tmp_path)
    for name in ("FINETUNE_DATA", "FINETUNE_WEIGHTS", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def invoke(*words: str) -> Result:
    result = CliRunner().invoke(app, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "\x1b" not in result.output, "escape codes in a pipe"
    return result


def test_letters_that_standard_output_has_no_code_for() -> None:
    """As in a pipe on Windows, whose encoding holds the letters of a few languages."""
    words = [sys.executable, "-m", "cli", "baseline", "--data", "Äpfel", "--show-recipe"]
    settings = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=settings, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert 'data = "\\xc4pfel"' in done.stdout


def run_words(root: Path, **settings: str) -> list[str]:
    """Words of a quick run; settings replace or add flags."""
    flags = {
        "arch": "test_resnet", "train_layers": "layer4,fc", "weights": str(root / "weights"),
        "data": str(root / "cifar"), "image_size": "32", "epochs": "1", "batch_size": "16", "precision": "fp32",
        "compile": "off", "device": "cpu", "cache_dir": str(root / "cache"), "output": "out",
    }  # fmt: skip
    flags |= settings
    return ["run", *(word for name, value in flags.items() for word in (flag(name), value))]


def error(*words: str, code: int) -> str:
    """The one line of a command that fails."""
    result = invoke(*words)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert result.stderr.splitlines()[-1] == lines[0], "the error comes last"
    assert "Traceback" not in result.stderr
    return lines[0].removeprefix("Error: ")


def run_error(root: Path, code: int = 1, **settings: str) -> str:
    words = error(*run_words(root, **settings), code=code)
    assert not Path(settings.get("output", "out")).exists(), "nothing is left of a run that did not begin"
    return words


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"Usage: root {command}" in result.stdout or f"Usage: finetune {command}" in result.stdout
    assert result.stderr == ""


def test_help_lists_every_command() -> None:
    for words in (["--help"], ["-h"]):
        assert all(command in invoke(*words).stdout for command in ("run", "layers", "demo", "cache"))
    assert all(command in invoke("cache", "--help").stdout for command in ("list", "clear"))


def test_run_help_has_every_setting_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    text = re.sub(r"[\s│]+", " ", invoke("run", "--help").stdout)
    for name, default in to_table(Recipe()).items():
        shown = ",".join(default) if isinstance(default, list) else str(default)
        assert f"{flag(name)} " in text, name
        assert f"[default: ({shown})]" in text or f"[default: {shown}]" in text or not shown, name
    assert all(panel in text for panel in PANELS)
    assert "no-" not in "".join(re.findall(r"--no-\w+", text)), "flags have no negative twins"


def test_version() -> None:
    version = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]
    assert invoke("--version").stdout == f"finetune {version}\n"


# What is printed, and where


def test_run_prints_the_result_on_stdout_and_the_rest_on_stderr(root: Path) -> None:
    result = invoke(*run_words(root))
    assert result.exit_code == 0, result.output
    summary = json.loads(Path("out/summary.json").read_text())
    lines = result.stdout.splitlines()
    assert lines[0] == f"test accuracy   {summary['test_accuracy']:.2f} %  (20 images, read once)"
    assert lines[2] == "frozen tensors  72 unchanged, bit for bit"
    assert lines[-1] == "kept in         out"
    told = result.stderr.splitlines()
    assert told[0] == "90 tensors loaded; the head (fc) starts fresh"
    assert "test_resnet.r160_in1k on cifar100: 43 train, 5 validation, 20 test images" in told
    assert [line[:9] for line in told if line.startswith("epoch")] == ["epoch 1/1"]


def test_json_is_all_that_is_on_stdout(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page that --open shows is shown all the same."""
    shown: list[str] = []
    monkeypatch.setattr(cli.report.webbrowser, "open", lambda address: not shown.append(address))
    result = invoke(*run_words(root), "--json", "--open")
    assert result.exit_code == 0
    assert shown == [Path("out/report.html").resolve().as_uri()]
    summary = json.loads(result.stdout)
    assert summary == {**json.loads(Path("out/summary.json").read_text()), "output": "out"}
    assert "epoch 1/1" in result.stderr


def test_config_and_flags(root: Path) -> None:
    """A recipe file repeats a run to the bit; a flag beside it wins."""
    assert invoke(*run_words(root)).exit_code == 0
    assert invoke("run", "--config", "out/recipe.toml", "--output", "again").exit_code == 0
    assert Path("again/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
    assert invoke("run", "--config", "out/recipe.toml", "--output", "other", "--lr", "0.5").exit_code == 0
    first, other = (tomllib.loads(Path(folder, "recipe.toml").read_text()) for folder in ("out", "other"))
    assert {name for name in first if first[name] != other[name]} == {"lr"}
    assert other["lr"] == 0.5


def test_a_recipe_repeats_its_run_from_another_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its page says to go to its folder; paths that were typed elsewhere must hold there."""
    words = [os.path.relpath(word) if Path(word).is_absolute() else word for word in run_words(root)]
    assert invoke(*words).exit_code == 0
    monkeypatch.chdir("out")
    again = invoke("run", "--config", "recipe.toml", "--output", "again")
    assert again.exit_code == 0, again.output
    assert Path("again/model.safetensors").read_bytes() == Path("model.safetensors").read_bytes()


def test_auto_may_be_written_out(root: Path) -> None:
    """Help shows `auto` as a default, so it may be given as a value, and a flag can undo a recipe file's."""
    Path("short.toml").write_text('memory_budget = "1GB"\nepochs = 3\n')
    words = run_words(root, memory_budget="auto", weights_dir="auto", limit="auto", views="auto", epochs="auto")
    result = invoke(*words, "--config", "short.toml")
    assert result.exit_code == 0, result.output
    made = tomllib.loads(Path("out/recipe.toml").read_text())
    assert (made["memory_budget"], made["weights_dir"], made["limit"], made["views"]) == ("auto",) * 4
    assert made["epochs"] == 40
    assert error("run", "--epochs", "many", code=2) == "--epochs is 'many'; give a whole number, or auto."


def test_a_run_folder_is_made_under_runs(root: Path) -> None:
    words = run_words(root)
    del words[words.index("--output") : words.index("--output") + 2]
    result = invoke(*words)
    assert result.stdout.splitlines()[-1] == "kept in         runs/test_resnet-cifar100-0001"


def test_resume_of_a_finished_run(root: Path) -> None:
    invoke(*run_words(root))
    result = invoke("run", "--resume", "out", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["output"] == "out"
    assert result.stderr == "out is a finished run; nothing is left to do.\n"


def test_resume_stands_alone() -> None:
    words = error("run", "--resume", "r", "--lr", "0.1", "--epochs", "3", "--output", "o", "--config", "c", code=2)
    assert words == (
        "--resume goes on with the run's own settings, and --epochs, --lr, --output, --config was given too; leave "
        "that out, or start a new run."
    )
    assert error("run", "--resume", "none", code=1).startswith("--resume none: it does not exist; give the folder")


def test_layers_table() -> None:
    result = invoke("layers", "resnet18", "--train-layers", "layer4,fc")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].strip() == "resnet18.tv_in1k, 224 × 224 pixels, 100 classes"
    rows = {line.split()[0]: line.split() for line in lines[1:] if line}
    assert rows["layer1"][:3] == ["layer1", "Sequential", "147,968"]
    assert [name for name, row in rows.items() if row[-1] == "yes"] == ["layer4", "fc"]
    assert any(line.startswith("cut             after layer3") for line in lines)
    assert result.stderr == ""


def test_layers_json() -> None:
    table = json.loads(invoke("layers", "test_resnet", "--train-layers", "layer4.0", "--json", "--depth", "2").stdout)
    trains = {row["name"]: row["trains"] for row in table["rows"]}
    assert (trains["layer4"], trains["layer4.0"], trains["layer3"], trains["fc"]) == ("in part", "yes", "", "")
    assert sum(row["parameters"] for row in table["rows"] if "." not in row["name"]) == table["parameters"]
    assert 0 < table["frozen_share"] < 1


def test_layers_errors() -> None:
    table = json.loads(invoke("layers", "crossvit_9_240", "--json").stdout)  # whose lists of branches are never called
    assert sum(row["share"] for row in table["rows"]) == pytest.approx(1, abs=0.01)
    words = error("layers", "resnet18", "--train-layers", "layer5", code=2)
    assert words.startswith("'layer5' names no layer of this model; did you mean layer4, layer3 or layer2?")
    assert 'Unknown architecture "resnet81"; did you mean' in error("layers", "resnet81", code=2)


def test_cache_commands(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["--cache-dir", "own"]
    assert invoke("cache", "list", *own).stdout == "Nothing is cached in own.\n"
    assert json.loads(invoke("cache", "list", *own, "--json").stdout) == []
    assert invoke("cache", "clear", *own).stdout.startswith("0 bytes freed, 0 entries deleted\n0 remembered timings")
    invoke(*run_words(root, cache_dir="own"))
    entries = json.loads(invoke("cache", "list", *own, "--json").stdout)
    assert sorted(entry["about"]["rows"] for entry in entries) == [5, 20, 43, 43]
    lines = invoke("cache", "list", *own).stdout.splitlines()
    assert all(any(entry["key"][:12] in line for line in lines) for entry in entries)
    assert lines[-1].startswith("4 entries, ")
    monkeypatch.setenv("COLUMNS", "200")
    table = invoke("cache", "list", *own).stdout
    for images in ("train, as it is", "train, mirrored", "validation, as it is", "test, as it is"):
        assert re.search(rf" cifar100 {images} +test_resnet\.r160_in1k, 32 px, float32 *$", table, re.M), images
    cleared = invoke("cache", "clear", *own).stdout
    assert re.match(r"\d+\.\d kB freed, 4 entries deleted\n2 remembered timings forgotten; the next run", cleared)
    assert invoke("cache", "list", *own).stdout == "Nothing is cached in own.\n"


# Errors: usage


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"arch": "resnet81"}, 'Unknown architecture "resnet81"; did you mean resnet18'),
        ({"arch": "resnet18.nothing"}, 'resnet18 has no pretrained weights "nothing"'),
        ({"train_layers": "layer5"}, "'layer5' names no layer of this model; did you mean layer4"),
        ({"train_layers": ","}, "--train-layers is empty; name layers to train"),
        ({"data": "cifar1000"}, "--data 'cifar1000' is neither a path that exists nor one of cifar10, cifar100"),
        ({"epochs": "0"}, "--epochs is 0; give a whole number of at least 1."),
        ({"limit": "0"}, "--limit is 0; give a whole number of at least 1."),
        ({"image_size": "0"}, "--image-size is 0; give a whole number of at least 1."),
        ({"batch_size": "0"}, "--batch-size is 0; give a whole number of at least 1."),
        ({"optimizer": "sdg"}, "--optimizer is 'sdg'; did you mean sgd? It can be auto, sgd, adam, adamw, muon."),
        (
            {"lr": "1e39"},
            "--lr 1e+39 with --head-lr-scale 10 and --weight-decay 0.0005 is more than 32-bit numbers can",
        ),
        ({"device": "tpu"}, "--device is 'tpu'; it can be auto, cpu, cuda, cuda:N or mps."),
        ({"cache_limit": "lots"}, "--cache-limit is 'lots'; give a size above 0 such as 500MB or 8GB."),
        ({"config": "none.toml"}, "The recipe none.toml cannot be read (No such file or directory)"),
        ({"allow_missing": "layer9"}, 'has no layer "layer9"; did you mean'),
    ],
)
def test_usage_errors(root: Path, settings: dict[str, str], words: str) -> None:
    assert words in run_error(root, 2, **settings)


def test_a_gpu_where_there_is_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = run_error(root, 2, device="cuda")
    assert words.startswith("--device cuda asks for a GPU, and PyTorch sees none here; use --device auto or cpu")


@pytest.mark.parametrize("words", [["run", "--no-such-flag"], ["nothing"], ["run", "--lr", "fast"], ["layers"]])
def test_what_typer_refuses(words: list[str]) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


# Errors: weights


def test_weights_missing(root: Path) -> None:
    assert run_error(root, weights="none.pth").startswith("--weights names none.pth, which does not exist")
    Path("empty").mkdir()
    assert "Found no weights for test_resnet.r160_in1k in empty" in run_error(root, weights="empty")


def test_weights_truncated(root: Path) -> None:
    whole = (root / "weights" / "test_resnet.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert run_error(root, weights="cut.safetensors").startswith("cut.safetensors is truncated, damaged or not")


def test_weights_of_another_network(root: Path) -> None:
    words = run_error(root, arch="test_resnet", weights=str(write_weights(Path("w.safetensors"), "test_vit")))
    assert words.startswith("The weights (local file w.safetensors) are those of another network than test_resnet")
    assert "give the --arch they belong to" in words


class Unsafe:
    """A pickle that would run a command."""

    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_weights_that_could_run_code(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("w.pth").write_bytes(pickle.dumps({"state_dict": Unsafe()}, protocol=2))
    words = run_error(root, weights="w.pth")
    assert words.startswith("w.pth is a pickle that holds more than tensors")
    assert "could run code, so it was not loaded" in words
    assert "code ran" not in capsys.readouterr().out


def test_weights_without_a_layer(root: Path) -> None:
    partial = str(write_weights(Path("w.safetensors"), without=("layer4", "fc")))
    words = run_error(root, weights=partial)
    assert "missing layer4 (all " in words
    assert words.endswith("or --allow-missing layer4 to start from random values there.")
    result = invoke(*run_words(root, weights=partial, allow_missing="layer4"))
    assert result.exit_code == 0
    assert "layer4 starts fresh as allowed (15 tensors absent)" in result.stderr


def test_weights_in_a_folder_with_two(root: Path) -> None:
    for name in ("test_resnet-a.safetensors", "test_resnet-b.safetensors"):
        write_weights(Path("two") / name)
    words = run_error(root, weights="two")
    assert words == (
        "two holds 2 files for test_resnet.r160_in1k: test_resnet-a.safetensors and test_resnet-b.safetensors; name "
        "one with --weights FILE."
    )


def test_weights_with_nan(root: Path) -> None:
    state = safetensors.torch.load_file(root / "weights" / "test_resnet.safetensors")
    state["layer4.0.bn1.bias"][0] = torch.nan
    safetensors.torch.save_file(state, "nan.safetensors")
    assert "hold NaN or infinite values in layer4.0.bn1.bias; they are spoilt, so give others." in run_error(
        root, weights="nan.safetensors"
    )


# Errors: data, training, run directory


def test_data_missing_or_not_what_it_seems(root: Path) -> None:
    assert run_error(root, data="no/photos") == (
        "There is nothing at no/photos; expected a data set (or one of cifar10, cifar100, shapes10, shapes100)."
    )
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("hello")
    assert run_error(root, data="notes").startswith("notes holds a.txt; expected CIFAR files")
    Path("table.csv").write_text("a,b")
    assert run_error(root, data="table.csv").startswith("table.csv is a file; expected a folder")
    write_cifar100_python(Path("cut"))
    Path("cut/train").write_bytes(Path("cut/train").read_bytes()[:500])
    assert "cut/train" in run_error(root, data="cut")


def test_one_class_only(root: Path) -> None:
    made = make_images(8, 0, classes=1)
    write_class_folders(Path("photos/train"), made.train, made.train_labels, ("cat",))
    words = run_error(root, data="photos")
    assert words == (
        "photos/train holds one class folder (cat); expected a folder of images for each of two or more classes."
    )


def test_too_few_images(root: Path) -> None:
    """An image of each class: nothing can be held out, and a batch has both."""
    write_image_folder(Path("photos"), made=make_images(2, 2, classes=2))
    result = invoke(*run_words(root, data="photos"))
    assert result.exit_code == 0, result.output
    assert "There is no validation split: no class can spare an image for it." in result.stderr
    assert run_error(root, 2, data="photos", limit="1", output="one").startswith("1 training images in batches of 16")


def test_a_loss_that_is_no_number(root: Path) -> None:
    words = error(*run_words(root, lr="1e30", schedule="constant"), code=1)
    assert words.startswith("The training loss became nan at step 2 (learning rate 1e+30)")
    assert not Path("out/summary.json").exists()


def test_an_output_folder_that_is_taken(root: Path) -> None:
    Path("out").mkdir()
    Path("out/notes.txt").touch()
    assert error(*run_words(root), code=1) == "out already holds notes.txt; give another --output."
