"""Time `finetune run` against the script that people write by hand: same images, same layers, in turn.

    python benchmarks/run_vs_script.py
    python benchmarks/run_vs_script.py --train-layers layer4,fc --train-layers all --data D --output

The script is the textbook one, `textbook` below: torchvision transforms, a DataLoader with two workers, `requires_grad`
on the named layers, SGD; in fp32, and again under bf16 autocast. Every round runs the candidates one after the other,
each in a process of its own; finetune with an empty cache folder and an empty compiler cache. Medians over the rounds
are compared, so a machine that drifts hurts all alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import RESULTS, command_line, conditions, run_process, table, write_result
from watched_run import watched_run
from whole_job import BARS, epoch_seconds, explained, job_seconds, write_part

SCRIPTS = ("script fp32", "script bf16")
OURS = "finetune"
LAYERS = ("layer4,fc", "fc", "all")
PHASES = ("features", "train", "eval", "test_features", "test", "sample")
FIGURES = (*PHASES, "start", "compile", "checkpoint", "cache", "memory")

Measured = dict[str, Any]
"""One candidate's figures of one round (`whole_job.Figures`), and "formats", in words."""


def textbook(
    splits: Any,
    layers: str,
    precision: str,
    *,
    arch: str,
    weights: str,
    size: int,
    batch: int,
    frozen_eval: bool,
    device: str = "cpu",
    workers: int = 2,
) -> Measured:
    """Train one epoch and evaluate once, as a hand-written script does. Nothing in it comes from finetune.

    Args:
        splits: train and val with `images` uint8 (N, 3, H, W) and `labels`, and `classes`.
        layers: comma-separated modules that train, or all.
        precision: fp32, or bf16 for autocast.
        arch: a timm name.
        weights: a file of tensors by name, or none. Those that fit are loaded.
        size: input side in pixels.
        batch: images per step.
        frozen_eval: keep frozen modules in eval mode, which most scripts forget; it also spares their batch statistics.
        device: cpu or cuda.
        workers: of the DataLoader.

    Returns:
        The figures train and eval.
    """
    import timm
    import torch

    train, evaluated = loaders(splits, size, batch, device, workers)
    model = timm.create_model(arch, num_classes=len(splits.classes))
    if weights != "none":
        load_fitting(model, arch, weights)
    model.to(device)
    names = layers.split(",")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "all" in names or any(name.startswith(f"{layer}.") for layer in names)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.01, 0.9, nesterov=True)
    autocast = torch.autocast(device.partition(":")[0], dtype=torch.bfloat16, enabled=precision == "bf16")
    loss_of = torch.nn.CrossEntropyLoss()
    total, correct = 0.0, 0

    def train_step(images: torch.Tensor, labels: torch.Tensor) -> None:
        nonlocal total
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with autocast:
            loss = loss_of(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()

    def eval_step(images: torch.Tensor, labels: torch.Tensor) -> None:
        nonlocal correct
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with torch.no_grad(), autocast:
            correct += int((model(images).argmax(1) == labels).sum())

    model.train()
    if frozen_eval:
        for module in model.modules():
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
    trained = rate(train, train_step)
    model.eval()
    return {"train": trained, "eval": rate(evaluated, eval_step), "formats": precision}


def loaders(splits: Any, size: int, batch: int, device: str, workers: int) -> tuple[Any, Any]:
    """Return the textbook's loaders of training and evaluated images, as `textbook` explains its arguments."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    class Pictures(Dataset):  # type: ignore[type-arg]
        """PIL images with a transform, as torchvision's CIFAR100 holds them."""

        def __init__(self, data: Any, transform: Any) -> None:
            self.arrays = data.images.permute(0, 2, 3, 1).contiguous().numpy()
            self.labels, self.transform = data.labels.tolist(), transform

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]

    to_input = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    augment = transforms.Compose([transforms.Resize(size), transforms.RandomHorizontalFlip(), *to_input])
    plain = transforms.Compose([transforms.Resize(size), *to_input])
    usual: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": device != "cpu"}
    return (
        DataLoader(Pictures(splits.train, augment), batch, shuffle=True, **usual),
        DataLoader(Pictures(splits.val, plain), batch, **usual),
    )


def rate(loader: Any, step: Callable[[Any, Any], None]) -> float:
    """Return images per second of one pass, from the end of its first batch.

    Starting the workers and the first call, which sets up memory and kernels, happen once in a job: they are left to
    its start.
    """
    done, start = 0, 0.0
    for images, labels in loader:
        step(images, labels)
        if start:
            done += len(labels)
        else:
            start = time.perf_counter()
    return done / (time.perf_counter() - start)


def load_fitting(model: Any, arch: str, weights: str) -> None:
    """Load those tensors of a weight file that fit the model; the file is found as `finetune run` finds it."""
    from weights.arch import resolve_arch
    from weights.load import read_tensors
    from weights.locate import locate

    found = locate(resolve_arch(arch), weights)
    here = model.state_dict()
    tensors = read_tensors(found.path) if found.path else {}
    fitting = {name: value for name, value in tensors.items() if name in here and here[name].shape == value.shape}
    model.load_state_dict(fitting, strict=False)


def step(args: argparse.Namespace) -> dict[str, Any]:
    """Do one step of the benchmark in this process, and return what it found."""
    from finetune.allocator import tune_allocator

    part = args.folder / "part"
    if args.step == "prepare":
        train = args.images + evaluation_images(args)
        return {"data": write_part(args.data, part, train, evaluation_images(args)), "conditions": conditions()}
    fraction = evaluation_images(args) / (args.images + evaluation_images(args))
    layers = args.train_layers[0]
    if args.step == OURS:
        tune_allocator()  # as the command does, before torch is imported
        with tempfile.TemporaryDirectory(dir=args.folder) as own:
            return watched_run(
                part, layers, Path(own), arch=args.arch, weights=args.weights, val_fraction=fraction, device="cpu",
                allow_missing=tuple(args.allow_missing.split(",")) if args.allow_missing else (),
                image_size=args.image_size, batch_size=args.batch_size, windows=args.windows, compile=args.compile,
            )  # fmt: skip
    from finetune.data import load_data

    splits = load_data(str(part), val_fraction=fraction)
    measured = textbook(
        splits, layers, args.step.split()[1], arch=args.arch, weights=args.weights, size=args.image_size,
        batch=args.batch_size, frozen_eval=args.frozen_eval,
    )  # fmt: skip
    known = len(splits.train) / measured["train"] + len(splits.val or ()) / measured["eval"]
    return {**measured, "known": known}


def evaluation_images(args: argparse.Namespace) -> int:
    """Return how many images are evaluated: a quarter as many as train, and at least two batches."""
    return max(int(args.images) // 4, 2 * int(args.batch_size))


def in_process(args: argparse.Namespace, name: str, layers: str, folder: Path) -> Measured:
    """Run one step in a process of its own; return its figures, with start and memory."""
    command = [
        sys.executable, __file__, "--step", name, "--folder", str(folder), "--train-layers", layers,
        "--data", args.data, "--weights", args.weights, "--allow-missing", args.allow_missing, "--arch", args.arch,
        "--images", str(args.images), "--batch-size", str(args.batch_size), "--image-size", str(args.image_size),
        "--windows", args.windows, "--compile", args.compile,
        *(["--frozen-eval"] if args.frozen_eval else []),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as compiler_cache:  # a new user's is empty: compiling has its full price
        done = run_process(command, {"TORCHINDUCTOR_CACHE_DIR": compiler_cache})
    measured: Measured = json.loads(done.output.splitlines()[-1])
    if "known" in measured:
        measured["start"] = max(0.0, done.seconds - measured.pop("known"))
        measured["memory"] = done.peak
        measured = {**dict.fromkeys(FIGURES, 0.0), **measured}
    return measured


def measure(args: argparse.Namespace, layers: str, folder: Path) -> dict[str, list[Measured]]:
    """Run all candidates in turn, `--rounds` times; return every round's figures."""
    found: dict[str, list[Measured]] = {name: [] for name in (*SCRIPTS, OURS)}
    for number in range(args.rounds):
        for name, rounds in found.items():
            rounds.append(in_process(args, name, layers, folder))
            print(f"{layers}, round {number + 1} of {args.rounds}: {name} done", file=sys.stderr, flush=True)
    return found


def medians(rounds: list[Measured]) -> dict[str, float]:
    """Return the median of every figure."""
    return {name: statistics.median(one[name] for one in rounds) for name in FIGURES}


def show(layers: str, found: dict[str, list[Measured]], barred: bool) -> str:
    """Return one set of layers' tables in Markdown: phases, then ratios with their bars."""
    middle = {name: medians(rounds) for name, rounds in found.items()}
    heading = ["", *(f"{phase.replace('_', ' ')} img/s" for phase in PHASES)]
    heading += ["start s", "of it compile s", "checkpoint s", "memory GiB", "of it cache GiB", "epoch s", "job s"]
    rows = []
    for name, one in middle.items():
        cells = [f"{one[phase]:,.1f}" if one[phase] else "" for phase in PHASES]
        cells += [f"{one['start']:.1f}", f"{one['compile']:.1f}", f"{one['checkpoint']:.2f}", f"{one['memory']:.2f}"]
        rows.append([name, *cells, f"{one['cache']:.2f}", f"{epoch_seconds(one):,.0f}", f"{job_seconds(one):,.0f}"])
    ratios = []
    for name in SCRIPTS:
        each = [job_seconds(a) / job_seconds(b) for a, b in zip(found[name], found[OURS], strict=True)]
        job = job_seconds(middle[name]) / job_seconds(middle[OURS])
        bar = BARS.get(layers, {}).get(name) if barred else None
        verdict = "" if bar is None else "reached" if job >= bar else "missed"
        epoch = epoch_seconds(middle[name]) / epoch_seconds(middle[OURS])
        spread = f"{min(each):.2f} to {max(each):.2f}"
        ratios.append([f"against {name}", f"{epoch:.2f}", f"{job:.2f}", spread, f"{bar:g}" if bar else "", verdict])
    return "\n\n".join(
        [
            f"## Trains `{layers}`",
            table(heading, rows),
            table(["finetune is faster, times", "epoch", "job", "job, single rounds", "bar for the job", ""], ratios),
            f"finetune chose: {found[OURS][-1]['formats']}.",
        ]
    )


def introduction(args: argparse.Namespace, about: dict[str, str], data: str) -> str:
    """Return what was measured, in a paragraph."""
    bars = "The bars are meant for two cores with AMX"
    bars += "." if "amx_bf16" in about["device"] else "; this machine has no AMX."
    few = "" if args.rounds >= 3 else f" Medians of {args.rounds} are no result: three rounds are the least."
    frozen = "kept in eval mode" if args.frozen_eval else "in train mode with the rest, as scripts have it"
    return (
        f"{args.arch} at {args.image_size} × {args.image_size}, {args.images:,} training and "
        f"{evaluation_images(args):,} evaluated images of {data}, batches of {args.batch_size}, "
        f"medians of {args.rounds}, candidates in turn. The script's frozen layers are {frozen}."
        f"{few} {bars}\n\n{explained()}"
    )


def read_options() -> argparse.Namespace:
    """Read and check the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train-layers", action="append", help=f"may be given several times; without it: {', then '.join(LAYERS)}")
    add("--data", default="shapes100", help="CIFAR or shapes, by name or path (default: shapes100)")
    add("--weights", default="none", help="as for finetune run (default: none, random values)")
    add("--allow-missing", default="", help="as for finetune run")
    add("--arch", default="resnet18", help="default: resnet18")
    add("--images", type=int, default=2000, help="training images (default: 2000)")
    add("--image-size", type=int, default=224, help="default: 224")
    add("--batch-size", type=int, default=64, help="default: 64")
    add("--rounds", type=int, default=3, help="how often each candidate runs (default: 3)")
    add("--windows", choices=("on", "off"), default="off", help="as for finetune run (default: off)")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="as for finetune run (default: auto)")
    add("--frozen-eval", action="store_true", help="the script keeps its frozen layers in eval mode")
    add("--output", type=Path, nargs="?", const=RESULTS, help="write a dated result (default: benchmarks/results)")
    add("--step", choices=("prepare", *SCRIPTS, OURS), help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.train_layers = args.train_layers or list(LAYERS)
    if args.rounds < 1 or args.batch_size < 2 or args.images < 2 * args.batch_size:
        parser.error("--rounds must be at least 1, --batch-size 2, and --images two batches")
    return args


def main() -> None:
    """Run all rounds of all sets of layers, print the tables, and write the result."""
    args = read_options()
    if args.step:
        print(json.dumps(step(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepared = in_process(args, "prepare", args.train_layers[0], Path(folder))
        about = {**prepared["conditions"], "command": command_line()}
        print(introduction(args, about, prepared["data"]), end="\n\n", flush=True)
        found, texts = {}, []
        for layers in args.train_layers:
            found[layers] = measure(args, layers, Path(folder))
            texts.append(show(layers, found[layers], barred=args.arch == "resnet18" and args.image_size == 224))
            print(texts[-1], end="\n\n", flush=True)
    if args.output:
        text = "\n\n".join([introduction(args, about, prepared["data"]), *texts])
        print(f"written: {write_result(args.output, 'run-vs-script', about, text, found)}")


if __name__ == "__main__":
    main()
