"""The images of `finetune eval`: which split of which data, with the model's labels, and which of them train holds too.

Legend: N images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from finetune.data import read_data
from finetune.events import Events
from finetune.images import DataSplits, ImageSet, RawData, first_few
from finetune.recipe import Recipe, from_table, read_toml
from finetune.rundir import RECIPE
from finetune.splits import make_splits, pixel_digests
from finetune.trained import Trained
from finetune.units import parse_bytes
from weights.errors import DataError, UsageError

SPLITS = {"train": "training", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class Chosen:
    """The images that a model is evaluated on.

    Attributes:
        name: of the data set.
        images: labels are the model's.
        learned: what the model was trained on, to look for repeated images in; None when nobody knows, or when it is
            the training split itself that is evaluated.
        notes: sentences for the user.
    """

    name: str
    images: ImageSet
    learned: ImageSet | None
    notes: tuple[str, ...]


def choose_images(
    trained: Trained, data: str | None, *, data_dir: Path | None, labels: str | None, split: str, events: Events
) -> Chosen:
    """Read a data set and return the split that is wanted, with the model's labels.

    One pile of classes, without train and test folders, is all test images, unless it is what the model's run divided:
    then its test split is the one that the run held out.
    """
    recipe = trained.recipe or Recipe()
    if data is None:
        data, data_dir = _own_data(trained, data_dir)
    size, wanted, memory = trained.preprocessing.size, labels or recipe.labels, _image_memory(trained)
    read = partial(read_data, image_size=size, image_memory=memory, progress=events.progress)
    try:
        raw = read(data, data_dir=data_dir, labels=wanted)
    except UsageError:
        if labels is not None or wanted == "fine":
            raise
        # Only CIFAR-100 has coarse labels; in other data the same classes are found by name.
        raw = read(data, data_dir=data_dir)
    if split == "test":  # whatever was held out for validation was there to learn from as well
        splits = make_splits(raw, val_fraction=0.0)
        if raw.hold_out_test and not _is_of_the_run(trained, splits):
            note = f"{raw.name} has no train and test folders, so all of its {len(raw.train):,} images are test images."
            learned, notes = _learned(trained, splits, read)
            return _with_labels_of(trained, raw, raw.train, learned, (note, *notes))
        learned, notes = _learned(trained, splits, read)
        return _with_labels_of(trained, raw, _required(splits.test, raw, split), learned, notes)
    splits = make_splits(
        raw, val_fraction=recipe.val_fraction, limit=recipe.limit, shots=recipe.shots, seed=recipe.seed
    )
    if split == "train":
        return _with_labels_of(trained, raw, splits.train, None)
    return _with_labels_of(trained, raw, _required(splits.val, raw, split), splits.train)


def _own_data(trained: Trained, data_dir: Path | None) -> tuple[str, Path | None]:
    """Return the data of the model's run, from its recipe.toml."""
    path = trained.folder / RECIPE
    if not path.is_file():
        raise UsageError(f"--data is missing, and {trained.folder} holds no {RECIPE} that names the data; give --data.")
    own = {name: value for name, value in read_toml(path).items() if name in ("data", "data_dir")}
    recipe = from_table({"data": "", **own}, str(path))
    return recipe.data, data_dir or recipe.data_dir


def _image_memory(trained: Trained) -> int | None:
    """Return the bytes that decoded images may take, as the model's run had it; None where nobody said."""
    path = trained.folder / RECIPE
    if not path.is_file():
        return None
    try:
        own = {name: value for name, value in read_toml(path).items() if name == "image_memory"}
        text = from_table(own, str(path)).image_memory
        return None if text is None else parse_bytes(text, f"image_memory of {path}")
    except UsageError:  # a recipe that cannot be read matters where it has to name the data, and is refused there
        return None


def _is_of_the_run(trained: Trained, splits: DataSplits) -> bool:
    return trained.said_of_data().get("sha256") == splits.sha256


def _learned(
    trained: Trained, splits: DataSplits, read: Callable[..., RawData]
) -> tuple[ImageSet | None, tuple[str, ...]]:
    """Return what the model was trained on, to look for repeated images in, and what there is to say about it.

    That is the training split of its own run's data, whatever data it is evaluated on. A checkpoint without a run is
    taken to be trained on what the data at hand give for training. Images of a run's other data are not kept: their
    digests will do.
    """
    if _is_of_the_run(trained, splits) or (trained.summary() is None and splits.test is not None):
        return splits.train, ()
    try:
        own, data_dir = _own_data(trained, None)
        labels = (trained.recipe or Recipe()).labels
        raw = read(own, data_dir=data_dir, labels=labels, image_memory=0, download=False)
        splits_of_run = make_splits(raw, val_fraction=0.0)
        if _is_of_the_run(trained, splits_of_run):
            return splits_of_run.train, ()
        reason = "the data of its run have changed"
    except (DataError, UsageError) as error:
        reason = str(error).rstrip(".")
    return None, (f"Whether the model was trained on some of these images is not known: {reason}.",)


def _required(images: ImageSet | None, raw: RawData, split: str) -> ImageSet:
    if images is None:
        there = ["train", *(name for name, part in (("val", raw.val), ("test", raw.test)) if part is not None)]
        raise DataError(
            f"{raw.name} has no {SPLITS[split]} images, only {' and '.join(there)}; give another --split, or a folder "
            "of classes, which is all test images."
        )
    return images


def _with_labels_of(
    trained: Trained, raw: RawData, images: ImageSet, learned: ImageSet | None, notes: tuple[str, ...] = ()
) -> Chosen:
    """Return images whose labels are places in the model's classes, found by name.

    Raises:
        DataError: the data set has a class that the model does not know.
    """
    place = {name: index for index, name in enumerate(trained.classes)}
    foreign = [name for name in images.classes if name not in place]
    if foreign:
        raise DataError(
            f"{raw.name} has classes that {trained.folder} was not trained on: {first_few(foreign, 10)}; it knows "
            f"{first_few(trained.classes, 10)}. Give data of the same classes."
        )
    absent = [name for name in trained.classes if name not in set(images.classes)]
    if absent:
        verb = "is" if len(absent) == 1 else "are"
        notes = (*notes, f"{first_few(absent, 10)} {verb} among the model's classes and not in {raw.name}.")
    table = torch.tensor([place[name] for name in images.classes])
    known = ImageSet(images.images, table[images.labels], trained.classes)
    return Chosen(raw.name, known, learned, (*raw.notes, *notes))


def repeated_images(images: ImageSet, learned: ImageSet) -> torch.Tensor:
    """Return bool (N,): which images have the same pixels as an image that was there to learn from."""
    seen = set(pixel_digests(learned.images))
    return torch.tensor([digest in seen for digest in pixel_digests(images.images)], dtype=torch.bool)
