"""The samples in WebDataset shards: an image and its label each, found by their names.

A sample is what has one name up to its first dot: an image (`0001.jpg`) and a label, which is a text file (`0001.cls`)
or "label" in `0001.json`: a whole number or the name of a class. classes.txt beside the shards, which may be absent,
names the classes, one in each line. Whole numbers are places in it, or the classes themselves where there is none.
Everything else in a shard is passed over.

Labels are read one by one when the shard's headers have been, so that no more of them than their text is kept.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune.decoded import DecodedCache
from finetune.folder import IMAGE_SUFFIXES, require_inside
from finetune.images import Progress, RawData, first_few
from finetune.shards import ShardSet, name_of
from finetune.stream import load_splits
from finetune.tar import Member, index_tar
from weights.errors import DataError, near_matches
from weights.guard import read_text, shortened, told

LABELS = ("cls", "json")
"""Suffixes of labels; the first that a sample has and that holds one counts."""

WHOLE = re.compile(r"[+-]?\d{1,18}", re.ASCII)
CLASSES = "classes.txt"
LARGEST_CLASSES = 2**20  # bytes; a name of 50 for each of 20,000 classes

LARGEST_TEXT = 2**20
"""Bytes of a file with a label: labels are a few, and a .json may hold more about its image."""

LONGEST_NAME = 255
"""Characters of a class's name: those that a folder's may have, which names the class elsewhere."""


@dataclass
class Samples:
    """The samples of one split: where each image lies, and its label as it is written."""

    images: list[Member] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Listed:
    """What lies in the shards of a data set.

    Attributes:
        classes: names in label order.
        splits: images of each split, and their labels.
        notes: sentences for the user.
    """

    classes: tuple[str, ...]
    splits: dict[str, tuple[list[Member], list[int]]]
    notes: tuple[str, ...]


def read_shards(
    found: ShardSet,
    *,
    image_size: int,
    memory: int | None = None,
    progress: Progress | None = None,
    kept: DecodedCache | None = None,
) -> RawData:
    """Read shards: their headers and labels at once, their images as `load_splits` does.

    Args:
        found: the shards.
        image_size: side of the decoded squares, at most.
        memory: as for `load_splits`.
        progress: called as progress(what, done, total).
        kept: as for `load_splits`.

    Raises:
        DataError: as for `list_samples`, or images that cannot be read.
        OSError: a shard that cannot be read.
    """
    listed = list_samples(found, progress)
    name = name_of(found)
    sets = load_splits(
        listed.splits,
        listed.classes,
        image_size=image_size,
        memory=memory,
        progress=progress,
        kept=kept,
        name=name,
    )
    return RawData(name, sets["train"], sets.get("val"), sets.get("test"), listed.notes, hold_out_test=found.pile)


def list_samples(found: ShardSet, progress: Progress | None = None) -> Listed:
    """Read the headers and the labels of all shards.

    Raises:
        DataError: a shard that is damaged, a sample without its image or its label, two of one name, a label that is
            none or of no class, a split without samples, fewer than two classes.
        OSError: a shard that cannot be read.
    """
    shards = [(split, shard) for split, shards in found.splits.items() for shard in shards]
    samples = {split: Samples() for split in found.splits}
    for done, (split, shard) in enumerate(shards):
        if progress is not None:
            progress("read shards", done, len(shards))
        _list_shard(shard, samples[split])
    for split, part in samples.items():
        if not part.images:
            many = len(found.splits[split])
            raise DataError(
                f"The {split} shards of {found.root} ({many}) hold no samples; expected images with labels beside "
                "them, such as 0001.jpg and 0001.cls."
            )
    names = _read_classes(found)
    classes = names or _classes_of(samples["train"])
    if len(classes) < 2:
        raise DataError(f"{found.root} holds images of one class ({shortened(classes[0])}); expected two or more.")
    numbers = {name: number for number, name in enumerate(classes)}
    splits = {}
    for split, part in samples.items():
        labels = [_number(*pair, numbers, listed=bool(names)) for pair in zip(part.labels, part.images, strict=True)]
        splits[split] = (part.images, labels)
    absent = [shortened(classes[label]) for label in sorted(set(range(len(classes))) - set(splits["train"][1]))]
    notes = [f"{CLASSES} names {first_few(absent)}, of which train holds no image."]
    return Listed(classes, splits, tuple(notes if absent else ()))


def _list_shard(shard: Path, samples: Samples) -> None:
    """Add the samples of a shard to those of its split.

    Raises:
        DataError: as for `list_samples`.
    """
    parts: dict[str, dict[str, Member]] = {}
    for member in index_tar(shard, lambda name: bool(_kind_of(name))):
        kind = _kind_of(member.name)
        sample = parts.setdefault(_split_name(member.name)[0], {})
        if kind in sample:
            first = shortened(sample[kind].name)
            raise DataError(
                f"{shard} holds two files of one sample: {first} and {shortened(member.name)}; expected one image and "
                "one label of a name, which ends at its first dot."
            )
        sample[kind] = member
    for key, sample in parts.items():
        label = next((text for kind in LABELS if kind in sample and (text := _label(sample[kind])) is not None), None)
        if "image" not in sample and label is not None:
            raise DataError(
                f"{shard} holds a label of {shortened(key)} ({shortened(next(iter(sample.values())).name)}) and no "
                "image; expected both, of one name up to the first dot."
            )
        if "image" in sample and label is None:
            raise DataError(
                f"{sample['image']} has no label; expected {shortened(key)}.cls, or {shortened(key)}.json with a "
                '"label", in the same shard.'
            )
        if label is not None:
            samples.images.append(sample["image"])
            samples.labels.append(label)


def _split_name(name: str) -> tuple[str, str]:
    """Return a member's name up to the first dot of its last part, and what follows that, in lower case."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _kind_of(name: str) -> str:
    """Return what a member is to its sample: image, cls or json; "" where it is none of these, or hidden."""
    key, suffix = _split_name(name)
    if not key or key.endswith("/"):
        return ""
    return "image" if f".{suffix}" in IMAGE_SUFFIXES else suffix if suffix in LABELS else ""


def _label(member: Member) -> str | None:
    """Return a label as text; None where a .json file holds none.

    Raises:
        DataError: it is neither a whole number nor one line of text, or too large.
        OSError: the shard cannot be read any more.
    """
    if member.size > LARGEST_TEXT:
        raise DataError(f"{member} has {member.size:,} bytes; a label of at most {LARGEST_TEXT:,} was expected.")
    content = member.read(LARGEST_TEXT)
    value: object = None
    try:
        value = content.decode("utf-8").strip()
        if _split_name(member.name)[1] == "json":
            table = json.loads(value)
            value = table.get("label") if isinstance(table, dict) else None
            if value is None:
                return None
    except (ValueError, RecursionError):
        value = None
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    text = unicodedata.normalize("NFC", text.strip())
    if not text or not text.isprintable():
        raise DataError(f"{member} holds no label; expected a whole number, or the name of a class.")
    if len(text) > LONGEST_NAME:
        raise DataError(
            f"{member} holds a label of {len(text):,} characters; expected a whole number, or the name of a class, "
            f"which may have {LONGEST_NAME}."
        )
    return str(int(text)) if WHOLE.fullmatch(text) else text


def _read_classes(found: ShardSet) -> tuple[str, ...]:
    """Return the names in classes.txt beside the shards; none where there is no such file.

    Raises:
        DataError: it is empty, names a class twice, or is a link that leads elsewhere.
    """
    path = (found.root.parent if found.root.is_file() else found.root) / CLASSES
    if not path.is_file():
        return ()
    require_inside(path, path.parent)
    try:
        text = unicodedata.normalize("NFC", read_text(path, LARGEST_CLASSES))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8; expected the name of a class in each line.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); expected the name of a class in each line.") from error
    names = [line.strip() for line in text.rstrip().splitlines()]
    reason = "" if names and all(name.isprintable() and name for name in names) else "has a line without a name"
    if twice := next((name for name, times in Counter(names).items() if times > 1 and name), None):
        reason = f"names {told(twice)} twice"
    if (longest := max(map(len, names), default=0)) > LONGEST_NAME:
        reason = f"has a line of {longest:,} characters, and a name may have {LONGEST_NAME}"
    if reason:
        raise DataError(f"{path} {reason}; expected the name of a class in each line, in the order of the labels.")
    return tuple(names)


def _classes_of(samples: Samples) -> tuple[str, ...]:
    """Return the classes that the labels of train name: numbers in their order, else names sorted."""
    distinct = set(samples.labels)
    if all(WHOLE.fullmatch(label) for label in distinct):
        return tuple(sorted(distinct, key=int))
    return tuple(sorted(distinct))


def _number(label: str, image: Member, numbers: Mapping[str, int], *, listed: bool) -> int:
    """Return the place of a label among the classes.

    Raises:
        DataError: it has none; the image is named.
    """
    if WHOLE.fullmatch(label) and (listed or int(label) < 0):
        if 0 <= int(label) < len(numbers):
            return int(label)
        there = f"{CLASSES} names {len(numbers)} classes, 0 to {len(numbers) - 1}"
        raise DataError(f"{image} has the label {label}; {there if listed else 'expected 0 or more'}.")
    if label not in numbers:
        where, known = CLASSES if listed else "the training images", [shortened(name) for name in numbers]
        raise DataError(
            f"{image} has the label {told(label)}, which is no class of {where}; expected one of "
            f"{first_few(known)}{near_matches(shortened(label), known) or '.'}"
        )
    return numbers[label]
