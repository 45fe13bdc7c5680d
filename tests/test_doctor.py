"""`finetune doctor`: verdicts on facts that are given, and the command on this machine, with and without PyTorch."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from make_server import serve
from typer.testing import CliRunner

from cli.main import app
from finetune import facts as looking
from finetune import installed as libraries
from finetune import probe
from finetune.doctor import CACHE_DISK, Check, judge, worst
from finetune.facts import Compiling, Facts
from finetune.installed import Installed, Package
from finetune.machine import Cores
from finetune.storage import Cache, Folder, caches, folders
from weights.reach import trusted, unreachable

ROOT = Path(__file__).parents[1]
GB = 10**9
TORCH: dict[str, Any] = {"threads": 2, "cuda_build": "", "gpus": [], "mps": False, "hub": "hub", "broken": {}}
PACKAGES = (Package("torch", "2.11.0+cpu", ">=2.9"), Package("timm", "1.0.25", ">=1.0.20"), Package("rich", "14", ""))


def facts(**changed: Any) -> Facts:
    """Facts of a machine on which all is well."""
    fine = Facts(
        python="3.12.1",
        installed=Installed(">=3.11", PACKAGES, {"onnx": ()}),
        torch=TORCH,
        torch_error="",
        cpu="Some CPU",
        flags=frozenset({"sse2", "avx2", "avx512f", "avx512_bf16"}),
        cores=Cores(2, 2, None),
        thread_variables={},
        driver=False,
        compiler="/bin/g++",
        compiling=Compiling(True, "cpu", 12.3),
        memory=16 * GB,
        memory_free=8 * GB,
        folders=(Folder("cache folder", Path("/c"), 100 * GB, "", "--cache-dir"),),
        caches=(Cache("cached features", Path("/c/features"), 0),),
        model_directory=None,
        sources={"download.pytorch.org": ""},
    )
    return dataclasses.replace(fine, **changed)


def check(name: str, **changed: Any) -> Check:
    """The one check of this name."""
    found = [one for one in judge(facts(**changed)) if one.name == name]
    assert len(found) == 1, found
    return found[0]


def with_torch(**changed: Any) -> Mapping[str, Any]:
    return {**TORCH, **changed}


def test_all_is_well() -> None:
    checks = judge(facts())
    assert worst(checks) == "ok"
    assert {one.name: one.found for one in checks} == {
        "python": "3.12.1 (>=3.11 is supported)",
        "torch": "2.11.0+cpu (>=2.9 is supported)",
        "timm": "1.0.25 (>=1.0.20 is supported)",
        "other libraries": "1 more, all in the supported range",
        "processor": "Some CPU, 2 cores; AVX-512",
        "threads": "PyTorch uses 2 for 2 usable cores",
        "gpu": "none, so runs use the processor",
        "compiler": "/bin/g++, torch.compile works on cpu (12 s for a first one)",
        "memory": "8.0 GB free of 16.0 GB",
        "cache folder": "/c, 100.0 GB free",
        "cached features": "0 bytes in /c/features",
        "download.pytorch.org": "can be reached",
        "extra onnx": "installed",
    }


def test_libraries_that_are_absent_broken_or_too_old() -> None:
    absent = Installed(">=3.11", (Package("torch", "", ">=2.9"), Package("timm", "1.0.25", ">=1.0.20")))
    gone = {"installed": absent, "torch": {}, "torch_error": "ModuleNotFoundError: No module named 'torch'"}
    assert check("torch", **gone) == Check("torch", "problem", "not installed", 'Install it: pip install "torch>=2.9".')
    assert check("timm", **gone).found == "1.0.25, not tried without torch"
    assert check("gpu", **gone).found == "not asked for without torch"

    broken = check("torch", torch={}, torch_error="the process was ended by SIGILL")
    assert broken.verdict == "problem"
    assert broken.found == "2.11.0+cpu, and does not import: the process was ended by SIGILL"
    assert broken.next == 'Install it again: pip install --force-reinstall "torch>=2.9".'

    timm = check("timm", torch=with_torch(broken={"timm": "ImportError: no nms"}))
    assert (timm.verdict, timm.found) == ("problem", "1.0.25, and does not import: ImportError: no nms")

    old = Installed(">=3.11", (Package("torch", "2.8.1", ">=2.9"), Package("rich", "12.0", ">=13")))
    assert check("torch", installed=old).found == "2.8.1, and >=2.9 is supported"
    assert check("torch", installed=old).verdict == "warning"
    assert check("rich", installed=old).next == 'Install a supported one: pip install "rich>=13".'
    assert check("python", python="3.10.4").verdict == "problem"


def test_a_torch_with_a_known_fault() -> None:
    def torch_check(version: str) -> Check:
        return check("torch", installed=Installed(">=3.11", (Package("torch", version, ">=2.9"),)))

    old = torch_check("2.9.1+cu126")
    assert old.verdict == "warning"
    assert old.found == "2.9.1+cu126, which a .pth file can be made to harm (CVE-2026-24747)"
    assert old.next == 'Update it: pip install --upgrade "torch>=2.10".'
    assert [torch_check(version).verdict for version in ("2.10.0", "2.10.0a0+git1", "2.15.0")] == ["ok"] * 3


def test_without_metadata_and_with_a_namesake() -> None:
    assert check("installation", installed=Installed()).verdict == "warning"
    broken = {"installed": Installed(), "torch": {}, "torch_error": "ImportError: libc10.so"}
    assert check("torch", **broken).verdict == "problem"
    assert check("finetune", installed=Installed(">=3.11", PACKAGES, {}, namesake=True)).next == (
        "Remove it: pip uninstall finetune, then install this again."
    )


def test_processor_and_threads() -> None:
    few = {"cores": Cores(64, 8, 3.5), "torch": with_torch(threads=32)}
    assert check("processor", **few).found.startswith("Some CPU, 3 of 64 cores usable, 3.5 by the container's limit; ")
    assert check("threads", **few) == Check(
        "threads",
        "warning",
        "PyTorch uses 32 for 3 usable cores",
        "Set OMP_NUM_THREADS=3: more threads than cores wait for each other.",
    )
    one = check("threads", cores=Cores(16, 16, None), thread_variables={"OMP_NUM_THREADS": "2"})
    assert (one.verdict, one.next) == ("warning", "Unset OMP_NUM_THREADS to use all cores.")
    assert check("threads", cores=Cores(16, 16, None), torch=with_torch(threads=8)).verdict == "ok"
    plain = check("processor", flags=frozenset({"sse2", "avx2"}))
    assert (plain.verdict, plain.found) == ("ok", "Some CPU, 2 cores; AVX2; no unit for bf16, so fp32 is faster")
    assert check("processor", flags=frozenset({"sse2"})).verdict == "warning"
    assert check("processor", flags=frozenset()).found == "Some CPU, 2 cores"


def test_gpus() -> None:
    gpu = {"name": "Some GPU", "free": 20 * GB, "total": 24 * GB, "error": ""}
    assert check("gpu", torch=with_torch(gpus=[gpu])).found == "Some GPU, 20.0 GB of 24.0 GB free"
    assert check("gpu", torch=with_torch(gpus=[{**gpu, "free": GB}])).verdict == "warning"
    taken = {"name": "GPU 1", "free": 0, "total": 0, "error": "RuntimeError: out of memory"}
    one = check("gpu", torch=with_torch(gpus=[gpu, taken]))
    assert one.found == "Some GPU, 20.0 GB of 24.0 GB free, GPU 1, which cannot be used: RuntimeError: out of memory"
    assert (one.verdict, check("gpu", torch=with_torch(gpus=[taken])).verdict) == ("ok", "warning")
    unseen = check("gpu", driver=True)
    assert (unseen.verdict, unseen.found) == ("warning", "an NVIDIA driver, and a build of PyTorch without CUDA")
    unseen = check("gpu", driver=True, torch=with_torch(cuda_build="13.0"))
    assert unseen.found == "an NVIDIA driver, and PyTorch (CUDA 13.0) sees no GPU"
    assert check("gpu", torch=with_torch(mps=True)).found == "an Apple GPU, used with --device mps"


def test_a_gpu_that_another_program_has_is_no_broken_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory\nCompile with more words")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    said = "RuntimeError: CUDA error: out of memory"
    assert probe.facts()["gpus"] == [{"name": "GPU 0", "free": 0, "total": 0, "error": said}]


def test_compilers() -> None:
    none = check("compiler", compiler=None, compiling=Compiling(False, "cpu"))
    assert (none.verdict, none.found) == ("warning", "no C++ compiler, so runs are not compiled")
    bad = check("compiler", compiling=Compiling(True, "cpu", 3, "CppCompileError: fatal error: omp.h: No such file"))
    assert bad.verdict == "warning"
    assert bad.found == "/bin/g++, and torch.compile fails: CppCompileError: fatal error: omp.h: No such file"
    assert check("compiler", compiling=Compiling(False, "cpu")).found == "/bin/g++, not tried"


def test_memory_folders_and_caches() -> None:
    assert check("memory", memory_free=GB).verdict == "warning"

    def folder(free: int, error: str = "", option: str = "--cache-dir") -> Check:
        return check("there", folders=(Folder("there", Path("/c"), free, error, option),))

    assert folder(CACHE_DISK).verdict == "ok"
    assert folder(CACHE_DISK - 1).verdict == "warning"
    assert folder(CACHE_DISK - 1, option="--output").verdict == "ok"
    assert folder(GB // 2).next == "Free some space there, or give another --cache-dir."
    assert folder(GB // 2, option="TMPDIR").next == "Free some space there, or set TMPDIR to another folder."
    shut = folder(GB, "Permission denied")
    assert (shut.verdict, shut.found) == ("problem", "/c cannot be written: Permission denied")
    assert shut.next == "Mend its rights, or give another --cache-dir."
    held = check("cached features", caches=(Cache("cached features", Path("/c"), 3 * GB),))
    assert held.next == "finetune cache clear deletes them."


def test_model_directory_sources_and_extras(tmp_path: Path) -> None:
    assert check("model directory", model_directory=tmp_path).verdict == "ok"
    assert check("model directory", model_directory=tmp_path / "none").verdict == "problem"
    away = check("some hub", sources={"some hub": "timed out"})
    assert (away.verdict, away.found) == ("warning", "cannot be reached: timed out")
    assert check("sources of weights", sources=None).found == "not asked, because of --offline"
    extra = check("extra onnx", installed=Installed("", PACKAGES, {"onnx": ("onnx", "onnxruntime")}))
    assert (extra.verdict, extra.found) == ("ok", "without onnx, onnxruntime")
    assert extra.next == 'For it: pip install "finetune-timm[onnx]".'


# Where the facts come from


def test_libraries_are_compared_with_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.11.0", "rich": "12.0", "onnx": "1.20"}
    monkeypatch.setattr(libraries, "version_of", lambda name: versions.get(name, ""))
    wanted = [
        "torch>=2.9", "rich>=13", "tomli>=2; python_version < '3.0'", 'onnx>=1.16; extra == "onnx"',
        'onnxruntime>=1.20; extra == "onnx"', 'pytest>=8; extra == "dev"',
    ]  # fmt: skip
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    about = {"Requires-Python": [">=3.11"], "Provides-Extra": ["dev", "onnx"]}

    class Metadata:
        def get_all(self, name: str) -> list[str] | None:
            return about.get(name)

    monkeypatch.setattr("importlib.metadata.metadata", lambda name: Metadata())
    found = libraries.installed()
    assert found.packages == (Package("torch", "2.11.0", ">=2.9"), Package("rich", "12.0", ">=13"))
    assert [one.supported for one in found.packages] == [True, False]
    assert (found.requires_python, found.extras) == (">=3.11", {"onnx": ("onnxruntime",)})


def test_folders_need_not_exist_and_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("12345")
    cache, output, temporary = folders(tmp_path / "a/b", tmp_path / "file/runs")
    assert (cache.error, cache.path) == ("", tmp_path / "a/b")
    assert cache.free > 0
    assert output.error == "Not a directory"
    assert temporary.option == "TMPDIR"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_sizes_of_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    for name in ("cache/features/key/tensor-0.bin", "code/x.so", "hub/checkpoints/a.pth"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(bytes(7))
    found = caches(tmp_path / "cache", tmp_path / "hub", None)
    held = {one.name: one.bytes for one in found if one.name != "downloaded data"}
    assert held == {"cached features": 7, "compiled code": 7, "torch hub's weights": 7}


def test_servers_that_answer_and_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(monkeypatch) as server:
        server.files["/a.pth"] = b"weights"
        assert unreachable(f"{server.address}/a.pth", 5) == ""
        assert unreachable(f"{server.address}/b.pth", 5) == "it answers 404 Not Found"
        assert server.asked == ["HEAD /a.pth", "HEAD /b.pth"]
    assert "refused" in unreachable("http://127.0.0.1:9/a.pth", 5)
    assert unreachable("http://example.com/a.pth", 5) == "only https addresses are trusted"
    assert not trusted("file:///a.pth")


def test_a_probe_that_is_ended_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a build of PyTorch with instructions that the processor lacks does."""
    script = tmp_path / "probe.py"
    monkeypatch.setattr(looking.probe, "__file__", str(script))
    script.write_text(f"import os, signal\nos.kill(os.getpid(), {int(signal.SIGILL)})")
    assert looking._ask("facts", timeout=60) == ({}, "the process was ended by SIGILL")
    script.write_text("import time\ntime.sleep(60)")
    assert looking._ask("facts", timeout=0.2) == ({}, "no answer within 0.2 s")


# The command


def test_the_command_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["doctor", "--offline", "--quick", "--json", "--cache-dir", str(tmp_path / "cache")]
    result = CliRunner().invoke(app, words)
    found = json.loads(result.stdout)
    checks = {one["name"]: one for one in found["checks"]}
    problems = [one for one in found["checks"] if one["verdict"] == "problem"]
    assert problems == []
    assert result.exit_code == 0
    assert {"python", "torch", "timm", "processor", "threads", "gpu", "compiler", "memory", "output folder"} <= set(
        checks
    )
    assert checks["torch"]["found"].startswith(libraries.version_of("torch"))
    assert checks["timm"]["verdict"] == "ok"
    assert checks["output folder"]["found"].startswith(str(tmp_path / "runs"))
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_the_command_where_torch_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-P", "-m", "cli.main", "doctor", "--offline"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("problem  torch "))
    assert lines[at].endswith(", and does not import: ImportError: libtorch_cpu.so: cannot open shared object file")
    assert lines[at + 1].strip().startswith("Install it again: pip install --force-reinstall")
    assert lines[-1].startswith("1 problem, ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_compiler_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tens of seconds, of which most are the compiler's."""
    assert looking._compile("cpu").error == ""
    wrong = tmp_path / "g++"
    wrong.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\necho "a.cpp:1:2: fatal error: no omp.h"; exit 1\n'
    )
    wrong.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrong))
    assert "fatal error: no omp.h" in looking._compile("cpu").error
