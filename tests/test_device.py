"""Modules on their device, in the layout that convolutions want."""

from __future__ import annotations

import torch
from torch import fx, nn

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
