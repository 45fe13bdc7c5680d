"""What a target of the fuzzing is, and the folder in which its reader reads and writes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis.strategies import SearchStrategy


class Place:
    """A folder in memory, in which a target writes and reads; it is not to be written elsewhere."""

    def __init__(self) -> None:
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))
        tempfile.tempdir = str(self.folder)  # what libraries write in passing

    def file(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def remove(self) -> None:
        tempfile.tempdir = None
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Target:
    """A reader to be fuzzed.

    Attributes:
        name: of the target.
        seeds: sound inputs.
        read: gives one input to the reader.
        words: pieces that mutated inputs may get.
        built: inputs that hypothesis builds; None for a target whose inputs are mutated.
    """

    name: str
    seeds: list[bytes]
    read: Callable[[bytes], None]
    words: tuple[bytes, ...] = ()
    built: SearchStrategy[bytes] | None = None


def require(sound: bool, what: str) -> None:
    """Raise when something that was read is not sound."""
    if not sound:
        raise AssertionError(what)
