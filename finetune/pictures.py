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
from PIL import Image

from finetune.decode import decode_within, reason_of, to_square, upright
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


def begin(picture: Picture, side: int, pool: ThreadPoolExecutor) -> Future[Decoded] | Decoded:
    """Begin to decode an image to a square whose side is its own shorter side, but no more than `side`.

    Files are decoded by the pool. What is in memory is decoded here and now: a Pillow image may not have been read yet,
    and threads must not read the same one at once.

    Raises:
        UsageError: it is no image.
    """
    if isinstance(picture, str | os.PathLike):
        return pool.submit(_decode_file, os.fspath(picture), side)
    image = picture if isinstance(picture, Image.Image) else _from_array(picture)
    try:
        return Decoded(None, to_square(upright(image), min(side, *image.size)))
    except Exception as error:  # what Pillow has opened and not read yet may be as damaged as any file
        return Decoded(None, None, str(error) or type(error).__name__)


def finish(begun: Future[Decoded] | Decoded) -> Decoded:
    """Return what `begin` began, when it is done."""
    return begun.result() if isinstance(begun, Future) else begun


def _decode_file(path: str, side: int) -> Decoded:
    try:
        return Decoded(path, decode_within(Path(path), side))
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
