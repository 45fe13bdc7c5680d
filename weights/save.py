"""Files that are whole or not there: atomic writing, checkpoints with one metadata key, timm's config.json.

A checkpoint is `model.safetensors`, plain state dict names, with exactly one metadata key, `finetune`: safetensors
writes its metadata in random order, so one key is what makes equal runs give equal bytes. With `config.json` beside it,
`timm.create_model("local-dir:FOLDER", pretrained=True)` loads the folder.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
from torch import Tensor

from weights.arch import Arch, resolve_arch
from weights.errors import RunError, WeightsError
from weights.guard import parse_json

METADATA_KEY = "finetune"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no more of this user's share, no larger file


def write_atomically(path: Path, write: Callable[[BinaryIO], object] | bytes) -> None:
    """Write a file so that a reader sees the old one or the whole new one, whatever happens on the way.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and then take the target's name.

    Args:
        path: the file to write; its folder exists.
        write: the bytes, or a function that writes them to the open file it is given.

    Raises:
        RunError: when the system refuses (no space, no permission, no such folder); nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                if isinstance(write, bytes):
                    file.write(write)
                else:
                    write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # Ctrl-C as well: no temporary file stays
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save answers the system's refusal with a RuntimeError of its own, in whose context the refusal is.
        refusal = error if isinstance(error, OSError) else error.__context__
        if not isinstance(refusal, OSError):
            raise
        raise cannot_write(path, refusal) from refusal


def cannot_write(path: Path, refusal: OSError) -> RunError:
    """Return the error for a file that the system does not let be written.

    Args:
        path: the file or folder.
        refusal: the system's.
    """
    advice = "free the space" if refusal.errno in FULL else "make it writable"
    return RunError(f"Could not write {path}: {refusal.strerror or refusal}; {advice} or choose another folder.")


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


def _sync_folder(folder: Path) -> None:
    # the rename itself must reach the disk; systems that cannot open a folder (Windows) do this on their own
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
