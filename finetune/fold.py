"""Make a frozen prefix cheaper without changing what it computes: fold each batch norm into the convolution before it.

In eval mode a batch norm is an affine map with fixed numbers, so y = bn(conv(x)) is one convolution with other weights
(Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
section 3.2). `torch.nn.utils.fusion` computes the weights; this file finds the pairs.
"""

from __future__ import annotations

import copy

from timm.layers.conv2d_same import Conv2dSame
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from finetune.cut import RetraceError, trace

# Exact types: a subclass may change its weight in forward (weight standardisation), and folding would be wrong there.
FOLDABLE_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)


def fold_batch_norms(prefix: fx.GraphModule) -> tuple[fx.GraphModule, int]:
    """Return a copy of a prefix with its batch norms folded, and how many there were.

    Args:
        prefix: a frozen prefix in eval mode; it is not touched, its weights are copied.

    Returns:
        The folded copy in eval mode (same inputs and outputs up to rounding), and the number of folded batch norms.
        A prefix that cannot be traced further comes back as a plain copy, with 0.
    """
    twin = copy.deepcopy(prefix).eval().requires_grad_(False)
    try:
        graph = trace(twin, lambda module, _: next(module.children(), None) is None)
    except RetraceError:
        return twin, 0
    folded = fx.GraphModule(twin, graph, "FoldedPrefix").eval()
    count = sum(_fold_pair(folded, node) for node in list(folded.graph.nodes))
    folded.graph.lint()
    folded.recompile()
    folded.delete_all_unused_submodules()
    return folded, count


def _fold_pair(module: fx.GraphModule, node: fx.Node) -> bool:
    """Fold the batch norm at `node` into the convolution that alone feeds it; return whether there was such a pair."""
    if node.op != "call_module" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before = node.args[0]
    if before.op != "call_module" or len(before.users) != 1 or _calls(module, before) > 1 or _calls(module, node) > 1:
        return False
    norm, convolution = module.get_submodule(str(node.target)), module.get_submodule(str(before.target))
    if not isinstance(norm, nn.BatchNorm2d) or type(convolution) not in FOLDABLE_CONVOLUTIONS:
        return False
    if norm.running_mean is None or norm.running_var is None:
        return False  # this one normalises by the batch even in eval mode
    fused: nn.Module = fuse_conv_bn_eval(convolution, norm)  # type: ignore[type-var]
    module.set_submodule(str(before.target), fused)
    # timm's BatchNormAct2d is a batch norm with dropout and activation of its own: these stay behind.
    rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if isinstance(part, nn.Module)]
    module.set_submodule(str(node.target), nn.Sequential(*rest).eval())
    return True


def _calls(module: fx.GraphModule, node: fx.Node) -> int:
    """How often the module that `node` calls is called in the whole graph (shared layers must not be folded)."""
    return sum(other.op == "call_module" and other.target == node.target for other in module.graph.nodes)
