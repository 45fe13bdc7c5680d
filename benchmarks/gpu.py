"""What a GPU makes of the same work: the arithmetic that is used, training from scratch, and the whole `layer4,fc` job.

    python benchmarks/gpu.py --output
    PYTHONPATH=. python benchmarks/gpu.py --part job --output  # where finetune is not installed
    python benchmarks/gpu.py --device cpu --arch resnet18 --network multistage --images 240 --epochs 2 --limit 32 \
        --image-size 32 --batch-size 8 --matrix 256 --rounds 1 --workers 0  # a try, whose figures say nothing

rates     multiply-adds a second of prefix, suffix and whole model, against the GPU's own bf16 matrix product
scratch   `finetune baseline` against the plain loop of benchmarks/scratch.py
job       `finetune run` on 60,000 images, 15 epochs, whole; against the script of benchmarks/run_vs_script.py with bf16
          autocast on the same GPU, of which a part of an epoch is measured and the job projected

Images are noise and weights random: nothing is read from elsewhere, and no accuracy means anything. Each measurement is
a process of its own, one after the other. Without a GPU it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bare_machine  # noqa: F401  (first, so that finetune finds what this machine lacks)
import scratch
import utilisation
from record import RESULTS, command_line, conditions, run_process, table, write_result
from run_vs_script import textbook
from whole_job import write_random

PARTS = ("rates", "scratch", "job")
STEPS = ("data", "rates", "plain", "ours", "script", "finetune")
LAYERS = "layer4,fc"
RATED = 8192  # images at most in the timings of rates: two views of a resnet50's features of these are 7 GB in bf16
TIMES, SECONDS = 10.0, 30.0  # the bars of the job: times faster than the script, and its seconds on an H200
WHOLE = {"images": 60_000, "epochs": 15, "image_size": 224}  # what the bars are meant for

Measured = dict[str, Any]
Run = Callable[[argparse.Namespace, str, str, Path], Measured]
"""Does one step for one network: options, the step's name, the network, the folder of the images."""


def step(args: argparse.Namespace, name: str, arch: str, folder: Path) -> Measured:
    """Do one step of the benchmark in this process, and return what it found."""
    part = folder / "part"
    if name == "data":
        write_random(part, args.images - args.images // 6, args.images // 6)
        return {"conditions": conditions()}
    if name == "rates":
        return rates(args, arch, part)
    if name == "plain":
        return {"rate": scratch.plain_loop(part, arch, args.batch_size, args.device, args.workers)}
    if name == "ours":
        return {"rate": scratch.ours(part, arch, args.batch_size, args.compile, args.device)}
    return script(args, arch, part) if name == "script" else whole_run(args, arch, part)


def rates(args: argparse.Namespace, arch: str, part: Path) -> Measured:
    """Time a network's prefix, suffix and whole model against the device's matrix product.

    Returns:
        Multiply-adds a second of every round ("found"), and the table ("text").
    """
    settings = {
        "arch": arch, "data": str(part), "images": min(args.limit, RATED, args.images - args.images // 6),
        "train_layers": LAYERS, "weights": "none", "allow_missing": "", "image_size": args.image_size,
        "batch_size": args.batch_size, "rounds": args.rounds, "compile": args.compile, "windows": "off",
        "device": args.device,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        parts, _ = utilisation.prepare_parts(argparse.Namespace(**settings), Path(folder))
        found = utilisation.measure(parts, args.rounds, args.matrix, args.device)
    return {"found": found, "text": utilisation.show(parts, found, {})}


def script(args: argparse.Namespace, arch: str, part: Path) -> Measured:
    """Measure the textbook script under bf16 autocast on a part of the images.

    Returns:
        Images per second: train and eval.
    """
    from finetune.data import load_data

    splits = load_data(str(part), limit=min(args.limit, args.images // 2))
    held = splits.val if splits.val is not None else splits.train
    measured = textbook(
        SimpleNamespace(train=splits.train, val=held, classes=splits.classes), LAYERS, "bf16", arch=arch,
        weights="none", size=args.image_size, batch=args.batch_size, frozen_eval=False, device=args.device,
        workers=args.workers,
    )  # fmt: skip
    return {"train": measured["train"], "eval": measured["eval"]}


def whole_run(args: argparse.Namespace, arch: str, part: Path) -> Measured:
    """Do the whole job as `finetune run` does.

    Returns:
        Seconds: "job", from the plan to the last file, "features", "train" and "eval" of these, and "ready" of what
        comes before (reading images, timing formats, compiling); what was chosen, and the counts of images.
    """
    from finetune.allocator import tune_allocator

    tune_allocator()  # as the command does, before torch is imported

    import torch

    from finetune.events import Events
    from finetune.pipeline import run
    from finetune.recipe import Recipe

    planned: list[float] = []
    with tempfile.TemporaryDirectory() as own:
        recipe = Recipe(
            arch=arch, train_layers=tuple(LAYERS.split(",")), data=str(part), weights="none", epochs=args.epochs,
            image_size=args.image_size, batch_size=args.batch_size, device=args.device, compile=args.compile,
            cache_dir=Path(own) / "cache", optimizer="sgd",  # auto would do less work than the script
        )  # fmt: skip
        begun = time.perf_counter()
        summary = run(recipe, Path(own) / "run", events=Events(plan=lambda plan: planned.append(time.perf_counter())))
        ended = time.perf_counter()
    chosen = {name: choice for name, choice in summary["computed"].items() if choice}
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device.startswith("cuda") else 0.0
    return {
        "job": ended - planned[0],
        "ready": planned[0] - begun,
        "features": summary["seconds"]["prefix"],
        "train": summary["seconds"]["train"],
        "eval": summary["seconds"]["eval"],
        "where": summary["features"]["where"],
        "formats": ", ".join(
            f"{name} {choice['precision']} {'compiled' if choice['compiled'] else 'eager'}"
            for name, choice in chosen.items()
        ),
        "counts": {name: summary["data"][name] for name in ("train", "val", "test")},
        "memory": peak,
    }


def in_process(args: argparse.Namespace, name: str, arch: str, folder: Path) -> Measured:
    """Do one step in a process of its own; where it does a whole run, add what the process took besides."""
    options = {
        "--step": name, "--folder": folder, "--arch": arch, "--network": arch, "--device": args.device,
        "--images": args.images, "--epochs": args.epochs, "--limit": args.limit, "--image-size": args.image_size,
        "--batch-size": args.batch_size, "--matrix": args.matrix, "--rounds": args.rounds, "--workers": args.workers,
        "--compile": args.compile,
    }  # fmt: skip
    command = [sys.executable, __file__, *(str(word) for pair in options.items() for word in pair)]
    with tempfile.TemporaryDirectory() as compiler_cache:  # a new user's is empty: compiling has its full price
        done = run_process(command, {"TORCHINDUCTOR_CACHE_DIR": compiler_cache})
    measured: Measured = json.loads(done.output.splitlines()[-1])
    return {**measured, "start": done.seconds - measured["job"]} if "job" in measured else measured


def measure(args: argparse.Namespace, folder: Path, run: Run) -> dict[str, Any]:
    """Measure what was asked for; candidates that are compared run in turn, `--rounds` times.

    Returns:
        By part: for rates what each network's step found; for scratch images per second by network and candidate; for
        the job what each round of each candidate found.
    """
    found: dict[str, Any] = {}
    if "rates" in args.part:
        found["rates"] = {arch: run(args, "rates", arch, folder) for arch in args.arch}
    if "scratch" in args.part:
        found["scratch"] = {arch: {"plain": [], "ours": []} for arch in args.network}
        for arch, candidates in found["scratch"].items():
            for _ in range(args.rounds):
                for name, each in candidates.items():
                    each.append(run(args, name, arch, folder)["rate"])
            told = ", ".join(f"{name} {statistics.median(each):,.0f} img/s" for name, each in candidates.items())
            print(f"{arch}: {told}", file=sys.stderr, flush=True)
    if "job" in args.part:
        found["job"] = {"script": [], "finetune": []}
        for _ in range(args.rounds):
            for name, rounds in found["job"].items():
                rounds.append(run(args, name, args.arch[0], folder))
                print(f"job: {name} {rounds[-1]}", file=sys.stderr, flush=True)
    return found


def projected(args: argparse.Namespace, counts: Mapping[str, int], rate: Mapping[str, float]) -> float:
    """Return the script's projected seconds for the job, after its start.

    Args:
        args: epochs are read.
        counts: images in train, val and test, as the job has them.
        rate: images per second, in train and eval.
    """
    evaluated = args.epochs * counts["val"] + counts["test"]
    return float(args.epochs * counts["train"] / rate["train"] + evaluated / rate["eval"])


def show_job(args: argparse.Namespace, rounds: Mapping[str, list[Measured]]) -> str:
    """Return the job's tables in Markdown."""
    counts = rounds["finetune"][-1]["counts"]
    theirs = [projected(args, counts, one) for one in rounds["script"]]
    jobs = [one["job"] for one in rounds["finetune"]]

    def middle(name: str, of: str = "finetune") -> str:
        return f"{statistics.median(one.get(name, 0.0) for one in rounds[of]):,.1f}"

    heading = ["", "the job, s", "features, s", "training, s", "evaluation, s", "start-up, s", "GPU memory, GiB"]
    ours = [middle(name) for name in ("features", "train", "eval", "start", "memory")]
    rows = [
        ["script, bf16 autocast", f"{statistics.median(theirs):,.1f}", "", "", "", "", ""],
        ["finetune", f"{statistics.median(jobs):,.1f}", *ours],
    ]
    each = [script / job for script, job in zip(theirs, jobs, strict=True)]
    times, barred = statistics.median(each), all(getattr(args, name) == value for name, value in WHOLE.items())
    barred = barred and args.device.startswith("cuda")
    verdicts = [
        ["times faster than the script", f"{times:.1f}", f"{min(each):.1f} to {max(each):.1f}", f"{TIMES:g} or more",
         utilisation.verdict(times >= TIMES) if barred else ""],
        ["seconds after start-up", f"{statistics.median(jobs):.1f}", f"{min(jobs):.1f} to {max(jobs):.1f}",
         f"{SECONDS:g} or less", utilisation.verdict(statistics.median(jobs) <= SECONDS) if barred else ""],
    ]  # fmt: skip
    last = rounds["finetune"][-1]
    return "\n\n".join(
        [
            f"{args.arch[0]}, `{LAYERS}`, {counts['train']:,} training images in two views, {counts['val']:,} "
            f"evaluated after each of {args.epochs} epochs, {counts['test']:,} tested. finetune's seconds are "
            "measured, from its plan to its last file; start-up is what the process took besides: imports, reading, "
            f"timing steps, compiling. The script's are projected from its rates on "
            f"{min(args.limit, args.images // 2):,} images, from the end of the first batch "
            f"({middle('train', 'script')} img/s in training, {middle('eval', 'script')} in evaluation, "
            f"{args.workers} workers): epochs × (train + evaluated) + test, without its start.",
            table(heading, rows),
            table(["", "median", "single rounds", "bar", ""], verdicts),
            f"finetune chose: {last['formats']}; features lay in: {last['where']}.",
        ]
    )


def show(args: argparse.Namespace, found: Mapping[str, Any]) -> str:
    """Return everything that was measured, in Markdown."""
    few = "" if args.rounds >= 3 else f" Medians of {args.rounds} are no result: three rounds are the least."
    texts = [
        f"Noise of 32 × 32 pixels and random weights, on {args.device}; batches of {args.batch_size}, medians of "
        f"{args.rounds} rounds, in turn.{few}"
    ]
    for arch, one in found.get("rates", {}).items():
        words = f"matrices of {args.matrix} × {args.matrix}"
        texts += [f"## {arch} at {args.image_size} × {args.image_size}, {words}", one["text"]]
    if "scratch" in found:
        heading = ["network", "plain loop img/s", "finetune baseline img/s", "times", "single rounds"]
        rows = [scratch.row(arch, each)[:5] for arch, each in found["scratch"].items()]
        texts += ["## From scratch, 32 × 32", table(heading, rows)]
    if "job" in found:
        texts += ["## The whole job", show_job(args, found["job"])]
    return "\n\n".join(texts)


def read_options(words: list[str] | None) -> argparse.Namespace:
    """Read and check the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--part", action="append", choices=PARTS, help="may be given several times; without it: all")
    add("--arch", nargs="+", default=["resnet18", "resnet50"], help="of rates; the job takes the first")
    add("--network", nargs="+", default=["figure1", "identity"], help="of scratch")
    add("--device", default="auto", help="auto (a GPU), cuda, cuda:N, or cpu for a try")
    add("--images", type=int, default=WHOLE["images"], help="of the job, a sixth of them to test with (default: 60000)")
    add("--epochs", type=int, default=WHOLE["epochs"], help="of the job (default: 15)")
    add("--limit", type=int, default=20_000, help="most images of the script's and the rates' timings (default: 20000)")
    add("--image-size", type=int, default=WHOLE["image_size"], help="of rates and job (default: 224)")
    add("--batch-size", type=int, default=128, help="of training (default: 128)")
    add("--matrix", type=int, default=8192, help="side of the matrices (default: 8192)")
    add("--rounds", type=int, default=3, help="how often everything is measured (default: 3)")
    add("--workers", type=int, help="of the script's DataLoader (default: as many as there are cores)")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="as for finetune run (default: auto)")
    add("--output", type=Path, nargs="?", const=RESULTS, help="write a dated result (default: benchmarks/results)")
    add("--step", choices=STEPS, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    args.part = args.part or list(PARTS)
    if args.rounds < 1 or args.epochs < 1 or args.batch_size < 2 or args.limit < 2 * args.batch_size:
        parser.error("--rounds and --epochs must be at least 1, --batch-size 2, and --limit two batches")
    if args.images < 24 * args.batch_size:
        parser.error("--images must be 24 batches at least, so that two of them are evaluated")
    return args


def main(words: list[str] | None = None, run: Run = in_process) -> None:
    """Measure everything, print the tables, and write the result.

    Args:
        words: options; those of the command line when None.
        run: does one step.
    """
    args = read_options(words)
    if args.step:
        print(json.dumps(step(args, args.step, args.arch[0], args.folder)))
        return
    import torch

    if args.device == "auto":
        if not torch.cuda.is_available():
            print(f"PyTorch {torch.__version__} sees no GPU here, so nothing was measured; --device cpu is for a try.")
            return
        args.device = "cuda"
    if args.workers is None:
        args.workers = usable_cores()
    with tempfile.TemporaryDirectory() as folder:
        about = {**run(args, "data", args.arch[0], Path(folder))["conditions"], "command": command_line()}
        found = measure(args, Path(folder), run)
    text = show(args, found)
    print(text)
    if args.output:
        print(f"\nwritten: {write_result(args.output, 'gpu', about, text, found)}")


def usable_cores() -> int:
    """Return how many cores this process may use."""
    from finetune.machine import cores

    return cores().usable


if __name__ == "__main__":
    main()
