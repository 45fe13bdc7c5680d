"""Make the frozen part ready to run: folded, in the number format and compilation that measured fastest.

The result is checked against the plain fp32 model on real images before any time is spent on it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from torch import fx, nn

from finetune.augment import Preprocessing
from finetune.cut import Cut
from finetune.device import prefix_batch, settle
from finetune.features import Prefix, RowShape
from finetune.fold import fold_batch_norms
from finetune.layers import tensor_sha256
from finetune.precision import DTYPES, Choice, compile_module

FP32_ERROR = 1e-3  # relative; folding rounds once per layer, 1e-6 is usual
BF16_ERROR = 0.1  # relative; bf16 keeps 8 bits (2**-8 = 0.004) per layer, 0.01 to 0.03 is usual


@dataclass(frozen=True)
class PreparedPrefix:
    """A prefix with its choice, and what its features depend on.

    Attributes:
        prefix: ready to give features.
        choice: number format and compilation, with the reason.
        identity: ingredients of the cache key that describe the computation.
        folded: how many batch norms were folded.
        exact: its twin in fp32, eager, for the test split; None when it is that itself.
        graph: what runs, in its number format, eager: to be merged with the prefixes of other cuts.
    """

    prefix: Prefix
    choice: Choice
    identity: dict[str, Any]
    folded: int
    exact: PreparedPrefix | None = None
    graph: nn.Module | None = None

    @property
    def for_test(self) -> PreparedPrefix:
        """What computes the test split's features: in fp32, eager, as whoever loads the model will."""
        return self.exact or self


def prepare_prefix(
    cut: Cut,
    preprocessing: Preprocessing,
    sample: torch.Tensor,
    device: torch.device,
    pick: Callable[[Callable[[str, bool], Callable[[], None]]], Choice],
) -> PreparedPrefix:
    """Fold, convert and compile a cut's prefix.

    Args:
        cut: with a prefix.
        preprocessing: pixels to model input.
        sample: uint8 images (B, 3, H, W) of the data, up to a batch of them, to time and check with.
        device: where it will run.
        pick: given `build(precision, compiled) → step`, returns the choice (measured or remembered).
    """
    if cut.prefix is None:
        raise ValueError("an uncut model has no prefix to prepare")
    batch = prefix_batch(device)
    few = sample[: min(len(sample), 8)]
    with torch.no_grad():
        exact = cut.prefix(preprocessing(few))
    folded, count = fold_batch_norms(cut.prefix)
    if not _error(folded, preprocessing(few), exact) <= FP32_ERROR:  # NaN does not pass either
        folded, count = copy.deepcopy(cut.prefix).requires_grad_(False), 0
    twins = _Twins(folded, device)
    full = sample[torch.arange(batch) % len(sample)]

    def build(precision: str, compiled: bool) -> Callable[[], None]:
        run = twins.runnable(precision, compiled)

        def step() -> None:
            with torch.no_grad():
                run(preprocessing(full.to(device), DTYPES[precision]))

        return step

    choice = pick(build)
    if choice.precision == "bf16":
        error = _error(twins.module("bf16"), preprocessing(few.to(device), torch.bfloat16), exact)
        if not error <= BF16_ERROR:
            reason = f"bf16 features would be {100 * error:.0f} % off"
            choice = replace(choice, precision="fp32", reason=reason)  # with bf16's rate, the best guess there is
    prefix = Prefix(
        run=twins.runnable(choice.precision, choice.compiled),
        preprocessing=preprocessing,
        dtype=choice.dtype,
        batch=batch,
        device=device,
        rows=tuple(RowShape(tuple(value.shape[1:]), choice.dtype) for value in exact),
    )
    identity = _identity(cut.prefix, prefix, choice, count)
    ready = PreparedPrefix(prefix, choice, identity, count, graph=twins.module(choice.precision))
    if choice.precision == "fp32" and not choice.compiled:
        return ready
    precise = replace(choice, precision="fp32", compiled=False, rate=choice.exact_rate)
    rows = tuple(RowShape(row.shape, torch.float32) for row in prefix.rows)
    twin = replace(prefix, run=twins.runnable("fp32", False), dtype=torch.float32, rows=rows)
    exactly = PreparedPrefix(twin, precise, _identity(cut.prefix, twin, precise, count), count)
    return replace(ready, exact=exactly)


class _Twins:
    """A folded prefix in each number format, eager and compiled; each is made when it is first asked for."""

    def __init__(self, folded: nn.Module, device: torch.device) -> None:
        self.folded, self.device = folded, device
        self._plain: dict[str, nn.Module] = {}
        self._compiled: dict[str, Any] = {}

    def module(self, precision: str) -> nn.Module:
        if precision not in self._plain:
            twin = copy.deepcopy(self.folded).to(dtype=DTYPES[precision])
            self._plain[precision] = settle(twin, self.device).eval()
        return self._plain[precision]

    def runnable(self, precision: str, compiled: bool) -> Any:
        if not compiled:
            return self.module(precision)
        if precision not in self._compiled:
            self._compiled[precision] = compile_module(self.module(precision))
        return self._compiled[precision]


def _identity(frozen: fx.GraphModule, prefix: Prefix, choice: Choice, folded: int) -> dict[str, Any]:
    """Return the ingredients of the cache key that describe the computation."""
    preprocessing = prefix.preprocessing
    return {
        "prefix": prefix_sha256(frozen),
        "image_size": preprocessing.size,
        "interpolation": preprocessing.interpolation,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "dtype": str(choice.dtype),
        "folded": folded,
        "compiled": choice.compiled,
        "device": prefix.device.type,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def prefix_sha256(prefix: fx.GraphModule) -> str:
    """Return an identity of a prefix: its graph's code and every tensor in it."""
    tensors = {**dict(prefix.named_parameters()), **dict(prefix.named_buffers())}  # not only what a state dict holds
    lines = [prefix.code] + [f"{name} {tensor_sha256(tensor)}" for name, tensor in sorted(tensors.items())]
    # Modules that stay whole in the graph hide their own code: their printed form names kernel sizes and strides, their
    # attributes numbers of heads, scales and the like.
    lines += [f"{name} {module} {_plain_attributes(module)}" for name, module in sorted(prefix.named_modules()) if name]
    return tensor_sha256(torch.frombuffer(bytearray("\n".join(lines).encode()), dtype=torch.uint8))


def _plain_attributes(module: nn.Module) -> list[str]:
    """Return a module's own numbers, switches and texts, but for its mode."""
    plain = (bool, int, float, str)
    return sorted(
        f"{name}={value!r}"
        for name, value in vars(module).items()
        if name != "training"
        and (isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(part, plain) for part in value)))
    )


def _error(module: nn.Module, pixels: torch.Tensor, exact: tuple[torch.Tensor, ...]) -> float:
    """Return the largest relative L2 error of a module's outputs against exact ones."""
    with torch.no_grad():
        values = module(pixels)
    errors = [
        (value.float().cpu() - truth).norm() / truth.norm().clamp_min(1e-12)
        for value, truth in zip(values, exact, strict=True)
    ]
    return float(torch.stack(errors).max())  # NaN where any is
