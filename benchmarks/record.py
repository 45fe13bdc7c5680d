"""What a benchmark's figures stand on: the conditions, the peak memory of a process, and dated result files."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SAMPLE_SECONDS = 1.0  # reading a process's shares of its pages takes some 10 ms per GiB: once a second disturbs little


@dataclass(frozen=True)
class Finished:
    """A process that has ended.

    Attributes:
        output: its standard output.
        seconds: from start to end.
        peak: the most memory that it and its children held together, in GiB.
    """

    output: str
    seconds: float
    peak: float


def run_process(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Finished:
    """Run a process to its end and watch its memory.

    The peak is the larger of two: the sum over the process tree, sampled once a second, pages that are shared being
    split among those that share them (Linux only); and the largest process's own peak, which the system keeps exactly.
    The second may be as large as this process itself, from which the new one was forked: keep this one small.

    Args:
        command: the program and its arguments.
        environment: variables to add.

    Raises:
        SystemExit: it failed; with the end of what it wrote to standard error.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors, env={**os.environ, **(environment or {})})
        sampled, due = 0, 0.0
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            if time.perf_counter() >= due:
                sampled = max(sampled, _tree_bytes(process.pid))
                due = time.perf_counter() + SAMPLE_SECONDS
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            tail = "\n".join(errors.read().splitlines()[-15:])
            raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}:\n{tail}")
        largest = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes, Linux KiB
        return Finished(output.read(), seconds, max(sampled, largest) / 2**30)


def _tree_bytes(pid: int) -> int:
    """Return the memory of a process and its children, shared pages counted once; 0 where that cannot be known."""
    total = 0
    with suppress(psutil.Error, OSError):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error, OSError):
                total += int(getattr(process.memory_full_info(), "pss", 0))
    return total


def conditions() -> dict[str, str]:
    """Return what a figure measured here and now depends on. Imports torch."""
    import torch

    from finetune.device import device_name

    return {
        "date": date.today().isoformat(),
        "command": command_line(),
        "commit": commit(),
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "system": f"{platform.system()} {platform.machine()}, {psutil.virtual_memory().total / 2**30:.0f} GiB memory",
        "versions": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm")),
        "load before": ", ".join(f"{load:.1f}" for load in os.getloadavg()) + " (1, 5, 15 minutes)",
    }


def command_line() -> str:
    """Return the command that this process was started with."""
    return shlex.join(["python", *map(_without_folders, sys.argv)])


def _without_folders(argument: str) -> str:
    """Shorten an absolute path, so that a result tells nothing of one machine's folders."""
    path = Path(argument)
    if path.is_absolute():
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else f".../{path.name}"
    return argument


def commit() -> str:
    """Return the short commit, with a remark when files differ from it; "unknown" outside a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = " with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up in plain text; all but the first are set right."""
    widths = [max(2, *(len(row[column]) for row in (heading, *rows))) for column in range(len(heading))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(heading), line(rule), *map(line, rows)])


def write_result(folder: Path, name: str, about: Mapping[str, str], text: str, figures: Any) -> Path:
    """Write DATE-NAME.md for people and DATE-NAME.json with every measurement; existing files are never replaced.

    Args:
        folder: made when it is missing.
        name: of the benchmark.
        about: what `conditions` returned.
        text: the tables, in Markdown.
        figures: plain values.

    Returns:
        The Markdown file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem, number = f"{about['date']}-{name}", 1
    while (folder / f"{stem}.md").exists() or (folder / f"{stem}.json").exists():
        number += 1
        stem = f"{about['date']}-{name}-{number}"
    rows = [f"- {key}: {value}" for key, value in about.items() if key not in ("date", "command")]
    head = [f"# {name}, {about['date']}", "", f"    {about['command']}", "", *rows]
    tail = f"Every measurement: [{stem}.json]({stem}.json)."
    (folder / f"{stem}.md").write_text("\n".join([*head, "", text, "", tail, ""]), encoding="utf-8")
    raw = json.dumps({"conditions": dict(about), "figures": figures}, indent=1)
    (folder / f"{stem}.json").write_text(raw + "\n", encoding="utf-8")
    return folder / f"{stem}.md"
