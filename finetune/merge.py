"""The prefixes of several cuts of one network, as one: what they have in common is computed once.

    images ──► layer1, layer2 ──┬──► layer3 ──┬──► layer4, pool ──► features of `fc`
                                │             └──► features of `layer4,fc`
                                └──► features of `layer3,layer4,fc`

Two nodes are the same when they do the same thing to the same values: the same function, or modules with equal tensors.
Nothing is assumed of the cuts: one need not lie within another, and any number of values may cross.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx, nn

from finetune.features import Prefix
from finetune.precision import compile_module
from finetune.prefix import BF16_ERROR, FP32_ERROR, PreparedPrefix


def join(parts: Sequence[PreparedPrefix], sample: torch.Tensor) -> Prefix | None:
    """Return one prefix that gives the crossing tensors of several, one part after the other.

    It is tried on real images against the parts, which run eager: eager itself, every bit has to be the same; compiled
    code rounds in other places, so there the bounds are those of a prefix against the plain model.

    Args:
        parts: prefixes of one network on one device, in the same number format, all compiled or none.
        sample: uint8 images (B, 3, H, W) of the data.

    Returns:
        The prefix; None where it would give other values than the parts.
    """
    choice = parts[0].choice
    graphs = [part.graph for part in parts if isinstance(part.graph, fx.GraphModule)]
    if len(graphs) < len(parts):
        return None
    merged = merge(graphs)
    run = compile_module(merged) if choice.compiled else merged
    joint = replace(parts[0].prefix, run=run, rows=tuple(row for part in parts for row in part.prefix.rows))
    full = sample[torch.arange(joint.batch) % len(sample)]
    bound = 0.0
    if choice.compiled:
        bound = BF16_ERROR if choice.precision == "bf16" else FP32_ERROR
    truths = [
        value for part, graph in zip(parts, graphs, strict=True) for value in replace(part.prefix, run=graph)(full)
    ]
    agree = (_agree(value, truth, bound) for value, truth in zip(joint(full), truths, strict=True))
    return joint if all(agree) else None


def _agree(value: torch.Tensor, truth: torch.Tensor, bound: float) -> bool:
    if not bound:
        return torch.equal(value, truth)
    error = (value.float() - truth.float()).norm() / truth.float().norm().clamp_min(1e-12)
    return bool(error <= bound)  # NaN does not pass


def merge(parts: Sequence[fx.GraphModule]) -> fx.GraphModule:
    """Return a module that gives the outputs of all parts.

    Args:
        parts: each takes images (B, 3, S, S) and gives a tuple of tensors. Their modules are used, not copied.

    Returns:
        In eval mode: images → the tuple of the first part's tensors, then those of the second, and so on.
    """
    merger = _Merger()
    outputs = [value for part in parts for value in merger.add(part)]
    merger.graph.output(tuple(outputs))
    merger.graph.lint()
    return fx.GraphModule(merger.owned, merger.graph, "MergedPrefix").eval()


class _Merger:
    """A graph that grows by one part after the other."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.images = self.graph.placeholder("images")
        self.known: dict[tuple[Any, ...], fx.Node] = {}
        self.owned: dict[str, Any] = {}

    def add(self, part: fx.GraphModule) -> list[fx.Node]:
        """Add what is new in a part; return its outputs.

        They are copies, made before the next part runs: it may change a value in place that this part hands out.
        """
        copies: dict[fx.Node, fx.Node] = {}
        met: Counter[tuple[Any, ...]] = Counter()
        crossing: Sequence[fx.Node] = ()
        for node in part.graph.nodes:
            if node.op == "placeholder":
                copies[node] = self.images
            elif node.op == "output":
                crossing = cast(Sequence[fx.Node], node.args[0])
            else:
                copies[node] = self._add_node(part, node, copies, met)
        return [self.graph.call_function(torch.clone, (copies[value],)) for value in crossing]

    def _add_node(
        self, part: fx.GraphModule, node: fx.Node, copies: dict[fx.Node, fx.Node], met: Counter[tuple[Any, ...]]
    ) -> fx.Node:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
        target = self._own(part, str(node.target)) if node.op in ("call_module", "get_attr") else node.target
        what = (node.op, target, repr(args), repr(kwargs))  # a node is printed as its name, which is unique
        met[what] += 1  # the same again within a part is another step: it may change its input in place
        key = (*what, met[what])
        if key not in self.known:
            self.known[key] = self.graph.create_node(node.op, target, args, kwargs)
        return self.known[key]

    def _own(self, part: fx.GraphModule, target: str) -> str:
        """Return the name under which the merged module holds a part's module or tensor."""
        value = operator.attrgetter(target)(part)
        names = (f"own_{target.replace('.', '_')}_{number}" for number in itertools.count())
        return next(name for name in names if _equal(self.owned.setdefault(name, value), value))


def _equal(one: Any, other: Any) -> bool:
    """Return whether two modules, or two tensors, do the same."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)
    if type(one) is not type(other) or str(one) != str(other):
        return False
    mine, others = _tensors(one), _tensors(other)
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
