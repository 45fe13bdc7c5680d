"""The feature cache on disk: what is in it, what may be believed, and how it is written.

    <cache>/features/<key>/about.json      every ingredient of the key, shapes, rows
                           tensor-0.bin    N rows of the first crossing tensor, one after the other; and so on
                           chunks.jsonl    a line per finished chunk: its number and a CRC-32 per tensor
    <cache>/features/<key>.lock            held by the run that writes the entry

The key is a hash of everything that makes the values: change one ingredient and the entry is not found. A chunk is
believed only when the journal lists it and its bytes match, and the journal line is written after the bytes are on
disk; so a killed run loses the chunk it was writing, and damage is noticed, named and computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from finetune.machine import user_cache
from finetune.placement import DISK_RESERVE, free_disk
from weights.atomic import write_atomically
from weights.errors import RunError
from weights.guard import parse_json, read_bytes, read_json, refuse_link

FORMAT = 2  # counts up whenever features of before would differ from those of now
CHUNK_BYTES = 64 * 2**20  # what a kill may cost: under a second of work for any prefix, and large enough to write fast


_OWN = re.compile(r"about\.json|\.about\.json\.\w+\.tmp|chunks\.jsonl|tensor-\d+\.bin")
"""The files of an entry. A folder that holds anything else is not the cache's and is never deleted to make room: a
stranger's recipe may name any folder as the cache."""


def default_cache_dir() -> Path:
    """Return where this system keeps a user's caches for this tool."""
    return user_cache()


def key_of(ingredients: Mapping[str, Any]) -> str:
    """Return the cache key: 32 hexadecimal digits of the sha256 of all ingredients as sorted JSON."""
    text = json.dumps({"format": FORMAT, **ingredients}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass
class Entry:
    """One view of one split's features on disk.

    Attributes:
        folder: where it lies.
        rows: N.
        shapes: stored shape of each crossing tensor without N.
        dtypes: their dtypes.
        damaged: numbers of chunks whose bytes did not match their checksum when read.
    """

    folder: Path
    rows: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    damaged: list[int] = field(default_factory=list)
    _sums: dict[int, list[int]] = field(default_factory=dict)
    _maps: list[torch.Tensor] = field(default_factory=list)

    @property
    def row_bytes(self) -> list[int]:
        """Bytes per row of each tensor."""
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in pairs]

    @property
    def chunk_rows(self) -> int:
        """Rows per chunk."""
        return max(1, CHUNK_BYTES // max(1, sum(self.row_bytes)))

    @property
    def lock(self) -> FileLock:
        """The lock that a writer holds; several entries are locked in the order of their keys."""
        return _lock(self.folder.with_suffix(".lock"))

    def open(self, about: Mapping[str, Any]) -> None:
        """Create the entry's files where absent and read its journal; call with the lock held.

        Args:
            about: the key's ingredients, and what people call them, kept beside the features for
                `finetune cache list`.

        Raises:
            RunError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._refuse_links()
            for number, size in enumerate(self.row_bytes):
                path = self._tensor(number)
                if not path.exists() or path.stat().st_size != size * self.rows:
                    # Absent or cut short: what is filled in here does not match the journal's sums, so it is noticed.
                    with path.open("ab") as file:
                        file.truncate(size * self.rows)
            for half_written in self.folder.glob(".about.json.*.tmp"):  # what a kill left
                half_written.unlink(missing_ok=True)
            about_path = self.folder / "about.json"
            if not about_path.exists():
                text = json.dumps({"rows": self.rows, **about}, sort_keys=True, indent=1)
                write_atomically(about_path, text.encode())
        except (OSError, RunError) as error:
            refusal = error.__cause__ if isinstance(error, RunError) else error
            raise cannot_write(self.folder, refusal) from refusal
        self.load_journal()

    def _refuse_links(self) -> None:
        """Refuse an entry that would be written elsewhere; nothing in the cache is a link."""
        refuse_link(self.folder)
        for path in self.folder.iterdir():
            refuse_link(path)

    def load_journal(self) -> None:
        """Read which chunks are there; an entry that was never opened has none."""
        self._sums = self._read_journal()

    @property
    def _journal(self) -> Path:
        return self.folder / "chunks.jsonl"

    def _tensor(self, number: int) -> Path:
        return self.folder / f"tensor-{number}.bin"

    def _read_journal(self) -> dict[int, list[int]]:
        sums: dict[int, list[int]] = {}
        try:
            lines = read_bytes(self._journal).decode(errors="replace").splitlines()
        except (OSError, ValueError):
            return sums
        for line in lines:
            try:
                row = parse_json(line)
                sums[int(row["chunk"])] = [int(value) for value in row["crc32"]]
            except (ArithmeticError, ValueError, KeyError, TypeError):
                continue  # a line that a kill cut short: its chunk does not count as written
        return sums

    def missing_rows(self) -> int:
        """Return how many rows the journal does not list."""
        starts = range(0, self.rows, self.chunk_rows)
        return sum(
            min(self.chunk_rows, self.rows - start) for number, start in enumerate(starts) if number not in self._sums
        )

    def holds(self, number: int) -> bool:
        """Return whether the journal lists a chunk."""
        return number in self._sums

    def rows_of(self, number: int) -> slice:
        """Return which rows a chunk has."""
        return slice(number * self.chunk_rows, min((number + 1) * self.chunk_rows, self.rows))

    def read_chunk(self, number: int) -> list[torch.Tensor] | None:
        """Return a chunk's rows of each tensor, or None when it is absent or damaged (then noted in `damaged`)."""
        sums = self._sums.get(number)
        if sums is None:
            return None
        values = self._read_rows(self.rows_of(number))
        if values is not None and [zlib.crc32(as_bytes(value)) for value in values] == sums:
            return values
        self.damaged.append(number)
        del self._sums[number]
        return None

    def _read_rows(self, rows: slice) -> list[torch.Tensor] | None:
        """Read rows of each tensor; None when a file is gone or too short.

        Plain reads, not the mapping: mapped pages would count as this process's memory beside the copy in RAM.
        """
        values = []
        for index, (shape, dtype, size) in enumerate(zip(self.shapes, self.dtypes, self.row_bytes, strict=True)):
            value = torch.empty((rows.stop - rows.start, *shape), dtype=dtype)
            try:
                with self._tensor(index).open("rb") as file:
                    file.seek(rows.start * size)
                    if file.readinto(as_bytes(value)) != value.nbytes:
                        return None
            except OSError:
                return None
            values.append(value)
        return values

    def write_chunk(self, number: int, values: Sequence[torch.Tensor]) -> None:
        """Write a chunk's rows, bytes first and journal line after.

        Raises:
            RunError: the disk is full or the folder cannot be written; the chunk does not count as written.
        """
        start = self.rows_of(number).start
        try:
            for index, (value, size) in enumerate(zip(values, self.row_bytes, strict=True)):
                with self._tensor(index).open("r+b") as file:
                    file.seek(start * size)
                    file.write(as_bytes(value))
                    file.flush()
                    os.fsync(file.fileno())
            sums = [zlib.crc32(as_bytes(value)) for value in values]
            with self._journal.open("a") as journal:
                # Begins a line of its own, also after one that a kill cut short.
                journal.write("\n" + json.dumps({"chunk": number, "crc32": sums}))
                journal.flush()
                os.fsync(journal.fileno())
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        self._sums[number] = sums

    def finish(self) -> None:
        """Mark the entry as used now; the least recently used go first when room is made.

        Raises:
            RunError: somebody deleted it.
        """
        try:
            os.utime(self.folder)
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def mapped(self) -> list[torch.Tensor]:
        """Return the tensors memory-mapped from their files: read-only by convention, paged in as rows are read.

        Raises:
            RunError: a file is gone or too short; torch would make one of zeros in its place.
        """
        if not self._maps:
            for number, (shape, dtype) in enumerate(zip(self.shapes, self.dtypes, strict=True)):
                elements, path = self.rows * torch.Size(shape).numel(), self._tensor(number)
                if not path.is_file() or path.stat().st_size != elements * dtype.itemsize:
                    raise RunError(
                        f"{path} was deleted or cut short while a run used it; start or resume the run again."
                    )
                flat = torch.from_file(str(path), shared=True, size=elements, dtype=dtype)
                self._maps.append(flat.reshape(self.rows, *shape))
        return self._maps


def _lock(path: Path, timeout: float = -1) -> FileLock:
    """Return a lock of the cache; older versions of filelock would empty the file that a link leads to.

    Raises:
        OSError: it is a link.
    """
    refuse_link(path)
    return FileLock(path, timeout=timeout)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a contiguous tensor's bytes without a copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def cannot_write(folder: Path, refusal: BaseException | None) -> RunError:
    """Return the error for a cache folder that the system does not let be written."""
    reason = getattr(refusal, "strerror", None) or refusal
    return RunError(
        f"The feature cache {folder} cannot be written ({reason}); free some disk space, point --cache-dir elsewhere, "
        "or use --cache ram or --cache off."
    )


@dataclass(frozen=True)
class Stored:
    """What `finetune cache list` shows of one entry.

    Attributes:
        key: the entry's name.
        folder: where it lies.
        bytes: on disk.
        used: seconds since the epoch of its last use.
        about: the ingredients it was made from; empty when they cannot be read.
    """

    key: str
    folder: Path
    bytes: int
    used: float
    about: dict[str, Any]

    @property
    def gives_way(self) -> bool:
        """Whether it holds decoded photos (`finetune/decoded.py`), which are made again sooner than features."""
        return "decoded" in self.about


def list_entries(cache_dir: Path) -> list[Stored]:
    """Return the entries of a cache folder, the most recently used first."""
    found = []
    for folder in (cache_dir / "features").glob("*/"):
        try:
            files = list(folder.iterdir())
            if folder.is_symlink() or not all(_OWN.fullmatch(file.name) for file in files):
                continue
            size = sum(file.lstat().st_size for file in files)
            used = folder.stat().st_mtime
        except OSError:
            continue  # another run is clearing it
        try:
            about = read_json(folder / "about.json")
        except (OSError, ValueError):
            about = {}
        found.append(Stored(folder.name, folder, size, used, about if isinstance(about, dict) else {}))
    return sorted(found, key=lambda entry: entry.used, reverse=True)


def clear(cache_dir: Path, entries: Sequence[Stored]) -> int:
    """Delete entries, except those that a run is writing now or that the system keeps; return the bytes freed.

    A run that has an entry mapped goes on reading it: the system keeps a deleted file until the last reader is done.
    """
    freed = 0
    for entry in entries:
        try:
            with _lock(cache_dir / "features" / f"{entry.key}.lock", timeout=0):
                shutil.rmtree(entry.folder, ignore_errors=True)
        except (Timeout, OSError):  # another run's, or not to be written
            continue
        if not entry.folder.exists():
            freed += entry.bytes
    return freed


def room_on_disk(cache_dir: Path) -> int:
    """Return the bytes that features may take of the disk: what is free, and what decoded photos take."""
    photos = sum(entry.bytes for entry in list_entries(cache_dir) if entry.gives_way)
    return free_disk(cache_dir) - DISK_RESERVE + photos


def make_room(cache_dir: Path, needed: int, limit: int, keep: Sequence[str]) -> None:
    """Delete least recently used entries until `needed` more bytes fit under `limit`; entries in `keep` stay.

    Where the disk has less, decoded photos go as well.
    """
    entries = list_entries(cache_dir)
    used = sum(entry.bytes for entry in entries)
    for entry in reversed(entries):
        short = entry.gives_way and needed > free_disk(cache_dir) - DISK_RESERVE
        if entry.key not in keep and (used + needed > limit or short):
            used -= clear(cache_dir, [entry])
