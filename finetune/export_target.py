"""What a model can be exported to, and where: checked before torch is imported and before anything is loaded.

safetensors    FILE.safetensors and config.json beside it: the weights alone
timm           a folder of model.safetensors and config.json, for timm.create_model("local-dir:FOLDER")
onnx           FILE.onnx: the whole computation, for onnxruntime and other programs
torch-export   FILE.pt2: the same, for torch without timm or finetune
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from weights.errors import RunError, UsageError, near_matches

ENDINGS = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2", "timm": ""}
GRAPHS = ("onnx", "torch-export")
EXTRA = {"onnx": ("onnx", "onnxscript", "onnxruntime")}  # what the extra of a target's name brings
MODEL, CONFIG = "model.safetensors", "config.json"  # finetune.rundir's names, which would import torch


def require_target(to: str, output: Path, *, with_preprocessing: bool = False, force: bool = False) -> None:
    """Refuse an export that cannot be made, before any work is done for it.

    Args:
        to: safetensors, onnx, torch-export or timm.
        output: the file or, for timm, the folder.
        with_preprocessing: whether the graph is to take pixels.
        force: whether files that are there may be replaced.

    Raises:
        UsageError: an unknown target, a target whose extra is missing, or an output that cannot be one.
        RunError: the output exists.
    """
    if to not in ENDINGS:
        near = near_matches(to, ENDINGS) or "."
        raise UsageError(f"--to is '{to}'; it can be safetensors, onnx, torch-export or timm{near}")
    if with_preprocessing and to not in GRAPHS:
        raise UsageError(
            f"--with-preprocessing belongs into a graph, and {to} holds weights alone; leave it out, or give --to onnx "
            "or --to torch-export."
        )
    _require_extra(to)
    if to == "timm":
        _require_free_folder(output, force)
    else:
        _require_free_file(to, output, force)


def files_of(to: str, output: Path) -> tuple[Path, ...]:
    """Return the files that an export writes, the weights or the graph first."""
    if to in GRAPHS:
        return (output,)
    return (output / MODEL, output / CONFIG) if to == "timm" else (output, output.with_name(CONFIG))


def _require_extra(to: str) -> None:
    missing = [name for name in EXTRA.get(to, ()) if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UsageError(
            f"--to {to} needs {' and '.join(missing)}, which {verb} not installed; install the extra `{to}`: "
            f"pip install 'finetune-timm[{to}]'."
        )


def _require_free_folder(output: Path, force: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file, and --to timm writes a folder; give another name.")
    if output.is_dir() and not force and any(output.iterdir()):
        raise RunError(
            f"{output} is not empty and is kept as it is; give another --output, or --force to replace {MODEL} and "
            f"{CONFIG} in it."
        )


def _require_free_file(to: str, output: Path, force: bool) -> None:
    ending = ENDINGS[to]
    if output.is_dir():
        raise UsageError(
            f"--output {output} is a folder, and --to {to} writes a file; give {output / f'model{ending}'}."
        )
    if output.suffix != ending:
        raise UsageError(
            f"--output {output} does not end in {ending}, by which programs know such files; give {output}{ending}."
        )
    there = [str(file) for file in files_of(to, output) if file.exists()]
    if there and not force:
        kept = "exists and is kept as it is" if len(there) == 1 else "exist and are kept as they are"
        raise RunError(f"{' and '.join(there)} {kept}; give another --output, or --force to replace what is there.")
