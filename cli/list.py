"""`finetune list`: the architectures there are."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from cli.console import print_lines, print_table
from weights.errors import UsageError


def list_command(
    name: Annotated[str, typer.Argument(help="Part of a name, or a pattern with *.", show_default=False)] = "",
    search: Annotated[str, typer.Option(help="The same, as an option.", show_default=False)] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """List architectures: our networks, and timm's with their pretrained tags.

    Example: finetune list resnet18
    """
    from finetune.catalog import catalog

    if name and search:
        raise UsageError(f"finetune list got '{name}' and --search {search}; give one of the two.")
    wanted = name or search
    found = catalog(wanted)
    if not found:
        raise UsageError(f"No architecture is called '{wanted}'; try a shorter part of its name, such as resnet.")
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=2))
        return
    rows = [
        [
            one.name,
            "" if one.parameters is None else f"{one.parameters:,}",
            "from scratch" if one.ours else _tags(one.tags),
        ]
        for one in found
    ]
    print_table(
        f"{len(found):,} architectures", [("name", "left"), ("parameters", "right"), ("pretrained tags", "left")], rows
    )
    print_lines(["", "A tag follows a dot: --arch resnet50.a1_in1k. The layers of one: finetune layers NAME."])


def _tags(tags: tuple[str, ...]) -> str:
    return ", ".join(tags) or "none"
