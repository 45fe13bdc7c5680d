"""Modules on their device, in the layout that convolutions want."""

from __future__ import annotations

import torch
from torch import nn

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
