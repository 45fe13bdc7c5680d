"""Views of an image: every version of it that training may see, and the pixels-to-tensor step.

Legend: B images in a batch, H and W pixels on disk, S pixels into the model. All functions work on whole batches, on
whatever device the batch is on.

A view is a deterministic version of an image, named by a number. `none` has one, `flip` two (as it is, mirrored): all
outcomes there are. `crop` has no small set, so it draws `count` shifts and mirrorings per image from a seed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch.nn import functional

CROP_SHARE = 8  # padding is 1/8 of the side: 4 pixels at 32 (He et al. 2015, "Deep Residual Learning", section 4.2)


@dataclass(frozen=True)
class Views:
    """The views that one run draws on.

    Attributes:
        kind: none, flip or crop.
        count: how many views each image has.
        draws: int64 (count, N, 3) rows of (down, right, mirrored) for crop; None for the others.
    """

    kind: str
    count: int
    draws: torch.Tensor | None = None

    def apply(self, images: torch.Tensor, rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """Return the wanted view of each image.

        Args:
            images: uint8 (B, 3, H, W).
            rows: int64 (B,), the images' places in their set.
            views: int64 (B,), which view of each, 0 to count - 1.

        Returns:
            uint8 (B, 3, H, W) on the images' device.
        """
        if self.kind == "none":
            return images
        if self.kind == "flip":
            return mirror(images, views == 1)
        if self.draws is None:
            raise ValueError("crop views need their draws: make them with make_views")
        draw = self.draws[views, rows].to(images.device)
        return mirror(shift(images, draw[:, 0], draw[:, 1]), draw[:, 2] == 1)

    def describe(self, view: int) -> str:
        """Return text that differs whenever the view's pixels could: an ingredient of the feature cache's key.

        `none` and the first view of `flip` are the same pixels, and share a text.
        """
        if self.draws is None:
            return "mirrored" if view else "as it is"
        return f"crop {hashlib.sha256(self.draws[view].numpy().tobytes()).hexdigest()}"


def make_views(kind: str, images: int, side: int, *, count: int | None, seed: int) -> Views:
    """Return the views of a set.

    Args:
        kind: none, flip or crop.
        images: N, images in the set.
        side: the shorter side of an image in pixels.
        count: views per image for crop; the other kinds have their own number.
        seed: of crop's draws.
    """
    if kind != "crop":
        return Views(kind, 2 if kind == "flip" else 1)
    generator = torch.Generator().manual_seed(seed)
    count = count or 1
    span = 2 * max(1, side // CROP_SHARE) + 1
    shifts = torch.randint(span, (count, images, 2), generator=generator)
    # Mirrored in every other view, beginning at random: two views in a row always show both sides (Jordan 2024, "94% on
    # CIFAR-10 in 3.29 Seconds on a Single GPU", section 3.6, "alternating flip").
    first = torch.randint(2, (1, images, 1), generator=generator)
    mirrored = (first + torch.arange(count)[:, None, None]) % 2
    return Views(kind, count, torch.cat([shifts, mirrored], dim=2))


def mirror(images: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Return images (B, 3, H, W) with those marked in bool (B,) mirrored left to right."""
    return torch.where(which.to(images.device)[:, None, None, None], images.flip(3), images)


def shift(images: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return each image's window of its reflect-padded self.

    Args:
        images: uint8 (B, 3, H, W).
        down: int64 (B,), the window's top row in the padded image, 0 to 2 * padding.
        right: int64 (B,), its left column.
    """
    batch, _, height, width = images.shape
    pad = max(1, min(height, width) // CROP_SHARE)
    padded = functional.pad(images.float(), (pad, pad, pad, pad), mode="reflect").to(images.dtype)
    rows = down[:, None] + torch.arange(height, device=images.device)  # (B, H)
    columns = right[:, None] + torch.arange(width, device=images.device)  # (B, W)
    which = torch.arange(batch, device=images.device)[:, None, None]
    # Advanced indices around the colour slice put colour last: (B, H, W, 3) → (B, 3, H, W).
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 pixels to what the model was trained to see.

    Attributes:
        size: S, the input side in pixels.
        mean: per colour, on the scale 0 to 1.
        std: per colour, on the scale 0 to 1.
        interpolation: bilinear or bicubic.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str

    def __call__(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return float images (B, 3, S, S) in channels-last memory from uint8 (B, 3, H, W), H and W any.

        Normalising before resizing is the same map (interpolation weights sum to 1) and touches fewer pixels when the
        image grows. An image that is not square is squeezed, not cropped.
        """
        mean = torch.tensor(self.mean, device=images.device)[:, None, None] * 255
        std = torch.tensor(self.std, device=images.device)[:, None, None] * 255
        pixels = (images.float() - mean) / std  # colour planes apart: torch resizes them faster so (docs/log.md)
        height, width = pixels.shape[-2:]
        if (height, width) != (self.size, self.size):
            # With antialias, torch's bicubic kernel is Pillow's (a = -0.5), which the weights were trained with.
            pixels = functional.interpolate(
                pixels, size=(self.size, self.size), mode=self.interpolation, antialias=True, align_corners=False
            )
        return pixels.to(dtype, memory_format=torch.channels_last)
