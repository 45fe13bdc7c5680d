"""Whether a training step fits in memory, known before the first one is taken.

What a step holds at its fullest is dominated by the activations that the backward pass wants back. PyTorch tells which
these are while a forward pass runs: what four images hold more than two is what two images hold, and the rest does not
grow with the batch. The sum is a lower bound: gradients of activations and scratch memory of single operations come on
top. So a run that is refused here could have worked by swapping at best, and one that passes may still be too large by
a little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from finetune.inference import autocast, cast
from finetune.machine import free_memory
from finetune.plan import Placement, size
from finetune.recipe import Recipe
from weights.errors import TrainingError, UsageError

PROBES = (2, 4)  # images; not one, because operations may treat shapes of one in their own way
STATES = {
    "auto": 1,
    "sgd": 1,
    "adam": 2,
    "adamw": 2,
    "muon": 2,
}  # numbers that the optimiser keeps for each trained one


@dataclass(frozen=True)
class StepMemory:
    """What training needs at least.

    Attributes:
        image: bytes for each image of a batch.
        fixed: bytes whatever the batch.
        free: bytes that can be had on the device that trains.
        shared: whether features lie in the same memory; they do not when a GPU with memory of its own trains.
    """

    image: int
    fixed: int
    free: int
    shared: bool

    def left(self, batch: int) -> int | None:
        """Bytes that training leaves for features in memory; None where it does not take from them."""
        return max(0, self.free - self.needed(batch)) if self.shared else None

    def needed(self, batch: int) -> int:
        """Bytes for a batch of this many images."""
        return self.fixed + batch * self.image

    def require(self, batch: int) -> None:
        """Refuse batches that cannot fit.

        Raises:
            UsageError: with the largest batch size that could.
        """
        if self.needed(batch) <= self.free:
            return
        fits = (self.free - self.fixed) // max(1, self.image)
        advice = (
            f"give --batch-size {fits} or less, or a smaller --image-size"
            if fits >= PROBES[0]
            else "give a smaller --image-size, or train fewer layers"
        )
        raise UsageError(
            f"Training in batches of {batch} images needs at least {size(self.needed(batch))} of memory and "
            f"{size(self.free)} are free; {advice}."
        )

    def require_beside(self, placement: Placement, batch: int) -> None:
        """Refuse features in memory that leave too little for training beside them.

        Raises:
            UsageError: with the memory budget that does.
        """
        left = self.left(batch)
        if left is None or placement.where != "ram" or placement.bytes <= left:
            return
        budget = f"{left // 10**6}MB" if left >= 10**6 else f"{left // 1000}kB"
        raise UsageError(
            f"Features in memory need {size(placement.bytes)}, training at least {size(self.needed(batch))} more, and "
            f"{size(self.free)} are free; give --memory-budget {budget} or less, so that features are read from disk, "
            "or a smaller --batch-size."
        )


@contextmanager
def exhaustion_explained() -> Iterator[None]:
    """Turn a GPU's memory running out into one sentence.

    Raises:
        TrainingError: memory ran out, with the way on.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise TrainingError(
            f"The device's memory ran out ({reason}). Start a new run with a smaller --batch-size or --image-size, or "
            "with --memory-budget, or end other programs that use the device and go on with --resume."
        ) from error


def step_memory(
    suffix: nn.Module, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, recipe: Recipe
) -> StepMemory:
    """Measure what a training step needs at least; weights and statistics stay as they are.

    Args:
        suffix: what trains, on the device.
        shapes: of its inputs without the batch dimension.
        dtype: torch.bfloat16 for training under autocast, else torch.float32.
        device: where it trains.
        recipe: optimizer, momentum and ema are read.
    """
    few, more = (_held(suffix, shapes, dtype, device, images) for images in PROBES)
    image = max(0, more - few) // (PROBES[1] - PROBES[0])
    trained = sum(value.nbytes for value in suffix.parameters() if value.requires_grad)
    fixed = max(0, few - PROBES[0] * image) + trained * (1 + optimizer_states(recipe))  # 1: the gradients
    if recipe.ema:
        fixed += sum(value.nbytes for value in suffix.parameters())
    return StepMemory(image, fixed, _free(device), shared=device.type != "cuda")


def optimizer_states(recipe: Recipe) -> int:
    """Return how many numbers the recipe's optimiser keeps for each trained one."""
    return 0 if recipe.optimizer == "sgd" and not recipe.momentum else STATES[recipe.optimizer]


def _held(
    suffix: nn.Module, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, images: int
) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, the module's own tensors left out."""
    own = {value.untyped_storage().data_ptr() for value in [*suffix.parameters(), *suffix.buffers()]}
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = tuple(torch.zeros(images, *shape, device=device) for shape in shapes)
    mode = suffix.training
    suffix.eval()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(device, dtype):
            kept = suffix(*cast(inputs, dtype))  # held until the sum is taken, or its memory would be used again
        return sum(held.values()) if kept is not None else 0
    finally:
        suffix.train(mode)


def _free(device: torch.device) -> int:
    """Return the bytes that can be had on a device; what PyTorch keeps for itself and does not use counts."""
    if device.type != "cuda":
        return free_memory()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
