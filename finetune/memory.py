"""Whether a training step fits in memory, known before the first one is taken.

What a step holds at its fullest is dominated by the activations that the backward pass wants back. PyTorch tells which
these are while a forward pass runs: what four images hold more than two is what two images hold, and the rest does not
grow with the batch. The sum is a lower bound: gradients of activations and scratch memory of single operations come on
top. So a run that is refused here could have worked by swapping at best, and one that passes may still be too large by
a little.

A GPU does not swap. What features and images may take of its memory leaves training twice that lower bound, and some of
all memory for what is not counted here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from finetune.device import synchronize
from finetune.inference import autocast, cast
from finetune.machine import free_memory
from finetune.placement import Placement, size
from finetune.recipe import Recipe
from weights.errors import TrainingError, UsageError

PROBES = (2, 4)  # images; not one, because operations may treat shapes of one in their own way
GPU_SHARE = 0.9  # of a GPU's free memory that is shared out; libraries' workspaces and gaps take the rest (a guess)
BACKWARD = 2  # times the activations: in the backward pass their gradients lie beside them
# Numbers that the optimiser keeps for each trained one.
STATES = {"auto": 1, "sgd": 1, "adam": 2, "adamw": 2, "muon": 2}


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

    def among(self, processes: int, here: int) -> StepMemory:
        """Return what several processes need that train together, each with its share of a batch.

        Args:
            processes: in all.
            here: on this machine. They share its memory, but each has a GPU's to itself.
        """
        if processes == 1:
            return self
        sharing = here if self.shared else 1
        return replace(self, image=self.image * sharing // processes, fixed=self.fixed * sharing)

    def left(self, batch: int) -> int | None:
        """Bytes that training leaves for features in memory; None where it does not take from them."""
        return max(0, self.free - self.needed(batch)) if self.shared else None

    def needed(self, batch: int) -> int:
        """Bytes for a batch of this many images."""
        return self.fixed + batch * self.image

    def room(self, batch: int, free: int, peak: int = 0) -> int:
        """Bytes of a GPU's own memory for features or images, beside training and whatever else runs before or after.

        Args:
            batch: images per step.
            free: bytes free there now.
            peak: most bytes that computing features takes for a while.
        """
        return max(0, int(GPU_SHARE * free) - max(BACKWARD * self.needed(batch), peak))

    def smaller(self, batch: int, taken: int) -> int | None:
        """Return the batch to try when this one did not fit: half of it, or less where that needs more than there is.

        Args:
            batch: images per step that ran out of memory.
            taken: bytes of the same memory that features or images take.

        Returns:
            None where fewer than two images would be left.
        """
        fits = (int(GPU_SHARE * self.free) - taken - BACKWARD * self.fixed) // (BACKWARD * max(1, self.image))
        fits = min(batch // 2, fits)
        return fits if fits >= PROBES[0] else None

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
def exhaustion_explained(smaller: int | None = None) -> Iterator[None]:
    """Turn a GPU's memory running out into one sentence.

    Args:
        smaller: a batch size that should fit; None where none is known.

    Raises:
        TrainingError: memory ran out, with the way on.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = (str(error).splitlines() or [""])[0]
        batch = f"--batch-size {smaller}, which should fit, or a smaller" if smaller else "a smaller --batch-size or"
        raise TrainingError(
            f"The device's memory ran out ({reason}). Start a new run with {batch} --image-size, or with "
            "--memory-budget, or end other programs that use the device and go on with --resume."
        ) from error


def gpu_room(
    memory: StepMemory, batch: int, device: torch.device, features: Sequence[tuple[Callable[[], object], int]]
) -> int | None:
    """Return the bytes of a GPU's own memory that features or images may take; None on other devices.

    Args:
        memory: of training.
        batch: images per step.
        device: where it trains.
        features: in each format that there will be: what computes a batch of features, which is run to see what it
            takes, and the bytes of features that gather beside it before they are kept.
    """
    if device.type != "cuda":
        return None
    # What has gathered is there twice when it is put together, and no batch then.
    peak = max((gathered + max(peak_memory(compute, device), gathered) for compute, gathered in features), default=0)
    return memory.room(batch, _free(device), peak)


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes of a GPU's memory that some work holds beyond what is held before it."""
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


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
        # Without its history: a saved output that led back to its graph would never be freed, nor what trained.
        return tensor.detach()

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
