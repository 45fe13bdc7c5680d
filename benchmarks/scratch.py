"""Training from scratch: `finetune baseline` against the plain loop that a student would write, in turn.

    python benchmarks/scratch.py
    python benchmarks/scratch.py --arch figure1 multistage --output
    python benchmarks/scratch.py --optimizer sgd

The plain loop: torchvision's RandomCrop, RandomHorizontalFlip, ToTensor and Normalize on PIL images, a DataLoader with
two workers, SGD with Nesterov momentum, fp32. Same network, same images, same batch size, same kind of augmentation.
finetune takes its recipe's optimiser unless another is named; with sgd both sides take the same steps.
Each candidate runs in a process of its own, one after the other; medians of the rounds are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from record import RESULTS, command_line, conditions, run_process, table, write_result
from run_vs_script import rate
from whole_job import choices_of_whole_job, write_part

ARCHS = ("figure1", "figure1_shared", "singlestage", "multistage", "vgg16", "resnet50_layer4", "identity")
BARS = {"figure1": 2.5, "multistage": 2.5}
"""How many times faster than the plain loop it should be, on two cores."""

Rates = dict[str, list[float]]
"""Images per second of every round, of "plain" and of "ours"."""


def plain_loop(part: Path, arch: str, batch: int, device: str = "cpu", workers: int = 2) -> float:
    """Train one epoch as a student would; nothing but the network and the reading of the file comes from finetune.

    Args:
        part: folder of images, as `write_part` leaves it.
        arch: one of ours.
        batch: images per step.
        device: cpu or cuda.
        workers: of the DataLoader.

    Returns:
        Images per second, from the end of the first batch.
    """
    import timm
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    import finetune  # noqa: F401  (its networks are timm's from here on)
    from finetune.data import load_data

    splits = load_data(str(part), val_fraction=0)
    to_input = [transforms.ToTensor(), transforms.Normalize((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))]
    augment = transforms.Compose([transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), *to_input])

    class Pictures(Dataset):  # type: ignore[type-arg]
        """PIL images with a transform, as torchvision's CIFAR100 holds them."""

        def __init__(self) -> None:
            self.arrays = splits.train.images[:].permute(0, 2, 3, 1).contiguous().numpy()
            self.labels = splits.train.labels.tolist()

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return augment(Image.fromarray(self.arrays[index])), self.labels[index]

    model = timm.create_model(f"finetune_{arch}", num_classes=len(splits.classes)).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, nesterov=True)
    loss_of, total = torch.nn.CrossEntropyLoss(), 0.0

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        nonlocal total
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        loss = loss_of(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()

    # Persistent, so that ending the workers is not timed.
    usual: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": device != "cpu"}
    return rate(DataLoader(Pictures(), batch, shuffle=True, **usual), step)


def ours(part: Path, arch: str, batch: int, compile_mode: str, device: str = "cpu", optimizer: str = "muon") -> float:
    """Train two epochs as `finetune baseline` does; formats are chosen as for all of CIFAR-100.

    Args:
        part: folder of images, as `write_part` leaves it.
        arch: one of ours.
        batch: images per step.
        compile_mode: as for --compile.
        device: as for --device.
        optimizer: as for --optimizer.

    Returns:
        Images per second of the second epoch; the first one holds first calls and compiling.
    """
    from finetune.allocator import tune_allocator

    tune_allocator()  # as the command does, before torch is imported

    from finetune.events import Events
    from finetune.pipeline import run
    from finetune.scratch import baseline_recipe
    from weights.errors import StoppedError

    rates: list[float] = []
    events = Events(epoch=lambda row, _: rates.append(row["images_per_second"]))
    with tempfile.TemporaryDirectory() as folder, choices_of_whole_job(), suppress(StoppedError):
        given = {
            "data": str(part), "batch_size": batch, "epochs": 3, "val_fraction": 0.0, "lr": 0.01, "device": device,
            "optimizer": optimizer, "compile": compile_mode, "cache_dir": Path(folder) / "cache",
        }  # fmt: skip
        run(
            baseline_recipe(arch, "fast", given),
            Path(folder) / "run",
            events=events,
            stop=lambda: len(rates) == 2,  # so that no time goes into a third epoch and a test
        )
    return rates[1]


def measure(args: argparse.Namespace, arch: str, part: Path) -> Rates:
    """Run both candidates in turn; return images per second of every round."""
    found: Rates = {"plain": [], "ours": []}
    for number in range(args.rounds):
        for name, rates in found.items():
            command = [
                sys.executable, __file__, "--step", name, "--arch", arch, "--data", str(part),
                "--batch-size", str(args.batch_size), "--compile", args.compile, "--optimizer", args.optimizer,
            ]  # fmt: skip
            rates.append(float(json.loads(run_process(command).output.splitlines()[-1])))
        told = ", ".join(f"{name} {rates[-1]:,.1f} img/s" for name, rates in found.items())
        print(f"{arch}, round {number + 1} of {args.rounds}: {told}", file=sys.stderr, flush=True)
    return found


def row(arch: str, rates: Rates) -> list[str]:
    """Return a network's line of the table."""
    plain, fast = statistics.median(rates["plain"]), statistics.median(rates["ours"])
    each = [after / before for before, after in zip(rates["plain"], rates["ours"], strict=True)]
    bar = BARS.get(arch)
    verdict = "" if bar is None else "reached" if fast / plain >= bar else "missed"
    spread = f"{min(each):.2f} to {max(each):.2f}"
    return [arch, f"{plain:,.0f}", f"{fast:,.0f}", f"{fast / plain:.2f}", spread, f"{bar:g}" if bar else "", verdict]


def read_options() -> argparse.Namespace:
    """Read and check the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arch", nargs="+", action="extend", choices=ARCHS, metavar="ARCH", help=f"default: {', '.join(ARCHS)}")
    add("--data", default="shapes100", help="CIFAR or shapes, by name or path (default: shapes100)")
    add("--images", type=int, default=4000, help="training images (default: 4000)")
    add("--batch-size", type=int, default=128, help="default: 128")
    add("--rounds", type=int, default=3, help="how often each candidate runs (default: 3)")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="as for finetune baseline (default: auto)")
    add("--optimizer", choices=("muon", "sgd"), default="muon", help="finetune baseline's (default: muon)")
    add("--output", type=Path, nargs="?", const=RESULTS, help="write a dated result (default: benchmarks/results)")
    add("--step", choices=("plain", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.arch = list(dict.fromkeys(args.arch or ARCHS))
    if args.rounds < 1 or args.batch_size < 2 or args.images < 2 * args.batch_size:
        parser.error("--rounds must be at least 1, --batch-size 2, and --images two batches")
    return args


def main() -> None:
    """Run all rounds of all networks, print the table, and write the result."""
    args = read_options()
    if args.step:
        part, arch = Path(args.data), args.arch[0]
        if args.step == "plain":
            print(plain_loop(part, arch, args.batch_size))
        else:
            print(ours(part, arch, args.batch_size, args.compile, optimizer=args.optimizer))
        return
    about = {**conditions(), "command": command_line()}
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part"
        data = write_part(args.data, part, args.images, 2)  # nobody tests
        found = {arch: measure(args, arch, part) for arch in args.arch}
    few = "" if args.rounds >= 3 else f" Medians of {args.rounds} are no result: three rounds are the least."
    heading = ["network", "plain loop img/s", "finetune baseline img/s", "times", "single rounds", "bar", ""]
    text = (
        f"{args.images:,} training images of {data}, batches of {args.batch_size}, medians of {args.rounds}, "
        f"candidates in turn, finetune baseline with {args.optimizer}.{few} The bars are meant for two cores.\n\n"
        f"{table(heading, [row(arch, rates) for arch, rates in found.items()])}"
    )
    print(text)
    if args.output:
        print(f"written: {write_result(args.output, 'scratch', about, text, found)}")


if __name__ == "__main__":
    main()
