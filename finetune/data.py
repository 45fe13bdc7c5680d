"""From the text of `--data` to images, split and ready for a run.

cifar10, cifar100       looked up in --data-dir, $FINETUNE_DATA, ./data and the cache, else downloaded
shapes10, shapes100     drawn by the program
anything else           a path: CIFAR pickles, CIFAR binary, a .tar.gz of either, the folder that holds exactly one
                        of these, an image folder, or WebDataset shards
"""

from __future__ import annotations

import os
from pathlib import Path

from finetune.cifar import (
    ARCHIVE_SUFFIXES,
    KINDS,
    CifarFiles,
    Kind,
    archive_kind,
    cifar_archive,
    cifar_folder,
    read_cifar,
)
from finetune.decoded import DecodedCache
from finetune.downloads import data_cache, download_cifar, not_found
from finetune.folder import has_classes, has_splits, read_folder, refuse_links_out, require_inside, subfolders
from finetune.images import DataSplits, Progress, RawData, first_few
from finetune.samples import read_shards
from finetune.shapes import SHAPES, draw_shapes
from finetune.shards import ShardSet, find_shards
from finetune.splits import check_settings, make_splits
from weights.errors import DataError, UsageError, near_matches

DATA_NAMES = (*KINDS, *SHAPES)
"""Every `--data` that is a name and not a path."""

UNPACKED = {
    "cifar-10-python.tar.gz": "cifar-10-batches-py",
    "cifar-10-binary.tar.gz": "cifar-10-batches-bin",
    "cifar-100-python.tar.gz": "cifar-100-python",
    "cifar-100-binary.tar.gz": "cifar-100-binary",
}
"""The folder that each published archive unpacks to. Where both are present, as torchvision leaves them, they count
as one, and the folder is read."""


def load_data(
    data: str,
    *,
    data_dir: Path | None = None,
    labels: str = "fine",
    image_size: int = 224,
    image_memory: int | None = None,
    val_fraction: float = 0.1,
    limit: int | None = None,
    shots: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    download: bool = True,
    kept: DecodedCache | None = None,
) -> DataSplits:
    """Load a data set and split it.

    Args:
        data: a name of `DATA_NAMES` or a path. A name wins over a file of that name; `./cifar100` is a path.
        data_dir: searched first for CIFAR by name.
        labels: `fine`, or `coarse` for CIFAR-100's superclasses.
        image_size: side to which images of folders and shards are decoded; other data keep their size.
        image_memory: bytes that these decoded images may take; more is streamed. None is most of what is free.
        val_fraction: share of the training images held out for validation, unless the data bring a validation split.
        limit: how many training images to keep, stratified, after the validation images are taken; None for all.
        shots: how many training images of every class to keep, of those within the limit; None for all.
        seed: decides which images are held out and kept.
        progress: called as progress(what, done, total) while images are decoded or drawn.
        download: fetch CIFAR by name when it is nowhere.
        kept: where decoded images of folders and shards stay for the next command; None is nowhere.

    Returns:
        The splits; images uint8 (N, 3, H, W), one size in all splits.

    Raises:
        UsageError: a setting or name that cannot be right.
        DataError: data that are missing, damaged or not what they seem.
    """
    check_settings(val_fraction=val_fraction, limit=limit)
    raw = read_data(
        data,
        data_dir=data_dir,
        labels=labels,
        image_size=image_size,
        image_memory=image_memory,
        progress=progress,
        download=download,
        kept=kept,
    )
    return make_splits(raw, val_fraction=val_fraction, limit=limit, shots=shots, seed=seed)


def read_data(
    data: str,
    *,
    data_dir: Path | None = None,
    labels: str = "fine",
    image_size: int = 224,
    image_memory: int | None = None,
    progress: Progress | None = None,
    download: bool = True,
    kept: DecodedCache | None = None,
) -> RawData:
    """Load a data set as it is found, before anything is held out. Arguments and errors are those of `load_data`."""
    if labels not in ("fine", "coarse"):
        raise UsageError(f"--labels is {labels!r}; expected fine or coarse.")
    if image_size < 1:
        raise UsageError(f"--image-size is {image_size}; expected at least 1 pixel.")
    try:
        found = find_data(data, data_dir=data_dir, labels=labels, download=download)
        if isinstance(found, ShardSet):
            return read_shards(found, image_size=image_size, memory=image_memory, progress=progress, kept=kept)
        if isinstance(found, Path):
            return read_folder(found, image_size=image_size, memory=image_memory, progress=progress, kept=kept)
        return read_set(found, labels=labels, progress=progress)
    except OSError as error:  # a folder without permission, a disk that fails
        raise cannot_read(data, error) from error


def require_data(data: str, *, labels: str = "fine") -> None:
    """Refuse a path at which there are no data, before anything else is done for them.

    Raises:
        UsageError, DataError: as for `load_data`, as far as it shows without reading.
    """
    try:
        find_data(data, labels=labels)
    except OSError as error:
        raise cannot_read(data, error) from error


def find_data(
    data: str, *, data_dir: Path | None = None, labels: str = "fine", download: bool = True
) -> CifarFiles | ShardSet | Path | str:
    """Find what `--data` names, without reading it.

    Args:
        data: as for `load_data`.
        data_dir: as for `load_data`.
        labels: `coarse` is refused where the data have no such labels.
        download: as for `load_data`.

    Returns:
        CIFAR files, shards, the root of an image folder, or the name of a set that the program draws.

    Raises:
        UsageError, DataError: as for `load_data`.
        OSError: a folder that cannot be listed; `cannot_read` has the words for it.
    """
    kind = next((kind for kind in KINDS if kind == data), None)
    if kind is not None:
        return _find_cifar(kind, data_dir, download)
    if data in SHAPES:
        _refuse_coarse(labels, data)
        return data
    path = Path(data).expanduser()
    if not data or not path.exists():
        if not data or (path.name == data and not path.suffix):
            known = ", ".join(DATA_NAMES)
            near = near_matches(data, DATA_NAMES)
            raise UsageError(f"--data {data!r} is neither a path that exists nor one of {known}{near or '.'}")
        raise DataError(f"There is nothing at {path}; expected a data set (or one of {', '.join(DATA_NAMES)}).")
    found = _at_path(path)
    if isinstance(found, Path | ShardSet):
        _refuse_coarse(labels, str(path))
    return found


def read_set(found: CifarFiles | str, *, labels: str = "fine", progress: Progress | None = None) -> RawData:
    """Read CIFAR files, or draw a set, as `find_data` returned them; images keep their size."""
    return draw_shapes(found, progress=progress) if isinstance(found, str) else read_cifar(found, labels=labels)


def cannot_read(data: str, error: OSError) -> DataError:
    """Return the error for data that the system does not give: no permission, a disk that fails."""
    place, reason = error.filename or data, error.strerror or str(error)
    return DataError(f"{place} cannot be read ({reason}); make it readable, or give --data another path.")


def _refuse_coarse(labels: str, data: str) -> None:
    if labels == "coarse":
        raise UsageError(f"--labels coarse needs CIFAR-100, but {data} has no coarse labels.")


def _at_path(path: Path) -> CifarFiles | ShardSet | Path:
    """Return what lies at a path: CIFAR files, shards, or the root of an image folder."""
    if path.is_file():
        if _is_archive(path):
            return cifar_archive(path)
        if (shard := find_shards(path)) is not None:
            return shard
        raise DataError(
            f"{path} is a file; expected a folder (of CIFAR files, of images by class, or of shards), a CIFAR .tar.gz "
            "archive, or a .tar shard."
        )
    here = cifar_folder(path)
    if here is not None:
        return _without_links_out(here, path)
    within = _data_sets_in(path)
    if within and not has_splits(path):
        chosen = _only(within, path, "give --data the path of one")
        require_inside(chosen, path)
        if chosen.is_dir() and has_splits(chosen):
            refuse_links_out(path, classes_of=chosen)
            return chosen
        found = _open_cifar(chosen)
        if found is not None:
            return _without_links_out(found, path)
    refuse_links_out(path, classes_of=path)
    if has_splits(path) or has_classes(path):
        return path
    if (shards := find_shards(path) or _shards_below(path)) is not None:
        return shards
    entries = sorted(entry.name for entry in path.iterdir())
    raise DataError(
        f"{path} holds {first_few(entries) or 'nothing'}; expected CIFAR files, a CIFAR .tar.gz, a folder of images "
        "for each class, or .tar shards."
    )


def _shards_below(parent: Path) -> ShardSet | None:
    """Return the one folder of shards right below a folder; None where there is none."""
    found = [shards for folder in sorted(subfolders(parent)) if (shards := find_shards(folder)) is not None]
    if not found:
        return None
    _only([shards.root for shards in found], parent, "give --data the path of one")
    return found[0]


def _data_sets_in(parent: Path, kind: Kind | None = None) -> list[Path]:
    """List the data sets right below a folder: CIFAR folders and archives, and image folders that have a train/.

    Args:
        parent: the folder.
        kind: list only CIFAR data sets of this kind.
    """
    found = []
    for entry in sorted(parent.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            files = cifar_folder(entry)
            if (files is not None and kind in (None, files.kind)) or (files is None and not kind and has_splits(entry)):
                found.append(entry)
        elif _is_archive(entry) and archive_kind(entry) in ((kind,) if kind else KINDS):
            found.append(entry)
    return [entry for entry in found if parent / UNPACKED.get(entry.name, "") not in found]


def _only(found: list[Path], parent: Path, what_next: str) -> Path:
    if len(found) > 1:
        listed = ", ".join(str(one) for one in found)
        raise DataError(f"{parent} holds {len(found)} data sets: {listed}; {what_next}.")
    return found[0]


def _open_cifar(path: Path) -> CifarFiles | None:
    return cifar_archive(path) if path.is_file() else cifar_folder(path)


def _without_links_out(files: CifarFiles, root: Path) -> CifarFiles:
    """Return CIFAR files as they are, unless one is a link that leads out of a folder.

    Raises:
        DataError: one is.
    """
    for name in sorted(files.names) if files.place.is_dir() else ():
        require_inside(files.place / name, root)
    return files


def _is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVE_SUFFIXES) and path.is_file()


def _find_cifar(kind: Kind, data_dir: Path | None, download: bool) -> CifarFiles:
    """Find a CIFAR by name in the places that are searched, in their order, or download it."""
    from_env = os.environ.get("FINETUNE_DATA")
    places = [
        ("$FINETUNE_DATA", Path(from_env).expanduser() if from_env else None),
        ("the current folder's", Path("data")),
    ]
    if data_dir is not None:
        places.insert(0, ("--data-dir", data_dir.expanduser()))
    places.append(("the cache", data_cache()))

    searched = []
    for title, place in places:
        searched.append(f"{title} {place}" if place is not None else f"{title} (not set)")
        if place is None:
            continue
        if not place.is_dir():
            searched[-1] += " (no such folder)"
            continue
        here = cifar_folder(place)
        if here is not None and here.kind == kind:
            return _without_links_out(here, place)
        within = _data_sets_in(place, kind)
        if within:
            chosen = _only(within, place, "give --data the path of one")  # in a folder of data sets, it may be a link
            found = _open_cifar(chosen)
            if found is not None and found.kind == kind:
                return _without_links_out(found, chosen)
    if not download:
        raise not_found(kind, searched, "downloading is switched off")
    return cifar_archive(download_cifar(kind, searched))
