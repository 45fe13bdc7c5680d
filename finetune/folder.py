"""Folders of images: found, decoded in parallel, and brought to one square size.

    root/train/<class>/**/*.jpg, root/val/<class>/..., root/test/<class>/...    (or Training, valid, eval and the like)
    root/<class>/**/*.jpg                                       one pile: a test split is held out of it later

Classes are the folders of train, sorted by name. Hidden files and folders are passed over; images outside any class
folder, and files that are no images by their suffix, are passed over and counted.

Decoding follows one rule for every image of the data set: the shorter side becomes `image_size` (bilinear, antialiased)
and the centre square is kept. Images that already share a shorter side of no more than `image_size` are not resized.
What Pillow reads becomes 8-bit RGB: turned as EXIF says, 16-bit scaled down, transparency on white.

Legend: N images, C = 3 channels (RGB), side S.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from finetune.decoded import DecodedCache
from finetune.grid import SWEEP
from finetune.images import Progress, RawData, first_few
from finetune.rundir import RECIPE
from finetune.stream import load_splits
from weights.errors import DataError, near_matches

IMAGE_SUFFIXES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".avif",
    }
)
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval"),
    "test": ("test", "testing"),
}
"""What people call the folder of a split, in any case."""

FOLLOW = "FINETUNE_FOLLOW_LINKS"
"""Environment variable: with any value, links that lead out of a data folder are followed."""

SKIPPED_FOLDERS = frozenset({"__MACOSX", "__pycache__"})


@dataclass
class _Listing:
    """Image files with their labels, and what was passed over: images in no class folder, and other files."""

    files: list[Path] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    loose: list[Path] = field(default_factory=list)
    strays: list[Path] = field(default_factory=list)


def require_inside(path: Path, root: Path) -> None:
    """Refuse what a link leads out of a data folder: whoever packed it would choose which files are read.

    Args:
        path: what is to be read, below the folder.
        root: the folder, which may be a link itself.

    Raises:
        DataError: it lies elsewhere, or would, and nobody has said that links are to be followed.
    """
    if not os.environ.get(FOLLOW) and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        if path.is_symlink() and not path.exists():
            raise DataError(f"{path} is a link to {path.readlink()}, which is not there; mend the link, or remove it.")
        raise DataError(
            f"{path} is a link that leads out of {root}; expected a folder that holds its own files, so copy what it "
            f"leads to, or set {FOLLOW}=1 if the links are your own."
        )


def refuse_links_out(root: Path, *, classes_of: Path | None = None) -> None:
    """Refuse links by which reading images would leave a folder. Others are not opened, and may lead anywhere.

    Args:
        root: the folder.
        classes_of: the image folder in it, of which only class folders are read; None when all of `root` is.

    Raises:
        DataError: there is one, and nobody has said that links are to be followed.
        OSError: a folder that cannot be listed.
    """
    if os.environ.get(FOLLOW):
        return
    folders = [root]
    if classes_of is not None:
        places = [place for split in SPLIT_NAMES for place in _places_of(classes_of, split)]
        places = places if has_splits(classes_of) else [classes_of]
        for place in places:
            require_inside(place, root)
        folders = [folder for place in places for folder in subfolders(place)]
        for folder in folders:
            require_inside(folder, root)
    seen: set[str] = set()
    while folders:
        folder = folders.pop()
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in SKIPPED_FOLDERS:
                    continue
                is_link = entry.is_symlink()
                is_folder = os.path.isdir(entry) if is_link else entry.is_dir()  # noqa: PTH112  a loop of links is none
                if is_link and (is_folder or is_image(Path(entry.name))):
                    require_inside(Path(entry.path), root)
                if is_folder:
                    folders.append(Path(entry.path))


def has_splits(root: Path) -> bool:
    """Tell whether a folder is laid out as train/ and others, rather than being one folder of classes.

    A `train` that holds images itself is a class of that name (of vehicles, say), not a split.
    """
    return any(any(True for _ in subfolders(place)) for place in _places_of(root, "train"))


def has_classes(root: Path) -> bool:
    """Tell whether any folder in `root` holds an image, at any depth."""
    return any(is_image(file) for folder in subfolders(root) for file in walk(folder))


def read_folder(
    root: Path,
    *,
    image_size: int,
    memory: int | None = None,
    progress: Progress | None = None,
    kept: DecodedCache | None = None,
) -> RawData:
    """Read an image folder, decoded to uint8.

    Args:
        root: holds train/ (and val/ and test/, by any of `SPLIT_NAMES`), or one folder for each class.
        image_size: side of the decoded squares; smaller when all images share a smaller shorter side.
        memory: as for `load_splits`.
        progress: called as progress("decode", done, total).
        kept: as for `load_splits`.

    Returns:
        The splits that are there; images uint8 (N, 3, S, S) with one S in all of them.

    Raises:
        DataError: fewer than two classes, a class without images, a class that train does not have, or images that
            cannot be read.
        OSError: a folder that cannot be listed.
    """
    places = find_places(root)
    classes = class_names(places["train"])
    listings = {split: _list_split(place, classes, split) for split, place in places.items()}

    parts = {split: (listing.files, listing.labels) for split, listing in listings.items()}
    name = root.resolve().name or "folder"
    sets = load_splits(parts, classes, image_size=image_size, memory=memory, progress=progress, kept=kept, name=name)
    pile = places["train"] == root
    notes = _passed_over(root, list(listings.values()))
    notes += tuple(
        f"{folder} passed over: it holds runs and no images."
        for folder in sorted(subfolders(places["train"]))
        if class_of(folder) not in classes
    )
    return RawData(name, sets["train"], sets.get("val"), sets.get("test"), notes, hold_out_test=pile)


def _places_of(root: Path, split: str) -> list[Path]:
    """List the folders in `root` that are called like a split."""
    return sorted(folder for folder in subfolders(root) if folder.name.lower() in SPLIT_NAMES[split])


def find_places(root: Path) -> dict[str, Path]:
    """Return the folder of each split that is there; one pile of classes is all train.

    Raises:
        DataError: two folders for one split, or splits without a train.
    """
    if not has_splits(root):
        lost = [place for split in ("test", "val") for place in _places_of(root, split) if has_classes(place)]
        if lost:
            names = " and ".join(place.name for place in lost)
            raise DataError(
                f"{root} holds {names} with class folders but no train folder to learn from; add one, or give "
                f"{lost[0]} to evaluate a model on it."
            )
        return {"train": root}
    places = {}
    for split in SPLIT_NAMES:
        found = _places_of(root, split)
        if len(found) > 1:
            names = " and ".join(place.name for place in found)
            kind = {"train": "training", "val": "validation", "test": "test"}[split]
            raise DataError(f"{root} holds {names}; expected one {kind} folder.")
        if found:
            places[split] = found[0]
    return places


def class_names(train: Path) -> tuple[str, ...]:
    """Return the classes that the folders of train stand for, sorted.

    Raises:
        DataError: fewer than two, one that two folders stand for, or splits that hold images instead of classes.
    """
    classes = tuple(sorted(class_of(folder) for folder in class_folders(train)))
    twice = [name for name, following in pairwise(classes) if name == following]
    if twice:
        raise DataError(f"{train} holds two folders for the class {twice[0]}, spelt with different bytes; merge them.")
    if len(classes) > 1 and all(any(name.lower() in names for names in SPLIT_NAMES.values()) for name in classes):
        raise DataError(
            f"{train} holds {' and '.join(classes)} with images but no class folders in them; expected a folder for "
            "each class inside, since folders name the classes."
        )
    if len(classes) < 2:
        found = f"one class folder ({classes[0]})" if classes else "no class folders"
        raise DataError(f"{train} holds {found}; expected a folder of images for each of two or more classes.")
    return classes


def class_of(folder: Path) -> str:
    """Return the class that a folder stands for: its name, in Unicode's composed form.

    macOS and archives made there may write "é" as two characters, so that train and test would not agree on a name.

    Raises:
        DataError: a name that is not UTF-8, which no report could hold.
    """
    try:
        folder.name.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{folder.parent} holds a folder named {os.fsencode(folder.name)!r}, which is not UTF-8; rename it, since "
            "folders name the classes."
        ) from None
    return unicodedata.normalize("NFC", folder.name)


def _list_split(place: Path, classes: tuple[str, ...], split: str) -> _Listing:
    """List the images of one split, class after class, each in the order of its paths."""
    listing = _Listing()
    for file in place.iterdir():
        if file.is_file() and not file.name.startswith("."):
            (listing.loose if is_image(file) else listing.strays).append(file)
    index = {name: label for label, name in enumerate(classes)}
    for folder in sorted(class_folders(place), key=class_of):
        name, files = class_of(folder), list(walk(folder))
        images = sorted((file for file in files if is_image(file)), key=lambda file: file.relative_to(folder).parts)
        strays = [file for file in files if not is_image(file)]
        listing.strays += strays
        if not images:
            if split != "train":
                continue
            instead = f" but {described(strays)}" if strays else ""
            raise DataError(f"{folder} holds no images{instead}; fill the class {name!r} or remove its folder.")
        if name not in index:
            near = near_matches(name, classes)
            raise DataError(
                f"{folder} is no class of the training images; expected one of {first_few(classes)}{near or '.'}"
            )
        listing.files += images
        listing.labels += [index[name]] * len(images)
    if not listing.files:
        raise DataError(f"{place} holds no images in class folders; fill it or remove it.")
    return listing


def subfolders(folder: Path) -> Iterator[Path]:
    """Yield the folders in a folder, but for hidden ones and those that systems leave behind."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in SKIPPED_FOLDERS:
            yield entry


def class_folders(folder: Path) -> Iterator[Path]:
    """Yield the folders in a folder that stand for classes: all but those in which runs were written."""
    return (below for below in subfolders(folder) if not holds_runs(below))


def holds_runs(folder: Path) -> bool:
    """Tell whether a folder holds run directories, at any depth, or is one, and holds no image.

    `finetune run --data .` writes runs/ among the classes.
    """
    found = False
    for file in walk(folder):
        if is_image(file):
            return False
        found = found or file.name in (RECIPE, SWEEP)
    return found


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, hidden ones left out; links are followed, but never round in a circle.

    Whoever begins with a folder of somebody else's calls `refuse_links_out` first.

    Raises:
        OSError: a folder that cannot be listed: its images would be missing without a word.
    """

    def fail(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for place, below, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = [name for name in below if not name.startswith(".") and name not in SKIPPED_FOLDERS]
        for name in names:
            if not name.startswith("."):
                yield Path(place, name)


def is_image(file: Path) -> bool:
    """Tell whether a file is an image by its suffix."""
    return file.suffix.lower() in IMAGE_SUFFIXES


def _passed_over(root: Path, listings: list[_Listing]) -> tuple[str, ...]:
    """Return a sentence on the images that are in no class folder, and one on the files that are no images."""
    loose = sum(len(listing.loose) for listing in listings)
    strays = [file for listing in listings for file in listing.strays]
    notes = []
    if loose:
        notes.append(f"{loose:,} image{'s' * (loose != 1)} in {root} passed over: in no class folder.")
    if strays:
        notes.append(f"{described(strays)} in {root} passed over: no image by the suffix.")
    return tuple(notes)


def described(files: list[Path]) -> str:
    """Return how many files, and their suffixes: "3 files (.heic, .txt)"."""
    suffixes = sorted({file.suffix.lower() or "no suffix" for file in files})
    return f"{len(files):,} file{'s' * (len(files) != 1)} ({first_few(suffixes)})"
