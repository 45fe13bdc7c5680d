"""Whether a training step fits in memory, known before the first one is taken.

What a step holds at its fullest is dominated by the activations that the backward pass wants back. PyTorch tells which
these are while a forward pass of two images runs; they grow with the batch. The sum is a lower bound: gradients of
activations and scratch memory of single operations come on top. So a run that is refused here could have worked by
swapping at best, and one that passes may still be too large by a little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from finetune.device import free_memory
from finetune.fit import autocast, cast
from finetune.plan import Placement, size
from finetune.recipe import Recipe
from weights.errors import UsageError

PROBE = 2  # images: one image would make shapes of one, which operations may treat in their own way
STATES = {"sgd": 1, "adam": 2, "adamw": 2}  # numbers that the optimiser keeps for each trained one


@dataclass(frozen=True)
class StepMemory:
    """What training needs at least.

    Attributes:
        image: bytes for each image of a batch.
        fixed: bytes whatever the batch.
        free: bytes that can be had on the device that trains.
    """

    image: int
    fixed: int
    free: int

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
            if fits >= PROBE
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
        left = self.free - self.needed(batch)
        if placement.where != "ram" or placement.bytes <= left:
            return
        budget = f"{left // 10**6}MB" if left >= 10**6 else f"{left // 1000}kB"
        raise UsageError(
            f"Features in memory need {size(placement.bytes)}, training at least {size(self.needed(batch))} more, and "
            f"{size(self.free)} are free; give --memory-budget {budget} or less, so that features are read from disk, "
            "or a smaller --batch-size."
        )


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
    weights = {tuple(parameter.shape) for parameter in suffix.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in weights:  # weights, and their copies in bf16, do not grow with the batch
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = tuple(torch.zeros(PROBE, *shape, device=device) for shape in shapes)
    mode = suffix.training
    suffix.eval()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(device, dtype):
        suffix(*cast(inputs, dtype))
    suffix.train(mode)
    trained = sum(value.nbytes for value in suffix.parameters() if value.requires_grad)
    states = 0 if recipe.optimizer == "sgd" and not recipe.momentum else STATES[recipe.optimizer]
    fixed = trained * (1 + states)  # 1: the gradients
    if recipe.ema:
        fixed += sum(value.nbytes for value in suffix.parameters())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return StepMemory(sum(held.values()) // PROBE, fixed, free)
