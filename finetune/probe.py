"""What PyTorch says about itself, as JSON: run by `finetune doctor` in a process of its own.

A build of PyTorch that does not suit the machine ends the process that imports it, without an exception that could be
caught. So the import happens here, by path and without anything of this project: `python probe.py facts`, or
`python probe.py compile DEVICE`.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

MARK = "probe: "
"""What the line with the answer begins with; libraries may print others."""

ALSO_IMPORTED = ("torchvision", "timm", "safetensors.torch")  # what a run imports, in the order of who needs whom


def facts() -> dict[str, Any]:
    """Return threads, GPUs and caches as PyTorch sees them, and which libraries beside it do not import."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        try:
            free, total = torch.cuda.mem_get_info(index)
            gpus.append({"name": torch.cuda.get_device_name(index), "free": free, "total": total, "error": ""})
        except RuntimeError as error:  # another program has all of its memory, or has it for itself
            gpus.append({"name": f"GPU {index}", "free": 0, "total": 0, "error": told(error)})
    return {
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cuda_build": torch.version.cuda or getattr(torch.version, "hip", None) or "",
        "gpus": gpus,
        "mps": torch.backends.mps.is_available(),
        "hub": torch.hub.get_dir(),
        "broken": {name: reason for name in ALSO_IMPORTED if (reason := import_error(name))},
    }


def import_error(name: str) -> str:
    """Return why a module cannot be imported, "" when it can.

    Args:
        name: of the module.
    """
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a broken installation raises
        return told(error)
    return ""


def compile_error(device: str) -> str:
    """Return why torch.compile does not work, "" when it does.

    Args:
        device: cpu or cuda.
    """
    import torch

    try:
        compiled = torch.compile(lambda x: (x.sin() * 2).relu(), dynamic=False)
        compiled(torch.ones(64, device=device))
    except Exception as error:  # whatever the compiler stack raises
        return told(error)
    return ""


def told(error: Exception) -> str:
    """Return an exception as one line: a C++ compiler's first error where it holds one, else its first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((line for line in lines if " error: " in line), lines[0] if lines else "")
    return f"{type(error).__name__}: {line}"[:200] if line else type(error).__name__


if __name__ == "__main__":
    answer = facts() if sys.argv[1] == "facts" else {"error": compile_error(sys.argv[2])}
    print(MARK + json.dumps(answer))
