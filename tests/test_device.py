"""Modules on their device, in the layout that convolutions want."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from torch import fx, nn

from finetune import device
from finetune.device import settle


class Mixed(nn.Module):
    """Parameters of four and five dimensions, as lambda networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.positions = nn.Parameter(torch.randn(2, 3, 4, 5, 6))
        self.register_buffer("table", torch.randn(2, 3, 4, 4))


def test_kernels_become_channels_last_and_values_stay() -> None:
    module = Mixed()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert settle(module, torch.device("cpu")) is module
    assert module.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert module.positions.is_contiguous()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Places(nn.Module):
    """Asks a buffer for its device while it is traced, as timm's rotary position embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("periods", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(device=self.periods.device) + torch.arange(x.shape[1], device=self.periods.device)


def test_devices_that_a_traced_module_holds_move_with_it() -> None:
    traced = fx.symbolic_trace(Places())
    assert "device(type='cpu')" in traced.code
    settle(traced, torch.device("meta"))
    assert "'cpu'" not in traced.code
    assert traced(torch.zeros(2, 4, device="meta")).device.type == "meta"


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
    assert device._left_in_groups(tmp_path) == [400]
    write_group(top / "box/job", "700", 600, 100)
    assert sorted(device._left_in_groups(tmp_path)) == [200, 400]
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,memory:/elsewhere\n")
    old = top / "memory"
    old.mkdir()
    for name, text in (("limit_in_bytes", "50"), ("usage_in_bytes", "30"), ("stat", "total_inactive_file 5")):
        (old / f"memory.{name}").write_text(text)
    assert device._left_in_groups(tmp_path) == [25]


def test_without_a_container_memory_is_the_machines(tmp_path: Path) -> None:
    assert device._left_in_groups(tmp_path) == []
    assert 0 < device.free_memory() <= psutil.virtual_memory().total
