"""How close a plan's expected times come: ten small runs, each beside what it had expected before it started.

    python benchmarks/estimate.py
    python benchmarks/estimate.py --data D --weights W --allow-missing layer4 --output

The runs differ in network, in what trains, in input size, augmentation and number of images. Each is a `finetune run`
or `finetune baseline` in a process of its own, with an empty cache folder, so that nothing is remembered and every
feature is computed. Estimate and outcome are those of its summary.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, conditions, run_process, table, write_result
from whole_job import write_part

PHASES = {"prefix": "features", "train": "training", "eval": "evaluation", "total": "whole run"}
SHORTEST = 1.0  # seconds: a phase that was expected to take less, and did, is not judged
TRAIN, TEST = 2000, 400  # images of the part that all runs share; each takes --limit of the first


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        arch: the network.
        layers: --train-layers; "scratch" is a `finetune baseline`.
        size: input side in pixels.
        augment: --augment.
        images: training images, a tenth of them held out for validation.
        epochs: how many.
    """

    arch: str
    layers: str
    size: int
    augment: str
    images: int
    epochs: int

    def __str__(self) -> str:
        return f"{self.arch}, {self.layers}, {self.size} px, {self.augment}, {self.images:,} × {self.epochs}"

    def words(self, part: Path, folder: Path, weights: Sequence[str]) -> list[str]:
        """Return the words of the command after `finetune`.

        Args:
            part: folder of the images.
            folder: for cache and run directory.
            weights: options for resnet18's weights; other networks start from random values.
        """
        about = {
            "--arch": self.arch, "--data": part, "--image-size": self.size, "--augment": self.augment,
            "--limit": self.images, "--epochs": self.epochs,
            "--cache-dir": folder / "cache", "--output": folder / "run",
        }  # fmt: skip
        words = [str(word) for pair in about.items() for word in pair]
        if self.layers == "scratch":
            return ["baseline", *words, "--json"]
        own = weights if self.arch == "resnet18" else ("--weights", "none")
        return ["run", *words, "--train-layers", self.layers, *own, "--json"]


JOBS = (
    Job("resnet18", "fc", 224, "none", 600, 10),
    Job("resnet18", "fc", 128, "flip", 2000, 20),
    Job("resnet18", "layer4,fc", 224, "flip", 500, 3),
    Job("resnet18", "layer4,fc", 96, "flip", 1500, 5),
    Job("resnet18", "all", 64, "flip", 1000, 3),
    Job("mobilenetv3_small_100", "head", 128, "none", 1000, 10),
    Job("mobilenetv3_small_100", "all", 96, "flip", 300, 3),
    Job("test_resnet", "layer4,fc", 128, "flip", 2000, 8),
    Job("finetune_figure1", "scratch", 32, "crop", 2000, 2),
    Job("finetune_multistage", "scratch", 32, "none", 2000, 4),
)

Times = dict[str, tuple[float, float]]
"""Of one run: (expected, taken) seconds of each phase."""


def times(summary: Mapping[str, Any]) -> Times:
    """Return what a run had expected and what it took."""
    expected, taken = summary["estimate"]["seconds"], summary["seconds"]
    return {phase: (float(expected[phase]), float(taken[phase])) for phase in PHASES}


def ratio(pair: tuple[float, float]) -> float | None:
    """Return taken / expected; None where both are too short to judge, infinity where nothing was expected."""
    expected, taken = pair
    if max(expected, taken) < SHORTEST:
        return None
    return taken / expected if expected else math.inf


def worst(ratios: Sequence[float]) -> float:
    """Return the ratio that is furthest from 1: half as long is as far as twice as long."""
    return max(ratios, key=lambda one: abs(math.log(one)) if one else math.inf)


def overview(found: Sequence[Times]) -> list[list[str]]:
    """Return a row for each phase: runs that are judged, the median ratio, the worst."""
    rows = []
    for phase, name in PHASES.items():
        ratios = [value for one in found if (value := ratio(one[phase])) is not None]
        figures = [f"{statistics.median(ratios):.2f}", f"{worst(ratios):.2f}"] if ratios else ["", ""]
        rows.append([name, str(len(ratios)), *figures])
    return rows


def detail(jobs: Sequence[Job], found: Sequence[Times]) -> list[list[str]]:
    """Return a row for each run: taken and expected seconds of each phase, with their ratio."""
    return [[str(job), *(_told(one[phase]) for phase in PHASES)] for job, one in zip(jobs, found, strict=True)]


def _told(pair: tuple[float, float]) -> str:
    expected, taken = pair
    value = ratio(pair)
    return f"{taken:.1f} of {expected:.1f}" + ("" if value is None else f" ({value:.2f})")


def read_options() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="shapes100", help="CIFAR or shapes, by name or path (default: shapes100)")
    add("--weights", default="none", help="of resnet18, as for finetune run (default: none)")
    add("--allow-missing", help="layers that these weights may lack")
    add("--output", type=Path, nargs="?", const=RESULTS, help="write a dated result (default: benchmarks/results)")
    return parser.parse_args()


def main() -> None:
    """Make the runs, print the tables, and write the result."""
    args = read_options()
    about = conditions()
    weights = ["--weights", args.weights, *(["--allow-missing", args.allow_missing] if args.allow_missing else [])]
    found: list[Times] = []
    with tempfile.TemporaryDirectory() as name:
        part = Path(name) / "part"
        data = write_part(args.data, part, TRAIN, TEST)
        for number, job in enumerate(JOBS, start=1):
            folder = Path(name) / str(number)
            folder.mkdir()
            command = [sys.executable, "-m", "cli.main", *job.words(part, folder, weights)]
            done = run_process(command, {"PYTHONPATH": str(ROOT)})
            found.append(times(json.loads(done.output)))
            said = ", ".join(f"{PHASES[phase]} {_told(pair)}" for phase, pair in found[-1].items())
            print(f"{number} of {len(JOBS)}: {job}: {said}", file=sys.stderr, flush=True)
    text = (
        f"{len(JOBS)} runs on {data}, {TEST} test images. Given is taken / expected, so above 1 a run took longer than "
        f"its plan said. Phases for which less than {SHORTEST:g} s was expected and taken are not judged; the worst is "
        "the ratio that is furthest from 1.\n\n"
        f"{table(['phase', 'runs', 'median', 'worst'], overview(found))}\n\n"
        "Seconds taken, of those expected (taken / expected); images × epochs:\n\n"
        f"{table(['run', *PHASES.values()], detail(JOBS, found))}"
    )
    print(text)
    if args.output:
        figures = {str(job): one for job, one in zip(JOBS, found, strict=True)}
        print(f"\nwritten: {write_result(args.output, 'estimate', about, text, figures)}")


if __name__ == "__main__":
    main()
