"""One target's turn: inputs made and read, with an eye on memory, time, files written and programs started."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from fuzz.mutate import mutated
from fuzz.place import Place, Target
from hypothesis import HealthCheck, Phase, given, seed, settings
from PIL import Image

from finetune.decode import set_warnings
from weights.errors import FinetuneError

MEMORY = 2**30  # bytes beyond what the process has when it begins
PATIENCE = 10.0  # seconds for one input
GUIDED = 16  # every so many inputs, one is watched for lines that no other has reached: that takes ten times as long
PIXELS = 2**20  # Pillow's limit while fuzzing: what an image claims below it is decoded
PACKAGES = tuple(str(Path(__file__).parents[2] / name) + os.sep for name in ("finetune", "weights"))

STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile", "ctypes.dlopen")
WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate")


class Stuck(BaseException):
    """An input took longer than `PATIENCE`."""


class Turn:
    """A target's turn.

    Args:
        target: what is fuzzed.
        place: where it may write.
        folder: corpus and findings of the target.
        number: of the first input, counted over all turns.
    """

    def __init__(self, target: Target, place: Place, folder: Path, number: float) -> None:
        self.target, self.place, self.folder, self.number = target, place, folder, int(number)
        self.watched = False
        self.done: list[str] = []  # what the reader did that it must not do
        self.current = place.folder / "current"

    def run(self, seconds: float) -> dict[str, float]:
        """Read inputs for a while.

        Returns:
            inputs, seconds, refused (ended with an error of the project), lines (of the packages reached), findings.
        """
        self._limit()
        corpus = [*self.target.seeds, *(path.read_bytes() for path in sorted(self.folder.glob("*.seen")))]
        lines: set[tuple[str, int]] = set()
        for content in corpus:
            self._reached(content, lines)
        counts = {"inputs": 0, "refused": 0, "findings": 0}
        started = time.monotonic()
        if self.target.built is not None:
            self._build(started + seconds, counts)
        while time.monotonic() - started < seconds:
            generator = random.Random(f"{self.target.name} {self.number}")
            content = mutated(generator, corpus, self.target.words)
            guided = self.number % GUIDED == 0
            before = len(lines)
            outcome = self._reached(content, lines) if guided else self._outcome(content)
            if guided and len(lines) > before:
                corpus.append(content)
                self._keep(content, "seen")
            counts["inputs"] += 1
            counts["refused"] += outcome == "refused"
            counts["findings"] += outcome == "finding"
            self.number += 1
        return {**counts, "seconds": time.monotonic() - started, "lines": len(lines)}

    def _build(self, end: float, counts: dict[str, int]) -> None:
        """Read what hypothesis builds, some hundreds at a time."""

        def read(content: bytes) -> None:
            if time.monotonic() < end:
                outcome = self._outcome(content)
                counts["inputs"] += 1
                counts["refused"] += outcome == "refused"
                counts["findings"] += outcome == "finding"
                self.number += 1

        built = self.target.built
        rules = settings(
            max_examples=500,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        while built is not None and time.monotonic() < end:
            seed(self.number)(rules(given(built)(read)))()

    def _limit(self) -> None:
        """Bound memory and time of this process, and watch what it does."""
        torch.set_num_threads(1)
        Image.MAX_IMAGE_PIXELS = PIXELS
        warnings.simplefilter("ignore")
        set_warnings()
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGALRM, _stuck)
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watched:
            return
        if event.startswith(STARTS) or event.startswith("socket.connect"):
            self.done.append(f"{event} {arguments!r:.200}")
        elif (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ) or event in WRITES:
            self._inside(event, arguments[0])

    def _inside(self, event: str, path: object) -> None:
        if not isinstance(path, str | bytes | os.PathLike) or not os.path.realpath(os.fsdecode(path)).startswith(
            str(self.place.folder)
        ):
            self.done.append(f"{event} {path!r:.200}")

    def _outcome(self, content: bytes) -> str:
        """Read one input: "read", "refused" or "finding"."""
        self.current.write_bytes(content)
        self.done.clear()
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        outcome, words = "read", ""
        try:
            self.watched = True
            self.target.read(content)
        except FinetuneError as error:
            outcome = "refused"
            if "\n" in str(error) or len(str(error)) > 3000:
                outcome, words = "finding", f"a message of {len(str(error))} letters: {error!s:.3000}"
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # whatever it is, the project must not raise it
            outcome, words = "finding", traceback.format_exc()
        finally:
            self.watched = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        if self.done:
            outcome, words = "finding", "\n".join([*self.done, words])
        if outcome == "finding":
            self._keep(content, "finding", words)
        return outcome

    def _reached(self, content: bytes, lines: set[tuple[str, int]]) -> str:
        """Read one input and note the lines of the packages that it reaches."""

        def inner(frame: FrameType, event: str, _: object) -> Callable[..., Any]:
            lines.add((frame.f_code.co_filename, frame.f_lineno))
            return inner

        def outer(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
            return inner if frame.f_code.co_filename.startswith(PACKAGES) else None

        sys.settrace(outer)
        try:
            return self._outcome(content)
        finally:
            sys.settrace(None)

    def keep_current(self, words: str) -> None:
        """Keep the input that a process died of."""
        self._keep(self.current.read_bytes() if self.current.exists() else b"", "finding", words)

    def _keep(self, content: bytes, kind: str, words: str = "") -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{hashlib.sha256(content).hexdigest()[:16]}.{kind}"
        path.write_bytes(content)
        if words:
            path.with_suffix(".txt").write_text(words)


def _stuck(*_: object) -> None:
    raise Stuck
