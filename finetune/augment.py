"""Views of an image: every version of it that training may see, and the pixels-to-tensor step.

Legend: B images in a batch, H and W pixels on disk, S pixels into the model. All functions work on whole batches, on
whatever device the batch is on.

A view is a deterministic version of an image, named by a number. `none` has one, `flip` and `altflip` two (as it is,
mirrored): all outcomes there are; the first draws one of them for each epoch, the second takes them in turn. `crop` has
no small set, so it draws `count` shifts and mirrorings per image from a seed, and the places of `--cutout` with them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch.nn import functional

from weights.errors import UsageError

CROP_SHARE = 8  # padding is 1/8 of the side: 4 pixels at 32 (He et al. 2015, "Deep Residual Learning", section 4.2)
PIECE = 2**19  # values that are normalised at a time: 2 MiB of float32, which stay in a core's cache (docs/log.md)


@dataclass(frozen=True)
class Views:
    """The views that one run draws on.

    Attributes:
        kind: none, flip, altflip or crop.
        count: how many views each image has.
        draws: int64 (count, N, 3) rows of (down, right, mirrored) for crop, with cutout (count, N, 5) and a place (row,
            column) behind; None for the others.
        cutout: side in pixels of the square that is cut out of each image around its place; 0 cuts nothing.
        fill: the square's colour.
    """

    kind: str
    count: int
    draws: torch.Tensor | None = None
    cutout: int = 0
    fill: tuple[int, ...] = (0, 0, 0)

    def apply(self, images: torch.Tensor, rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """Return the wanted view of each image.

        Args:
            images: uint8 (B, 3, H, W).
            rows: int64 (B,), the images' places in their set; on the device of the draws, or on the host.
            views: int64 (B,), which view of each, 0 to count - 1; beside `rows`.

        Returns:
            uint8 (B, 3, H, W) on the images' device.
        """
        if self.kind == "none":
            return images
        if self.kind in ("flip", "altflip"):
            return mirror(images, views == 1)
        if self.draws is None:
            raise ValueError("crop views need their draws: make them with make_views")
        draw = self.draws[views, rows].to(images.device, torch.int64)
        images = mirror(shift(images, draw[:, 0], draw[:, 1]), draw[:, 2] == 1)
        return cut_out(images, draw[:, 3:], self.cutout, self.fill) if self.cutout else images

    def on(self, device: torch.device) -> Views:
        """Return the same views with their draws on a device, so that `apply` has to wait for nothing there."""
        if self.draws is None or device.type == "cpu":
            return self
        return replace(self, draws=self.draws.to(torch.int16).to(device))  # pixels of a side: far below 2**15

    def describe(self, view: int) -> str:
        """Return text that differs whenever the view's pixels could: an ingredient of the feature cache's key.

        `none` and the first view of `flip` are the same pixels, and share a text; `flip` and `altflip` share both.
        """
        if self.draws is None:
            return "mirrored" if view else "as it is"
        square = f", cutout {self.cutout} of {self.fill}" if self.cutout else ""
        return f"crop {hashlib.sha256(self.draws[view].numpy().tobytes()).hexdigest()}{square}"


def make_views(
    kind: str,
    images: int,
    side: int,
    *,
    count: int | None,
    seed: int,
    cutout: int = 0,
    fill: tuple[int, ...] = (0, 0, 0),
) -> Views:
    """Return the views of a set.

    Args:
        kind: none, flip, altflip or crop.
        images: N, images in the set.
        side: the shorter side of an image in pixels.
        count: views per image for crop; the other kinds have their own number.
        seed: of crop's draws.
        cutout: side in pixels of the square that crop cuts out; 0 is none.
        fill: its colour: the one that is 0 after normalisation, as in DeVries and Taylor 2017, "Improved Regularization
            of Convolutional Neural Networks with Cutout".

    Raises:
        UsageError: a square as large as the images.
    """
    if cutout >= side:
        raise UsageError(f"--cutout {cutout} covers whole images of {side} pixels; give less, such as {side // 4}.")
    if kind != "crop":
        return Views(kind, 1 if kind == "none" else 2)
    generator = torch.Generator().manual_seed(seed)
    count = count or 1
    span = 2 * max(1, side // CROP_SHARE) + 1
    shifts = torch.randint(span, (count, images, 2), generator=generator)
    first = torch.randint(2, (1, images, 1), generator=generator)
    mirrored = (first + torch.arange(count)[:, None, None]) % 2  # as alternating_views does for altflip
    draws = [shifts, mirrored]
    if cutout:
        draws.append(torch.randint(side, (count, images, 2), generator=generator))
    return Views(kind, count, torch.cat(draws, dim=2), cutout, fill)


def alternating_views(images: int, epoch: int, seed: int) -> torch.Tensor:
    """Return which of its two views each image shows in an epoch of `altflip`: int64 (N,) of 0 and 1.

    An image begins with one of them at random and takes them in turn: two epochs in a row always show both sides
    (Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", section 3.6, "alternating flip").

    Args:
        images: N.
        epoch: its number, from 0.
        seed: of the run.
    """
    first = torch.randint(2, (images,), generator=torch.Generator().manual_seed(seed))
    return (first + epoch) % 2


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
    # All windows as a view (B, 3, 2 pad + 1, 2 pad + 1, H, W): one index per image is twice as fast as one per pixel.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(batch, device=images.device), :, down, right]


def cut_out(images: torch.Tensor, places: torch.Tensor, side: int, fill: tuple[int, ...]) -> torch.Tensor:
    """Return images with a square of one colour around a place; where it reaches over the border it is cut off.

    Args:
        images: uint8 (B, 3, H, W).
        places: int64 (B, 2), row and column of the square's middle, in pixels of the shorter side.
        side: of the square, in pixels.
        fill: its colour, 0 to 255.
    """
    height, width = images.shape[-2:]

    def inside(place: torch.Tensor, length: int) -> torch.Tensor:
        start = place * length // min(height, width) - side // 2  # (B,)
        offset = torch.arange(length, device=images.device) - start[:, None]  # (B, length)
        return (offset >= 0) & (offset < side)

    square = inside(places[:, 0], height)[:, None, :, None] & inside(places[:, 1], width)[:, None, None, :]
    return torch.where(square, colour(fill, images.device).to(images.dtype), images)


def colour(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return a number for each colour, float32 (3, 1, 1) on a device; on a GPU it is the same tensor each time."""
    # To make one there, the host would wait for the GPU in every batch.
    return _kept_colour(values, device) if device.type == "cuda" else _new_colour(values, device)


def _new_colour(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


_kept_colour = lru_cache(maxsize=64)(_new_colour)


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

        An image that is not square is squeezed, not cropped.
        """
        if images.shape[-2:] != (self.size, self.size):
            images = scale(images, self.size, self.interpolation)
        # Rows of red, green, blue, red, ...: one mean for each value of a row, where one for each colour would make
        # loops of three values.
        rows = images.permute(0, 2, 3, 1).reshape(len(images), self.size, 3 * self.size)
        mean, std = (
            255 * colour(values, images.device).flatten().repeat(self.size) for values in (self.mean, self.std)
        )
        pixels = torch.empty(rows.shape, dtype=dtype, device=images.device)
        count = max(1, PIECE // (3 * self.size**2)) if images.device.type == "cpu" else max(1, len(images))
        for piece, place in zip(rows.split(count), pixels.split(count), strict=True):
            place.copy_(piece.float().sub_(mean).div_(std))
        return pixels.view(-1, self.size, self.size, 3).permute(0, 3, 1, 2)


def scale(images: torch.Tensor, size: int, interpolation: str) -> torch.Tensor:
    """Return images uint8 (B, 3, S, S) of uint8 (B, 3, H, W), scaled as Pillow does it, in whole values.

    Pretrained weights were made with such images, and timm's transform makes them of a file: torch's kernel for uint8
    on processors computes like Pillow, first along the width, and rounds after each axis. (Of images that are higher
    than wide some versions of Pillow take the height first.) Other devices have no such kernel: `scale_in_float`.

    Args:
        images: on any device.
        size: S.
        interpolation: bilinear or bicubic.
    """
    if images.device.type != "cpu":
        return scale_in_float(images, size, interpolation)
    rows = images.contiguous(memory_format=torch.channels_last)
    return functional.interpolate(rows, (size, size), mode=interpolation, antialias=True)


def scale_in_float(images: torch.Tensor, size: int, interpolation: str) -> torch.Tensor:
    """Return what `scale` does, but for values that lie between two whole ones: these may differ by 1 for each axis."""
    pixels = images.float()
    for shape in ((images.shape[2], size), (size, size)):
        pixels = whole(functional.interpolate(pixels, shape, mode=interpolation, antialias=True))
    return pixels.to(torch.uint8)


def whole(pixels: torch.Tensor) -> torch.Tensor:
    """Return the nearest whole values from 0 to 255, float32 of the same shape.

    A half becomes the next one, also where an error of rounding has made it a little less: without that, two runtimes
    would come to different pixels wherever the exact value is a half.
    """
    return (pixels + 0.501).floor().clamp(0, 255)
