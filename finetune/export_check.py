"""Does what was exported compute what the model computes? Asked before a file is kept.

Legend: N images in a batch, S pixels into the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional

from weights.errors import RunError

Compute = Callable[[torch.Tensor], torch.Tensor]

BATCHES = (1, 2, 5)  # a graph could have the size that it was traced with built in: one image, that size, another
TOLERANCE = 1e-4  # of fp32 values around 1, and of the largest one where that is more: 1e-6 is usual


@dataclass(frozen=True)
class Agreement:
    """How near two computations of the same images are.

    Attributes:
        batches: numbers of images that were computed at once.
        difference: the largest between two outputs.
        allowed: the largest difference that counts as rounding.
        same_labels: images with the same likeliest class.
    """

    batches: tuple[int, ...]
    difference: float
    allowed: float
    same_labels: int

    @property
    def images(self) -> int:
        """How many images were compared."""
        return sum(self.batches)


def sample_pixels(sides: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Return batches of `BATCHES` images with something in them: patches of colour under noise, always the same.

    Args:
        sides: height and width of each batch's images.

    Returns:
        uint8 (N, 3, height, width) each.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for count, side in zip(BATCHES, sides, strict=True):
        patches = functional.interpolate(torch.rand(count, 3, 4, 4, generator=generator), size=side, mode="bilinear")
        noise = torch.rand(count, 3, *side, generator=generator)
        made.append((255 * (0.8 * patches + 0.2 * noise)).to(torch.uint8))
    return made


def compare(
    exact: Compute, exported: Compute, batches: Sequence[torch.Tensor], what: str, rounding: float = 0.0
) -> Agreement:
    """Compute batches both ways.

    Args:
        exact: the model itself.
        exported: what was written, read back.
        batches: inputs of either.
        what: was written, for messages.
        rounding: difference that is no mistake, where it is more than `TOLERANCE`: of pixels that lie half-way between
            two values and may be rounded to either.

    Raises:
        RunError: the outputs differ by more than rounding, or a batch cannot be computed.
    """
    truths, values = [], []
    for batch in batches:
        with torch.no_grad():
            truths.append(exact(batch))
            values.append(_computed(exported, batch, truths[-1], what))
    truth, computed = torch.cat(truths), torch.cat(values)
    allowed = TOLERANCE * max(1.0, float(truth.abs().max()))
    agreement = Agreement(
        batches=tuple(len(batch) for batch in batches),
        difference=float((computed - truth).abs().max()),  # NaN where there is any
        allowed=max(allowed, rounding) if rounding else allowed,
        same_labels=int((computed.argmax(1) == truth.argmax(1)).sum()),
    )
    if not agreement.difference <= agreement.allowed:  # NaN does not pass either
        raise RunError(
            f"{what} differs from the model by up to {agreement.difference:.2g} on {agreement.images} images, and "
            f"rounding explains {agreement.allowed:.2g}; it was not kept."
        )
    return agreement


def _computed(exported: Compute, batch: torch.Tensor, truth: torch.Tensor, what: str) -> torch.Tensor:
    try:
        values = exported(batch)
        if values.shape != truth.shape:
            raise ValueError(f"outputs are {tuple(values.shape)}, not {tuple(truth.shape)}")
    except Exception as error:  # a runtime's own kinds of error
        raise RunError(
            f"{what} cannot compute a batch of {' × '.join(map(str, batch.shape))} ({_first_line(error)}); it was not "
            "kept."
        ) from error
    return values


@contextmanager
def read_back(what: str) -> Iterator[None]:
    """Explain that what was written cannot be read: a runtime may lack an operation, or timm know another config.json.

    Args:
        what: was written, for messages.

    Raises:
        RunError: whatever is raised inside.
    """
    try:
        yield
    except Exception as error:  # a runtime's own kinds of error
        raise RunError(f"{what} cannot be read back ({_first_line(error)}); it was not kept.") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
