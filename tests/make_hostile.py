"""What a stranger may send: files that would run code, never end, or claim sizes; and small honest ones beside them.

Import with `from make_hostile import ...`. Nothing is trained here.
"""

from __future__ import annotations

import json
import os
import pickle
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image

from finetune.predictions import Predictions, write_predictions
from finetune.recipe import Recipe, to_toml
from weights.save import save_checkpoint, write_config

CLASSES = ("ant", "bee", "cow")
NESTED = "[" * 200_000


class Payload:
    """Pickles to a call that makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def bomb_of_tuples(times: int = 24) -> bytes:
    """Return a pickle of a dict whose key is a tuple of the same tuple twice, and so on: its hash visits 2 ** times."""
    return b"\x80\x02}N" + b"q\x00h\x00\x86" * times + b"K\x01s."


def packed(path: Path, pickled: bytes) -> None:
    """Write a pickle as the archive that torch.save writes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", pickled)
        archive.writestr("w/version", b"3\n")


def write_model(folder: Path, **config: Any) -> Path:
    """Write model.safetensors and config.json of a small network with `CLASSES`; `config` goes over the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=len(CLASSES))
    save_checkpoint(folder / "model.safetensors", model.state_dict(), {"arch": "test_resnet"})
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    write_config(
        folder / "config.json", arch="test_resnet", num_classes=len(CLASSES), classes=CLASSES, mean=mean, std=std,
        interpolation="bilinear", input_size=(3, 32, 32),
    )  # fmt: skip
    if config:
        change_json(folder / "config.json", config)
    return folder


def write_finished(folder: Path, **summary: Any) -> Path:
    """Write the files of a finished run but the model's weights; `summary` goes over summary.json, a dot in a name
    leads inside (`data__name` is data.name)."""
    folder.mkdir(parents=True, exist_ok=True)
    content = summary_of()
    for name, value in summary.items():
        outer, _, inner = name.partition("__")
        if inner:
            content[outer] = {**content[outer], inner: value}
        else:
            content[outer] = value
    (folder / "summary.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row_of(epoch)) + "\n" for epoch in (1, 2)))
    (folder / "recipe.toml").write_text(to_toml(Recipe()))
    (folder / "config.json").write_text(json.dumps({"label_names": CLASSES}))
    labels = torch.arange(6) % len(CLASSES)
    guesses = torch.where(torch.arange(6) < 3, labels, (labels + 1) % len(CLASSES))  # half of them, as in the summary
    logits = torch.eye(len(CLASSES))[guesses]
    none = torch.zeros(0, dtype=torch.int64)
    write_predictions(folder / "predictions.safetensors", Predictions(logits, labels, none, none))
    return folder


def summary_of() -> dict[str, Any]:
    """Return a summary as a run writes it."""
    return {
        "arch": "test_resnet",
        "test_accuracy": 50.0,
        "test_loss": 1.0,
        "train_accuracy": 60.0,
        "val_accuracy": 55.0,
        "calibration": {"temperature": 1.0, "reason": "no validation images"},
        "epochs": 2,
        "kept_epoch": 2,
        "images_seen": 80,
        "ended_by_budget": None,
        "seconds": {"total": 3.0, "compile": 0.0, "prefix": 1.0, "train": 1.0, "eval": 1.0},
        "estimate": None,
        "parameters": {"total": 100, "trained": 10},
        "trained_layers": ["fc"],
        "frozen_unchanged": True,
        "frozen_tensors": 5,
        "weights": {"source": "local file w.pth", "sha256": "ab" * 32},
        "data": {
            "name": "photos", "sha256": "cd" * 32, "test_sha256": "ef" * 32, "classes": 3, "uneven": False,
            "train": 40, "val": 6, "test": 6,
        },
        "device": "cpu",
        "precision": "fp32",
        "compile": False,
        "features": {"where": "ram", "bytes": 1000, "test_seconds": 0.1},
        "versions": {"torch": "2"},
    }  # fmt: skip


def row_of(epoch: int, **changes: Any) -> dict[str, Any]:
    """Return a row of metrics.jsonl."""
    row = {
        "epoch": epoch, "train_loss": 1.0 / epoch, "train_accuracy": 50.0, "val_loss": 1.1, "val_accuracy": 50.0,
        "lr": 0.01, "seconds": 0.5, "eval_seconds": 0.5, "images_per_second": 80.0,
    }  # fmt: skip
    return {**row, **changes}


def change_json(path: Path, changes: dict[str, Any]) -> None:
    """Put entries over those of a JSON object; those of an object in it with a name like `pretrained_cfg__mean`."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        if inner:
            content[outer][inner] = value
        else:
            content[outer] = value
    path.write_text(json.dumps(content))


def write_photos(root: Path, count: int = 2) -> Path:
    """Write a folder of two classes of small images."""
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (number, 90, 200)).save(root / name / f"{number}.png")
    return root


def damage(path: Path, content: bytes | Path) -> Path:
    """Replace a file by bytes or by a link."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        path.symlink_to(content)
    else:
        path.write_bytes(content)
    return path


@contextmanager
def pipe(path: Path) -> Iterator[list[str]]:
    """Put a named pipe at a path; yields a list that is empty as long as nobody opens it for reading.

    Whoever does so reads an empty file instead of waiting without end.
    """
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    opened: list[str] = []

    def write() -> None:
        with path.open("wb"):
            opened.append(path.name)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        yield opened
        before = list(opened)
    finally:
        reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # lets the thread go
        writer.join()
        os.close(reading)
        path.unlink()
    opened[:] = before


def payload_bytes(mark: Path, protocol: int = 2) -> bytes:
    """Return the pickle of a `Payload`."""
    return pickle.dumps({"state_dict": Payload(mark)}, protocol=protocol)
