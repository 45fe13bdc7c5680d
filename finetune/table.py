"""The layers of an architecture as a table: parameters, work, what would train, and where the cut would lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from finetune.arch import resolve_network
from finetune.cut import cut_model
from finetune.layers import Selection, freeze, is_inside, select_layers
from finetune.models import build, check_size, head_names


@dataclass(frozen=True)
class Row:
    """One module.

    Attributes:
        name: dotted name, as `--train-layers` takes it.
        kind: its class.
        parameters: in it and below.
        share: of a forward pass's multiply-adds, 0 to 1.
        trains: "yes", "in part" or "".
    """

    name: str
    kind: str
    parameters: int
    share: float
    trains: str


@dataclass(frozen=True)
class LayerTable:
    """What `finetune layers` shows.

    Attributes:
        arch: full timm name.
        image_size: input side in pixels.
        parameters: in all.
        trained: how many would train.
        multiply_adds: of one image's forward pass.
        frozen_share: share of them that lie before the cut, 0 to 1.
        cut: a clause on where the cut lies, or why there is none.
        rows: the modules in the order of the network.
    """

    arch: str
    image_size: int
    parameters: int
    trained: int
    multiply_adds: int
    frozen_share: float
    cut: str
    rows: tuple[Row, ...]


def layer_table(arch_name: str, train_layers: tuple[str, ...], *, classes: int = 100, depth: int = 1) -> LayerTable:
    """Build an architecture with random weights and describe it.

    Args:
        arch_name: any timm name.
        train_layers: as for `--train-layers`.
        classes: outputs of the head.
        depth: levels of modules to list.

    Raises:
        UsageError: unknown architecture or layer.
    """
    arch = resolve_network(arch_name)
    size = int(arch.config["input_size"][-1])
    model, _ = build(arch, classes, size)
    check_size(model, arch, size)
    selection = select_layers(model, train_layers, head_names(arch))
    freeze(model, selection)
    image = torch.zeros(2, 3, size, size)
    cut = cut_model(model, selection, image)
    whole, by_name = count_work(model, image)
    frozen = count_work(cut.prefix, image)[0] if cut.prefix is not None else 0
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    trained = set(selection.trained)
    rows = [
        Row(
            name,
            type(module).__name__,
            sum(size for parameter, size in sizes.items() if is_inside(parameter, name)),
            _work(model, name, by_name) / max(whole, 1),
            _trains(selection, name),
        )
        for name, module in model.named_modules()
        if name and name.count(".") < depth and next(module.parameters(), None) is not None
    ]
    where = f"after {', '.join(cut.crossing)}" if cut.prefix is not None else f"none: {cut.reason}"
    return LayerTable(
        arch=arch.full_name,
        image_size=size,
        parameters=sum(sizes.values()),
        trained=sum(size for name, size in sizes.items() if name in trained),
        multiply_adds=whole // 2 // len(image),  # a multiply-add is two floating-point operations
        frozen_share=frozen / max(whole, 1),
        cut=where,
        rows=tuple(rows),
    )


def count_work(model: nn.Module, images: torch.Tensor) -> tuple[int, dict[str, int]]:
    """Return a forward pass's floating-point operations, in all and by module name.

    Args:
        model: in eval mode.
        images: float32 (N, 3, S, S).
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    prefix = f"{type(model).__name__}."
    by_name = {
        name.removeprefix(prefix): sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
        if name.startswith(prefix)
    }
    return counter.get_total_flops(), by_name


def _work(model: nn.Module, name: str, by_name: dict[str, int]) -> int:
    """Return a module's work: what was counted in it or, where its own forward is not called, in those below it."""
    if name in by_name:
        return by_name[name]
    return sum(_work(model, f"{name}.{child}", by_name) for child, _ in model.get_submodule(name).named_children())


def _trains(selection: Selection, name: str) -> str:
    if selection.covers(name):
        return "yes"
    return "in part" if any(is_inside(selected, name) for selected in selection.names) else ""
