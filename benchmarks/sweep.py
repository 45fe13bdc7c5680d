"""`finetune sweep` of three cuts and three learning rates, against its nine runs made one by one without a cache.

    python benchmarks/sweep.py --data D --weights W --limit 10000 --output

Every command is a process of its own, timed from its start to its end. The sweep has an empty cache folder; the single
runs have `--cache off` and share what they remember of timed steps. Both begin with an empty compiler cache. The sweep
tests one run, so all but the last of the single runs leave the test images unread; with `--every-test` each reads them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, command_line, conditions, run_process, table, write_result

CUTS = ("fc", "layer4,fc", "layer3,layer4,fc")
RATES = "0.01,0.03,0.1"
BAR = 0.5
"""Share of the single runs' time that the sweep may take."""

Round = dict[str, Any]
"""sweep: seconds, peak (GiB), runs, features. alone: for each run its name, seconds, peak, val_accuracy."""


def common_words(args: argparse.Namespace) -> list[str]:
    """Return the options that both sides have."""
    words = ["--arch", args.arch, "--data", args.data, "--weights", args.weights, "--limit", str(args.limit)]
    words += ["--image-size", str(args.image_size)] if args.image_size else []
    words += ["--epochs", str(args.epochs)] if args.epochs else []
    words += ["--allow-missing", args.allow_missing] if args.allow_missing else []
    return [*words, "--device", "cpu", "--compile", args.compile, "--precision", args.precision]


def time_command(words: Sequence[str], folder: Path) -> tuple[dict[str, Any], float, float]:
    """Run one command of finetune; return what it prints as JSON, its seconds, and its peak memory in GiB."""
    command = [sys.executable, "-m", "cli.main", *words, "--cache-dir", str(folder / "cache"), "--json"]
    done = run_process(command, {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")})
    return json.loads(done.output), done.seconds, done.peak


def measure(args: argparse.Namespace, folder: Path) -> Round:
    """Time the sweep, then the single runs; what is measured is told at once, for it takes long."""
    cuts = [word for cut in args.train_layers for word in ("--train-layers", cut)]
    swept, seconds, peak = time_command(
        ["sweep", *common_words(args), *cuts, "--lr", args.lr, "--output", str(folder / "sweep")], folder / "swept"
    )
    tell(f"sweep: {seconds:,.0f} s")
    alone = []
    pairs = list(itertools.product(args.train_layers, args.lr.split(",")))
    for number, (cut, rate) in enumerate(pairs, start=1):
        hold = [] if args.every_test or number == len(pairs) else ["--hold-test"]
        words = ["run", *common_words(args), "--train-layers", cut, "--lr", rate, "--cache", "off", *hold]
        summary, own, most = time_command([*words, "--output", str(folder / f"run{number}")], folder / "single")
        alone.append({"name": f"{cut}, {rate}", "seconds": own, "peak": most, "val_accuracy": summary["val_accuracy"]})
        tell(f"run {number} of {len(pairs)} ({cut}, {rate}): {own:,.0f} s")
    runs = [{key: run[key] for key in ("name", "seconds", "val_accuracy")} for run in swept["runs"]]
    features = swept["seconds"]["features"]
    return {"sweep": {"seconds": seconds, "peak": peak, "runs": runs, "features": features}, "alone": alone}


def tell(text: str) -> None:
    """Say a line of progress."""
    print(text, file=sys.stderr, flush=True)


def told(args: argparse.Namespace, rounds: Sequence[Round]) -> str:
    """Return the result as text: the runs of the first round beside each other, and the whole of all rounds."""
    first = rounds[0]
    rows = [
        [one["name"], f"{one['seconds']:,.0f}", f"{run['seconds']:,.0f}", _percent(one), _percent(run)]
        for one, run in zip(first["alone"], first["sweep"]["runs"], strict=True)
    ]
    heading = ["layers, learning rate", "alone s", "in the sweep s", "val alone", "val in the sweep"]
    whole = [sum(one["seconds"] for one in found["alone"]) for found in rounds]
    swept = [found["sweep"]["seconds"] for found in rounds]
    shares = [part / full for part, full in zip(swept, whole, strict=True)]
    share = statistics.median(shares)
    verdict = "reached" if share < BAR else "missed"
    peaks = (
        max(found["sweep"]["peak"] for found in rounds),
        max(one["peak"] for found in rounds for one in found["alone"]),
    )
    totals = table(
        ["", "seconds", "of the single runs"],
        [
            ["single runs", f"{statistics.median(whole):,.0f}", "100 %"],
            ["sweep", f"{statistics.median(swept):,.0f}", f"{100 * share:.0f} %"],
            ["of it features", f"{statistics.median(found['sweep']['features'] for found in rounds):,.0f}", ""],
        ],
    )
    tests = "each of them reads the test images" if args.every_test else "one of them reads the test images"
    return (
        f"{args.arch}, {args.limit:,} training images of {args.data}, {len(rounds)} round(s); single runs with --cache "
        f"off, {tests}. The sweep should take less than {100 * BAR:.0f} %: {verdict}. Memory at its peak: sweep "
        f"{peaks[0]:.1f} GiB, single runs {peaks[1]:.1f} GiB.\n\n{totals}\n\nSeconds of a single run are those of its "
        f"process; those in the sweep are without its features.\n\n{table(heading, rows)}"
    )


def _percent(run: dict[str, Any]) -> str:
    return "diverged" if run["val_accuracy"] is None else f"{run['val_accuracy']:.2f} %"


def read_options() -> argparse.Namespace:
    """Read and check the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train-layers", nargs="+", action="extend", help=f"cuts (default: {'; '.join(CUTS)})")
    add("--lr", default=RATES, help=f"learning rates (default: {RATES})")
    add("--arch", default="resnet18", help="any timm name (default: resnet18)")
    add("--data", default="shapes100", help="as for finetune run (default: shapes100)")
    add("--weights", default="none", help="as for finetune run (default: none)")
    add("--allow-missing", default="", help="as for finetune run")
    add("--limit", type=int, default=10_000, help="training images (default: 10000)")
    add("--epochs", type=int, help="default: as finetune run chooses")
    add("--image-size", type=int, default=224, help="input side in pixels (default: 224)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="as for finetune run (default: auto)")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="as for finetune run (default: auto)")
    add("--rounds", type=int, default=1, help="how often everything is measured (default: 1)")
    add("--every-test", action="store_true", help="each single run reads the test images")
    add("--output", type=Path, nargs="?", const=RESULTS, help="write a dated result (default: benchmarks/results)")
    args = parser.parse_args()
    args.train_layers = list(dict.fromkeys(args.train_layers or CUTS))
    if args.rounds < 1 or args.limit < 1:
        parser.error("--rounds and --limit must be at least 1")
    return args


def main() -> None:
    """Run all rounds, print the tables, and write the result."""
    args = read_options()
    about = {**conditions(), "command": command_line()}
    rounds = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(measure(args, Path(folder)))
    shown = argparse.Namespace(**{**vars(args), "data": Path(args.data).name})
    text = told(shown, rounds)
    print(text)
    if args.output:
        print(f"written: {write_result(args.output, 'sweep', about, text, rounds)}")


if __name__ == "__main__":
    main()
