"""How much of the machine the network's arithmetic uses: multiply-adds a second, against a bf16 matrix product's.

    python benchmarks/utilisation.py
    python benchmarks/utilisation.py --rounds 5 --output

The parts are those of a run, made by the program itself: the prefix as `finetune run` prepares it, the suffix and the
whole model in its trainer. Every round times the matrix product and then each part in turn; a part's share is taken
against the product of its own round. Multiply-adds are those of convolutions and matrix products, counted in the
plain network (`torch.utils.flop_counter`): what folding a batch norm or compiling saves is speed, not less work. At the
end the start of `finetune --help` is timed against `import torch`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from record import RESULTS, ROOT, conditions, table, write_result
from whole_job import choices_of_whole_job, write_part

from finetune.allocator import tune_allocator

if TYPE_CHECKING:
    import torch

    from finetune.inference import Source
    from finetune.job import Job

BARS = {"prefix": 0.8, "suffix, training": 0.6}  # of the matrix product's rate
HELP_BAR = 1 / 3  # of the time of `import torch`
QUEUED = 10  # matrix products in one timing on a GPU, so that launching and waiting count little
PRODUCTS = 5  # timings of the matrix product in a round, of which the fastest counts


@dataclass(frozen=True)
class Part:
    """Something that is timed.

    Attributes:
        name: as in the table.
        formats: number format and compilation.
        multiply_adds: of one image.
        images: in one call of `run`.
        run: does the work once.
    """

    name: str
    formats: str
    multiply_adds: int
    images: int
    run: Callable[[], object]


def cut_parts(job: Job) -> list[Part]:
    """Return the parts of a run whose model is cut: the prefix, and the suffix in training and in evaluation.

    Args:
        job: what `finetune.job.prepare` returned.
    """
    import torch

    from finetune.features import Features, compute_view, new_stores

    if job.cut.prefix is None or job.computing.prefix is None:
        raise SystemExit(f"The model cannot be cut ({job.cut.reason}); give other --train-layers.")
    data, frozen, ready = job.data.train, job.cut.prefix, job.computing.prefix
    stores = new_stores(ready.prefix.rows, job.views.count, len(data), job.device)

    def features(view: int) -> list[torch.Tensor]:
        into = [store[view] for store in stores]
        return compute_view(ready.prefix, data, job.views, view, entry=None, into=into, report=lambda images: None)

    few = job.prepared.preprocessing(data.images[:2])
    with torch.no_grad():
        inputs = frozen(few)
        count = multiply_adds(lambda: frozen(few), len(few))
    every_view = [features(view) for view in range(job.views.count)]
    return [
        Part("prefix", str(ready.choice), count, len(data), lambda: features(0)),
        *trained_parts(
            "suffix", job, Features(every_view, job.device, stores), Features(every_view[:1], job.device), inputs
        ),
    ]


def whole_parts(job: Job) -> list[Part]:
    """Return training and evaluation of a whole model, on images."""
    from finetune.augment import Views
    from finetune.residency import ImagePlace
    from finetune.sources import Live

    data, dtype = job.data.train, job.computing.training.dtype
    images = ImagePlace("device", job.device)
    views, plain = (
        Live(data, views, job.prepared.preprocessing, None, job.device, dtype, images)
        for views in (job.views, Views("none", 1))
    )
    return trained_parts("whole model", job, views, plain, (job.prepared.preprocessing(data.images[:2]),))


def trained_parts(name: str, job: Job, views: Source, plain: Source, inputs: tuple[torch.Tensor, ...]) -> list[Part]:
    """Return what trains, in training and in evaluation, in the trainer that `finetune run` would make.

    Args:
        name: what to call it.
        job: the run.
        views: source of the training images' views.
        plain: source of the training images as they are.
        inputs: of what trains, for two images.
    """
    import torch

    from finetune.device import settle
    from finetune.fit import Trainer
    from finetune.inference import evaluation_batch, predict
    from finetune.precision import compile_module
    from finetune.sharing import Split

    data, training = job.data.train, job.computing.training
    suffix = settle(job.cut.suffix, job.device)
    inputs = tuple(value.to(job.device) for value in inputs)

    windows = job.computing.windows
    if windows is not None:  # every timed epoch alike
        windows = replace(windows, sides=windows.sides[:1] * len(windows.sides))

    def trainer_of(module: torch.nn.Module, compiled: bool) -> Trainer:
        forward = compile_module(module) if compiled else None
        return Trainer(module, job.prepared.fresh, job.recipe, len(data), training.dtype, job.device, forward, windows)

    counted = trainer_of(copy.deepcopy(suffix), compiled=False)  # the counter does not see into compiled code
    with torch.no_grad():
        forward = multiply_adds(lambda: counted.suffix.eval()(*inputs), 2)
    counted.suffix.train()
    if windows is not None:
        inputs = windows.cut(inputs, 0, torch.zeros(2, 2, dtype=torch.int64, device=job.device))
    step = multiply_adds(lambda: counted.step(inputs, data.labels[:2].to(job.device)), 2)
    trainer, split = trainer_of(suffix, training.compiled), Split(views, data.labels, job.views.count)
    epochs, rows = iter(range(trainer.epochs)), torch.arange(len(data))

    def train() -> None:
        trainer.train_epoch(split, next(epochs), lambda done, of: None, lambda: False)

    def evaluate() -> None:
        predict(trainer.evaluated, plain, rows, job.device, training.dtype, batch=evaluation_batch(job.recipe))

    return [
        Part(f"{name}, training", str(training), step, len(data), train),
        Part(f"{name}, evaluation", f"{training.precision}, eager", forward, len(data), evaluate),
    ]


def multiply_adds(work: Callable[[], object], images: int) -> int:
    """Return the multiply-adds per image of some work, which are half its floating-point operations."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops()) // 2 // images


def product_rate(side: int, device: str = "cpu") -> float:
    """Return multiply-adds per second of a bf16 product of two square matrices: the best of a few timings."""
    import torch

    left, right = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    queued = QUEUED if device.startswith("cuda") else 1

    def multiply() -> None:
        for _ in range(queued):
            torch.mm(left, right)

    multiply()
    return queued * side**3 / min(seconds(multiply, device) for _ in range(PRODUCTS))


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """Return how long some work takes, on a GPU with what it has queued there."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        return time.perf_counter() - start
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(parts: list[Part], rounds: int, side: int, device: str = "cpu") -> dict[str, list[float]]:
    """Time the matrix product and all parts in turn; return multiply-adds per second, by name, of every round."""
    found: dict[str, list[float]] = {"matrix product": [], **{part.name: [] for part in parts}}
    for part in parts:
        part.run()  # the first time compiles and sets up kernels
    for number in range(rounds):
        found["matrix product"].append(product_rate(side, device))
        for part in parts:
            found[part.name].append(part.multiply_adds * part.images / seconds(part.run, device))
        print(f"round {number + 1} of {rounds} done", file=sys.stderr, flush=True)
    return found


def measure_start(rounds: int) -> dict[str, list[float]]:
    """Time `finetune --help` and `import torch` in turn, each in a process of its own; return seconds."""
    commands = {
        "finetune --help": [str(Path(sys.executable).with_name("finetune")), "--help"],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    if not Path(commands["finetune --help"][0]).exists():
        commands["finetune --help"] = [sys.executable, "-m", "cli.main", "--help"]
    found: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            took = seconds(partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT))
            if number:  # the first time reads files from the disk
                found[name].append(took)
    return found


def show(parts: list[Part], found: dict[str, list[float]], bars: dict[str, float]) -> str:
    """Return the table of all parts in Markdown."""
    product = found["matrix product"]
    rows = [["matrix product", "bf16", "", "", f"{statistics.median(product) / 1e9:,.0f}", "100 %", "", ""]]
    for part in parts:
        rates = found[part.name]
        middle = statistics.median(rates)
        share = statistics.median(rate / best for rate, best in zip(rates, product, strict=True))
        bar = bars.get(part.name)
        cells = [f"{part.multiply_adds / 1e9:.3f}", f"{middle / part.multiply_adds:,.1f}", f"{middle / 1e9:,.0f}"]
        cells += [f"{100 * share:.0f} %", f"{100 * bar:.0f} %" if bar else "", verdict(share >= bar) if bar else ""]
        rows.append([part.name, part.formats, *cells])
    heading = ["", "computed in", "10⁹ multiply-adds/image", "img/s", "10⁹ multiply-adds/s", "share", "bar", ""]
    return table(heading, rows)


def show_start(start: dict[str, list[float]]) -> str:
    """Return the table of the two starts in Markdown."""
    ours, torch_alone = (statistics.median(start[name]) for name in ("finetune --help", "import torch"))
    ratio = ours / torch_alone
    quick = [
        ["import torch", f"{torch_alone:.2f}", "", "", ""],
        ["finetune --help", f"{ours:.2f}", f"{ratio:.2f}", f"{HELP_BAR:.2f}", verdict(ratio < HELP_BAR)],
    ]
    return table(["start", "seconds", "ratio", "bar, below", ""], quick)


def verdict(good: bool) -> str:
    """Return what became of a bar."""
    return "reached" if good else "missed"


def prepare_parts(args: argparse.Namespace, folder: Path) -> tuple[list[Part], str]:
    """Prepare a cut and an uncut run on the same few images; return their parts and the data set's name."""
    from finetune.events import Events
    from finetune.job import prepare
    from finetune.recipe import Recipe, check

    data = folder / "data"
    name = write_part(args.data, data, args.images, 1)
    recipe = Recipe(
        arch=args.arch,
        train_layers=tuple(args.train_layers.split(",")),
        data=str(data),
        weights=args.weights,
        allow_missing=tuple(args.allow_missing.split(",")) if args.allow_missing else (),
        image_size=args.image_size,
        epochs=args.rounds + 1,
        batch_size=args.batch_size,
        val_fraction=0.0,
        compile=args.compile,
        windows=args.windows,
        device=args.device,
        cache_dir=folder / "cache",
    )
    check(recipe)
    with choices_of_whole_job():
        cut = prepare(recipe, Events())
        whole = prepare(replace(recipe, train_layers=("all",)), Events())
    return [*cut_parts(cut), *whole_parts(whole)], name


def read_options() -> argparse.Namespace:
    """Read and check the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train-layers", default="layer4,fc", help="where the cut lies (default: layer4,fc)")
    add("--data", default="shapes100", help="CIFAR or shapes, by name or path (default: shapes100)")
    add("--weights", default="none", help="as for finetune run (default: none, random values)")
    add("--allow-missing", default="", help="as for finetune run")
    add("--arch", default="resnet18", help="default: resnet18")
    add("--images", type=int, default=1024, help="images in each timing (default: 1024)")
    add("--image-size", type=int, default=224, help="default: 224")
    add("--batch-size", type=int, default=64, help="of training (default: 64)")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="as for finetune run (default: auto)")
    add("--windows", choices=("on", "off"), default="off", help="as for finetune run (default: off)")
    add("--device", default="cpu", help="as for finetune run (default: cpu)")
    add("--matrix", type=int, default=4096, help="side of the matrices (default: 4096)")
    add("--rounds", type=int, default=3, help="how often each part is timed (default: 3)")
    add("--output", type=Path, nargs="?", const=RESULTS, help="write a dated result (default: benchmarks/results)")
    args = parser.parse_args()
    if args.rounds < 1 or args.images < 2:
        parser.error("--rounds must be at least 1, --images 2")
    return args


def main() -> None:
    """Time everything, print the tables, and write the result."""
    args = read_options()
    tune_allocator()  # as the command does, before torch is imported
    about = conditions()
    with tempfile.TemporaryDirectory() as folder:
        parts, name = prepare_parts(args, Path(folder))
        found = measure(parts, args.rounds, args.matrix, args.device)
    start = measure_start(max(args.rounds, 5))
    bars = BARS if args.arch == "resnet18" and args.image_size == 224 else {}
    few = "" if args.rounds >= 3 else f" Medians of {args.rounds} are no result: three rounds are the least."
    text = (
        f"{args.arch} at {args.image_size} × {args.image_size}, cut for `{args.train_layers}`, {args.images:,} images "
        f"of {name} in each timing, batches of {args.batch_size} in training, matrices of {args.matrix} × "
        f"{args.matrix}; medians of {args.rounds} rounds, in turn. A part's share is taken in each round, "
        f"against the matrix product of that round.{few}\n\n{show(parts, found, bars)}\n\n{show_start(start)}"
    )
    print(text)
    if args.output:
        figures = {"multiply-adds per second": found, "seconds": start}
        print(f"\nwritten: {write_result(args.output, 'utilisation', about, text, figures)}")


if __name__ == "__main__":
    main()
