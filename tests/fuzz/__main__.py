"""Fuzz every reader for a while: `make fuzz`, or `PYTHONPATH=tests python -m fuzz --seconds 600`.

Each target has its turn in a process of its own, so that one that is killed, or takes all memory, is a finding and not
the end. Counts, inputs that reached new lines, and findings are kept in a folder; the next run goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fuzz.built import STRATEGIES
from fuzz.place import Place
from fuzz.targets import targets
from fuzz.watch import Turn

from weights.errors import FinetuneError

TURN = 6.0  # seconds of a target before the next has its turn


def main() -> int:
    """Fuzz, and return how many findings there are."""
    options = argparse.ArgumentParser(prog="fuzz", description=__doc__.splitlines()[0])
    options.add_argument("--seconds", type=float, default=float(os.environ.get("FUZZ_SECONDS", "600")))
    options.add_argument("--state", type=Path, default=Path("build/fuzz"), help="Folder of counts and findings.")
    options.add_argument("--only", default="", help="Part of the names of targets.")
    given = options.parse_args()
    place = Place()
    try:
        readers = {target.name: target for target in targets(place)}
        for target in readers.values():  # what is computed once per process is computed before there are children
            with suppress(FinetuneError):
                target.read(target.seeds[0])
        built = [replace(readers[name], name=f"{name}, built", built=made) for name, made in STRATEGIES.items()]
        chosen = [target for target in (*readers.values(), *built) if given.only in target.name]
        state = _State(given.state)
        end = time.monotonic() + given.seconds
        while chosen and (left := end - time.monotonic()) > 0:
            target = min(chosen, key=lambda one: state.of(one.name)["seconds"])
            row = state.of(target.name)
            folder = given.state / "corpus" / target.name.replace(" ", "-")
            found = _in_a_process(Turn(target, place, folder, row["inputs"]), min(TURN, left))
            state.add(target.name, found)
            print(f"{target.name:<22} {row['inputs']:>10,} inputs, {row['lines']:>4} lines", flush=True)
        print(f"{state.total():,} inputs in all, {state.findings()} findings in {given.state}")
        return min(state.findings(), 100)
    finally:
        place.remove()


class _State:
    """Counts of all runs so far, in state.json."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "state.json"
        self.rows: dict[str, dict[str, float]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def of(self, name: str) -> dict[str, float]:
        return self.rows.setdefault(name, {"inputs": 0, "seconds": 0.0, "refused": 0, "lines": 0, "findings": 0})

    def add(self, name: str, found: dict[str, float]) -> None:
        row = self.of(name)
        for key in ("inputs", "seconds", "refused", "findings"):
            row[key] += found.get(key, 0)
        row["lines"] = max(row["lines"], found.get("lines", 0))
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.rows, indent=1))
        beside.replace(self.path)

    def total(self) -> int:
        return int(sum(row["inputs"] for row in self.rows.values()))

    def findings(self) -> int:
        return int(sum(row["findings"] for row in self.rows.values()))


def _in_a_process(turn: Turn, seconds: float) -> dict[str, float]:
    """Give a target its turn in a child; what it was at when it died is a finding."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            os.write(writing, json.dumps(turn.run(seconds)).encode())
            code = 0
        except KeyboardInterrupt:
            code = 0
        except BaseException:  # a fault of the fuzzing itself: what a reader raises is a finding that the turn returns
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    started = time.monotonic()
    try:
        with os.fdopen(reading, "rb") as answers:
            answer = answers.read()
        status = os.waitpid(child, 0)[1]
    except KeyboardInterrupt:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    if answer:
        found: dict[str, float] = json.loads(answer)
        return found
    turn.keep_current(f"ended with status {status}")
    return {"seconds": time.monotonic() - started, "findings": 1}


if __name__ == "__main__":
    sys.exit(main())
