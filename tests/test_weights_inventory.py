"""`finetune weights list` and `verify`: which files there are, what each is, and whether it is sound."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from make_run import write_weights
from make_server import empty_caches
from typer.testing import CliRunner, Result

from cli.main import app
from weights.save import save_checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of test_resnet."""
    return write_weights(tmp_path_factory.mktemp("original") / "test_resnet.safetensors")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local model directory, and empty caches."""
    empty_caches(tmp_path, monkeypatch)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def invoke(*words: str) -> Result:
    result = CliRunner().invoke(app, [*words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def rows(*words: str, code: int = 0) -> list[dict[str, Any]]:
    result = invoke(*words, "--json")
    assert result.exit_code == code, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def error(*words: str) -> str:
    result = invoke(*words)
    assert (result.exit_code, result.stdout) == (1, "")
    return result.stderr.removeprefix("Error: ").strip()


def in_the_hub_cache(caches: Path, repo: str, original: Path) -> Path:
    """Put a file into the Hugging Face cache as its client does; return the link."""
    folder = caches / "hub" / f"models--{repo.replace('/', '--')}"
    digest = hashlib.sha256(original.read_bytes()).hexdigest()
    for part in ("blobs", "refs", "snapshots/abc123"):
        (folder / part).mkdir(parents=True)
    shutil.copy(original, folder / "blobs" / digest)
    (folder / "refs/main").write_text("abc123")
    link = folder / "snapshots/abc123/model.safetensors"
    link.symlink_to(folder / "blobs" / digest)
    return link


def test_list_says_what_each_file_is(models: Path, original: Path) -> None:
    caches, content = models.parent, original.read_bytes()
    (models / "test_resnet.r160_in1k.pth").write_bytes(content)
    (models / "resnet50_a1_0-14fe96d1.pth").write_bytes(content)
    (models / "best.safetensors").write_bytes(content)
    (models / "notes.txt").write_text("no weights")
    safetensors.torch.save_file({"weight": torch.ones(1)}, models / "test_vit.safetensors", {"license": "mit"})
    save_checkpoint(models / "mine.safetensors", {"weight": torch.ones(1)}, {"arch": "test_vit.r160_in1k"})
    run = models / "run"
    run.mkdir()
    for name in ("model.safetensors", "predictions.safetensors", "checkpoint.pt"):
        (run / name).write_bytes(content)
    about = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": {"license": "cc-by-4.0"}}
    (run / "config.json").write_text(json.dumps(about))
    hub = caches / "torch/hub/checkpoints"
    hub.mkdir(parents=True)
    (hub / "resnet18-f37072fd.pth").write_bytes(content)
    (hub / "somebody-elses.pth").write_bytes(content)
    in_the_hub_cache(caches, "timm/test_resnet.r160_in1k", original)
    in_the_hub_cache(caches, "somebody/else", original)

    found = rows("weights", "list", "--weights-dir", str(models))
    beside = [(row["source"], row["arch"], row["licence"], row["recorded"]) for row in found]
    assert beside == [
        ("local file best.safetensors", "unknown", "unknown", None),
        ("local file mine.safetensors", "test_vit", "unknown", None),
        ("local file resnet50_a1_0-14fe96d1.pth", "resnet50.a1_in1k", "apache-2.0", "its name"),
        ("local file model.safetensors", "test_resnet", "cc-by-4.0", None),
        ("local file test_resnet.r160_in1k.pth", "test_resnet.r160_in1k", "apache-2.0", None),
        ("local file test_vit.safetensors", "test_vit", "mit", None),
        ("torch hub cache, resnet18-f37072fd.pth", "resnet18.tv_in1k", "bsd-3-clause", "its name"),
        (
            "Hugging Face cache, timm/test_resnet.r160_in1k",
            "test_resnet.r160_in1k",
            "apache-2.0",
            "the Hugging Face cache",
        ),
    ]
    digest = hashlib.sha256(content).hexdigest()
    assert {row["sha256"] for row in found if row["bytes"] == len(content)} == {digest}

    lines = [line.split() for line in invoke("weights", "list", "--weights-dir", str(models)).stdout.splitlines()]
    assert lines[0] == ["8", "weight", "files"]
    assert lines[1] == ["arch", "size", "sha256", "licence", "where"]
    assert lines[8][0] == "resnet18.tv_in1k"
    assert lines[8][3:] == [digest[:12], "bsd-3-clause", "torch", "hub", "cache,", "resnet18-f37072fd.pth"]


def test_list_of_nothing_names_the_places(models: Path) -> None:
    text = invoke("weights", "list", "--weights-dir", str(models)).stdout
    assert text.startswith(f"No weights in --weights-dir {models}, the torch hub cache ")
    assert text.endswith("; finetune weights fetch gets some.\n")
    assert rows("weights", "list") == []
    assert error("weights", "list", "--weights-dir", "nowhere") == (
        "--weights-dir names nowhere, which is not a folder; give one that is."
    )


def test_verify_reads_what_is_sound(models: Path, original: Path) -> None:
    good = models / "test_resnet.safetensors"
    shutil.copy(original, good)
    shutil.copy(original, models / "best.safetensors")
    (models / f"{good.name}.sha256").write_text(f"{hashlib.sha256(good.read_bytes()).hexdigest()}  {good.name}\n")
    result = invoke("weights", "verify", str(models))
    assert result.exit_code == 0
    tensors = len(safetensors.torch.load_file(original))
    assert result.stdout.splitlines() == [
        f"ok       {models / 'best.safetensors'}: {tensors} tensors, of an unknown network, so their shapes were not "
        "checked; no sha256 is recorded to compare with",
        f"ok       {good}: {tensors} tensors, fit test_resnet.r160_in1k; sha256 as test_resnet.safetensors.sha256 says",
        "",
        "2 of 2 sound",
    ]
    row = rows("weights", "verify", str(models / "best.safetensors"), "--arch", "test_resnet")[0]
    assert (row["ok"], row["fits"], row["tensors"]) == (True, "test_resnet.r160_in1k", tensors)


def test_verify_names_each_file_that_is_not(models: Path, original: Path) -> None:
    content = original.read_bytes()
    caches = models.parent
    link = in_the_hub_cache(caches, "timm/test_resnet.r160_in1k", original)
    link.resolve().write_bytes(content[:-4] + b"\0\0\0\1")
    (models / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (models / "test_vit.safetensors").write_bytes(content)
    state = safetensors.torch.load_file(original)
    state["fc.bias"][0] = float("nan")
    safetensors.torch.save_file(state, models / "test_resnet.safetensors")
    (models / "run").mkdir()
    (models / "run/model.safetensors").write_bytes(content)
    (models / "run/config.json").write_text("{")

    found = rows("weights", "verify", "--weights-dir", str(models), code=1)
    problems = {Path(row["path"]).name if row["path"] != str(link) else "cached": row["problem"] for row in found}
    assert problems["cut.safetensors"].startswith("cut.safetensors is truncated, damaged or not a weight file (")
    assert problems["test_vit.safetensors"].startswith(
        "The weights (test_vit.safetensors) are those of another network than test_vit"
    )
    assert problems["test_resnet.safetensors"] == (
        "The weights (test_resnet.safetensors) hold NaN or infinite values in fc.bias; they are spoilt, so give others."
    )
    assert "config.json is not readable as JSON" in problems["model.safetensors"]
    assert problems["cached"].startswith(
        "model.safetensors is not the file that was recorded: the Hugging Face cache says sha256 "
    )
    # the link alone would bring the damaged bytes back
    assert problems["cached"].endswith(
        f"Delete {link.resolve()} and fetch it again with finetune weights fetch test_resnet.r160_in1k."
    )
    assert not any(row["ok"] for row in found)
    assert invoke("weights", "verify", "--weights-dir", str(models)).stdout.splitlines()[-1] == "0 of 5 sound"


def test_a_link_to_nothing_and_a_config_of_the_wrong_kind(models: Path, original: Path) -> None:
    """The first is no file; the second is told and hides no other file."""
    (models / "test_resnet.pth").symlink_to(models / "unmounted.pth")
    (models / "sound.safetensors").write_bytes(original.read_bytes())
    run = models / "run"
    run.mkdir()
    (run / "model.safetensors").write_bytes(original.read_bytes())

    def say(mean: object) -> None:
        config = {"architecture": "test_resnet", "pretrained_cfg": {"mean": mean}}
        (run / "config.json").write_text(json.dumps(config))

    say(0.5)
    listed = rows("weights", "list", "--weights-dir", str(models))
    assert [row["source"] for row in listed] == ["local file model.safetensors", "local file sound.safetensors"]
    found = rows("weights", "verify", str(models), code=1)
    assert [row["problem"] for row in found] == [
        "The config.json of test_resnet has mean 0.5; expected a list of three numbers, or of one for all colours. "
        "Mend it, or give the weights alone in another folder.",
        None,
    ]
    for wrong in ([0.5, 0.4], [0.5, 0.4, 0.3, 0.2], [], [0.5, "0.4", 0.3]):
        say(wrong)
        told = rows("weights", "verify", str(models), code=1)[0]["problem"]
        assert "expected a list of three numbers, or of one for all colours" in told


def test_verify_of_nothing(models: Path) -> None:
    assert error("weights", "verify", str(models)) == (
        f"{models} holds no weight files (.safetensors, .pth.tar, .pth, .pt, .bin, .ckpt); give a folder that does, or "
        "get some with finetune weights fetch."
    )
    assert error("weights", "verify", "absent.pth") == "There is no file or folder absent.pth; give one that is there."
    words = error("weights", "verify", "--weights-dir", str(models))
    assert words.startswith(f"There are no weights in --weights-dir {models}, the torch hub cache ")
    assert words.endswith("; name a file, or get some with finetune weights fetch.")
