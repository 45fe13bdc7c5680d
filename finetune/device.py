"""The machine: which device, how much memory, whether there is a compiler."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import psutil
import torch
from torch import nn

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
    """
    module.to(device)
    for value in [*module.parameters(), *module.buffers()]:
        if value.ndim == 4:
            value.data = value.data.contiguous(memory_format=torch.channels_last)
    return module


def free_memory() -> int:
    """Return the bytes of memory that can be had without swapping."""
    return int(psutil.virtual_memory().available)


def find_compiler() -> str | None:
    """Return the C++ compiler that `torch.compile` would use on a CPU, or None."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++", "c++"]:
        if found := shutil.which(name):
            return found
    return None
