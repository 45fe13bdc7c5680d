"""A hundred SIGKILLs, each followed by the same command or its --resume, which has to leave the undisturbed bytes.

    .venv/bin/python tests/kills.py --kills 100 --seconds 150

What passed is kept in a file, so that a call that ran out of its time, or was itself killed, is gone on with by the
next one. Kills of other code, or with other packages, do not count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import time
import traceback
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from make_kills import Kills
from make_process import ROOT, phase_of

BUILD = ROOT / "build"
FIRST = 8  # as in test_kills.py


def fingerprint() -> str:
    """Return a hash of everything that a kill tries, the packages' versions included."""
    digest = hashlib.sha256()
    for folder in ("cli", "finetune", "weights"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    for name in ("make_kills", "make_process", "make_data", "make_run"):
        digest.update((ROOT / "tests" / f"{name}.py").read_bytes())
    digest.update(" ".join(version(name) for name in ("torch", "timm", "safetensors", "filelock")).encode())
    return digest.hexdigest()[:16]


def read_passed(state: Path, code: str) -> dict[int, dict[str, Any]]:
    """Return the kills that passed, by seed."""
    passed = {}
    for line in state.read_text().splitlines() if state.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut short by a kill of this program
        if row["code"] == code:
            passed[row["seed"]] = row
    return passed


def main() -> int:
    """Kill until all have passed or the time is over; return 0, 1 where one failed, or 3 where some are left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how many in all (default: 100)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after this time (default: never)")
    parser.add_argument("--state", type=Path, default=BUILD / "kills.jsonl", help="what passed (build/kills.jsonl)")
    given = parser.parse_args()
    begun, code = time.monotonic(), fingerprint()
    passed, failed = read_passed(given.state, code), list[int]()
    place = BUILD / f"kills-{code}"
    place.mkdir(parents=True, exist_ok=True)
    given.state.parent.mkdir(parents=True, exist_ok=True)
    kills = Kills(place)
    for seed in range(FIRST, FIRST + given.kills):
        if seed in passed:
            continue
        if time.monotonic() - begun > given.seconds:
            print(f"{len(passed)} of {given.kills} passed so far; call this again to go on.")
            return 3
        folder, phase, start = place / str(seed), phase_of(seed)[1], time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        try:
            kills.kill(seed, folder)
        except AssertionError:
            failed.append(seed)
            print(f"seed {seed:3}  {phase:14}  FAILED, kept in {folder}\n{traceback.format_exc()}", flush=True)
            continue
        shutil.rmtree(folder)
        took = round(time.monotonic() - start, 1)
        passed[seed] = {"code": code, "seed": seed, "phase": phase, "seconds": took}
        with given.state.open("a") as file:
            file.write(json.dumps(passed[seed]) + "\n")
        print(f"seed {seed:3}  {phase:14}  {took:5.1f} s  {len(passed)} of {given.kills}", flush=True)
    shutil.rmtree(place) if not failed else None
    by_phase = Counter(row["phase"] for row in passed.values())
    seconds = sum(row["seconds"] for row in passed.values())
    print(f"{len(passed)} of {given.kills} kills passed in {seconds:.0f} s: {json.dumps(by_phase)}")
    print(f"code {code}, Python {platform.python_version()}, torch {version('torch')}, {os.cpu_count()} cores")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
