"""Where features will be: a GPU's memory, the computer's, or a disk. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from weights.errors import UsageError

DISK_RESERVE = 2 * 10**9  # bytes left free on the cache's disk, so that nothing else on it fails
MEMORIES = {
    "device": "in the GPU's memory",
    "pinned": "in memory, sent to the GPU batch by batch",
    "ram": "in memory",
}
"""Places that are memory, as a plan words them."""

MEMORY_SHARE = 0.6  # of what is free: training itself, and the system's file cache, want the rest


@dataclass(frozen=True)
class Placement:
    """Where features will be.

    Attributes:
        where: "device" (a GPU's own memory), "pinned" (the computer's memory, from which a GPU fetches batches through
            pinned buffers), "ram", "disk" (memory-mapped), "off" (computed in every epoch) or "uncut" (there is no
            prefix).
        on_disk: whether they are also kept on disk for the next run.
        bytes: of all features.
        reason: one clause for people.
    """

    where: str
    on_disk: bool
    bytes: int
    reason: str

    @property
    def in_memory(self) -> bool:
        """Whether all features are in some memory."""
        return self.where in MEMORIES

    @property
    def ahead(self) -> bool:
        """Whether features are computed once, before training."""
        return self.in_memory or self.where == "disk"


def size(count: int) -> str:
    """Return a number of bytes for people: "11.0 GB"."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def place(
    needed: int,
    *,
    mode: str,
    free: int,
    limit: int,
    memory: int,
    held: int,
    fresh_each_epoch: bool,
    device: int | None = None,
    quick: bool = False,
) -> Placement:
    """Decide where features go.

    Args:
        needed: bytes of all features.
        mode: auto, ram, disk or off.
        free: bytes that features may take on the cache's disk.
        limit: most bytes the cache may take.
        memory: most bytes of the computer's memory for features.
        held: bytes of these features that are on disk already.
        fresh_each_epoch: every epoch uses views of its own that are not on disk, so caching saves nothing in this run.
        device: most bytes of a GPU's own memory for features; None where there is none.
        quick: features are computed faster than a disk gives them back.

    Raises:
        UsageError: the asked-for place is too small.
    """
    if mode == "off":
        return Placement("off", False, 0, "computed anew in every epoch, as asked")
    if mode == "auto" and fresh_each_epoch:
        return Placement("off", False, 0, "every epoch has views of its own, so they are computed as it goes")
    where = memory_for(needed, memory, device)
    text = f"{size(needed)} {MEMORIES.get(where, '')}"
    if mode == "ram":
        if not where:
            raise UsageError(
                f"--cache ram needs {size(needed)} for features and the memory budget is {size(memory)}; raise "
                "--memory-budget, lower --limit or --views, or use --cache disk."
            )
        return Placement(where, False, needed, f"{text}, nothing on disk")
    if mode == "auto" and where and quick and held < needed:
        return Placement(where, False, needed, f"{text}, not kept: a disk is slower than computing them again")
    if needed <= limit and needed - held <= free:
        if where and mode == "auto":
            return Placement(where, True, needed, f"{text}, kept on disk for the next run")
        return Placement("disk", True, needed, f"{size(needed)} on disk, read as needed (memory budget {size(memory)})")
    if mode == "disk":
        raise UsageError(
            f"--cache disk needs {size(needed)} for features; --cache-limit is {size(limit)} and "
            f"{size(max(free, 0))} can be used on that disk: raise the limit, point --cache-dir elsewhere, or use "
            "--cache off."
        )
    if where:
        return Placement(where, False, needed, f"{text}; the disk budget is too small to keep them")
    return Placement(
        "off", False, 0, f"{size(needed)} fit neither disk nor memory, so they are computed in every epoch"
    )


def memory_for(needed: int, memory: int, device: int | None) -> str:
    """Return the memory in which so many bytes fit, a GPU's own before the computer's; "" where they fit in none.

    Args:
        needed: bytes.
        memory: most bytes of the computer's memory.
        device: most bytes of a GPU's own memory; None where there is none.
    """
    if device is not None and needed <= device:
        return "device"
    if needed > memory:
        return ""
    return "ram" if device is None else "pinned"


def free_disk(path: Path) -> int:
    """Return the bytes free on the disk of a folder that need not exist yet."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return int(psutil.disk_usage(str(path)).free)
