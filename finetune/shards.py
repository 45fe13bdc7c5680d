"""WebDataset shards: which tar files a data set has, and which split each is of.

    root/train-000000.tar ...  root/val-000000.tar ...  root/test-000000.tar ...     the split is a word of the name
    root/train/000000.tar ...  root/val/...  root/test/...                           or the folder
    root/photos-000000.tar ...                                  one pile: a test split is held out of it later

`finetune/samples.py` reads them. docs/decisions/0010-shards.md says why they are indexed and read in place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from finetune.folder import SPLIT_NAMES, require_inside, subfolders
from finetune.images import first_few
from finetune.tar import compressed
from weights.errors import DataError

COMPRESSED = re.compile(r".*\.(tar\.\w+|tgz|tbz2?|txz)", re.IGNORECASE)
NUMBERED = re.compile(r"(?P<name>.*?)(?P<number>\d+)(?:-of-(?P<total>\d+))?", re.ASCII)
"""train-000012, and train-00012-of-00064 as Hugging Face numbers shards."""
NAMED = 3  # missing shards that an error names


@dataclass(frozen=True)
class ShardSet:
    """The shards of a data set, found but not read.

    Attributes:
        root: what `--data` names.
        splits: the shards of each split, in their order, train first.
        pile: whether they are one pile, from which a test split is to be taken.
    """

    root: Path
    splits: dict[str, tuple[Path, ...]]
    pile: bool


def find_shards(path: Path) -> ShardSet | None:
    """Return the shards at a path: a .tar file, or a folder that holds some; None where there are none.

    Raises:
        DataError: shards that cannot be told apart into splits, are compressed, lack one of their numbers, or are links
            that lead out of the folder.
    """
    if path.is_file():
        return ShardSet(path, {"train": (path,)}, pile=True) if path.suffix.lower() == ".tar" else None
    by_split: dict[str, list[Path]] = {split: [] for split in SPLIT_NAMES}
    unnamed: list[Path] = []
    for shard in _tars(path):
        split = _split_of(shard)
        (by_split[split] if split else unnamed).append(shard)
    for folder in sorted(subfolders(path)):
        split = next((split for split, names in SPLIT_NAMES.items() if folder.name.lower() in names), None)
        if split:
            by_split[split] += _tars(folder)
    splits = {split: tuple(shards) for split, shards in by_split.items() if shards}
    if not splits:
        splits = {"train": tuple(unnamed)} if unnamed else {}
    elif unnamed:
        raise DataError(
            f"{path} holds shards of {' and '.join(splits)}, and {first_few([shard.name for shard in unnamed])}, whose "
            "name says no split; put train, val or test into it, or move it elsewhere."
        )
    if not splits:
        return None
    if "train" not in splits:
        raise DataError(f"{path} holds shards of {' and '.join(splits)} but none of train to learn from.")
    for shards in splits.values():
        _require_all_numbers(shards)
        for shard in shards:
            require_inside(shard, path)
    return ShardSet(path, {split: tuple(sorted(shards, key=_order)) for split, shards in splits.items()}, bool(unnamed))


def name_of(found: ShardSet) -> str:
    """Return a short name of the data set."""
    root = found.root.resolve()
    return (root.stem if found.root.is_file() else root.name) or "shards"


def _tars(folder: Path) -> list[Path]:
    """Return the shards in a folder.

    Raises:
        DataError: one is compressed.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    shards = [file for file in files if file.suffix.lower() == ".tar"]
    packed = [file for file in files if COMPRESSED.fullmatch(file.name)]
    for file in packed:
        stem = Path(file.name.partition(".")[0])
        if NUMBERED.fullmatch(str(stem)) or _split_of(stem):
            raise compressed(file, file.name.rpartition(".")[2])
    return shards


def _split_of(shard: Path) -> str | None:
    """Return the split that a shard's name says, as one of its words."""
    words = set(re.split(r"[^a-z]+", shard.stem.lower()))
    said = [split for split, names in SPLIT_NAMES.items() if words & set(names)]
    if len(said) > 1:
        raise DataError(f"The name of {shard} says {' and '.join(said)}; expected the shard of one split.")
    return said[0] if said else None


def _order(shard: Path) -> tuple[str, int]:
    match = NUMBERED.fullmatch(shard.stem)
    return (match["name"], int(match["number"])) if match else (shard.stem, 0)


def _require_all_numbers(shards: Sequence[Path]) -> None:
    """Refuse numbered shards of which one is missing.

    Raises:
        DataError: the missing ones are named.
    """
    rows: dict[tuple[Path, str, str | None], dict[int, re.Match[str]]] = {}
    for shard in shards:
        if match := NUMBERED.fullmatch(shard.stem):
            rows.setdefault((shard.parent, match["name"], match["total"]), {})[int(match["number"])] = match
    for (folder, name, total), there in rows.items():
        low, high = min(there), max(there) + 1
        if total is not None:  # numbered from 0 or from 1
            low = 0 if int(total) not in there else 1
            high = low + int(total)
        lack = high - low - sum(low <= number < high for number in there)
        if not lack:
            continue
        width = len(there[min(there)]["number"])
        tail = "" if total is None else f"-of-{total}"
        gaps = islice((number for number in range(low, high) if number not in there), NAMED)
        missing = ", ".join(f"{name}{number:0{width}d}{tail}.tar" for number in gaps)
        more = f" and {lack - NAMED:,} more" if lack > NAMED else ""
        raise DataError(
            f"{folder} lacks {lack:,} of {high - low:,} shards: {missing}{more}; bring {'it' if lack == 1 else 'them'} "
            "back, or number the shards without a gap."
        )
