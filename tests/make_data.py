"""Small data sets in every layout, written by the tests that need them.

Import with `from make_data import ...`. Images are uint8 (N, 3, H, W) numpy arrays, labels int64 (N,).
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Made:
    """What was written: train and test images, their labels, and the class names in label order."""

    train: Pixels
    train_labels: Labels
    test: Pixels
    test_labels: Labels
    classes: tuple[str, ...]


def make_images(n_train: int = 40, n_test: int = 20, *, classes: int = 4, size: int = 32, seed: int = 0) -> Made:
    """Make noise whose brightness depends on the class, so that a network can learn it; labels go round in turn."""
    random = np.random.default_rng(seed)

    def images(count: int) -> tuple[Pixels, Labels]:
        labels = np.arange(count) % classes
        base = labels[:, None, None, None] * (200 // classes)
        return (base + random.integers(0, 56, (count, 3, size, size))).astype(np.uint8), labels.astype(np.int64)

    return Made(*images(n_train), *images(n_test), tuple(f"class_{index:02d}" for index in range(classes)))


def write_pickle(path: Path, content: dict[bytes, Any]) -> None:
    """Write a dict as the published files hold it: protocol 2, bytes as keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


def write_cifar100_python(folder: Path, n_train: int = 40, n_test: int = 20, *, made: Made | None = None) -> Made:
    """Write `train`, `test` and `meta`; two coarse classes, which are the halves of the fine ones."""
    made = made or make_images(n_train, n_test)
    for name, images, labels in (("train", made.train, made.train_labels), ("test", made.test, made.test_labels)):
        write_pickle(
            folder / name,
            {
                b"filenames": [f"{name}_{index}.png".encode() for index in range(len(labels))],
                b"batch_label": f"{name}ing batch 1 of 1".encode(),
                b"fine_labels": labels.tolist(),
                b"coarse_labels": coarse(labels, made.classes).tolist(),
                b"data": flat(images),
            },
        )
    meta = {b"fine_label_names": [name.encode() for name in made.classes], b"coarse_label_names": [b"first", b"second"]}
    write_pickle(folder / "meta", meta)
    return made


def write_cifar10_python(
    folder: Path, n_train: int = 40, n_test: int = 20, *, batches: int = 5, made: Made | None = None
) -> Made:
    """Write `data_batch_1` ..., `test_batch` and `batches.meta`."""
    made = made or make_images(n_train, n_test)
    for number, index in enumerate(_parts(made, batches), start=1):
        content = {
            b"batch_label": f"training batch {number} of {batches}".encode(),
            b"labels": made.train_labels[index].tolist(),
            b"data": flat(made.train[index]),
        }
        write_pickle(folder / f"data_batch_{number}", content)
    test = {b"batch_label": b"testing batch 1 of 1", b"labels": made.test_labels.tolist(), b"data": flat(made.test)}
    write_pickle(folder / "test_batch", test)
    write_pickle(folder / "batches.meta", {b"label_names": [name.encode() for name in made.classes]})
    return made


def write_cifar100_binary(folder: Path, n_train: int = 40, n_test: int = 20, *, made: Made | None = None) -> Made:
    """Write `train.bin`, `test.bin` and the two files of names."""
    made = made or make_images(n_train, n_test)
    folder.mkdir(parents=True, exist_ok=True)
    for name, images, labels in (("train", made.train, made.train_labels), ("test", made.test, made.test_labels)):
        header = np.stack([coarse(labels, made.classes), labels], axis=1).astype(np.uint8)
        (folder / f"{name}.bin").write_bytes(np.concatenate([header, flat(images)], axis=1).tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(made.classes) + "\n", encoding="utf-8")
    (folder / "coarse_label_names.txt").write_text("first\nsecond\n", encoding="utf-8")
    return made


def write_cifar10_binary(
    folder: Path, n_train: int = 40, n_test: int = 20, *, batches: int = 5, made: Made | None = None
) -> Made:
    """Write `data_batch_1.bin` ..., `test_batch.bin` and `batches.meta.txt` (which ends in an empty line)."""
    made = made or make_images(n_train, n_test)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [(f"data_batch_{number}.bin", index) for number, index in enumerate(_parts(made, batches), start=1)]
    for name, index in parts:
        _write_records(folder / name, made.train[index], made.train_labels[index])
    _write_records(folder / "test_batch.bin", made.test, made.test_labels)
    (folder / "batches.meta.txt").write_text("\n".join(made.classes) + "\n\n", encoding="utf-8")
    return made


def write_image_folder(
    root: Path,
    n_train: int = 40,
    n_test: int = 20,
    *,
    n_val: int = 0,
    size: int = 32,
    suffix: str = ".png",
    made: Made | None = None,
) -> Made:
    """Write `train/<class>/` and, unless their count is 0, `test/<class>/` and `val/<class>/`.

    Validation images are made apart and are not in what is returned.
    """
    made = made or make_images(n_train, n_test, size=size)
    write_class_folders(root / "train", made.train, made.train_labels, made.classes, suffix=suffix)
    if len(made.test):
        write_class_folders(root / "test", made.test, made.test_labels, made.classes, suffix=suffix)
    if n_val:
        val = make_images(n_val, 0, classes=len(made.classes), size=size, seed=1)
        write_class_folders(root / "val", val.train, val.train_labels, made.classes, suffix=suffix)
    return made


def write_class_folders(
    root: Path, images: Pixels, labels: Labels, classes: Sequence[str], *, suffix: str = ".png"
) -> None:
    """Write images (N, 3, H, W) as files into one folder for each class that has any."""
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        folder = root / classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{index:05d}{suffix}")


def write_shards(root: Path, made: Made, *, each: int = 100, names: bool = True) -> None:
    """Write images as shards `train-000000.tar`, `test-000000.tar` and so on, `each` samples to a shard.

    Args:
        root: the folder.
        made: the images.
        each: samples of a shard.
        names: labels are names of classes; otherwise numbers, with classes.txt beside the shards.
    """
    root.mkdir(parents=True, exist_ok=True)
    for split, images, labels in (("train", made.train, made.train_labels), ("test", made.test, made.test_labels)):
        for start in range(0, len(labels), each):
            samples: dict[str, bytes] = {}
            for index in range(start, min(start + each, len(labels))):
                label = made.classes[labels[index]] if names else str(labels[index])
                samples |= {f"{index:06d}.png": as_png(images[index]), f"{index:06d}.cls": label.encode()}
            write_tar(root / f"{split}-{start // each:06d}.tar", samples)
    if not names:
        (root / "classes.txt").write_text("".join(f"{name}\n" for name in made.classes), encoding="utf-8")


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    """Write an uncompressed tar file of these files."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def as_png(image: Pixels) -> bytes:
    """Return an image (3, H, W) as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def write_archive(archive: Path, folder: Path) -> None:
    """Pack a folder into a .tar.gz, under its own name, as the published archives are."""
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)


def flat(images: Pixels) -> Pixels:
    """Return images (N, 3, 32, 32) as CIFAR's rows (N, 3072)."""
    return images.reshape(len(images), 3 * 32 * 32)


def coarse(labels: Labels, classes: Sequence[str]) -> Labels:
    """Return coarse labels: 0 for the first half of the classes, 1 for the second."""
    return (labels >= len(classes) // 2).astype(np.int64)


def _parts(made: Made, batches: int) -> list[NDArray[np.int64]]:
    return np.array_split(np.arange(len(made.train)), batches)


def _write_records(path: Path, images: Pixels, labels: Labels) -> None:
    path.write_bytes(np.concatenate([labels[:, None].astype(np.uint8), flat(images)], axis=1).tobytes())
