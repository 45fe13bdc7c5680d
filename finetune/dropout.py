"""Dropout around the cut: on in training behind everything frozen, off before it and in evaluation.

A dropout that is a module follows `.train()` where the suffix holds it. One that is a function was traced in eval mode,
with `training=False` for good, so it becomes a module. Dropout in front of what is computed once stays off.
"""

from __future__ import annotations

from collections.abc import Callable

from timm.layers.drop import DropBlock2d, DropPath
from timm.layers.patch_dropout import PatchDropout
from torch import fx, nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd

from finetune.layers import stays_in_eval

FUNCTIONS: dict[Callable[..., object], type[_DropoutNd]] = {
    functional.dropout: nn.Dropout,
    functional.dropout1d: nn.Dropout1d,
    functional.dropout2d: nn.Dropout2d,
    functional.dropout3d: nn.Dropout3d,
    functional.alpha_dropout: nn.AlphaDropout,
    functional.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
RATES = {_DropoutNd: "p", DropPath: "drop_prob", DropBlock2d: "drop_prob", PatchDropout: "prob"}
"""The attribute of each kind of module that holds its probability."""


def colour_dropout(model: nn.Module, graph: fx.Graph, coloured: set[fx.Node]) -> None:
    """Give to the suffix, with all that follows, dropout that has no frozen layer behind it.

    Args:
        model: frozen by `layers.freeze`.
        graph: of the model.
        coloured: the nodes of the suffix so far; more are added.
    """
    for node in graph.nodes:
        if node not in coloured and _rate(model, node) and not _in_frozen_module(model, node):
            behind = _behind(node)
            if not any(_is_layer(model, other) for other in behind - coloured):
                coloured |= behind


def follow_mode(model: nn.Module, suffix: fx.GraphModule) -> None:
    """Make modules of the functions in a suffix that drop, so that they follow `.train()`.

    Args:
        model: frozen by `layers.freeze`.
        suffix: with copies of the nodes of the model's graph; it is changed in place.
    """
    for number, node in enumerate(list(suffix.graph.nodes)):
        if node.op != "call_function" or not _rate(model, node) or _in_frozen_module(model, node):
            continue
        name = f"_dropout_{number}"
        suffix.add_module(name, FUNCTIONS[node.target](_rate(model, node)))
        node.op, node.target = "call_module", name
        node.args, node.kwargs = (_input(node),), {}
    suffix.graph.lint()
    suffix.recompile()


def _rate(model: nn.Module, node: fx.Node) -> float:
    """Return the probability with which a node drops, 0 where it is no dropout."""
    if node.op == "call_function" and node.target in FUNCTIONS:
        rate = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        return float(rate) if isinstance(rate, int | float) else 0.0
    if node.op != "call_module" or _is_layer(model, node):
        return 0.0
    rates = [
        getattr(module, attribute)
        for module in model.get_submodule(str(node.target)).modules()
        for kind, attribute in RATES.items()
        if isinstance(module, kind)
    ]
    return max((float(rate) for rate in rates if rate), default=0.0)


def _input(node: fx.Node) -> fx.node.Argument:
    return node.args[0] if node.args else node.kwargs["input"]


def _in_frozen_module(model: nn.Module, node: fx.Node) -> bool:
    """Tell whether a node was traced within a module that stays in eval mode."""
    stack = node.meta.get("nn_module_stack", {})
    # Its keys count the calls of a module; the values begin with its name.
    path = str(node.target) if node.op == "call_module" else [name for name, _ in stack.values()][-1] if stack else ""
    parts = path.split(".")
    return any(stays_in_eval(model.get_submodule(".".join(parts[:count]))) for count in range(1, len(parts) + 1))


def _is_layer(model: nn.Module, node: fx.Node) -> bool:
    """Tell whether a node computes with parameters or buffers."""
    if node.op != "call_module":
        return any(parent.op == "get_attr" for parent in node.all_input_nodes)
    module = model.get_submodule(str(node.target))
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _behind(node: fx.Node) -> set[fx.Node]:
    """Return a node and all that is computed from it."""
    found, coming = {node}, [node]
    while coming:
        for user in coming.pop().users:
            if user not in found:
                found.add(user)
                coming.append(user)
    return found
