"""Images as a model is given them: files, Pillow's images or pixels; each decoded to a square, or the reason why not.

Legend: H and W pixels, S side of the squares.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from finetune.decode import open_image, reason_of, to_square, upright
from weights.errors import UsageError

Picture = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]
"""An image: a path, an image of Pillow's, or uint8 pixels (H, W, 3) or (H, W)."""


@dataclass(frozen=True)
class Decoded:
    """An image that was read, or was not.

    Attributes:
        path: of the file; None for an image that was given as pixels.
        pixels: uint8 (3, S, S); None for an image that could not be read.
        reason: why it could not be read, a clause for people.
    """

    path: str | None
    pixels: NDArray[np.uint8] | None
    reason: str = ""


@dataclass(frozen=True)
class Framing:
    """How an image becomes a square.

    Attributes:
        side: of the square, at most.
        mode: what becomes of an image that is none, in timm's words: center keeps the centre square, squash squeezes
            the whole image, border puts it on a square of one colour.
        fill: that colour.
    """

    side: int
    mode: str = "center"
    fill: tuple[int, ...] = (0, 0, 0)

    def apply(self, image: Image.Image) -> NDArray[np.uint8]:
        """Return the square uint8 (3, S, S) of an 8-bit RGB image; one whose shorter side is less is not scaled up.

        Raises:
            ValueError: an image without pixels.
        """
        if not all(image.size):
            raise ValueError("it has no pixels")
        if self.mode == "squash":
            image = image.resize((self.side, self.side), Image.Resampling.BILINEAR)
        elif self.mode == "border":
            image = ImageOps.pad(image, (self.side, self.side), Image.Resampling.BILINEAR, color=self.fill)
        return to_square(image, min(self.side, *image.size))


def begin(picture: Picture, framing: Framing, pool: ThreadPoolExecutor) -> Future[Decoded] | Decoded:
    """Begin to decode an image to a square.

    Files are decoded by the pool. What is in memory is decoded here and now: a Pillow image may not have been read yet,
    and threads must not read the same one at once.

    Raises:
        UsageError: it is no image.
    """
    if isinstance(picture, str | os.PathLike):
        return pool.submit(_decode_file, os.fspath(picture), framing)
    image = picture if isinstance(picture, Image.Image) else _from_array(picture)
    try:
        return Decoded(None, framing.apply(upright(image)))
    except Exception as error:  # what Pillow has opened and not read yet may be as damaged as any file
        return Decoded(None, None, str(error) or type(error).__name__)


def finish(begun: Future[Decoded] | Decoded) -> Decoded:
    """Return what `begin` began, when it is done."""
    return begun.result() if isinstance(begun, Future) else begun


def _decode_file(path: str, framing: Framing) -> Decoded:
    try:
        with open_image(path) as opened:
            side = min(framing.side, *opened.size)
            opened.draft(None, (2 * side, 2 * side))  # JPEG: decode at the smallest scale that keeps twice the side
            return Decoded(path, framing.apply(upright(opened)))
    except Exception as error:  # damaged bytes can make Pillow's readers raise nearly anything
        return Decoded(path, None, reason_of(Path(path), error))


def _from_array(pixels: object) -> Image.Image:
    """Return pixels as an image.

    Raises:
        UsageError: anything but uint8 (H, W, 3) or (H, W).
    """
    if not isinstance(pixels, np.ndarray):
        raise UsageError(f"An image is a {type(pixels).__name__}; give a path, a Pillow image or a uint8 array.")
    if pixels.dtype != np.uint8 or not pixels.size or not (pixels.ndim == 2 or pixels.shape[2:] == (3,)):
        raise UsageError(
            f"An image is an array of {pixels.dtype} {pixels.shape}; give uint8 pixels, (height, width, 3) or "
            "(height, width)."
        )
    return Image.fromarray(pixels)
