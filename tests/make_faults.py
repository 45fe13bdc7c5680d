"""A disk that refuses, for tests of what a run leaves behind.

Import with `from make_faults import ...`. Every operation below a folder that needs space or permission is counted: new
files and folders, writes, syncs, renames, locks. From a chosen one on all are refused, as on a disk that is full and
stays full; of a refused write the first half lands. Deleting goes on working.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Disk:
    """What happened below a folder.

    Attributes:
        root: the folder.
        refuses: told each operation's number and name, such as 7 and "write model.safetensors"; True refuses it and all
            that follow.
        code: what the system says then.
        operations: the names so far, the refused ones included.
        refused: how many were.
    """

    root: Path
    refuses: Callable[[int, str], bool] = lambda number, name: False
    code: int = errno.ENOSPC
    operations: list[str] = field(default_factory=list)
    refused: int = 0

    def touch(self, what: str, path: str | Path) -> None:
        """Note an operation; raise what the system would when it is refused."""
        if not Path(path).is_relative_to(self.root):
            return
        name = f"{what} {plain(Path(path).name)}"
        self.operations.append(name)
        if self.refused or self.refuses(len(self.operations) - 1, name):
            self.refused += 1
            raise OSError(self.code, os.strerror(self.code), str(path))


def plain(name: str) -> str:
    """Return a file's name as it will be: temporary files as their targets, cache entries without their keys."""
    name = re.sub(r"^\.(.+)\.[0-9a-f]{8}\.tmp$", r"\1", name)
    return re.sub(r"^[0-9a-f]{32}", "entry", name)


class _File:
    """An open file whose writes the disk may refuse."""

    def __init__(self, file: Any, path: Path, disk: Disk) -> None:
        self._file, self._path, self._disk = file, path, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *about: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        try:
            self._disk.touch("write", self._path)
        except OSError:
            self._file.write(data[: len(data) // 2])
            raise
        written: int = self._file.write(data)
        return written


@contextmanager
def watched(disk: Disk) -> Iterator[Disk]:
    """Let everything that this process does with Python's files go past a disk."""
    opened, replace, mkdir, sync, low = Path.open, Path.replace, Path.mkdir, os.fsync, os.open
    paths: dict[int, Path] = {}

    def open_(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if not set(mode) & set("wxa+"):
            return opened(path, mode, *rest, **named)
        if not path.exists():
            disk.touch("create", path)
        file = opened(path, mode, *rest, **named)
        paths[file.fileno()] = path
        return _File(file, path, disk)

    def replace_(path: Path, target: Any) -> Any:
        disk.touch("rename", target)
        return replace(path, target)

    def mkdir_(path: Path, *rest: Any, **named: Any) -> None:
        if not path.exists():
            disk.touch("make", path)
        mkdir(path, *rest, **named)

    def sync_(handle: int) -> None:
        if handle in paths:  # folders are synced too, when everything is in place
            disk.touch("sync", paths[handle])
        sync(handle)

    def low_(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & (os.O_CREAT | os.O_RDWR | os.O_WRONLY):  # filelock has not always created a file that is there
            disk.touch("lock", os.fspath(path))
        handle = low(path, flags, *rest, **named)
        paths.pop(handle, None)  # the number of a file that is closed by now
        return handle

    with pytest.MonkeyPatch.context() as patch:
        for owner, name, function in (
            (Path, "open", open_),
            (Path, "replace", replace_),
            (Path, "mkdir", mkdir_),
            (os, "fsync", sync_),
            (os, "open", low_),
        ):
            patch.setattr(owner, name, function)
        yield disk
