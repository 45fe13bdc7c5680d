"""What the machine has, and what of it a process in a container may use."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from finetune import machine
from finetune.machine import Cores


def write_group(folder: Path, limit: str, used: int, files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {files}\n")


def test_a_containers_limit_is_the_limit(tmp_path: Path) -> None:
    """The tightest group counts; its page cache is as good as free."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/box/job\n")
    top = tmp_path / "sys/fs/cgroup"
    write_group(top / "box", "1000", 700, 100)
    write_group(top / "box/job", "max", 600, 100)
    assert machine._left_in_groups(tmp_path) == [400]
    write_group(top / "box/job", "700", 600, 100)
    assert sorted(machine._left_in_groups(tmp_path)) == [200, 400]
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,memory:/elsewhere\n")
    old = top / "memory"
    old.mkdir()
    for name, text in (("limit_in_bytes", "50"), ("usage_in_bytes", "30"), ("stat", "total_inactive_file 5")):
        (old / f"memory.{name}").write_text(text)
    assert machine._left_in_groups(tmp_path) == [25]


def test_without_a_container_memory_is_the_machines(tmp_path: Path) -> None:
    assert machine._left_in_groups(tmp_path) == []
    assert 0 < machine.free_memory() <= psutil.virtual_memory().total


def test_a_containers_share_of_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tightest of affinity and of every group's quota, in either form, counts."""
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert machine.cores(tmp_path) == Cores(64, 8, None)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/box/job\n3:cpuacct,cpu:/old\n")
    for folder, name, text in (
        ("box", "cpu.max", "350000 100000"),
        ("box/job", "cpu.max", "max 100000"),
        ("cpu/old", "cpu.cfs_quota_us", "400000"),
        ("cpu/old", "cpu.cfs_period_us", "100000"),
    ):
        (tmp_path / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / folder / name).write_text(text + "\n")
    found = machine.cores(tmp_path)
    assert (found, found.usable) == (Cores(64, 8, 3.5), 3)
    (tmp_path / "sys/fs/cgroup/cpu/old/cpu.cfs_quota_us").write_text("50000\n")
    assert machine.cores(tmp_path).usable == 1, "half a core is one thread"
    (tmp_path / "sys/fs/cgroup/box/cpu.max").unlink()
    (tmp_path / "sys/fs/cgroup/cpu/old/cpu.cfs_quota_us").write_text("-1\n")
    assert machine.cores(tmp_path).usable == 8


def test_the_processors_flags(tmp_path: Path) -> None:
    assert machine.cpu_flags(tmp_path) == frozenset()
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("model name : Some CPU\nflags\t\t: sse2 avx2 amx_bf16\nbugs : none\n")
    assert machine.cpu_flags(tmp_path) == {"sse2", "avx2", "amx_bf16"}
