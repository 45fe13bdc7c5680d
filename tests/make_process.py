"""Commands in processes of their own, for tests that kill them; a fork server imports everything once for all.

Import with `from make_process import ...`. What a process prints is in `out.txt` and `err.txt` in its folder.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize  # what atexit is elsewhere: it runs as such a process ends
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

from cli.main import main
from finetune import cache, features

ROOT = Path(__file__).parents[1]
PHASES = {
    "run": {
        "features": "finetune/features.py compute_view",
        "steps": "finetune/fit.py Trainer.train_epoch",
        "checkpoint": "finetune/rundir.py RunDirectory.write_checkpoint",
        "files": "finetune/pipeline.py _finish",
    },
    "sweep": {
        "sweep-features": "finetune/sweep.py _features",
        "sweep-runs": "finetune/sweep.py _run",
        "sweep-choice": "finetune/sweep.py _test",
    },
    "export": {"export": "finetune/export.py export"},
}
"""The parts of each command in which it is killed, each the time that one function takes."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torchvision", "timm", "cli.main", "finetune.pipeline"])


def start(folder: Path, *words: str, prepare: Callable[[], object] | None = None) -> BaseProcess:
    """Start `finetune` with these words in a folder.

    Args:
        folder: where the process works; made when it is missing.
        words: the command line.
        prepare: called in the process before anything else; a function of a module, or a `functools.partial` of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    process = _context.Process(target=_command, args=(folder, words, torch.get_num_threads(), prepare), daemon=True)
    process.start()
    return process


def as_rank(rank: int, port: int, then: Callable[[], object] | None) -> None:
    """Be one of two processes of a run, as torchrun would say it; a `prepare` of `start`.

    Args:
        rank: 0 or 1.
        port: of a store on this machine, as torchrun has one.
        then: called after that.
    """
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.update(TORCHELASTIC_RUN_ID="test", TORCHELASTIC_USE_AGENT_STORE="True", MASTER_ADDR="127.0.0.1")
    if then is not None:
        then()


def finish(process: BaseProcess) -> int:
    """Wait for a process and return its exit code, which is minus the signal's number for one that was killed."""
    process.join()
    code = process.exitcode
    process.close()
    return 0 if code is None else code


def _command(folder: Path, words: tuple[str, ...], threads: int, prepare: Callable[[], object] | None) -> None:
    os.chdir(folder)
    for number, name in ((1, "out.txt"), (2, "err.txt")):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(threads)  # as many as here: sums over threads are otherwise added in another order
    if prepare is not None:
        prepare()
    sys.argv = ["finetune", *words]
    main()


def log_rows(path: Path, chunk_bytes: int) -> None:
    """Make chunks small, and append the number of rows to a file whenever the prefix has computed some."""
    cache.CHUNK_BYTES = chunk_bytes
    compute = features.compute_rows

    def logged(*arguments: Any) -> Any:
        rows = compute(*arguments)
        with path.open("a") as file:
            file.write(f"{len(rows[0])}\n")
        return rows

    features.compute_rows = logged


def rows_logged(path: Path) -> int:
    """Return how many rows `log_rows` has seen in all processes together."""
    return sum(int(line) for line in path.read_text().split()) if path.exists() else 0


@dataclass(frozen=True)
class Moment:
    """When to kill a run: some seconds after the n-th call of a function of this project within a phase."""

    phase: str
    call: int
    delay: float


def phase_of(seed: int) -> tuple[str, str]:
    """Return the command and the phase whose turn it is."""
    phases = [(command, phase) for command in PHASES for phase in PHASES[command]]
    return phases[seed % len(phases)]


def random_moment(seed: int, calls: dict[str, int]) -> Moment:
    """Draw a moment: seeds go through the phases in turn.

    Args:
        seed: of the draw.
        calls: how many calls an undisturbed process makes in each phase, as `count_calls` found.
    """
    draw = random.Random(seed)
    phase = phase_of(seed)[1]
    # Up to 5 ms on: about the time of writing and syncing a chunk or a file, so that kills fall into the middle of it.
    return Moment(phase, draw.randint(1, calls[phase]), draw.uniform(0, 0.005))


class _Watch:
    """A profile function that counts calls in each phase, and kills the process at one of them."""

    def __init__(self, command: str, moment: Moment | None) -> None:
        self.phases = {function: phase for phase, function in PHASES[command].items()}
        self.moment, self.calls, self.inside = moment, Counter[str](), list[str]()
        self.kill: threading.Thread | None = None
        self._known: dict[CodeType, tuple[bool, str | None]] = {}

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event not in ("call", "return"):
            return
        ours, phase = self._known.get(frame.f_code) or self._look_up(frame.f_code)
        if not ours:
            return
        if event == "return":
            if phase:
                self.inside.pop()
            return
        if phase:
            self.inside.append(phase)
        if self.inside:
            self.calls[self.inside[-1]] += 1
            if self.moment and (self.inside[-1], self.calls[self.inside[-1]]) == (self.moment.phase, self.moment.call):
                sys.setprofile(None)
                self.kill = threading.Thread(target=self._kill, args=(self.moment.delay,))
                self.kill.start()

    def _look_up(self, code: CodeType) -> tuple[bool, str | None]:
        path = Path(code.co_filename)
        ours = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("cli", "finetune", "weights")
        name = f"{path.relative_to(ROOT).as_posix()} {code.co_qualname}" if ours else ""
        self._known[code] = ours, self.phases.get(name)
        return self._known[code]

    @staticmethod
    def _kill(delay: float) -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)


def count_calls(command: str, path: Path, rows: Path, chunk_bytes: int) -> None:
    """Count the calls of each phase of a command, and write them to a file as the process ends."""
    log_rows(rows, chunk_bytes)
    watch = _Watch(command, None)
    Finalize(None, lambda: path.write_text("\n".join(f"{k} {n}" for k, n in watch.calls.items())), exitpriority=1)
    sys.setprofile(watch)


def kill_at(command: str, moment: Moment, rows: Path, chunk_bytes: int) -> None:
    """Let the process kill itself at a moment of a command; one that ends before the delay is over waits for it."""
    log_rows(rows, chunk_bytes)
    watch = _Watch(command, moment)
    Finalize(None, lambda: watch.kill and watch.kill.join(), exitpriority=1)
    sys.setprofile(watch)
