"""The cut: a model becomes a prefix that never changes and a suffix that trains.

    images ──► prefix (frozen, eval) ──► crossing tensors ──► suffix (holds everything that trains) ──► logits

How it is found, without a line about any architecture:

1. `torch.fx` traces the model coarsely: a module that is wholly frozen, wholly trained or without parameters stays one
   node, called as it is, so its own Python (train mode, dropout, control flow) keeps working. Only modules that mix
   trained and frozen children are traced through. One that cannot be traced becomes a single node, and tracing starts
   again: the cut then lies before it.
2. Every node that uses a trained parameter, or anything computed from one, is coloured, and so is dropout with nothing
   frozen behind it (`finetune/dropout.py`).
3. The cut lies where uncoloured values enter coloured nodes; these values are the features. Sizes that are the same
   whatever the images are written into the suffix as numbers.

The suffix shares the model's own modules under their own names: training the suffix trains the model.
"""

from __future__ import annotations

import copy
import linecache
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torch.fx import graph_module

from finetune.dropout import colour_dropout, follow_mode
from finetune.layers import Selection, is_inside, remembers
from weights.errors import UsageError

MAX_RETRACES = 200  # one per module that cannot be traced; the largest timm models have fewer stages than that


@dataclass(frozen=True)
class Cut:
    """A model taken apart.

    Attributes:
        prefix: images (N, 3, S, S) → tuple of crossing tensors, each with N rows; None when the model trains uncut.
        suffix: crossing tensors → logits (N, classes); the model itself when uncut.
        crossing: names of the graph nodes whose values cross.
        reason: why the model is uncut, or "".
    """

    prefix: fx.GraphModule | None
    suffix: nn.Module
    crossing: tuple[str, ...]
    reason: str = ""


class RetraceError(Exception):
    """Tracing failed inside a module: `path` names the innermost one ("" is the model itself)."""

    def __init__(self, path: str, cause: BaseException) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.path = path


class _Tracer(fx.Tracer):
    """Trace with a rule of what stays whole, and remember where tracing failed."""

    def __init__(self, stays_whole: Callable[[nn.Module, str], bool]) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.stays_whole = stays_whole
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, tuple(get_notrace_modules())) or self.stays_whole(m, module_qualified_name):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        # Only the images are an input: optional arguments (masks, lists of indices) keep their defaults.
        return root_fn, [self.root, self.create_proxy("placeholder", "images", (), {})]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = self.path_of_module(m)
            raise


def trace(model: nn.Module, stays_whole: Callable[[nn.Module, str], bool]) -> fx.Graph:
    """Trace `model`, keeping whole what the rule names and what cannot be traced.

    Args:
        model: a module whose forward takes one tensor.
        stays_whole: (module, dotted name) → whether it becomes a single node.

    Returns:
        The graph; its targets are names in `model`.

    Raises:
        RetraceError: the model's own forward cannot be traced.
    """
    whole: set[str] = set()
    for _ in range(MAX_RETRACES):
        tracer = _Tracer(lambda m, name: name in whole or stays_whole(m, name))
        try:
            return tracer.trace(model)
        except Exception as error:  # any Python that a proxy cannot follow: its own kind of error each time
            path = tracer.failed or ""
            if not path or path in whole:
                raise RetraceError(path, error) from error
            whole.add(path)
    raise RetraceError("", RecursionError(f"over {MAX_RETRACES} modules cannot be traced"))


def cut_model(model: nn.Module, selection: Selection, sample: torch.Tensor) -> Cut:
    """Cut a model at the boundary between what is frozen and what trains.

    Args:
        model: the model, frozen by `layers.freeze`, on the CPU, in fp32.
        selection: what trains.
        sample: float images (N, 3, S, S), N ≥ 2, to see which values cross and to check the cut.

    Returns:
        The cut, with suffix(*prefix(sample)) equal to model(sample), or an uncut one with its reason. Either way the
        model is left in eval mode.

    Raises:
        UsageError: the model does not use what is selected.
    """
    if selection.covers(""):
        return Cut(None, model, (), "every layer trains")
    model.eval()
    try:
        with _nothing_remembered(model):
            graph = _trace_around(model, selection)
    except RetraceError as error:
        return Cut(None, model, (), f"the model cannot be traced ({_first_line(error)})")
    coloured = _colour(graph, selection)
    colour_dropout(model, graph, coloured)
    runs = [(part, _run(model, graph, part)) for part in (sample, sample[:1])]
    constants: dict[fx.Node, Any] = {}
    crossing = _crossing(graph, coloured)
    while odd := [n for n in crossing if not all(_has_rows(values[n], len(part)) for part, values in runs)]:
        # Constants and tables whose rows are no images cannot be cached: the suffix computes them again.
        constants |= {n: runs[0][1][n] for n in odd if _is_fixed_size(*(values[n] for _, values in runs))}
        coloured.update(odd)
        coloured.difference_update(constants)
        crossing = [node for node in _crossing(graph, coloured) if node not in constants]
    inputs = [node for node in crossing if _is_input(node)]
    if inputs == crossing:
        return Cut(None, model, (), "no frozen layer comes before the first trained one")
    if inputs:
        return Cut(None, model, (), "what trains needs the images beside what the frozen layers make of them")
    prefix = _prefix(model, graph, crossing)
    suffix = _suffix(model, graph, coloured, crossing, constants)
    missing = sorted(set(selection.trained) - {name for name, _ in suffix.named_parameters(remove_duplicate=False)})
    used = _used(model, missing, sample) if missing else []
    if not used and len(missing) == len(selection.trained):
        raise UsageError(
            f"The network has {missing[0]} and does not use it, so nothing would train; name layers that it uses."
        )
    if used:
        return Cut(None, model, (), f"{used[0]} trains, and tracing the model does not show where it is used")
    trained = {id(value) for value in (*suffix.parameters(), *suffix.buffers())}
    if any(id(value) in trained for value in (*prefix.parameters(), *prefix.buffers())):
        prefix = copy.deepcopy(prefix)  # both halves read it, and the suffix moves to its device alone
    if not _agree(model, prefix, suffix, sample):
        return Cut(None, model, (), "the two halves do not give the whole model's output")
    return Cut(prefix, suffix, tuple(node.name for node in crossing))


def _trace_around(model: nn.Module, selection: Selection) -> fx.Graph:
    """Trace coarsely; where the model takes a frozen module's output apart in Python, trace through those too."""

    def is_uniform(module: nn.Module, name: str) -> bool:
        return selection.covers(name) or not any(is_inside(selected, name) for selected in selection.names)

    try:
        return trace(model, is_uniform)
    except RetraceError:
        return trace(model, lambda module, name: selection.covers(name) or next(module.parameters(), None) is None)


def _colour(graph: fx.Graph, selection: Selection) -> set[fx.Node]:
    """Return the nodes that use a trained parameter or anything computed from one."""
    coloured: set[fx.Node] = set()
    for node in graph.nodes:
        uses_trained = node.op in ("call_module", "get_attr") and (
            selection.covers(str(node.target))
            or any(is_inside(selected, str(node.target)) for selected in selection.names)
        )
        if uses_trained or node.op == "output" or any(parent in coloured for parent in node.all_input_nodes):
            coloured.add(node)
    return coloured


def _crossing(graph: fx.Graph, coloured: set[fx.Node]) -> list[fx.Node]:
    """Return the uncoloured nodes that coloured ones read, in graph order; frozen parameters are no such values."""
    return [
        node
        for node in graph.nodes
        if node not in coloured and node.op != "get_attr" and any(user in coloured for user in node.users)
    ]


class _Recorder(fx.Interpreter):
    """Run a graph and keep what each node gave."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        # fx hands lists over frozen; some models (HRNet) write into the list they are given.
        return super().call_module(target, tuple(list(a) if isinstance(a, list) else a for a in args), kwargs)


def _run(model: nn.Module, graph: fx.Graph, sample: torch.Tensor) -> dict[fx.Node, Any]:
    recorder = _Recorder(model, graph)
    with torch.no_grad():
        recorder.run(sample)
    return recorder.values


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim >= 1 and value.shape[0] == rows and value.is_floating_point()


def _is_input(node: fx.Node) -> bool:
    """Tell whether a node stands for the images."""
    return node.op == "placeholder"  # torch.fx's word for an argument of the graph


def _is_fixed_size(*values: Any) -> bool:
    """Tell whether a value is a whole number, or several, that do not depend on how many images there are."""
    first = values[0]
    parts = first if isinstance(first, tuple | list) else (first,)
    return all(type(part) is int for part in parts) and all(value == first for value in values)


@contextmanager
def _nothing_remembered(model: nn.Module) -> Iterator[None]:
    """Trace what attention computes from its biases, instead of the result it remembers in eval mode (LeViT's kind)."""

    def forget() -> None:
        for module in filter(remembers, model.modules()):
            module.attention_bias_cache.clear()  # type: ignore[operator, union-attr]

    forget()
    try:
        yield
    finally:
        forget()  # what was traced is no tensor


def _prefix(model: nn.Module, graph: fx.Graph, crossing: list[fx.Node]) -> fx.GraphModule:
    """Copy what the crossing values are computed from; the output is the tuple of them."""
    needed = set(crossing)
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in needed or _is_input(node):
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in crossing))
    return fx.GraphModule(model, part, "Prefix").eval()


def _suffix(
    model: nn.Module,
    graph: fx.Graph,
    coloured: set[fx.Node],
    crossing: list[fx.Node],
    constants: dict[fx.Node, Any],
) -> fx.GraphModule:
    """Copy the coloured part; crossing values become its inputs, frozen parameters that it reads come along."""
    part = fx.Graph()
    copies: dict[fx.Node, Any] = {node: part.placeholder(node.name) for node in crossing}
    copies |= constants
    for node in graph.nodes:
        if node in coloured or (node.op == "get_attr" and any(user in coloured for user in node.users)):
            copies[node] = part.node_copy(node, copies.__getitem__)
    suffix = fx.GraphModule(model, part, "Suffix")
    follow_mode(model, suffix)
    return suffix


def _used(model: nn.Module, names: list[str], sample: torch.Tensor) -> list[str]:
    """Return which of the parameters the model's training depends on; networks may have some that they do not use."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    before = {name: value.clone() for name, value in model.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        outputs = model.train()(sample)
    logits = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    wanted = [parameters[name] for name in names]
    slopes = (
        torch.autograd.grad(logits.sum(), wanted, allow_unused=True) if logits.requires_grad else [None] * len(names)
    )
    model.eval()
    for name, value in model.named_buffers():
        value.copy_(before[name])
    return [name for name, slope in zip(names, slopes, strict=True) if slope is not None]


def _agree(model: nn.Module, prefix: nn.Module, suffix: nn.Module, sample: torch.Tensor) -> bool:
    suffix.eval()
    with torch.no_grad():
        return torch.allclose(suffix(*prefix(sample)), model(sample), rtol=1e-5, atol=1e-5)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


@contextmanager
def sources_dropped() -> Iterator[None]:
    """Let go, at the end, of the sources of all graphs that were made within; usable as a decorator.

    PyTorch keeps the source of every graph module for tracebacks, as long as the process lives (`_EvalCacheLoader` in
    torch/fx/graph_module.py): 43 kB a run, its evaluation and its export for the smallest network.
    """
    sources = graph_module._loader.eval_cache
    before = set(sources)
    try:
        yield
    finally:
        for name in set(sources) - before:
            sources.pop(name, None)
            linecache.cache.pop(name, None)
