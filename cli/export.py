"""`finetune export`: a trained model for other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import Screen, print_lines
from cli.options import require_folder

if TYPE_CHECKING:
    from finetune.export import Exported, Port


def export_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Run directory, or a model.safetensors with its config.json beside it.")
    ],
    to: Annotated[str, typer.Option(help="The form to write.", metavar="safetensors|onnx|torch-export|timm")],
    output: Annotated[
        Path, typer.Option(help="File to write, ending in .safetensors, .onnx or .pt2; for timm a folder.")
    ],
    with_preprocessing: Annotated[
        bool,
        typer.Option(
            "--with-preprocessing",
            help="A graph from uint8 pixels of any size to calibrated probabilities, not from images to logits.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON on standard output.")] = False,
) -> None:
    """Write a trained model for other programs: onnxruntime, torch alone, timm.

    Class names, preprocessing and temperature go inside. What was written is read back and compared with the model
    before it is kept. onnx needs the extra of that name: pip install 'finetune-timm[onnx]'.

    Example: finetune export runs/photos --to onnx --output photos.onnx
    """
    from finetune.export_target import require_target

    require_target(to, output, with_preprocessing=with_preprocessing, force=force)
    require_folder(output, "--output")
    from finetune.export import export
    from finetune.trained import load_trained

    with Screen() as screen:
        trained = load_trained(checkpoint)
        screen.note(f"writing {trained.arch.name} with {len(trained.classes)} classes, and comparing it with the model")
        result = export(trained, to, output, with_preprocessing=with_preprocessing, force=force)
    if as_json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        print_lines(export_lines(result))


def export_lines(result: Exported) -> list[str]:
    """Return in a few lines what was written and how near it is to the model."""
    from finetune.placement import size

    check, ends = result.agreement, result.gives.name == "probabilities"
    temperature = f"temperature {result.temperature:g} ({'applied' if ends else 'divide logits by it'})"
    batches = ", ".join(map(str, check.batches[:-1])) + f" and {check.batches[-1]}"
    return [
        f"written         {result.output} ({size(result.bytes)})",
        f"input           {_port(result.takes)}",
        f"output          {_port(result.gives)}",
        f"inside          {result.classes:,} class names, preprocessing, {temperature}",
        f"checked         largest difference from torch {check.difference:.1g}; same label for {check.same_labels} of "
        f"{check.images} images, in batches of {batches}",
    ]


def _port(port: Port) -> str:
    letters = [part for part in port.shape if isinstance(part, str)]
    free = f", any {' and '.join(letters)}" if letters else ""
    return f"{port.name}: {port.dtype} ({', '.join(map(str, port.shape))}){free}"
