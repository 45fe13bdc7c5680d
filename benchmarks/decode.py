"""Time the decoding of a folder of photos: finetune's against torchvision's ImageFolder behind a DataLoader.

    python benchmarks/decode.py
    python benchmarks/decode.py --photos 4000 --rounds 5 --output

The photos are drawn by this program, as JPEG files whose detail falls off as in real ones. Both sides read the same
files and end with the same pixels: shorter side to --image-size, centre square, uint8. Each pass runs in a process of
its own, in turn, and medians are compared. The files have just been written, so both read them from memory. finetune
reads them a second time besides, as the next command on them does: from its cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import RESULTS, command_line, conditions, run_process, table, write_result

OURS, AGAIN, THEIRS = "finetune", "finetune-again", "torchvision"
CLASSES = 4
OCTAVES = 7
"""Grids that a photo is a sum of, from 4 points across to 4 * 2^6 = 256: finer ones are left to the sensor's noise."""

SENSOR_NOISE = 5.0  # standard deviation in grey levels of 255
QUALITY = 95  # of the JPEG files

NEAR = 2.0
"""Grey levels by which the mean over all pixels may differ between the two sides before the comparison is refused."""

Measured = dict[str, Any]


def draw_photos(folder: Path, count: int, width: int, height: int) -> int:
    """Write JPEG photos into `CLASSES` class folders.

    Each is a sum of random grids, every one twice as fine as the last and half as strong (as the detail of natural
    images falls off), with a little noise.

    Args:
        folder: made when it is missing.
        count: how many photos.
        width: of each, in pixels.
        height: of each, in pixels.

    Returns:
        Bytes of all files.
    """
    import numpy as np
    from PIL import Image

    random, total = np.random.default_rng(0), 0
    for number in range(count):
        picture = np.full((height, width, 3), 128.0)
        for octave in range(OCTAVES):
            across = 4 * 2**octave
            grid = random.integers(0, 256, (max(1, across * height // width), across, 3)).astype(np.uint8)
            grown = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
            picture += (np.asarray(grown, dtype=np.float64) - 128) / 2**octave
        picture += random.normal(0, SENSOR_NOISE, picture.shape)
        path = folder / f"class_{number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)
        total += path.stat().st_size
    return total


def decode_ours(folder: Path, size: int) -> Measured:
    """Decode a folder as `finetune run` does: list, decode in threads, all images in one array.

    Returns:
        seconds, images, and the mean of all pixels.
    """
    from finetune.folder import read_folder

    start = time.perf_counter()
    raw = read_folder(folder, image_size=size, progress=lambda *_: None)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "images": len(raw.train), "mean": raw.train.images[:].double().mean().item()}


def decode_again(folder: Path, size: int) -> Measured:
    """Read a folder as `finetune run` does the second time; the first time fills the cache, and does not count.

    Returns:
        seconds, images, and the mean of all pixels.
    """
    from finetune import decoded
    from finetune.folder import read_folder

    decoded.LEAST_SECONDS = 0.0  # few photos are kept too
    with tempfile.TemporaryDirectory() as cache:
        notes: list[str] = []
        kept = decoded.DecodedCache(Path(cache), 10**12, notes.append)
        time.sleep(decoded.SETTLED_SECONDS)  # files that have just been written are not kept
        read_folder(folder, image_size=size, kept=kept)
        start = time.perf_counter()
        raw = read_folder(folder, image_size=size, progress=lambda *_: None, kept=kept)
        seconds = time.perf_counter() - start
    if len(notes) != 1:
        raise SystemExit(f"the second reading did not use the cache: {notes}")
    return {"seconds": seconds, "images": len(raw.train), "mean": raw.train.images[:].double().mean().item()}


def decode_theirs(folder: Path, size: int, workers: int, batch: int) -> Measured:
    """Decode a folder as scripts do: one pass over a DataLoader. Nothing in it comes from finetune.

    `PILToTensor` keeps bytes, as finetune does; the conversion to floats that scripts make there is left out.

    Returns:
        seconds, images, and the mean of all pixels.
    """
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
    start = time.perf_counter()
    data = ImageFolder(str(folder), transforms.Compose(steps))
    batches = [images for images, _ in DataLoader(data, batch_size=batch, num_workers=workers)]
    seconds = time.perf_counter() - start
    count = sum(len(images) for images in batches)
    mean = sum(images.double().mean().item() * len(images) for images in batches) / count
    return {"seconds": seconds, "images": count, "mean": mean}


def step(args: argparse.Namespace) -> Measured:
    """Carry out one step of the whole, in this process."""
    if args.step == "draw":
        size = draw_photos(args.folder, args.photos, args.width, args.height)
        return {"bytes": size, "conditions": conditions()}
    if args.step == OURS:
        return decode_ours(args.folder, args.image_size)
    if args.step == AGAIN:
        return decode_again(args.folder, args.image_size)
    return decode_theirs(args.folder, args.image_size, args.workers, args.batch_size)


def in_process(args: argparse.Namespace, name: str, folder: Path) -> Measured:
    """Run one step in a process of its own; return what it measured, with its peak memory."""
    options = {
        "--step": name, "--folder": folder, "--photos": args.photos, "--width": args.width, "--height": args.height,
        "--image-size": args.image_size, "--workers": args.workers, "--batch-size": args.batch_size,
    }  # fmt: skip
    done = run_process([sys.executable, __file__, *(str(word) for pair in options.items() for word in pair)])
    measured: Measured = json.loads(done.output.splitlines()[-1])
    return {**measured, "memory": done.peak}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[Measured]]:
    """Run both sides in turn, `--rounds` times, the one that begins changing from round to round.

    Raises:
        SystemExit: the two sides did not decode the same.
    """
    found: dict[str, list[Measured]] = {OURS: [], AGAIN: [], THEIRS: []}
    for number in range(args.rounds):
        for name in (OURS, AGAIN, THEIRS) if number % 2 == 0 else (THEIRS, AGAIN, OURS):
            found[name].append(in_process(args, name, folder))
            print(f"round {number + 1} of {args.rounds}: {name} done", file=sys.stderr, flush=True)
    ours, theirs = found[OURS][0], found[THEIRS][0]
    if ours["images"] != theirs["images"] or abs(ours["mean"] - theirs["mean"]) > NEAR:
        raise SystemExit(
            f"finetune decoded {ours['images']} images of mean {ours['mean']:.2f}, torchvision {theirs['images']} of "
            f"mean {theirs['mean']:.2f}; expected the same, so their times cannot be compared."
        )
    return found


def show(found: dict[str, list[Measured]], workers: int) -> str:
    """Return the table in Markdown, and the ratio."""
    rows = []
    titles = {
        OURS: "finetune",
        AGAIN: "finetune, from its cache",
        THEIRS: f"torchvision, DataLoader, {workers} workers",
    }
    for name, title in titles.items():
        rates = [one["images"] / one["seconds"] for one in found[name]]
        memory = statistics.median(one["memory"] for one in found[name])
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        rows.append([title, f"{statistics.median(rates):,.0f}", spread, f"{memory:.2f}"])
    each = [theirs["seconds"] / ours["seconds"] for ours, theirs in zip(found[OURS], found[THEIRS], strict=True)]
    middle = {name: statistics.median(one["seconds"] for one in rounds) for name, rounds in found.items()}
    ratio, again = middle[THEIRS] / middle[OURS], middle[OURS] / middle[AGAIN]
    return (
        table(["", "images/s", "single rounds", "memory GiB"], rows)
        + f"\n\nfinetune decodes {ratio:.2f} times as fast (single rounds {min(each):.2f} to {max(each):.2f}), and the "
        f"next command reads them {again:.0f} times as fast as it decoded them."
    )


def introduction(args: argparse.Namespace, size: int) -> str:
    """Return what was measured, in a paragraph."""
    few = "" if args.rounds >= 3 else f" Medians of {args.rounds} are no result: three rounds are the least."
    return (
        f"{args.photos:,} JPEG photos of {args.width} × {args.height}, {size / args.photos / 1000:.0f} kB on average, "
        f"to {args.image_size} × {args.image_size}; medians of {args.rounds}, in turn, imports not counted. "
        f"Each pass ends with all images in memory as bytes.{few}"
    )


def read_options() -> argparse.Namespace:
    """Read and check the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--photos", type=int, default=2000, help="how many photos are drawn (default: 2000)")
    add("--width", type=int, default=500, help="of a photo (default: 500)")
    add("--height", type=int, default=375, help="of a photo (default: 375)")
    add("--image-size", type=int, default=224, help="side of the decoded squares (default: 224)")
    add("--workers", type=int, default=2, help="processes of the DataLoader (default: 2)")
    add("--batch-size", type=int, default=64, help="of the DataLoader (default: 64)")
    add("--rounds", type=int, default=3, help="how often each side runs (default: 3)")
    add("--output", type=Path, nargs="?", const=RESULTS, help="write a dated result (default: benchmarks/results)")
    add("--step", choices=("draw", OURS, AGAIN, THEIRS), help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.photos < CLASSES or min(args.width, args.height, args.image_size, args.batch_size, args.rounds) < 1:
        parser.error(f"--photos must be at least {CLASSES}, and every other number at least 1")
    if args.workers < 0:
        parser.error("--workers must be at least 0")
    return args


def main() -> None:
    """Draw the photos, run all rounds, print the table, and write the result."""
    args = read_options()
    if args.step:
        print(json.dumps(step(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        drawn = in_process(args, "draw", Path(folder))
        about = {**drawn["conditions"], "command": command_line()}
        print(introduction(args, drawn["bytes"]), end="\n\n", flush=True)
        found = measure(args, Path(folder))
    print(text := show(found, args.workers))
    if args.output:
        text = f"{introduction(args, drawn['bytes'])}\n\n{text}"
        print(f"written: {write_result(args.output, 'decode', about, text, found)}")


if __name__ == "__main__":
    main()
