"""`finetune layers`: the layers of an architecture, and what `--train-layers` would train."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from cli.console import print_lines, print_table


def layers_command(
    arch: Annotated[str, typer.Argument(help="Any timm architecture.")],
    train_layers: Annotated[str, typer.Option(help="What would train.")] = "head",
    depth: Annotated[int, typer.Option(help="Levels of modules to show.", min=1)] = 1,
    classes: Annotated[int, typer.Option(help="Outputs of the new head.", min=2)] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Show an architecture's layers: parameters, share of a forward pass, and what would train."""
    from finetune.table import layer_table

    names = tuple(part.strip() for part in train_layers.split(",") if part.strip())
    table = layer_table(arch, names, classes=classes, depth=depth)
    if as_json:
        print(json.dumps(asdict(table), indent=2))
        return
    columns = [("layer", "left"), ("type", "left"), ("parameters", "right"), ("work", "right"), ("trains", "left")]
    rows = [[r.name, r.kind, f"{r.parameters:,}", f"{100 * r.share:.1f} %", r.trains] for r in table.rows]
    print_table(f"{table.arch}, {table.image_size} × {table.image_size} pixels, {classes} classes", columns, rows)
    print_lines(
        [
            "",
            f"parameters      {table.parameters:,}, {table.trained:,} of them train with --train-layers {train_layers}",
            f"multiply-adds   {table.multiply_adds / 1e9:.2f} billion per image, {100 * table.frozen_share:.1f} % "
            "in the frozen part, computed once",
            f"cut             {table.cut}",
        ]
    )
