"""The machine, and what of it this process may use: processor, memory, compiler, the user's cache folder.

Nothing here imports PyTorch, because `finetune doctor` also has to speak where PyTorch is broken or absent.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import psutil

BF16_UNITS = ("amx_bf16", "avx512_bf16")
"""Flags of the units that compute in bf16; a processor without them is slower in bf16 than in fp32."""


@dataclass(frozen=True)
class Cores:
    """Processor cores.

    Attributes:
        machine: logical cores of the machine.
        allowed: those that this process may run on (affinity, cpusets).
        quota: cores' worth of time that control groups allow it; None without a limit.
    """

    machine: int
    allowed: int
    quota: float | None

    @property
    def usable(self) -> int:
        """Whole cores that this process can keep busy, at least 1."""
        return self.allowed if self.quota is None else max(1, min(self.allowed, int(self.quota)))


def user_cache() -> Path:
    """Return where this system keeps a user's caches for this tool."""
    return Path(platformdirs.user_cache_dir("finetune-timm"))


def cpu_name() -> str:
    """Return the processor's name with its units for bf16, such as "AMD EPYC (avx512_bf16)"."""
    lines = _cpuinfo(Path("/"))
    if not lines:
        return platform.processor() or platform.machine()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    units = [unit for unit in BF16_UNITS if any(unit in line for line in lines[:40])]
    return f"{name} ({', '.join(units)})" if units else name


def cpu_flags(root: Path = Path("/")) -> frozenset[str]:
    """Return the processor's flags as Linux names them (`avx2`, `amx_bf16`); none where they cannot be read.

    Args:
        root: where /proc lies.
    """
    line = next((line for line in _cpuinfo(root) if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def cores(root: Path = Path("/")) -> Cores:
    """Return how many cores there are and how many this process may use.

    Args:
        root: where /proc and /sys lie.
    """
    machine = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    quotas = [quota for group, v2 in _groups(root, "cpu") if (quota := _quota(group, v2=v2)) is not None]
    return Cores(machine, allowed, min(quotas, default=None))


def free_memory() -> int:
    """Return the bytes of memory that can be had without swapping, within the limits of a container."""
    return min([int(psutil.virtual_memory().available), *_left_in_groups(Path("/"))])


def find_compiler() -> str | None:
    """Return the C++ compiler that `torch.compile` would use on a CPU, or None."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++", "c++"]:
        if found := shutil.which(name):
            return found
    return None


def _cpuinfo(root: Path) -> list[str]:
    try:
        return (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []  # not Linux


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folder of each control group above this process that `controller` limits, and whether it is of v2.

    The files are those of cgroup v2 (kernel documentation, "Control Group v2") and of the v1 controller.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        v2 = controllers == ""  # one hierarchy for all controllers
        if not v2 and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" if v2 else root / "sys/fs/cgroup" / controller
        here = top / path.strip("/")
        yield from ((group, v2) for group in (here, *here.parents) if group.is_relative_to(top))


def _quota(group: Path, *, v2: bool) -> float | None:
    """Return the cores' worth of time that a group may take, None where it has no limit."""
    try:
        if v2:
            limit, period = (group / "cpu.max").read_text().split()
        else:
            limit, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(limit) / int(period) if int(limit) > 0 else None  # -1: no limit, in v1
    except (OSError, ValueError, ZeroDivisionError):
        return None  # no such group in this container's view, or "max", which is no limit


def _left_in_groups(root: Path) -> list[int]:
    """Return what each control group above this process may still take, in bytes; [] where none has a limit.

    psutil tells the whole machine's memory, also to a process in a container. A group's own page cache does not count
    as taken, because the kernel gives it up.

    Args:
        root: where /proc and /sys lie.
    """
    left = []
    for group, v2 in _groups(root, "memory"):
        names = ("memory.max", "memory.current") if v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if (bytes_left := _left_in(group, *names)) is not None:
            left.append(bytes_left)
    return left


def _left_in(group: Path, limit: str, usage: str) -> int | None:
    try:
        most, taken = (int((group / name).read_text()) for name in (limit, usage))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None  # no such group in this container's view, or "max", which is no limit
    return max(0, most - taken + int(stat.get("total_inactive_file", stat.get("inactive_file", 0))))
