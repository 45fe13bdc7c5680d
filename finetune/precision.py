"""Number format and compilation, chosen by timing a few real steps.

What a CPU's flags promise and what it does differ: bf16 without AMX or AVX512-BF16 is slower than fp32. So each
candidate runs on real batches, and the fastest wins. Compiling is tried only when it would save more than it costs. The
outcome is remembered per machine, architecture, cut and torch version, so the next run asks the file and not the clock.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from finetune.device import synchronize
from weights.atomic import write_atomically
from weights.config import is_number
from weights.errors import RunError, UsageError
from weights.guard import read_json, refuse_link, told

# Compiling a folded ResNet-18 prefix gained 7 % where it gained least (docs/log.md); the first compile of a process
# takes tens of seconds, of which 30 is a cautious guess until it has been timed here.
COMPILE_GAIN = 0.06
COMPILE_SECONDS = 30.0

QUEUED_STEPS = 8  # in one timing on a GPU: enough that waiting for the last of them counts little

FROZEN_ADVICE = "end other programs that use it, or give a smaller --image-size or --device cpu"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Choice:
    """How one part of a run is computed.

    Attributes:
        precision: fp32 or bf16.
        compiled: whether through torch.compile.
        rate: images per second measured for the choice; 0 when nothing had to be timed.
        compile_seconds: what compiling took; 0 when not tried.
        reason: one clause for people.
        exact_rate: images per second in fp32, eager; 0 when that was not timed.
    """

    precision: str
    compiled: bool
    rate: float
    compile_seconds: float
    reason: str
    exact_rate: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of `precision`."""
        return DTYPES[self.precision]

    def __str__(self) -> str:
        return f"{self.precision}, {'compiled' if self.compiled else 'eager'}"


def choice_of(value: object) -> Choice:
    """Return a choice that was written down: in a checkpoint, or among remembered ones.

    Args:
        value: what `asdict` made of one.

    Raises:
        ValueError: it is none.
    """
    kinds = {item.name: str(item.type) for item in fields(Choice)}
    if not isinstance(value, dict) or not value.keys() <= kinds.keys():
        raise ValueError(f"{told(value)} is no choice of a number format")
    for name, kind in kinds.items():
        part = value.get(name, 0.0)  # exact_rate is younger than the others
        fits = is_number(part) if kind == "float" else isinstance(part, bool if kind == "bool" else str)
        if not fits:
            raise ValueError(f"its {name} is {told(part)}")
    choice = Choice(**value)
    if choice.precision not in DTYPES or min(choice.rate, choice.compile_seconds, choice.exact_rate) < 0:
        raise ValueError(f"{told(value)} is no choice of a number format")
    return choice


Candidate = Callable[[str, bool], Callable[[], None]]
"""build(precision, compiled) → a function that runs one timed step; raises when that cannot be built."""


def choose(
    build: Candidate,
    *,
    images_per_step: int,
    work: int,
    precision: str,
    compile_mode: str,
    compiler: str | None,
    device: torch.device,
    compilations: int = 1,
    fits: Callable[[str], int | None] | None = None,
    batch: int | None = None,
) -> Choice:
    """Time the candidates and return the fastest.

    Args:
        build: makes a step function for a precision and a compile flag.
        images_per_step: images in each step.
        work: images to be processed in the run, which decides whether compiling can pay.
        precision: auto, fp32 or bf16.
        compile_mode: auto, on or off.
        compiler: path of the C++ compiler, or None where there is none.
        device: where the steps run.
        compilations: sizes of input that will be met; each is compiled by itself.
        fits: given a precision, finds a smaller number of images of which a step runs; asked where no candidate fits.
        batch: images of a training step, of which `images_per_step` are one process's share; None for another step.

    Returns:
        The choice, its reason naming the rates of what was tried. A choice that was asked for is timed all the same,
        for the plan.

    Raises:
        UsageError: no candidate fits in the device's memory.
    """
    precisions = ["fp32", "bf16"] if precision == "auto" else [precision]
    rates: dict[str, float] = {}
    for name in precisions:
        try:
            rates[name] = images_per_step / step_seconds(build(name, False), device)
        except torch.OutOfMemoryError:
            rates[name] = 0.0  # the other format may need less
            torch.cuda.empty_cache()
        except (RuntimeError, NotImplementedError):
            if name == precisions[0]:
                raise
            rates[name] = 0.0  # an operation that this device does not have in bf16
    best = max(rates, key=rates.__getitem__)
    if not rates[best]:
        raise _too_large(images_per_step, batch, device, fits(precisions[-1]) if fits else None)
    told = ", ".join(f"{name} {rate:.0f} img/s" for name, rate in rates.items())
    eager = Choice(best, False, rates[best], 0.0, told, rates.get("fp32", 0.0))
    if compile_mode == "off":
        return eager
    if device.type == "cpu" and compiler is None:
        return replace(eager, reason=f"{told}; not compiled: no C++ compiler found (install g++ or clang++)")
    seconds = work / eager.rate
    if compile_mode == "auto" and seconds * COMPILE_GAIN < COMPILE_SECONDS * compilations:
        return replace(eager, reason=f"{told}; {seconds:.0f} s of work would not repay compiling")
    return _try_compiled(build, eager, images_per_step, compile_mode == "on", device)


def _too_large(images: int, batch: int | None, device: torch.device, fits: int | None) -> UsageError:
    """Return the error for steps that do not fit; `fits` is a share that does, as `images` is one of `batch`."""
    if batch is None:
        return _frozen_too_large(images, device, FROZEN_ADVICE)
    whole = 0 if fits is None else fits * -(-batch // images)
    advice = f"--batch-size {whole}, which was tried and fits," if whole else "a smaller --batch-size"
    return UsageError(
        f"A step of {batch} images needs more memory than {device} has; give {advice} or a smaller --image-size, or "
        "train fewer layers."
    )


def _frozen_too_large(images: int, device: torch.device, advice: str) -> UsageError:
    return UsageError(
        f"The frozen part takes {images} images at a time, which need more memory than {device} has; {advice}."
    )


@contextmanager
def frozen_part_named(images: int | None, device: torch.device, advice: str = FROZEN_ADVICE) -> Iterator[None]:
    """Say that the frozen part does not fit, where it runs by itself: how many images it takes nobody chooses.

    Args:
        images: that it takes at a time; None where there is none, or where something else may be at fault.
        device: where it runs.
        advice: what to do about it.

    Raises:
        UsageError: memory ran out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if images is None:
            raise
        raise _frozen_too_large(images, device, advice) from error


def largest_that_runs(build: Callable[[int], Callable[[], None]], images: int) -> int | None:
    """Return the largest of half, a quarter and so on of `images` of which a step fits in memory; None below two.

    Args:
        build: makes a step of so many images.
        images: too many.
    """
    while (images := images // 2) >= 2:
        try:
            build(images)()
            return images
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return None


def _try_compiled(build: Candidate, eager: Choice, images: int, forced: bool, device: torch.device) -> Choice:
    """Compile the fastest eager candidate and keep it when it is faster, or when it was asked for."""
    start = time.perf_counter()
    try:
        step = build(eager.precision, True)
        step()
    except Exception as error:  # whatever the compiler stack raises: the eager twin does the same work
        first = (str(error).splitlines() or [""])[0][:120]
        return replace(eager, reason=f"{eager.reason}; compiling failed ({type(error).__name__}: {first})")
    seconds = time.perf_counter() - start
    rate = images / step_seconds(step, device)
    reason = f"{eager.reason}, compiled {rate:.0f} img/s after {seconds:.0f} s"
    compiled = forced or rate > eager.rate
    # The time of compiling is spent by now; later runs find most of it in the compiler's own cache.
    return replace(
        eager, compiled=compiled, rate=rate if compiled else eager.rate, compile_seconds=seconds, reason=reason
    )


def compile_module(module: nn.Module) -> Callable[..., Any]:
    """Return a compiled twin of a module that shares its weights; compiling happens at the first call.

    Batches come in at most two sizes, and feature maps in at most three, so shapes are compiled as constants.
    """
    # Without a GPU the compiler warns that it found none, which is no news to anybody.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    compiled: Callable[..., Any] = torch.compile(module, dynamic=False)
    return compiled


def step_seconds(step: Callable[[], None], device: torch.device, *, repeats: int = 2) -> float:
    """Return the fastest of a few timings of `step`, after one that does not count.

    A GPU gets several steps at once, as in training, where the host runs ahead and does not wait for each of them.
    """
    steps = QUEUED_STEPS if device.type == "cuda" else 1
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(device)
        times.append((time.perf_counter() - start) / steps)
    return min(times[1:])


def remembered(cache_dir: Path, about: Mapping[str, Any], measure: Callable[[], Choice]) -> Choice:
    """Return the choice made earlier for the same situation, or measure and remember it.

    Args:
        cache_dir: the user's cache folder.
        about: everything that the choice depends on (machine, arch, cut, sizes, torch version, what was asked).
        measure: makes the choice when none is remembered.
    """
    key = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode()).hexdigest()[:32]
    path = cache_dir / "measurements" / f"{key}.json"
    try:
        choice = choice_of(read_json(path)["choice"])
        if choice.rate > 0:
            return choice
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing there, or nothing that can be believed: measure
    choice = measure()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        refuse_link(path.with_suffix(".lock"))
        with FileLock(path.with_suffix(".lock")):
            write_atomically(path, json.dumps({"about": dict(about), "choice": asdict(choice)}, indent=1).encode())
    except (OSError, RunError):
        return choice  # a cache folder that cannot be written costs the next run a few seconds, nothing else
    return choice


def forget(cache_dir: Path) -> int:
    """Delete all remembered choices, so that the next run measures anew; return how many there were."""
    found = list((cache_dir / "measurements").glob("*.json"))
    for path in found:
        path.unlink(missing_ok=True)
        path.with_suffix(".lock").unlink(missing_ok=True)
    return len(found)
