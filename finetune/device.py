"""The machine: which device, how much memory, whether there is a compiler."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import psutil
import torch
from torch import fx, nn

from weights.errors import UsageError


def pick_device(wanted: str) -> torch.device:
    """Return the device to run on.

    Args:
        wanted: auto, cpu, cuda, cuda:N or mps; auto takes a GPU when PyTorch sees one.

    Raises:
        UsageError: no such device here.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UsageError(f"--device is '{wanted}'; it can be auto, cpu, cuda, cuda:N or mps.") from None
    if device.type == "cuda":
        here = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= here:
            raise UsageError(
                f"--device {wanted} asks for a GPU, and PyTorch sees {here or 'none'} here; use --device auto or cpu, "
                "or install a driver and a build of PyTorch with CUDA."
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps asks for an Apple GPU, and PyTorch sees none here; use --device auto or cpu.")
    elif device.type not in ("cpu", "mps"):
        raise UsageError(f"--device is '{wanted}'; it can be auto, cpu, cuda, cuda:N or mps.")
    return device


def device_name(device: torch.device) -> str:
    """Return a name for people and for the key of remembered measurements, such as "AMD EPYC, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"GPU of {_cpu_name()}"
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'' if threads == 1 else 's'}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    units = [unit for unit in ("amx_bf16", "avx512_bf16") if any(unit in line for line in lines[:40])]
    return f"{name} ({', '.join(units)})" if units else name


def settle(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a module to a device, its convolution kernels in channels-last memory, and return it.

    `Module.to(memory_format=...)` fails on networks that hold a five-dimensional parameter, which has no such layout.
    A traced module holds the device that it was traced on wherever the network's code asks a tensor for it (timm's
    rotary position embeddings do); these constants move too.
    """
    module.to(device)
    if isinstance(module, fx.GraphModule):
        for node in module.graph.nodes:
            node.args, node.kwargs = fx.node.map_aggregate(
                (node.args, node.kwargs), lambda value: device if isinstance(value, torch.device) else value
            )
        module.recompile()
    for value in [*module.parameters(), *module.buffers()]:
        if value.ndim == 4:
            value.data = value.data.contiguous(memory_format=torch.channels_last)
    return module


def free_memory() -> int:
    """Return the bytes of memory that can be had without swapping, within the limits of a container."""
    return min([int(psutil.virtual_memory().available), *_left_in_groups(Path("/"))])


def _left_in_groups(root: Path) -> list[int]:
    """Return what each control group above this process may still take, in bytes; [] where none has a limit.

    psutil tells the whole machine's memory, also to a process in a container. A group's own page cache does not count
    as taken, because the kernel gives it up. The files are those of cgroup v2 (kernel documentation, "Control Group
    v2", section Memory) and, for memory alone, of v1.

    Args:
        root: where /proc and /sys lie.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        first = controllers == ""  # of v2, which has one hierarchy for all controllers
        if not first and "memory" not in controllers.split(","):
            continue
        top = root / ("sys/fs/cgroup" if first else "sys/fs/cgroup/memory")
        names = ("memory.max", "memory.current") if first else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        here = top / path.strip("/")
        for group in (here, *here.parents):
            if group.is_relative_to(top) and (bytes_left := _left_in(group, *names)) is not None:
                left.append(bytes_left)
    return left


def _left_in(group: Path, limit: str, usage: str) -> int | None:
    try:
        most, taken = (int((group / name).read_text()) for name in (limit, usage))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None  # no such group in this container's view, or "max", which is no limit
    return max(0, most - taken + int(stat.get("total_inactive_file", stat.get("inactive_file", 0))))


def find_compiler() -> str | None:
    """Return the C++ compiler that `torch.compile` would use on a CPU, or None."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++", "c++"]:
        if found := shutil.which(name):
            return found
    return None
