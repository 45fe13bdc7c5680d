"""Small runs one after the other in one process, through the Python interface: do memory, files and threads stay flat?

    .venv/bin/python tests/soak.py --seconds 1200

A round is a run with features of its own, `finetune.load` and predictions, an evaluation, and an export as
safetensors. After each, the process's resident memory, open files and threads are written down. The first half of the
rounds is for warming up: allocators and PyTorch's own caches grow in it. Over the second half a straight line is laid
through each figure; what it rises by from end to end is the verdict.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import torch
from make_data import make_images, write_cifar100_python
from make_run import TINY, TRAINED, write_weights

import finetune
from finetune.evaluate import evaluate
from finetune.export import export
from finetune.trained import load_trained

LIMITS = {"rss_mb": 8.0, "files": 0.5, "threads": 0.5}
"""What each may rise by over the second half: memory by what allocators leave behind, the others by nothing."""

LEAST_ROUNDS = 20


@dataclass(frozen=True)
class Sample:
    """The process after a round."""

    second: float
    rss_mb: float
    files: int
    threads: int


def rises(samples: Sequence[Sample]) -> dict[str, float]:
    """Return by how much a line through the second half of the samples rises over that half, for each figure."""
    half = samples[len(samples) // 2 :]
    places = np.arange(len(half))
    slopes = {name: np.polyfit(places, [getattr(one, name) for one in half], 1)[0] for name in LIMITS}
    return {name: float(slope * (len(half) - 1)) for name, slope in slopes.items()}


def one_round(folder: Path, data: Path, weights: Path) -> None:
    """Train, predict, evaluate and export; the folder is gone afterwards."""
    result = finetune.run(
        arch="test_resnet",
        train_layers=TRAINED["test_resnet"],
        data=data,
        weights=weights,
        cache_dir=folder / "cache",
        output=folder / "run",
        **TINY,
    )
    images = [np.full((32, 32, 3), level, dtype=np.uint8) for level in range(0, 250, 25)]
    finetune.load(result.folder, device="cpu").predict(images)
    evaluate(load_trained(result.folder), device="cpu").as_dict()
    export(load_trained(result.folder), "safetensors", folder / "model.safetensors")
    shutil.rmtree(folder)


def sample(begun: float) -> Sample:
    """Look at this process."""
    gc.collect()
    process = psutil.Process()
    rss = process.memory_info().rss / 2**20
    return Sample(round(time.monotonic() - begun, 1), round(rss, 2), process.num_fds(), process.num_threads())


def main() -> int:
    """Run rounds until the time is over; return 0 when everything stayed flat, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    seconds = float(os.environ.get("SOAK_SECONDS", "1200"))
    parser.add_argument("--seconds", type=float, default=seconds, help="$SOAK_SECONDS, else 1200")
    parser.add_argument("--samples", type=Path, help="write a JSON line per round here")
    given = parser.parse_args()
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="finetune-soak-") as name:
        root = Path(name)
        write_cifar100_python(root / "cifar", made=make_images(64, 20))
        weights = write_weights(root / "test_resnet.safetensors")
        begun = time.monotonic()
        while time.monotonic() - begun < given.seconds or len(samples) < LEAST_ROUNDS:
            (root / "round").mkdir()
            one_round(root / "round", root / "cifar", weights)
            samples.append(sample(begun))
            if given.samples:
                with given.samples.open("a") as file:
                    file.write(json.dumps(asdict(samples[-1])) + "\n")
            if len(samples) % 20 == 0:
                print(f"round {len(samples)}  {json.dumps(asdict(samples[-1]))}", flush=True)
    found = rises(samples)
    flat = True
    print(
        f"{len(samples)} rounds in {samples[-1].second:.0f} s; rise over the last {len(samples) - len(samples) // 2}:"
    )
    for name, limit in LIMITS.items():
        flat &= found[name] < limit
        values = [getattr(one, name) for one in samples]
        print(
            f"{name:8}  first {values[0]:g}, half-way {values[len(values) // 2]:g}, last {values[-1]:g}; rise "
            f"{found[name]:+.2f}, less than {limit:g} expected: {'flat' if found[name] < limit else 'NOT FLAT'}"
        )
    threads = torch.get_num_threads()
    print(f"Python {platform.python_version()}, torch {version('torch')}, {threads} threads, {platform.system()}")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
