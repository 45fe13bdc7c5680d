"""Time epochs on features read from mapped files against epochs on features in memory.

    python benchmarks/mapped.py
    python benchmarks/mapped.py --train-layers layer4,fc --images 4096 --rounds 5 --output

The same run is made with a memory budget that holds its features and with a third of it, in turn, on one cache folder
whose files have just been written, so that the system's page cache holds them. What is compared is the speed of the
last epoch; the losses of all epochs have to be the same numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import RESULTS, conditions, table, write_result
from whole_job import write_part

from finetune.allocator import tune_allocator

IN_MEMORY, MAPPED = "in memory", "mapped files"
BAR = 0.8  # of the speed in memory
SHARE = 3  # features are this many times the smaller memory budget
EPOCHS = 2  # the first one sets up kernels


def measure(settings: dict[str, Any], folder: Path, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Run with features in memory and on mapped files, in turn.

    Args:
        settings: of the recipe, but for the memory budget.
        folder: new folder for run directories.
        rounds: how often.

    Returns:
        Images per second of the last epoch, by place and round; and the features' size in bytes.

    Raises:
        SystemExit: the two gave different losses, or features were not where they were to be.
    """
    from finetune.pipeline import run
    from finetune.recipe import Recipe

    rates: dict[str, list[float]] = {IN_MEMORY: [], MAPPED: []}
    size = run(Recipe(**settings), folder / "first")["features"]["bytes"]
    losses = {}
    for number in range(rounds):
        for place, where, budget in ((IN_MEMORY, "ram", None), (MAPPED, "disk", f"{size // SHARE}B")):
            output = folder / f"{number}-{where}"
            found = run(Recipe(**settings, memory_budget=budget), output)["features"]["where"]
            if found != where:
                raise SystemExit(f"Features were to be {place} and were '{found}'; give the machine more free memory.")
            rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
            rates[place].append(rows[-1]["images_per_second"])
            losses[place] = [row["train_loss"] for row in rows]
        if losses[IN_MEMORY] != losses[MAPPED]:
            raise SystemExit(f"The losses differ, which must not be: {losses}.")
        print(f"round {number + 1} of {rounds} done", file=sys.stderr, flush=True)
    return rates, size


def show(found: dict[str, tuple[dict[str, list[float]], int]]) -> str:
    """Return the table in Markdown: a row for each choice of trained layers."""
    rows = []
    for layers, (rates, size) in found.items():
        ratios = [ours / theirs for ours, theirs in zip(rates[MAPPED], rates[IN_MEMORY], strict=True)]
        middle = statistics.median(ratios)
        cells = [f"{statistics.median(rates[place]):,.0f}" for place in (IN_MEMORY, MAPPED)]
        spread = f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append([layers, f"{size / 1e6:,.0f} MB", *cells, spread, f"{BAR}", verdict(middle)])
    return table(["trains", "features", "in memory, img/s", "mapped, img/s", "ratio", "bar", ""], rows)


def verdict(ratio: float) -> str:
    """Return what became of the bar."""
    return "reached" if ratio >= BAR else "missed"


def read_options() -> argparse.Namespace:
    """Read and check the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train-layers", action="append", help="what trains; may be repeated (default: layer4,fc, then fc)")
    add("--arch", default="resnet18", help="default: resnet18")
    add("--data", default="shapes100", help="CIFAR or shapes, by name or path (default: shapes100)")
    add("--images", type=int, default=2048, help="training images (default: 2048)")
    add("--image-size", type=int, default=224, help="default: 224")
    add("--rounds", type=int, default=3, help="default: 3")
    add("--output", type=Path, nargs="?", const=RESULTS, help="write a dated result (default: benchmarks/results)")
    args = parser.parse_args()
    if args.rounds < 1 or args.images < 4:
        parser.error("--rounds must be at least 1, --images 4")
    return args


def main() -> None:
    """Time everything, print the table, and write the result."""
    args = read_options()
    tune_allocator()  # as the command does, before torch is imported
    about = conditions()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_part(args.data, folder / "data", args.images, max(args.images // 8, 1))
        for number, layers in enumerate(args.train_layers or ["layer4,fc", "fc"]):
            settings = {
                "arch": args.arch,
                "train_layers": tuple(layers.split(",")),
                "data": str(folder / "data"),
                "weights": "none",
                "image_size": args.image_size,
                "epochs": EPOCHS,
                "val_fraction": 0.0,
                "compile": "off",
                "device": "cpu",
                "cache_dir": folder / "cache",
            }
            found[layers] = measure(settings, folder / f"runs{number}", args.rounds)
    text = (
        f"{args.arch} at {args.image_size} × {args.image_size}, random weights, {args.images:,} images of {data}; "
        f"features are {SHARE} times the memory budget where they are read from mapped files, which the page cache "
        f"holds; the last of {EPOCHS} epochs; medians of {args.rounds} rounds, in turn. Losses were the same.\n\n"
        f"{show(found)}"
    )
    print(text)
    if args.output:
        rates = {layers: rates for layers, (rates, _) in found.items()}
        print(f"\nwritten: {write_result(args.output, 'mapped', about, text, rates)}")


if __name__ == "__main__":
    main()
