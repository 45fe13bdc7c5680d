"""What a checkpoint is made of: weights with one metadata key, and timm's config.json.

A checkpoint is `model.safetensors`, plain state dict names, with exactly one metadata key, `finetune`: safetensors
writes its metadata in random order, so one key is what makes equal runs give equal bytes. With `config.json` beside it,
`timm.create_model("local-dir:FOLDER", pretrained=True)` loads the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from weights.arch import Arch, resolve_arch
from weights.atomic import write_atomically
from weights.errors import WeightsError
from weights.guard import parse_json

METADATA_KEY = "finetune"


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a safetensors checkpoint; equal tensors and equal `about` give equal bytes.

    Args:
        path: the file to write.
        tensors: state dict, any device, dtype and memory layout; their order does not matter.
        about: what the reader should know, as JSON can hold it (arch, classes, preprocessing, settings); no paths,
            times or versions, which would make equal runs differ.

    Raises:
        RunError: when the file cannot be written.
    """
    text = json.dumps(about, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # clone: safetensors refuses tensors that share memory, and tied weights do
    plain = {name: tensors[name].detach().cpu().clone().contiguous() for name in sorted(tensors)}
    write_atomically(path, safetensors.torch.save(plain, metadata={METADATA_KEY: text}))


def read_about(path: Path) -> dict[str, Any] | None:
    """Return what `save_checkpoint` was told about a checkpoint, or None for a file this project did not write.

    Args:
        path: any weight file.

    Raises:
        WeightsError: when there is no such file.
    """
    if not Path(path).is_file():
        raise WeightsError(f"There is no weight file at {path}.")
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            about = parse_json((file.metadata() or {}).get(METADATA_KEY, "null"))
    except (safetensors.SafetensorError, OSError, ValueError):
        return None
    return about if isinstance(about, dict) else None


def write_config(
    path: Path,
    *,
    arch: Arch | str,
    num_classes: int,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    input_size: Sequence[int],
    crop_pct: float = 1.0,
    model_args: Mapping[str, Any] | None = None,
    finetune: Mapping[str, Any] | None = None,
) -> None:
    """Write the `config.json` that timm's `local-dir:` reads.

    Args:
        path: the file, `config.json` beside `model.safetensors`.
        arch: the network; a name is resolved as `--arch` would be.
        num_classes: outputs of the head.
        classes: class names in label order.
        mean: per channel (C,), of images in 0..1.
        std: per channel (C,).
        interpolation: `bilinear`, `bicubic` or another of timm's names.
        input_size: (C, H, W) of the images it was trained with.
        crop_pct: share of the image that the centre crop keeps; 1.0 is no crop.
        model_args: further arguments for `timm.create_model`.
        finetune: what only this project reads, under a key of its own that timm passes over.

    Raises:
        RunError: when the file cannot be written.
    """
    known = resolve_arch(arch) if isinstance(arch, str) else arch
    # A fixed set of keys: another timm version refuses keys that it does not know. No tag, url or hub id: these weights
    # are no longer those.
    preprocessing = {
        "input_size": list(input_size),
        "fixed_input_size": bool(known.config.get("fixed_input_size", False)),
        "interpolation": interpolation,
        "crop_pct": crop_pct,
        "crop_mode": "center",
        "mean": list(mean),
        "std": list(std),
        "num_classes": num_classes,
        "pool_size": None,
        "first_conv": known.config.get("first_conv"),
        "classifier": known.config.get("classifier"),
        "license": known.config.get("license"),
        "custom_load": False,
    }
    config: dict[str, Any] = {
        "architecture": known.name,
        "num_classes": num_classes,
        "label_names": list(classes),
        "pretrained_cfg": preprocessing,
    }
    for name, extra in (("model_args", model_args), ("finetune", finetune)):
        if extra:
            config[name] = dict(extra)
    write_atomically(path, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
