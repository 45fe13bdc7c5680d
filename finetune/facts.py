"""What `finetune doctor` looks at: libraries, machine, folders, caches, servers. Facts alone; `doctor` judges them.

Nothing here imports PyTorch or what needs it: `probe` does, in a process of its own.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from finetune import probe
from finetune.installed import Installed, installed
from finetune.machine import Cores, cores, cpu_flags, cpu_name, find_compiler, free_memory, user_cache
from finetune.storage import Cache, Folder, caches, folders
from weights.reach import unreachable

PROBE_SECONDS = 120.0  # importing takes seconds; from a network drive it may take a minute
COMPILE_SECONDS = 300.0
REACH_SECONDS = 5.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Compiling:
    """What came of a tiny torch.compile.

    Attributes:
        tried: whether it was.
        device: cpu or cuda.
        seconds: it took.
        error: why it does not work, "" when it does.
    """

    tried: bool
    device: str
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Facts:
    """All of it.

    Attributes:
        python: version.
        installed: libraries.
        torch: what `probe.facts` says, {} when PyTorch does not import.
        torch_error: why it does not.
        cpu: name of the processor.
        flags: of the processor; none where they cannot be read.
        cores: how many, and how many of them are usable.
        thread_variables: environment variables that set the number of threads.
        driver: whether there is an NVIDIA driver.
        compiler: path of the C++ compiler, None without one.
        compiling: whether torch.compile works.
        memory: bytes of the machine.
        memory_free: bytes that can be had.
        folders: that a run writes to.
        caches: what is kept.
        model_directory: what $FINETUNE_WEIGHTS names, None without it.
        sources: server → why it cannot be reached, "" when it can; None when nobody asked.
    """

    python: str
    installed: Installed
    torch: Mapping[str, Any]
    torch_error: str
    cpu: str
    flags: frozenset[str]
    cores: Cores
    thread_variables: Mapping[str, str]
    driver: bool
    compiler: str | None
    compiling: Compiling
    memory: int
    memory_free: int
    folders: tuple[Folder, ...]
    caches: tuple[Cache, ...]
    model_directory: Path | None
    sources: Mapping[str, str] | None


def gather(
    *,
    cache_dir: Path | None = None,
    output: Path | None = None,
    offline: bool = False,
    compiling: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> Facts:
    """Look at everything.

    Args:
        cache_dir: folder of cached features; the user's when None.
        output: where runs go; runs/ in the current folder when None.
        offline: ask no server.
        compiling: try torch.compile.
        note: told before what takes long.
    """
    note("Asking PyTorch ...")
    torch, torch_error = _ask("facts", timeout=PROBE_SECONDS)
    compiler = find_compiler()
    device = "cuda" if torch.get("gpus") else "cpu"
    compiled = Compiling(False, device)
    if compiling and torch and (compiler or device == "cuda"):
        note("Trying the compiler ...")
        compiled = _compile(device)
    cache = (cache_dir or user_cache()).expanduser()
    hub, named = _hugging_face(), os.environ.get("FINETUNE_WEIGHTS")
    return Facts(
        python=platform.python_version(),
        installed=installed(),
        torch=torch,
        torch_error=torch_error,
        cpu=cpu_name(),
        flags=cpu_flags(),
        cores=cores(),
        thread_variables={name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        driver=shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists(),
        compiler=compiler,
        compiling=compiled,
        memory=int(psutil.virtual_memory().total),
        memory_free=free_memory(),
        folders=folders(cache, output or Path("runs")),
        caches=caches(cache, Path(torch["hub"]) if torch else None, Path(hub.HF_HUB_CACHE) if hub else None),
        model_directory=Path(named).expanduser() if named else None,
        sources=None if offline else _sources(hub),
    )


def _ask(*words: str, timeout: float, environment: Mapping[str, str] | None = None) -> tuple[dict[str, Any], str]:
    """Run the probe; return its answer, or {} and why there is none."""
    command = [sys.executable, "-P", str(Path(probe.__file__)), *words]  # -P: not beside this project's modules
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **(environment or {})}
        )
    except subprocess.TimeoutExpired:
        return {}, f"no answer within {timeout:g} s"
    except OSError as error:
        return {}, str(error)
    answers = [line for line in done.stdout.splitlines() if line.startswith(probe.MARK)]
    if answers:
        return dict(json.loads(answers[-1].removeprefix(probe.MARK))), ""
    if done.returncode < 0:
        return {}, f"the process was ended by {signal.Signals(-done.returncode).name}"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return {}, lines[-1][:200] if lines else f"exit code {done.returncode}"


def _compile(device: str) -> Compiling:
    """Try torch.compile with caches in a temporary folder, so that nothing is found that was compiled before."""
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="finetune-doctor-", ignore_cleanup_errors=True) as folder:
            caches_there = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
            answer, error = _ask("compile", device, timeout=COMPILE_SECONDS, environment=caches_there)
    except OSError as refusal:  # no temporary folder, which has a line of its own
        answer, error = {}, str(refusal)
    return Compiling(True, device, time.monotonic() - start, error or answer["error"])


def _hugging_face() -> Any:
    """Return the settings of the Hugging Face client, None when it does not import."""
    try:
        from huggingface_hub import constants
    except Exception:  # whatever a broken installation raises; that it is missing is said elsewhere
        return None
    return constants


def _sources(hub: Any) -> dict[str, str]:
    """Ask for the head of one file of each server that weights come from."""
    addresses = {"download.pytorch.org": "https://download.pytorch.org/models/resnet18-f37072fd.pth"}
    answers = {}
    if hub and hub.HF_HUB_OFFLINE:
        answers["Hugging Face hub"] = "HF_HUB_OFFLINE is set"
    elif hub:
        addresses["Hugging Face hub"] = f"{hub.ENDPOINT}/timm/resnet18.a1_in1k/resolve/main/config.json"
    with ThreadPoolExecutor(len(addresses)) as pool:
        asked = pool.map(lambda url: unreachable(url, REACH_SECONDS), addresses.values())
    return {**dict(zip(addresses, asked, strict=True)), **answers}
