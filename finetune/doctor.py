"""`finetune doctor`: can this machine run what this project does, and what would make it better?

Each check is a verdict on facts: `ok`, `warning` (a run works, slower or not with every setting) or `problem` (no run
works, or none with the default settings). The next step is one sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from finetune.facts import THREAD_VARIABLES, Facts
from finetune.installed import DISTRIBUTION, Package, in_range
from finetune.machine import BF16_UNITS
from finetune.placement import DISK_RESERVE, size
from finetune.storage import Folder

OK, WARNING, PROBLEM = "ok", "warning", "problem"

SHOWN = ("torch", "torchvision", "timm", "safetensors", "typer")  # libraries with a line of their own
IMPORTED = {"torchvision": "torchvision", "timm": "timm", "safetensors": "safetensors.torch"}  # what the probe tried

SAFE_TORCH = "2.10"
"""The first in which `torch.load(weights_only=True)` compares sizes before it believes them. A .pth file that was made
for an older one may corrupt memory (CVE-2026-24747); `weights/torch_file.py` looks for what is known of it."""

LITTLE_MEMORY = 2 * 10**9
"""Bytes below which only small networks and batches train; a run measures what it needs before it begins (`memory`)."""

LITTLE_DISK = 10**9
"""Bytes: a ResNet-50's model and its checkpoint with Adam's two numbers per weight take 25.6 million × 4 × 4."""

CACHE_DISK = 12 * 10**9 + DISK_RESERVE
"""Bytes: what a ResNet-18's features of CIFAR-100 take, and what a run leaves free on the disk."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        verdict: ok, warning or problem.
        found: what there is.
        next: what to do, one sentence; "" where there is nothing to do.
    """

    name: str
    verdict: str
    found: str
    next: str = ""


def judge(facts: Facts) -> list[Check]:
    """Return a verdict on each fact, in the order in which they matter.

    Args:
        facts: as `gather` gives them.
    """
    return [
        _python(facts),
        *_libraries(facts),
        _processor(facts),
        *_threads(facts),
        _graphics(facts),
        _compiler(facts),
        _memory(facts),
        *(_folder(folder) for folder in facts.folders),
        *(_cache(one.name, str(one.path), one.bytes) for one in facts.caches),
        *_model_directory(facts),
        *_sources(facts.sources),
        *_extras(facts.installed.extras),
    ]


def worst(checks: Iterable[Check]) -> str:
    """Return the worst verdict among checks, ok when there are none."""
    verdicts = {check.verdict for check in checks}
    return next((one for one in (PROBLEM, WARNING) if one in verdicts), OK)


def _python(facts: Facts) -> Check:
    required = facts.installed.requires_python
    if required and not in_range(facts.python, required):
        return Check(
            "python", PROBLEM, f"{facts.python}, {required} is needed", "Make an environment with a newer Python."
        )
    return Check("python", OK, _with_range(facts.python, required))


def _libraries(facts: Facts) -> list[Check]:
    packages = {package.name: package for package in facts.installed.packages}
    if not packages:
        found = f"{DISTRIBUTION} is not installed as a package, so versions were not compared"
        checks = [Check("installation", WARNING, found, "Install it with pip, from its folder: pip install .")]
        return [*checks, *([_library(facts, Package("torch", "", ""))] if facts.torch_error else [])]
    checks = [_library(facts, packages.pop(name)) for name in SHOWN if name in packages]
    wrong = [package for package in packages.values() if not package.supported]
    checks += [_library(facts, package) for package in wrong]
    fine = len(packages) - len(wrong)
    checks.append(Check("other libraries", OK, f"{fine} more, all in the supported range"))
    if facts.installed.namesake:
        found = "another distribution called finetune is installed, whose package has the same name"
        checks.append(Check("finetune", WARNING, found, "Remove it: pip uninstall finetune, then install this again."))
    return checks


def _library(facts: Facts, package: Package) -> Check:
    """Judge a library that has to be there: absent, broken, out of range or fine."""
    name, version = package.name, package.version
    again = f'Install it again: pip install --force-reinstall "{name}{package.required}".'
    if not version and package.required:
        return Check(name, PROBLEM, "not installed", f'Install it: pip install "{name}{package.required}".')
    if name == "torch" and facts.torch_error:
        return Check(name, PROBLEM, f"{version or 'installed'}, and does not import: {facts.torch_error}", again)
    if name in IMPORTED and not facts.torch:
        return Check(name, WARNING, f"{version}, not tried without torch", "Mend torch first.")
    if error := facts.torch.get("broken", {}).get(IMPORTED.get(name, "")):
        return Check(name, PROBLEM, f"{version}, and does not import: {error}", again)
    if not package.supported:
        step = f'Install a supported one: pip install "{name}{package.required}".'
        return Check(name, WARNING, f"{version}, and {package.required} is supported", step)
    if name == "torch" and in_range(version, f"<{SAFE_TORCH}"):
        found = f"{version}, which a .pth file can be made to harm (CVE-2026-24747)"
        return Check(name, WARNING, found, f'Update it: pip install --upgrade "torch>={SAFE_TORCH}".')
    return Check(name, OK, _with_range(version, package.required))


def _processor(facts: Facts) -> Check:
    cores = facts.cores
    limit = "" if cores.quota is None else f", {cores.quota:g} by the container's limit"
    some = cores.machine != cores.usable
    used = f"{cores.usable} of {cores.machine} cores usable{limit}" if some else f"{cores.machine} cores"
    found = f"{facts.cpu}, {used}"
    if not facts.flags:
        return Check("processor", OK, found)
    vectors = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in facts.flags), "")
    found += f"; {vectors or 'no AVX2'}"
    if not any(unit in facts.flags for unit in BF16_UNITS):  # the name has those that are there
        found += "; no unit for bf16, so fp32 is faster"
    if not vectors and any(flag.startswith("sse") for flag in facts.flags):
        return Check("processor", WARNING, found, "Use a machine with AVX2: PyTorch's fast code needs it.")
    return Check("processor", OK, found)


def _threads(facts: Facts) -> list[Check]:
    if not facts.torch:
        return []
    threads, usable = int(facts.torch["threads"]), facts.cores.usable
    given = ", ".join(f"{name}={value}" for name, value in facts.thread_variables.items())
    found = f"PyTorch uses {threads} for {usable} usable core{'' if usable == 1 else 's'}" + (
        f" ({given})" if given else ""
    )
    if threads > usable:
        step = f"Set {THREAD_VARIABLES[0]}={usable}: more threads than cores wait for each other."
        return [Check("threads", WARNING, found, step)]
    if given and 2 * threads < usable:
        return [Check("threads", WARNING, found, f"Unset {' and '.join(facts.thread_variables)} to use all cores.")]
    return [Check("threads", OK, found)]


def _graphics(facts: Facts) -> Check:
    if not facts.torch:
        return Check("gpu", OK, "not asked for without torch")
    gpus = facts.torch.get("gpus") or []
    if gpus:
        found = ", ".join(
            f"{one['name']}, which cannot be used: {one['error']}"
            if one["error"]
            else f"{one['name']}, {size(one['free'])} of {size(one['total'])} free"
            for one in gpus
        )
        if max(one["free"] for one in gpus) < LITTLE_MEMORY:
            return Check("gpu", WARNING, found, "End other programs that use it, or give --device cpu.")
        return Check("gpu", OK, found)
    if facts.torch.get("mps"):
        return Check("gpu", OK, "an Apple GPU, used with --device mps")
    if facts.driver:
        if facts.torch["cuda_build"]:
            step = "Update the NVIDIA driver: PyTorch's build of CUDA may be newer than it allows."
            return Check(
                "gpu", WARNING, f"an NVIDIA driver, and PyTorch (CUDA {facts.torch['cuda_build']}) sees no GPU", step
            )
        step = "Install a build of PyTorch with CUDA, as its site describes."
        return Check("gpu", WARNING, "an NVIDIA driver, and a build of PyTorch without CUDA", step)
    return Check("gpu", OK, "none, so runs use the processor")


def _compiler(facts: Facts) -> Check:
    tried, there = facts.compiling, f"{facts.compiler}" if facts.compiler else "no C++ compiler"
    if not facts.compiler and tried.device == "cpu":
        step = "Install g++ or clang++ (on Debian: apt install g++), so that runs may compile the frozen part."
        return Check("compiler", WARNING, f"{there}, so runs are not compiled", step)
    if tried.error:
        step = "Mend it, or leave it: runs go on without compiling, and --compile off does not try."
        return Check("compiler", WARNING, f"{there}, and torch.compile fails: {tried.error}", step)
    if not tried.tried:
        return Check("compiler", OK, f"{there}, not tried")
    return Check(
        "compiler", OK, f"{there}, torch.compile works on {tried.device} ({tried.seconds:.0f} s for a first one)"
    )


def _memory(facts: Facts) -> Check:
    found = f"{size(facts.memory_free)} free of {size(facts.memory)}"
    if facts.memory_free < LITTLE_MEMORY:
        step = "End other programs, or give a small --batch-size and --memory-budget."
        return Check("memory", WARNING, found, step)
    return Check("memory", OK, found)


def _folder(folder: Folder) -> Check:
    found = f"{folder.path}, {size(folder.free)} free"
    flag = folder.option.startswith("--")
    elsewhere = f"give another {folder.option}" if flag else f"set {folder.option} to another folder"
    if folder.error:
        return Check(
            folder.name,
            PROBLEM,
            f"{folder.path} cannot be written: {folder.error}",
            f"Mend its rights, or {elsewhere}.",
        )
    if folder.free < LITTLE_DISK:
        return Check(folder.name, WARNING, found, f"Free some space there, or {elsewhere}.")
    if folder.option == "--cache-dir" and folder.free < CACHE_DISK:
        step = f"Features that do not fit are kept in memory or computed in every epoch; for more room, {elsewhere}."
        return Check(folder.name, WARNING, found, step)
    return Check(folder.name, OK, found)


def _cache(name: str, path: str, held: int) -> Check:
    step = "finetune cache clear deletes them." if name == "cached features" and held else ""
    return Check(name, OK, f"{size(held)} in {path}", step)


def _model_directory(facts: Facts) -> list[Check]:
    folder = facts.model_directory
    if folder is None:
        return []
    if not folder.is_dir():
        step = "Make the folder, or unset FINETUNE_WEIGHTS: every run that looks for weights stops there."
        return [Check("model directory", PROBLEM, f"$FINETUNE_WEIGHTS names {folder}, which is not a folder", step)]
    return [Check("model directory", OK, f"{folder} ($FINETUNE_WEIGHTS)", "finetune weights list shows what is in it.")]


def _sources(sources: Mapping[str, str] | None) -> list[Check]:
    if sources is None:
        return [Check("sources of weights", OK, "not asked, because of --offline")]
    step = "Weights that are not on this machine cannot be downloaded from there: put files into --weights-dir."
    return [
        Check(server, WARNING, f"cannot be reached: {reason}", step) if reason else Check(server, OK, "can be reached")
        for server, reason in sources.items()
    ]


def _extras(extras: Mapping[str, tuple[str, ...]]) -> list[Check]:
    return [
        Check(f"extra {name}", OK, f"without {', '.join(absent)}", f'For it: pip install "{DISTRIBUTION}[{name}]".')
        if absent
        else Check(f"extra {name}", OK, "installed")
        for name, absent in extras.items()
    ]


def _with_range(version: str, required: str) -> str:
    return f"{version} ({required} is supported)" if required else version
