"""Prefixes of several cuts as one: the values of each, for the work of the deepest."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from make_features import PLAIN, Counted
from make_run import write_weights
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from finetune.cut import cut_model
from finetune.features import RowShape
from finetune.layers import freeze, select_layers
from finetune.merge import join, merge
from finetune.precision import Choice
from finetune.prefix import PreparedPrefix, prepare_prefix
from weights.load import read_tensors

FP32 = Choice("fp32", False, 100.0, 0.0, "")


def prepared(model: nn.Module, layers: list[str]) -> PreparedPrefix:
    """The prefix before some layers, folded, in fp32."""
    chosen = select_layers(model, layers, ["fc"])
    freeze(model, chosen)
    cut = cut_model(model, chosen, PLAIN(torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)))
    assert cut.prefix is not None, cut.reason
    return prepare_prefix(cut, PLAIN, noise(), torch.device("cpu"), lambda build: FP32)


def noise() -> torch.Tensor:
    return torch.randint(256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def graphs(parts: list[PreparedPrefix]) -> list[fx.GraphModule]:
    return [part.graph for part in parts if isinstance(part.graph, fx.GraphModule)]


def multiply_adds(module: nn.Module) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(PLAIN(noise()))
    return counter.get_total_flops()


def require_parts(parts: list[PreparedPrefix]) -> None:
    """The merged prefix gives every bit of what its parts give."""
    joint = join(parts, noise())
    assert joint is not None
    values = list(joint(noise()))
    expected = [value for part in parts for value in part.prefix(noise())]
    assert len(values) == len(expected) == len(joint.rows)
    assert all(torch.equal(value, truth) for value, truth in zip(values, expected, strict=True))


def test_nested_cuts_cost_what_the_deepest_costs(tmp_path: Path) -> None:
    """Each part is of a model of its own with the same weights, as the runs of a sweep are."""
    state = read_tensors(write_weights(tmp_path / "w.safetensors"))
    parts = []
    for layers in (["fc"], ["layer4", "fc"], ["layer2", "layer3", "layer4", "fc"]):
        model = timm.create_model("test_resnet", num_classes=1000)
        model.load_state_dict(state)
        parts.append(prepared(model.eval(), layers))
    assert parts[0].folded > parts[1].folded > parts[2].folded > 0
    require_parts(parts)
    deepest, *others = graphs(parts)
    assert multiply_adds(merge([*others, deepest])) == multiply_adds(deepest)


class Branches(nn.Module):
    """Two branches whose values both reach the head; the second one may change in place what the first one reads."""

    def __init__(self, *, inplace: bool = False) -> None:
        super().__init__()
        self.start = nn.Conv2d(3, 4, 3, padding=1)
        self.left = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.right = nn.Sequential(nn.ReLU(inplace), nn.Conv2d(4, 4, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        start = self.start(images)
        both = torch.cat([self.left(start), self.right(start)], dim=1)
        return self.fc(both.mean((2, 3)))  # type: ignore[no-any-return]


def parts_of(model: nn.Module, *cuts: list[str]) -> list[PreparedPrefix]:
    parts = []
    for layers in cuts:
        for module in model.modules():
            module.__dict__.pop("train", None)  # as before the last `freeze`
        parts.append(prepared(model, layers))
    return parts


def test_cuts_that_do_not_nest_and_cross_several_values() -> None:
    """In the last one a batch norm trains, which the third folds into the convolution before it."""
    torch.manual_seed(0)
    parts = parts_of(Branches().eval(), ["left", "fc"], ["right", "fc"], ["fc"], ["left.1", "fc"])
    assert [len(part.prefix.rows) for part in parts] == [2, 2, 1, 2]
    require_parts(parts)


def test_a_value_that_a_deeper_cut_changes_in_place() -> None:
    torch.manual_seed(0)
    require_parts(parts_of(Branches(inplace=True).eval(), ["left", "right", "fc"], ["right", "fc"], ["fc"]))


def test_what_cannot_be_one_is_left_apart() -> None:
    """Here what is new in the second part reads a value that the first one has changed in place."""
    torch.manual_seed(0)
    parts = parts_of(Branches(inplace=True).eval(), ["fc"], ["left.1", "fc"])
    assert join(parts, noise()) is None
    assert join([parts[0], Counted((RowShape((4,), torch.float32),)).prepared()], noise()) is None, "it has no graph"


def test_networks_with_other_weights_share_nothing() -> None:
    torch.manual_seed(0)
    parts = [*parts_of(Branches().eval(), ["fc"]), *parts_of(Branches().eval(), ["fc"])]
    require_parts(parts)
    assert multiply_adds(merge(graphs(parts))) == 2 * multiply_adds(graphs(parts)[0])
