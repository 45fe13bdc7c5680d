"""Which device PyTorch computes on, its name, its batches, waiting for it, and modules moved to it."""

from __future__ import annotations

import torch
from torch import fx, nn

from finetune.machine import cpu_name
from weights.errors import UsageError

PREFIX_BATCH = 64  # images per call: larger batches were no faster on a CPU and cost memory (docs/log.md)
GPU_BATCH = 256  # a GPU is through with few images before the host has launched what follows (not measured)


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
        return f"GPU of {cpu_name()}"
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'' if threads == 1 else 's'}"


def prefix_batch(device: torch.device) -> int:
    """Return how many images a prefix computes per call on a device."""
    return GPU_BATCH if device.type == "cuda" else PREFIX_BATCH


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that was asked of it; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


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
