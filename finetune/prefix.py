"""Make the frozen part ready to run: folded, in the number format and compilation that measured fastest.

The result is checked against the plain fp32 model on real images before any time is spent on it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from finetune.augment import Preprocessing
from finetune.cut import Cut
from finetune.features import Prefix, RowShape
from finetune.fold import fold_batch_norms
from finetune.layers import tensor_sha256
from finetune.precision import DTYPES, Choice, compile_module

PREFIX_BATCH = 64  # images per call: larger batches were no faster on a CPU and cost memory (docs/log.md)
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
    """

    prefix: Prefix
    choice: Choice
    identity: dict[str, Any]
    folded: int


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
    batch = PREFIX_BATCH
    few = sample[: min(len(sample), 8)]
    with torch.no_grad():
        exact = cut.prefix(preprocessing(few))
    folded, count = fold_batch_norms(cut.prefix)
    if _error(folded, preprocessing(few), exact) > FP32_ERROR:
        folded, count = copy.deepcopy(cut.prefix).requires_grad_(False), 0
    modules: dict[str, nn.Module] = {}

    def module(precision: str) -> nn.Module:
        if precision not in modules:
            twin = copy.deepcopy(folded).to(device, DTYPES[precision]).to(memory_format=torch.channels_last)
            modules[precision] = twin.eval()
        return modules[precision]

    compiled_modules: dict[str, Any] = {}

    def runnable(precision: str, compiled: bool) -> Any:
        if not compiled:
            return module(precision)
        if precision not in compiled_modules:
            compiled_modules[precision] = compile_module(module(precision))
        return compiled_modules[precision]

    full = sample[torch.arange(batch) % len(sample)]

    def build(precision: str, compiled: bool) -> Callable[[], None]:
        run = runnable(precision, compiled)
        pixels = preprocessing(full.to(device), DTYPES[precision])

        def step() -> None:
            with torch.no_grad():
                run(pixels)

        return step

    choice = pick(build)
    if choice.precision == "bf16":
        error = _error(module("bf16"), preprocessing(few.to(device), torch.bfloat16), exact)
        if error > BF16_ERROR:
            reason = f"bf16 features would be {100 * error:.0f} % off"
            choice = Choice("fp32", choice.compiled, 0.0, 0.0, reason)
    prefix = Prefix(
        run=runnable(choice.precision, choice.compiled),
        preprocessing=preprocessing,
        dtype=choice.dtype,
        batch=batch,
        device=device,
        rows=tuple(RowShape(tuple(value.shape[1:]), choice.dtype) for value in exact),
    )
    identity = {
        "prefix": prefix_sha256(cut.prefix),
        "image_size": preprocessing.size,
        "interpolation": preprocessing.interpolation,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "dtype": str(choice.dtype),
        "folded": count,
        "compiled": choice.compiled,
        "device": device.type,
        "torch": torch.__version__,
    }
    return PreparedPrefix(prefix, choice, identity, count)


def prefix_sha256(prefix: fx.GraphModule) -> str:
    """Return an identity of a prefix: its graph's code and every tensor in it."""
    lines = [prefix.code] + [f"{name} {tensor_sha256(tensor)}" for name, tensor in sorted(prefix.state_dict().items())]
    # Modules that stay whole in the graph hide their own code: their printed form names kernel sizes and strides.
    lines += [f"{name} {module}" for name, module in sorted(prefix.named_modules()) if name]
    return tensor_sha256(torch.frombuffer(bytearray("\n".join(lines).encode()), dtype=torch.uint8))


def _error(module: nn.Module, pixels: torch.Tensor, exact: tuple[torch.Tensor, ...]) -> float:
    """Return the largest relative L2 error of a module's outputs against exact ones."""
    with torch.no_grad():
        values = module(pixels)
    return max(
        float((value.float().cpu() - truth).norm() / truth.norm().clamp_min(1e-12))
        for value, truth in zip(values, exact, strict=True)
    )
