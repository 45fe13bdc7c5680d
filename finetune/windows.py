"""Random windows of feature maps: shifts that cost nothing, of features that are computed once.

A cached feature map (C, H, W) is a grid of descriptions of places in the image. Training on a random window of it is
training on a shifted, slightly zoomed image, as padded random crops are for pixels, and every step gets cheaper by the
share of the map that is left out. No window is used in evaluation; that a network tested on the whole map may train on
less of it is known from images (Touvron et al. 2019, "Fixing the train-test resolution discrepancy").

Legend: B images in a batch, S side of the map, W side of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from timm.layers.attention_pool2d import AttentionPool2d, RotAttentionPool2d
from timm.models.vgg import ConvMlp
from torch import nn

from finetune.recipe import Recipe
from weights.errors import UsageError

SMALLEST_SIDE = 10  # a map of 7 x 7 has no window between almost all of it and half of it
# Layers and parameters whose weights belong to places of the map; some of them scale themselves to maps of any size.
PLACED = (ConvMlp, AttentionPool2d, RotAttentionPool2d)
PLACED_NAMES = ("pos_embed", "rel_pos", "relative_position")
# (share of the epochs, share of the side left out): small windows first, whole maps last, on which batch norms end as
# evaluation will find them. For maps of 14: 10, 12, 14 (docs/decisions/0006, docs/log.md).
STAGES = ((0.5, 2 / 7), (0.75, 1 / 7), (1.0, 0.0))


@dataclass(frozen=True)
class Windows:
    """Which windows each epoch trains on.

    Attributes:
        side: S, of every crossing map.
        sides: W for each epoch; S where the whole map is used.
    """

    side: int
    sides: tuple[int, ...]

    @property
    def cost(self) -> float:
        """Mean share of the map that is trained on, 0 to 1: about what a step costs against one on whole maps."""
        return sum(side * side for side in self.sides) / len(self.sides) / self.side**2

    def corners(self, images: int, epoch: int, seed: int) -> torch.Tensor | None:
        """Return each image's top left corner in an epoch (from 0): int64 (N, 2), or None for the whole map."""
        span = self.side - self.sides[epoch] + 1
        if span == 1:
            return None
        # A stream of its own: the views of --augment crop are drawn from the seed as it is.
        generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + epoch)
        return torch.randint(span, (images, 2), generator=generator)

    def cut(self, inputs: Sequence[torch.Tensor], epoch: int, corners: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the window of each image's maps.

        Args:
            inputs: crossing tensors (B, C, S, S).
            epoch: from 0.
            corners: int64 (B, 2), top and left, on the inputs' device.

        Returns:
            Tensors (B, C, W, W) in channels-last memory.
        """
        reach = torch.arange(self.sides[epoch], device=corners.device)
        which = torch.arange(len(corners), device=corners.device)[:, None, None]
        rows = (corners[:, :1] + reach)[:, :, None]  # (B, W, 1)
        columns = (corners[:, 1:] + reach)[:, None, :]  # (B, 1, W)
        return tuple(value.permute(0, 2, 3, 1)[which, rows, columns].permute(0, 3, 1, 2) for value in inputs)


def choose_windows(recipe: Recipe, shapes: Sequence[tuple[int, ...]], suffix: nn.Module) -> Windows | None:
    """Return the windows that a run trains on, or None where it trains on whole maps.

    Args:
        recipe: windows, epochs, patience and budget are read.
        shapes: of one image's crossing tensors, such as (C, S, S); none where the model trains uncut.
        suffix: what trains.

    Raises:
        UsageError: windows were asked for and cannot be had.
    """
    if recipe.windows == "auto":
        try:
            return choose_windows(replace(recipe, windows="on"), shapes, suffix)
        except UsageError:
            return None  # what cannot be had was not asked for
    if recipe.windows == "off":
        return None
    early = f"--patience {recipe.patience}" if recipe.patience else f"--budget {recipe.budget}"
    if recipe.patience or recipe.budget is not None:
        raise UsageError(
            f"--windows on and {early} do not go together, because a run that ends early would never train on whole "
            "maps; leave one of them out."
        )
    side = shapes[0][-1] if shapes else 0
    squares = bool(shapes) and all(len(shape) == 3 and shape[1:] == (side, side) for shape in shapes)
    if not squares or side < SMALLEST_SIDE:
        crosses = ", ".join("x".join(map(str, shape)) for shape in shapes) or "nothing, since the model is not cut"
        raise UsageError(
            f"--windows on needs square feature maps of at least {SMALLEST_SIDE} x {SMALLEST_SIDE} before the layers "
            f"that train, and what reaches them is {crosses}; use --windows off or other --train-layers."
        )
    windows = Windows(side, window_sides(side, recipe.epochs or 1))
    if not all(_takes(suffix, shapes, each) for each in sorted(set(windows.sides))):
        raise UsageError("--windows on needs layers that take maps of any size, and these do not; use --windows off.")
    return windows


def window_sides(side: int, epochs: int) -> tuple[int, ...]:
    """Return the window's side in each epoch; it differs from `side` by an even number, as strides want."""
    sides = []
    for epoch in range(epochs):
        margin = next(margin for until, margin in STAGES if epoch + 1 <= until * epochs or until == 1.0)
        sides.append(side - 2 * round(side * margin / 2))
    return tuple(sides)


def _takes(suffix: nn.Module, shapes: Sequence[tuple[int, ...]], side: int) -> bool:
    """Whether a module gives class scores for maps of another side, and none of its weights belongs to one place."""
    names = [name for name, _ in suffix.named_parameters()]
    if any(isinstance(module, PLACED) for module in suffix.modules()) or any(
        word in name for name in names for word in PLACED_NAMES
    ):
        return False
    device = next(suffix.parameters()).device
    training = suffix.training
    suffix.eval()
    try:
        with torch.no_grad():
            scores = suffix(*(torch.zeros(2, shape[0], side, side, device=device) for shape in shapes))
    except (RuntimeError, AssertionError, ValueError, IndexError):
        return False  # whatever a layer of fixed size says to maps of another
    finally:
        suffix.train(training)
    return bool(scores.ndim == 2)
