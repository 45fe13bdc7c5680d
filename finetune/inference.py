"""What a module says of images, without training it: batches, number formats, logits and their score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional

from finetune.recipe import Recipe
from finetune.residency import send
from weights.errors import DivergedError

HELD = 64  # batches whose logits wait on the device before the host asks for them


class Source(Protocol):
    """Where batches come from. One whose rows lie on the device says so with `on_device = True`."""

    def take(self, rows: torch.Tensor, views: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the model part's inputs for int64 (B,) rows and views, on the device."""


def lies_on_device(source: Source) -> bool:
    """Whether a source wants its rows and views on the device; others want them on the host."""
    return bool(getattr(source, "on_device", False))


@runtime_checkable
class ReadsAhead(Protocol):
    """A source that can begin with batches before they are asked for."""

    def expect(self, *batches: torch.Tensor) -> None:
        """Begin with int64 (B,) rows of the coming batches, the first of which is asked for next."""


def announced(
    source: Source, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of (rows, views) unchanged; before each, a source that reads ahead is told of it and the next."""
    if not isinstance(source, ReadsAhead):
        yield from batches
        return
    remaining = iter(batches)
    batch = next(remaining, None)
    while batch is not None:
        following = next(remaining, None)
        source.expect(batch[0], *([] if following is None else [following[0]]))
        yield batch
        batch = following


def evaluation_batch(recipe: Recipe) -> int:
    """Return how many images are evaluated at a time: without gradients, twice a training batch fits where one does."""
    return min(256, max(1, 2 * (recipe.batch_size or 128)))  # a stranger's checkpoint may state any number


def predict(
    module: nn.Module, source: Source, rows: torch.Tensor, device: torch.device, dtype: torch.dtype, *, batch: int = 256
) -> torch.Tensor:
    """Return logits float32 (R, classes) of images as they are (view 0), on the CPU.

    Args:
        module: takes what the source gives.
        source: the split's source.
        rows: int64 (R,), which images.
        device: where the module is.
        dtype: torch.bfloat16 runs under autocast; torch.float32 does not.
        batch: images at a time.

    Raises:
        DivergedError: a logit is not finite, which the training loss does not show when the last step did it.
    """
    module.eval()
    parts: list[torch.Tensor] = []
    finished: list[torch.Tensor] = []
    rows = send(rows, device) if lies_on_device(source) else rows
    with torch.no_grad():
        for part, views in announced(source, ((part, torch.zeros_like(part)) for part in rows.split(batch))):
            inputs = cast(source.take(part, views), dtype)  # autocast would change a live prefix
            with autocast(device, dtype):
                logits = module(*inputs)
            parts.append(logits.float())
            if len(parts) == HELD:
                finished.append(torch.cat(parts).cpu())
                parts = []
    logits = torch.cat([*finished, *([torch.cat(parts).cpu()] if parts else [])])
    if not bool(torch.isfinite(logits).all()):
        raise DivergedError(
            "The model's predictions are not finite numbers after its last training step. Lower --lr or "
            "--head-lr-scale, or use --precision fp32, and run again."
        )
    return logits


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context for forward passes: bf16 autocast, or nothing for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def cast(inputs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return inputs that a module takes: features cached in bf16 become fp32 where autocast is off."""
    return inputs if dtype == torch.bfloat16 else tuple(value.float() for value in inputs)


def score(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Return (mean cross-entropy in nats, accuracy in percent) of logits (N, classes) against int64 labels (N,)."""
    loss = functional.cross_entropy(logits.double(), labels)
    return float(loss), 100 * int((logits.argmax(1) == labels).sum()) / len(labels)
