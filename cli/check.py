"""`finetune check`: is a data set sound?"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.console import Screen, print_lines, print_table
from cli.options import require_page

if TYPE_CHECKING:
    from finetune.check import Check

SHOWN = 20  # classes up to which each has a line: more are in the page and in the JSON
DEFAULT_THRESHOLD = 10  # finetune.check.THRESHOLD, which would import torch for `--help`; a test compares the two


def check_command(
    data: Annotated[
        str,
        typer.Argument(
            help="cifar10, cifar100, shapes10, shapes100, or a path to CIFAR files, image folders or tar shards.",
            show_default=False,
        ),
    ],
    data_dir: Annotated[
        Path | None, typer.Option(help="Where named data sets are looked up first.", show_default="$FINETUNE_DATA")
    ] = None,
    labels: Annotated[
        str, typer.Option(help="CIFAR-100's 100 fine or 20 coarse classes.", metavar="fine|coarse")
    ] = "fine",
    threshold: Annotated[
        int, typer.Option(help="Bits of 64 in which the perceptual hashes of look-alikes may differ, 0 to 16.")
    ] = DEFAULT_THRESHOLD,
    allow_leaks: Annotated[
        bool, typer.Option("--allow-leaks", help="Accept test images that are among the training images.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with example pictures here.", show_default="no page")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON on standard output.")] = False,
) -> None:
    """Check a data set before training on it: damage, strays, imbalance, duplicates.

    Images are compared as they lie on disk. The exit code is 1 when a test image is pixel-identical to a training image
    (unless that is allowed), or when there is something that a run would refuse. Nothing is changed.

    Example: finetune check ~/photos --html check.html
    """
    from finetune.check import check_data

    if html is not None:
        require_page(html, "--html")
    with Screen() as screen:
        result = check_data(
            data,
            data_dir=data_dir,
            labels=labels,
            threshold=threshold,
            allow_leaks=allow_leaks,
            progress=screen.progress,
        )
    if html is not None:
        from finetune.check_page import write_page

        write_page(html, result)
    if as_json:
        print(json.dumps({**result.as_dict(), "page": None if html is None else str(html)}, indent=2))
    else:
        print_check(result)
        print_lines([] if html is None else [f"page: {html}"])
    if not result.ok:
        raise typer.Exit(1)


def print_check(result: Check) -> None:
    """Print counts, then what was found, the worst first."""
    found, counts = result.originals, result.originals.counts()
    columns = [("split", "left"), ("images", "right"), ("classes", "right"), ("per class", "right")]
    columns += [("sizes", "left"), ("modes", "left")]
    rows = []
    for split, numbers in counts.items():
        there = [number for number in numbers if number]
        each = f"{min(there):,} to {max(there):,}" if there and min(there) < max(there) else f"{max(numbers):,}"
        row = [split, f"{sum(numbers):,}", str(len(there)), each]
        rows.append([*row, _sizes(result.sizes(split)), ", ".join(_counted(result.modes(split)))])
    print_table(f"{found.name}: {len(found.classes)} classes", columns, rows)
    if len(found.classes) <= SHOWN:
        print_lines([""])
        table = [[name, *(f"{counts[split][label]:,}" for split in counts)] for label, name in enumerate(found.classes)]
        print_table("images of each class", [("class", "left"), *((split, "right") for split in counts)], table)
    lines = [f"{one.level:<8} {one.text}" for one in result.findings]
    levels = Counter(one.level for one in result.findings)
    told = [f"{levels[level]} {level}{'s' * (levels[level] != 1)}" for level in ("error", "warning", "note")]
    print_lines(["", *lines, *([""] if lines else []), ", ".join(told)])


def _sizes(sizes: Counter[tuple[int, int]]) -> str:
    """Return the sizes where they are few, else the range of the shorter side."""
    if len(sizes) <= 2:
        return ", ".join(_counted(Counter({f"{w} × {h}": count for (w, h), count in sizes.items()})))
    shorter = [min(size) for size in sizes]
    return f"{len(sizes)} sizes, shorter side {min(shorter):,} to {max(shorter):,}"


def _counted(counts: Counter[Any]) -> list[str]:
    most = counts.most_common()
    return [str(name) for name, _ in most] if len(most) == 1 else [f"{name} ({count:,})" for name, count in most]
