"""What the paths of `finetune predict` stand for: image files, by name, in folders, by a pattern, or in a list.

Whoever names a file means it, so it is tried whatever its suffix. In folders and among what a pattern finds, hidden
files are left out and files that are no images by their suffix are passed over and counted, as in folders to train on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from finetune.folder import described, is_image, refuse_links_out, walk
from weights.errors import DataError, UsageError

LISTED = "-"  # what stands for a list on standard input, as for many a Unix tool
WILD = frozenset("*?[")


@dataclass(frozen=True)
class Inputs:
    """Image files to look at.

    Attributes:
        files: paths, as they were given or below the folders that were given; nothing has been opened.
        notes: sentences for the user.
    """

    files: tuple[str, ...]
    notes: tuple[str, ...]


def find_images(
    paths: Iterable[str | os.PathLike[str]], read_list: Callable[[], Iterable[str]] | None = None
) -> Inputs:
    """Find the image files that paths stand for.

    Args:
        paths: files, folders (read at any depth) and patterns (`*`, `?`, `[...]`, and `**` for any depth), in the order
            in which their images are wanted. What exists is never taken for a pattern.
        read_list: gives the lines that `-` stands for, each a file or a folder; None where `-` is a name like others.
            A file of such a list that does not exist shows only when it is opened.

    Raises:
        UsageError: no paths at all.
        DataError: nothing at a path, a folder or pattern without images, an empty list, a folder that cannot be read.
    """
    names = [os.fspath(path) for path in paths]
    if not names:
        raise UsageError("There are no images to predict; give files, folders or a quoted pattern, or - for a list.")
    files: list[str] = []
    strays: list[Path] = []
    given = ""
    try:
        for given in names:
            lines = read_list() if read_list is not None and given == LISTED else None
            found, others = _at_path(given) if lines is None else _in_list(lines)
            files += found
            strays += others
    except OSError as error:
        place, reason = error.filename or given, error.strerror or str(error)
        raise DataError(f"{place} cannot be read ({reason}); make it readable, or give another path.") from error
    return Inputs(tuple(files), (f"{described(strays)} passed over: no image by the suffix.",) if strays else ())


def _at_path(given: str) -> tuple[list[str], list[Path]]:
    """Return the images that one path stands for, and the files that were passed over."""
    name = str(Path(given).expanduser()) if given.startswith("~/") else given
    path = Path(name)
    if name and path.is_dir():
        return _some(*_in_folder(path), f"{name} holds no images")
    if name and path.exists():
        return [name], []
    if WILD & set(name):
        return _some(*_by_pattern(name), f"The pattern {name} finds no images")
    raise DataError(
        f"There is nothing at {name or 'an empty path'}; expected an image, a folder of images, or a quoted pattern "
        "such as 'photos/*.jpg'."
    )


def _in_list(lines: Iterable[str]) -> tuple[list[str], list[Path]]:
    files: list[str] = []
    strays: list[Path] = []
    for line in (line.rstrip("\r\n") for line in lines):
        if line.strip() and Path(line).is_dir():
            images, others = _some(*_in_folder(Path(line)), f"{line} holds no images")
            files += images
            strays += others
        elif line.strip():
            files.append(line)
    if not files:
        raise DataError("Standard input names no images; expected a list of paths, one in each line.")
    return files, strays


def _in_folder(folder: Path) -> tuple[list[str], list[Path]]:
    refuse_links_out(folder)
    files = sorted(walk(folder), key=lambda file: file.parts)
    return [str(file) for file in files if is_image(file)], [file for file in files if not is_image(file)]


def _by_pattern(pattern: str) -> tuple[list[str], list[Path]]:
    """Return what a pattern finds; folders among it are read, and a file that is found twice counts once."""
    files: dict[str, None] = {}
    strays: dict[Path, None] = {}
    for name in sorted(glob(pattern, recursive=True)):  # noqa: PTH207  Path.glob finds hidden files
        path = Path(name)
        images, others = _in_folder(path) if path.is_dir() else ([name], []) if is_image(path) else ([], [path])
        files |= dict.fromkeys(images)
        strays |= dict.fromkeys(others)
    return list(files), list(strays)


def _some(files: list[str], strays: list[Path], empty: str) -> tuple[list[str], list[Path]]:
    """Return both, or say that there are no images, and what there is instead."""
    if not files:
        instead = f", only {described(strays)}" if strays else ""
        raise DataError(f"{empty}{instead}; expected files that end in .jpg, .png or the like.")
    return files, strays
