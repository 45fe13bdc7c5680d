"""What lies in an image folder, with everything that is out of place: `read_folder` refuses, this lists.

The layouts and the names of splits and classes are those of `finetune/folder.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from finetune.folder import class_folders, class_names, class_of, find_places, is_image, subfolders, walk


@dataclass
class Survey:
    """An image folder, found but not decoded.

    Attributes:
        root: the folder.
        classes: names of train's class folders, sorted.
        splits: the splits that are there, train first.
        pile: whether the root is one pile of classes, of which a run holds out a test.
        files: image files in class folders, split after split, class after class.
        split: index into `splits` of each file.
        labels: index into `classes` of each file.
        empty: class folders of train without an image.
        unknown: folders of other splits that are no class of train.
        beside: folders beside the splits, which a run never opens.
        loose: images in no class folder.
        strays: files that are no images by their suffix.
    """

    root: Path
    classes: tuple[str, ...]
    splits: tuple[str, ...]
    pile: bool
    files: list[Path] = field(default_factory=list)
    split: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)
    unknown: list[Path] = field(default_factory=list)
    beside: list[Path] = field(default_factory=list)
    loose: list[Path] = field(default_factory=list)
    strays: list[Path] = field(default_factory=list)

    def place(self, path: Path) -> str:
        """Return a path below the root for people; bytes of its name that are not UTF-8 are spelt out."""
        return str(path.relative_to(self.root)).encode("utf-8", "backslashreplace").decode()


def survey_folder(root: Path) -> Survey:
    """List an image folder.

    Args:
        root: as for `read_folder`.

    Raises:
        DataError: no layout at all: fewer than two classes, two folders for one split, splits without a train.
        OSError: a folder that cannot be listed.
    """
    places = find_places(root)
    found = Survey(root, class_names(places["train"]), tuple(places), pile=places["train"] == root)
    if not found.pile:
        _list_loose(found, root)
        found.beside += sorted(folder for folder in subfolders(root) if folder not in places.values())
    for number, place in enumerate(places.values()):
        _list_loose(found, place)
        for folder in sorted(class_folders(place), key=class_of):
            _list_class(found, number, folder)
    return found


def _list_loose(found: Survey, place: Path) -> None:
    """Note the files that lie in a folder of folders."""
    for file in sorted(place.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            (found.loose if is_image(file) else found.strays).append(file)


def _list_class(found: Survey, number: int, folder: Path) -> None:
    """Note the files below one class folder of split `number`."""
    name, files = class_of(folder), list(walk(folder))
    images = sorted((file for file in files if is_image(file)), key=lambda file: file.relative_to(folder).parts)
    found.strays += sorted(file for file in files if not is_image(file))
    if name not in found.classes:
        if images:
            found.unknown.append(folder)
        return
    if not images and found.splits[number] == "train":
        found.empty.append(folder)
    found.files += images
    found.split += [number] * len(images)
    found.labels += [found.classes.index(name)] * len(images)
