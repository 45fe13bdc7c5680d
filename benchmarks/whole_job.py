"""The job that the benchmarks speak of, and how a small measured run is projected to it.

The job: CIFAR-100, 50,000 training images in two flip views, 15 epochs, and 10,000 images evaluated after each. A
benchmark measures rates on a few thousand images; this file turns rates into the job's seconds, and lets the small run
be computed as the whole job would be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

TRAIN, EVALUATED, EPOCHS, VIEWS = 50_000, 10_000, 15, 2
TEST = 10_000
SAMPLE = 10_000  # training images that a finished run predicts for its train_accuracy (finetune.forecast.TRAIN_SAMPLE)

WORK = {"prefix": TRAIN * VIEWS + EVALUATED + TEST, "training": EPOCHS * TRAIN}
"""Images of work for each part, from which `--compile auto` decides."""

BARS = {
    "layer4,fc": {"script fp32": 11.0, "script bf16": 3.5},
    "fc": {"script fp32": 60.0, "script bf16": 20.0},
    "all": {"script fp32": 3.0, "script bf16": 1.3},
}
"""How many times faster the whole job should be on two cores with AMX, by trained layers and opponent."""

Figures = Mapping[str, float]
"""Of one candidate. In images per second: features, train, eval, test_features, test, sample. In seconds: start,
compile (a part of start), checkpoint (per epoch). memory and cache in GiB. 0 where a candidate has no such phase."""


def epoch_seconds(figures: Figures) -> float:
    """Return the projected time of one epoch with its evaluation and checkpoint, features being at hand."""
    return _seconds(TRAIN, figures["train"]) + _seconds(EVALUATED, figures["eval"]) + figures["checkpoint"]


def job_seconds(figures: Figures) -> float:
    """Return the projected time of the whole job.

    What happens once counts once: starting and compiling, the features of both views of the training images and of
    the evaluated ones, the final test in fp32 (features and suffix, each at its own rate) and the accuracy on a sample
    of the training images. The epochs come on top.
    """
    once = (
        figures["start"]
        + _seconds(TRAIN * VIEWS + EVALUATED, figures["features"])
        + _seconds(TEST, figures["test_features"])
        + _seconds(TEST, figures["test"])
        + _seconds(SAMPLE, figures["sample"])
    )
    return once + EPOCHS * epoch_seconds(figures)


def _seconds(images: int, rate: float) -> float:
    return images / rate if rate else 0.0


def explained() -> str:
    """Return the projection in words, for the terminal and for result files."""
    return (
        f"The job is CIFAR-100: {TRAIN:,} training images in {VIEWS} views, {EPOCHS} epochs, {EVALUATED:,} images "
        "evaluated after each. Script: start + epochs × (train + eval). finetune: start with compiling + features of "
        "all views and of the evaluated images + epochs × (train + eval + checkpoint) + once, what the script does "
        f"not do: the test of {TEST:,} images in fp32 and the accuracy on {SAMPLE:,} training images. Every term is a "
        "number of images over its own measured rate, or measured seconds."
    )


@contextmanager
def choices_of_whole_job() -> Iterator[None]:
    """Choose number formats and compilation as for the whole job, however few images the measured run has.

    `--compile auto` compiles when the work ahead repays it. A run of a few hundred images would say no where the whole
    job says yes, and would measure the rates of another computation.
    """
    from finetune import compute

    original = compute._picker

    def picker(*about: Any) -> Callable[..., Any]:
        pick = original(*about)
        return lambda part, build, step_images, _work, *sizes, **more: pick(
            part, build, step_images, WORK[part], *sizes, **more
        )

    with patch.object(compute, "_picker", picker):
        yield


def write_part(data: str, folder: Path, train: int, test: int) -> str:
    """Write the first images of a set as CIFAR-100 binary files, so that every candidate reads the same.

    Args:
        data: as for `--data`; images of 32 × 32 pixels.
        folder: new folder for train.bin, test.bin and the class names.
        train: how many training images.
        test: how many test images.

    Returns:
        The data set's name.

    Raises:
        SystemExit: images of another size, or too few of them.
        FinetuneError: the data cannot be read.
    """
    import torch

    from finetune.data import load_data

    splits = load_data(data, val_fraction=0)
    if splits.test is None or splits.train.images.shape[1:] != (3, 32, 32):
        raise SystemExit(f"{data} is no set of 32 × 32 pixels with a test split; give CIFAR or shapes100 as --data.")
    if len(splits.train) < train or len(splits.test) < test:
        raise SystemExit(
            f"{data} has {len(splits.train):,} training and {len(splits.test):,} test images, and {train:,} and "
            f"{test:,} are wanted; lower --images."
        )
    folder.mkdir(parents=True)
    for name, part, count in (("train.bin", splits.train, train), ("test.bin", splits.test, test)):
        labels = part.labels[:count, None].to(torch.uint8)
        # A record: the coarse label (there is none, so 0), the fine label, the pixels.
        records = torch.cat([torch.zeros_like(labels), labels, part.images[:count].flatten(1)], dim=1)
        (folder / name).write_bytes(records.numpy().tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(splits.classes), encoding="utf-8")
    return splits.name


def write_random(folder: Path, train: int, test: int) -> None:
    """Write noise as CIFAR-100 binary files: 32 × 32 pixels, labels in turn, at least ten images of every class.

    Args:
        folder: new folder, as `write_part` leaves it.
        train: how many training images.
        test: how many test images.
    """
    import numpy as np

    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, count in (("train.bin", train), ("test.bin", test)):
        records = random.integers(0, 256, (count, 2 + 3 * 32 * 32), dtype=np.uint8)
        records[:, 1] = np.arange(count) % max(2, min(100, train // 10))
        (folder / name).write_bytes(records.tobytes())
    names = "\n".join(f"class_{number:02d}" for number in range(100))
    (folder / "fine_label_names.txt").write_text(names, encoding="utf-8")
