"""Training from scratch: `finetune baseline` against the plain loop that a student would write, in turn.

    python benchmarks/scratch.py
    python benchmarks/scratch.py --arch figure1 --arch multistage --rounds 5 --output

The plain loop: torchvision's RandomCrop, RandomHorizontalFlip, ToTensor and Normalize on PIL images, a DataLoader with
two workers, SGD with Nesterov momentum, fp32. Same network, same images, same batch size. Each candidate runs in a
process of its own; medians of the rounds are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import RESULTS, command_line, conditions, run_process, table, write_result
from run_vs_script import rate

ARCHS = ("figure1", "figure1_shared", "singlestage", "multistage", "vgg16", "resnet50_layer4", "identity")
BARS = {"figure1": 2.5, "multistage": 2.5}
"""How many times faster than the plain loop it should be, on two cores."""


def plain_loop(args: argparse.Namespace, arch: str) -> float:
    """Return the images per second of one epoch of the plain loop, from the end of its first batch."""
    import timm
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    import finetune  # noqa: F401  (its networks are timm's from here on)
    from finetune.data import load_data

    splits = load_data(args.data, val_fraction=0, limit=args.images)
    to_input = [transforms.ToTensor(), transforms.Normalize((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))]
    augment = transforms.Compose([transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), *to_input])

    class Pictures(Dataset):  # type: ignore[type-arg]
        """PIL images with a transform, as torchvision's CIFAR100 holds them."""

        def __init__(self) -> None:
            self.arrays = splits.train.images.permute(0, 2, 3, 1).contiguous().numpy()
            self.labels = splits.train.labels.tolist()

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return augment(Image.fromarray(self.arrays[index])), self.labels[index]

    model = timm.create_model(f"finetune_{arch}", num_classes=len(splits.classes)).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, nesterov=True)
    loss_of, total = torch.nn.CrossEntropyLoss(), 0.0

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        nonlocal total
        loss = loss_of(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()

    return rate(DataLoader(Pictures(), args.batch_size, shuffle=True, num_workers=2), step)


def ours(args: argparse.Namespace, arch: str) -> float:
    """Return the images per second of the second epoch of `finetune baseline`."""
    from finetune.allocator import tune_allocator
    from finetune.baseline import baseline_recipe
    from finetune.events import Events

    tune_allocator()  # as the command does, before torch is imported
    from finetune.pipeline import run

    rates: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "data": args.data, "limit": args.images, "batch_size": args.batch_size, "epochs": 2, "val_fraction": 0.0,
            "cache_dir": Path(folder) / "cache", "lr": 0.01, "device": "cpu", "compile": args.compile,
        }  # fmt: skip
        events = Events(epoch=lambda row, _: rates.append(row["images_per_second"]))
        run(baseline_recipe(arch, "fast", given), Path(folder) / "run", events=events)
    return rates[-1]


def measure(args: argparse.Namespace, arch: str) -> dict[str, list[float]]:
    """Run both candidates in turn; return images per second of every round."""
    found: dict[str, list[float]] = {"plain": [], "ours": []}
    for number in range(args.rounds):
        for name, rates in found.items():
            command = [
                sys.executable, __file__, "--step", name, "--arch", arch, "--data", args.data, "--images",
                str(args.images), "--batch-size", str(args.batch_size), "--compile", args.compile,
            ]  # fmt: skip
            rates.append(float(json.loads(run_process(command).output.splitlines()[-1])))
        print(f"{arch}, round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
    return found


def read_options() -> argparse.Namespace:
    """Read and check the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arch", action="append", help=f"may be given several times; without it: {', '.join(ARCHS)}")
    add("--data", default="shapes100", help="CIFAR or shapes, by name or path (default: shapes100)")
    add("--images", type=int, default=4000, help="training images (default: 4000)")
    add("--batch-size", type=int, default=128, help="default: 128")
    add("--rounds", type=int, default=3, help="how often each candidate runs (default: 3)")
    add("--compile", choices=("auto", "on", "off"), default="on", help="as for finetune baseline (default: on)")
    add("--output", type=Path, nargs="?", const=RESULTS, help="write a dated result (default: benchmarks/results)")
    add("--step", choices=("plain", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.arch = args.arch or list(ARCHS)
    if args.rounds < 1 or args.images < 2 * args.batch_size:
        parser.error("--rounds must be at least 1, and --images two batches")
    return args


def main() -> None:
    """Run all rounds of all networks, print the table, and write the result."""
    args = read_options()
    if args.step:
        print(json.dumps(plain_loop(args, args.arch[0]) if args.step == "plain" else ours(args, args.arch[0])))
        return
    about = {**conditions(), "command": command_line()}
    found = {arch: measure(args, arch) for arch in args.arch}
    rows = []
    for arch, rates in found.items():
        plain, fast = statistics.median(rates["plain"]), statistics.median(rates["ours"])
        bar = BARS.get(arch)
        verdict = "" if bar is None else "reached" if fast / plain >= bar else "missed"
        rows.append([arch, f"{plain:,.0f}", f"{fast:,.0f}", f"{fast / plain:.2f}", f"{bar:g}" if bar else "", verdict])
    heading = ["network", "plain loop img/s", "finetune baseline img/s", "times", "bar", ""]
    text = (
        f"{args.images:,} training images of {Path(args.data).name}, batches of {args.batch_size}, medians of "
        f"{args.rounds}, in turn.\n\n{table(heading, rows)}"
    )
    print(text)
    if args.output:
        print(f"written: {write_result(args.output, 'scratch', about, text, found)}")


if __name__ == "__main__":
    main()
