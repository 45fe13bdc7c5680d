"""What is fuzzed: each reader of the project, what it is given to begin with, and what it must not do.

A reader gets bytes as a stranger would send them. It returns something that is sound, or ends with one of the project's
errors; anything else it raises is a finding. `Target.read` raises whatever the reader raises.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from fuzz.place import Place, Target, require
from fuzz.shards import shard_targets
from make_data import make_images, write_cifar10_binary, write_cifar100_python
from make_hostile import CLASSES, row_of, summary_of, write_finished, write_model
from PIL import Image

from finetune import checkpoint, report, trained
from finetune.cache import Entry, list_entries
from finetune.cifar import CifarFiles, cifar_archive, read_cifar
from finetune.compare import compare
from finetune.decode import formats
from finetune.examples import choose_examples
from finetune.grid import read_sweep
from finetune.pictures import Framing, _decode_file
from finetune.precision import Choice, remembered
from finetune.predictions import Predictions, read_predictions, write_predictions
from finetune.recipe import Recipe, check, from_table, read_toml, to_toml
from finetune.results import read_results
from finetune.rundir import RunDirectory
from weights.arch import resolve_arch
from weights.inventory import _licence
from weights.load import read_tensors
from weights.locate import locate
from weights.save import read_about
from weights.torch_file import GROWTH, SMALL

WORDS = (
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"[]",
    b"{}",
    b'""',
    b"9" * 30,
    b"\\ud800",
    b"[[[[",
    b"\xff",
    b"\0",
)
"""Pieces that go into text."""

CODES = tuple(bytes([code]) for code in b"\x80\x85\x86\x87\x88NKMJX}]()lhqrjsuetbRcQ.0")
"""Operations of pickles."""


def targets(place: Place) -> list[Target]:
    """Return all targets, reading and writing in `place`."""
    data = [*_cifar(place), *shard_targets(place), *_images(place)]
    return [*_weights(place), *_checkpoints(place), *data, *_settings(place), *_runs(place)]


def _weights(place: Place) -> list[Target]:
    tensors = {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor([True]),
        "c": torch.ones(1, dtype=torch.half),
    }
    plain = safetensors.torch.save(tensors, metadata={"finetune": '{"arch":"test_resnet","trained_layers":["fc"]}'})
    wrapped = {"epoch": 1, "state_dict": {f"module.{name}": value for name, value in tensors.items()}}

    def read(name: str, content: bytes) -> None:
        path = place.file(name, content)
        size = sum(tensor.nbytes for tensor in read_tensors(path).values())
        require(size <= max(SMALL, GROWTH * len(content)), "tensors of this size")

    def plain_file(content: bytes) -> None:
        path = place.file("model.safetensors", content)
        require(isinstance(read_about(path), dict | None) and bool(_licence(path, {}, {})), "metadata that are none")
        read("model.safetensors", content)

    saved = [_saved(wrapped), _saved(tensors)]
    old = [_saved(wrapped, old=True), _saved(tensors, old=True)]
    inner = [_member(content, "data.pkl") for content in saved]
    return [
        Target("safetensors", [plain, safetensors.torch.save({"x": torch.zeros(0)})], plain_file, WORDS),
        Target("torch archive", saved, lambda content: read("w.pth", content), CODES),
        Target("torch pickle", inner, lambda content: read("w.pth", _packed(content)), CODES),
        Target("torch file before 1.6", old, lambda content: read("w.pth", content), CODES),
    ]


def _saved(value: object, *, old: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


def _member(archive: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return opened.read(next(one for one in opened.namelist() if one.endswith(name)))


def _packed(pickled: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("w/data.pkl", pickled)
        archive.writestr("w/version", b"3\n")
        for key, size in enumerate((24, 1, 2)):
            archive.writestr(f"w/data/{key}", bytes(size))
    return file.getvalue()


def _checkpoints(place: Place) -> list[Target]:
    choice = {"precision": "fp32", "compiled": False, "rate": 1.0, "compile_seconds": 0.0, "reason": "measured"}
    state = {
        "progress": {"epoch": 1, "rows": [row_of(1)], "best_loss": 1.0},
        "trainer": {"suffix": {"w": torch.zeros(6)}, "optimizer": {}, "schedule": {}},
        "best": None,
        "data": "ab" * 32,
        "weights": None,
        "choices": {"training": choice, "prefix": None},
        "recipe": {"epochs": 2},
        "format": checkpoint.FORMAT,
    }

    def read(content: bytes) -> None:
        place.file("checkpoint.pt", content)
        found = RunDirectory(place.folder).read_checkpoint()
        require(found is not None, "a checkpoint that is gone")
        checkpoint.require_whole(place.folder, found or {})
        checkpoint.progress_of(place.folder, found or {})

    saved = _saved(state)
    return [Target("checkpoint", [_member(saved, "data.pkl")], lambda content: read(_packed(content)), CODES)]


def _cifar(place: Place) -> list[Target]:
    made = make_images(4, 2)
    write_cifar100_python(place.folder / "py", made=made)
    write_cifar10_binary(place.folder / "bin", made=made, batches=1)
    python = {path.name: path.read_bytes() for path in (place.folder / "py").iterdir()}
    # An array as wide as CIFAR's makes inputs of 3 kB; the bytes in it decide nothing, so one image is enough.
    small = {
        b"data": made.train.reshape(4, -1)[:1],
        b"fine_labels": [0],
        b"coarse_labels": [0],
        b"batch_label": b"1 of 1",
    }
    python["train"] = python["test"] = pickle.dumps(small, protocol=2)
    binary = {path.name: path.read_bytes() for path in (place.folder / "bin").iterdir()}

    def read(kind: Any, held: dict[str, bytes], name: str, content: bytes) -> None:
        held = {**held, name: content}
        files = CifarFiles(Path("place"), kind, kind == "cifar10", frozenset(held), held.__getitem__)
        raw = read_cifar(files)
        labels = raw.train.labels
        require(raw.train.images.shape[1:] == (3, 32, 32) and len(labels) == len(raw.train.images), "images")
        require(int(labels.min()) >= 0 and int(labels.max()) < len(raw.train.classes), "labels")

    def archive(content: bytes) -> None:
        files = cifar_archive(place.file("cifar.tar.gz", content))
        require(sum(len(files.read(name)) for name in files.names) <= 2**29, "files of this size")

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("meta", "train", "test"):
            header = tarfile.TarInfo(f"cifar/{'long' * 30 if name == 'meta' else ''}/{name}")
            header.size = 40
            tar.addfile(header, io.BytesIO(python[name][:40]))
    whole = packed.getvalue()
    ends = (b"\0" * 12, b"\x80", b"7777777")

    def cifar100(name: str) -> Callable[[bytes], None]:
        return lambda content: read("cifar100", python, name, content)

    def cifar10(name: str) -> Callable[[bytes], None]:
        return lambda content: read("cifar10", binary, name, content)

    return [
        Target("CIFAR pickle", [python["train"]], cifar100("train"), CODES),
        Target("CIFAR names, pickled", [python["meta"]], cifar100("meta"), CODES),
        Target("CIFAR binary", [binary["test_batch.bin"]], cifar10("test_batch.bin")),
        Target(
            "CIFAR names", [binary["batches.meta.txt"]], cifar10("batches.meta.txt"), (b"\n", b"\r", b"\xff", b"\0")
        ),
        Target("tar.gz", [gzip.compress(whole, 1)], archive),
        Target("tar in it", [whole], lambda content: archive(gzip.compress(content, 1)), ends),
    ]


def _images(place: Place) -> list[Target]:
    picture = Image.effect_noise((12, 9), 60)
    found = []
    for name in formats():
        mode = "L" if name == "GIF" else "RGB"
        seeds = []
        for extra in (mode, "RGBA", "P", "I;16"):
            file = io.BytesIO()
            try:
                (picture.convert(extra) if extra != "I;16" else Image.new(extra, (5, 4), 300)).save(file, name)
            except (OSError, ValueError, KeyError, TypeError):
                continue  # a mode that the format does not have
            seeds.append(file.getvalue())

        def read(content: bytes, name: str = name) -> None:
            decoded = _decode_file(str(place.file(f"image.{name.lower()}", content)), Framing(8))
            if decoded.pixels is None:
                require(bool(decoded.reason), "an image without pixels and without a reason")
            else:
                require(decoded.pixels.ndim == 3 and max(decoded.pixels.shape) <= 8, "pixels of another shape")

        found.append(Target(f"image {name}", seeds, read))
    return found


def _settings(place: Place) -> list[Target]:
    recipe = to_toml(Recipe()).encode()
    sweep = b"""train_layers = [["fc"], ["layer4", "fc"]]
lr = ["auto", 0.1]
weight_decay = ["auto"]
shots = ["auto", 5]
[recipe]
seed = 1
"""

    def recipe_file(content: bytes) -> None:
        check(from_table(read_toml(place.file("recipe.toml", content)), "recipe.toml"))

    def sweep_file(content: bytes) -> None:
        place.file("sweep.toml", content)
        grid, own = read_sweep(place.folder)
        grid.check(own)

    words = (*WORDS, b"nan", b"inf", b"1979-05-27", b"'''", b"[[a]]", b"auto", b"a.b=1", b"\n")
    lines = [b"\n".join(recipe.splitlines()[start : start + 8]) for start in range(1, 40, 8)]
    return [
        Target("recipe.toml", [recipe, *lines], recipe_file, words),
        Target("sweep.toml", [sweep], sweep_file, words),
    ]


def _runs(place: Place) -> list[Target]:
    first, second = write_finished(place.folder / "first"), write_finished(place.folder / "second")
    model = write_model(place.folder / "model")
    config = (model / "config.json").read_bytes()
    predictions = place.folder / "predictions.safetensors"
    logits, labels = torch.rand(3, 3), torch.tensor([0, 1, 2])
    pictures = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    write_predictions(predictions, Predictions(logits, labels, torch.tensor([1]), pictures))
    usual = Choice("fp32", False, 1.0, 0.0, "measured")

    def run_file(name: str, content: bytes) -> None:
        whole = (first / name).read_bytes()
        try:
            (first / name).write_bytes(content)
            summary, rows = read_results(first)
            report._parts(summary, rows, CLASSES, None)
            if zlib.crc32(content) % 8 == 0:
                json.dumps(compare([first, second]).as_dict())
        finally:
            (first / name).write_bytes(whole)

    def config_file(content: bytes) -> None:
        path = model / "config.json"
        path.write_bytes(content)
        for read in (_trained_config, lambda path: locate(resolve_arch("test_resnet"), str(path.parent))):
            read(path)

    def predictions_file(content: bytes) -> None:
        found = read_predictions(place.file("predictions.safetensors", content))
        if found is not None and len(found.labels) and found.logits.shape[1] < 100:
            choose_examples(found.logits, found.labels)

    def cache_file(content: bytes) -> None:
        entry = Entry(place.folder / "features" / "entry", 2, ((1,),), (torch.float32,))
        entry.folder.mkdir(parents=True, exist_ok=True)
        for name in ("about.json", "chunks.jsonl", "tensor-0.bin"):
            (entry.folder / name).write_bytes(content)
        entry.load_journal()
        require(entry.missing_rows() <= 2, "rows")
        values = entry.read_chunk(0)
        require(values is None or values[0].shape == (2, 1), "features")
        list_entries(place.folder)
        remembered(place.folder, {}, lambda: usual)
        for path in (place.folder / "measurements").glob("*.json"):
            path.write_bytes(content)
        require(remembered(place.folder, {}, lambda: usual).rate > 0, "a rate")

    journal = b'\n{"chunk": 0, "crc32": [1]}\n{"chunk": 1, "crc32": [2]}'
    measured = json.dumps(
        {"choice": {"precision": "bf16", "compiled": True, "rate": 2.0, "compile_seconds": 1.0, "reason": "x"}}
    )
    rows = "".join(json.dumps(row_of(epoch)) + "\n" for epoch in (1, 2))
    return [
        Target(
            "summary.json",
            [json.dumps(summary_of()).encode()],
            lambda content: run_file("summary.json", content),
            WORDS,
        ),
        Target("metrics.jsonl", [rows.encode()], lambda content: run_file("metrics.jsonl", content), WORDS),
        Target("config.json", [config], config_file, WORDS),
        Target("predictions", [predictions.read_bytes()], predictions_file, WORDS),
        Target("feature cache", [journal, measured.encode(), b'{"rows": 2}'], cache_file, WORDS),
    ]


def _trained_config(path: Path) -> None:
    """Go the way of `load_trained` up to the building of the network."""
    config = trained._read_config(path)
    trained._known(config, "architecture", str, path)
    trained._class_names(config, path)
    arch, _ = trained._with_preprocessing(resolve_arch("test_resnet"), config, path)
    trained._crop(config["pretrained_cfg"], path)
    trained._model_args(config, path)
    trained._temperature(config, path)
    require(len(arch.config["mean"]) == 3, "a mean")
