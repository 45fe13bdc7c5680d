"""Image files to uint8 squares: decoded in parallel, at the size that training uses.

Legend: N images, C = 3 channels (RGB), side S.
"""

from __future__ import annotations

import functools
import io
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from finetune.images import Progress
from finetune.tar import Member
from weights.errors import DataError
from weights.guard import require_regular, require_size

ImageFile = Path | Member
"""A file, or one within a shard."""

Receiver = Callable[[int, NDArray[np.uint8]], object]

CHUNK = 32
"""Images that a thread decodes between two reports of progress."""

SAMPLE = 32
"""Images looked at before decoding, to guess whether all share one size."""

NAMED = 3
"""Unreadable files that an error names; the rest are counted."""

LONGEST = 3
"""Times its shorter side that an image may be long when it is resized: what lies beyond is cropped off before. A strip
of 1 x 50,000 pixels would otherwise be blown up whole for the sake of its centre square."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO")
"""What is read, in Pillow's words, whatever a file's suffix. Pillow knows more, and some do more than decode: EPS is a
program that is handed to Ghostscript, others go to programs of the system or to files beside them."""

START = 16  # bytes by which Pillow tells formats apart

LARGEST_IMAGE = 1 << 29
"""Bytes of an image file: twice what an image of Pillow's limit takes in 8-bit RGB, uncompressed. Some of Pillow's
readers take a file into memory whole, and images in shards are read so before Pillow sees them."""

LARGE = 64_000_000
"""Pixels of 8-bit RGB or grey; of other kinds, which are converted by way of wider numbers, a quarter. Images with more
are decoded one at a time: at Pillow's limit, 90 million, one takes up to 2 GB, and there may be many threads."""

_one_at_a_time = threading.Lock()

TURNS: dict[int | None, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image upright, by EXIF's orientation. `ImageOps.exif_transpose` turns the same way, but then writes
the EXIF anew and fails on photos whose other tags are odd."""


@dataclass
class _Outcome:
    """What became of a chunk: places of unreadable files with the reason, and whether another size turned up."""

    unreadable: list[tuple[int, str]] = field(default_factory=list)
    other_size: bool = False


def decode_files(
    files: Sequence[ImageFile],
    image_size: int,
    receiver: Callable[[int, bool], Receiver],
    progress: Progress | None = None,
) -> None:
    """Decode image files to squares of one size, and hand each on as soon as it is there.

    The shorter side of every image becomes `image_size` and the centre square is kept. Images that all share one
    shorter side of no more than `image_size` keep it. One image of another size changes that for all, and decoding
    starts again.

    Args:
        files: at least one.
        image_size: side of the squares, at most.
        receiver: called as receiver(side, resize) before decoding begins, and again when it starts again. What it
            returns is given the place of each image in `files` and its square, uint8 (3, S, S), by any thread.
        progress: called as progress("decode", done, total).

    Raises:
        DataError: images that cannot be read (the first few are named).
    """
    shared = _shared_side(files)
    kept = (
        shared is not None
        and shared <= image_size
        and _decode_all(files, shared, receiver(shared, False), resize=False, progress=progress)
    )
    if not kept and not _decode_all(files, image_size, receiver(image_size, True), resize=True, progress=progress):
        raise RuntimeError("resized images differ in size")  # cannot happen: every image is resized to one side


def decode_image(file: ImageFile, side: int, *, resize: bool = True) -> NDArray[np.uint8] | None:
    """Decode one image file to a square.

    Args:
        file: a path, or a file within a shard.
        side: side of the square, S.
        resize: bring the shorter side to S; without it, an image whose shorter side is not S gives None.

    Returns:
        uint8 (3, S, S), or None.

    Raises:
        OSError, SyntaxError, ValueError, RuntimeError: what Pillow's readers raise for files that they cannot read.
        Image.DecompressionBombError: more than twice the pixels of Pillow's limit.
    """
    with open_image(file) as opened:
        if not resize and min(opened.size) != side:
            return None
        if resize:
            opened.draft(None, (2 * side, 2 * side))  # JPEG: decode at the smallest scale that keeps twice the side
        return to_square(upright(opened), side)


@functools.cache
def formats() -> tuple[str, ...]:
    """Return which of `FORMATS` this Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(file: ImageFile | str | os.PathLike[str]) -> Image.Image:
    """Open an image file of one of `FORMATS`, or one within a shard; nothing is decoded yet.

    Raises:
        OSError, SyntaxError, ValueError, RuntimeError: what Pillow's readers raise for files that they cannot read;
            ValueError for one of more than `LARGEST_IMAGE` bytes.
        Image.DecompressionBombError: more than twice the pixels of Pillow's limit.
    """
    if isinstance(file, Member):
        return Image.open(io.BytesIO(file.read(LARGEST_IMAGE)), formats=formats())
    require_regular(Path(file))
    require_size(Path(file).stat().st_size, LARGEST_IMAGE)
    return Image.open(file, formats=formats())


def to_square(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """Bring the shorter side of an 8-bit RGB image to S and keep the centre square: uint8 (3, S, S)."""
    width, height = image.size
    short = min(width, height)
    if short != side:
        image = _centre(image, min(width, LONGEST * short), min(height, LONGEST * short))
        width, height = (max(side, round(length * side / short)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)  # Pillow's filters are antialiased
    return np.asarray(_centre(image, side, side)).transpose(2, 0, 1)  # (S, S, 3) -> (3, S, S)


def upright(opened: Image.Image) -> Image.Image:
    """Load an opened file and return it turned as EXIF says, in 8-bit RGB.

    Raises:
        OSError, SyntaxError, ValueError, RuntimeError: as for `decode_image`.
    """
    weight = opened.width * opened.height * (1 if opened.mode in ("RGB", "L") else 4)
    with _one_at_a_time if weight > LARGE else nullcontext():
        opened.load()
        turn = TURNS.get(opened.getexif().get(ExifTags.Base.Orientation))
        return to_rgb(opened if turn is None else opened.transpose(turn))


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    """Crop an image to its centre of this size; as it is when it has that size."""
    if image.size == (width, height):
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image to 8-bit RGB: 16-bit greys are scaled (not clipped), transparent parts lie on white.

    Raises:
        ValueError: a mode that has no agreed range, such as floating-point pixels.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Mode I is how Pillow opens some 16-bit greys; nothing else in a picture file has 32-bit integers.
        wide = np.clip(np.asarray(image), 0, 65535).astype(np.int32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _shared_side(files: Sequence[ImageFile]) -> int | None:
    """Return the shorter side that a sample of the images share, or None when they differ or cannot be opened."""
    sides = set()
    with warnings.catch_warnings():
        set_warnings()
        for index in np.linspace(0, len(files) - 1, min(SAMPLE, len(files))).astype(int).tolist():
            try:
                with open_image(files[index]) as image:
                    sides.add(min(image.size))
            except Exception:  # decoding meets the file again, and says what is wrong with it
                continue
    return sides.pop() if len(sides) == 1 else None


def _decode_all(
    files: Sequence[ImageFile], side: int, receive: Receiver, *, resize: bool, progress: Progress | None
) -> bool:
    """Decode every file at one side; return False when, without resizing, one has another size.

    Whatever `progress` raises ends the decoding: chunks that no thread has begun are dropped.
    """

    def decode_chunk(start: int) -> _Outcome:
        outcome = _Outcome()
        for index in range(start, min(start + CHUNK, len(files))):
            try:
                image = decode_image(files[index], side, resize=resize)
            except Exception as error:  # damaged bytes can make Pillow's readers raise nearly anything
                outcome.unreadable.append((index, reason_of(files[index], error)))
                continue
            if image is None:
                outcome.other_size = True
                break
            receive(index, image)
        return outcome

    unreadable: list[tuple[int, str]] = []
    done = 0
    # Filters are set here and not in the threads, where they would overwrite each other.
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        set_warnings()
        futures = {pool.submit(decode_chunk, start): start for start in range(0, len(files), CHUNK)}
        try:
            for future in as_completed(futures):
                outcome = future.result()
                if outcome.other_size:
                    return False
                unreadable += outcome.unreadable
                done += min(CHUNK, len(files) - futures[future])
                if progress is not None:
                    progress("decode", done, len(files))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    if unreadable:
        unreadable.sort()
        named = ", ".join(f"{files[index]} ({reason})" for index, reason in unreadable[:NAMED])
        more = f" and {len(unreadable) - NAMED:,} more" if len(unreadable) > NAMED else ""
        raise DataError(
            f"{len(unreadable):,} of {len(files):,} images cannot be read: {named}{more}; replace or remove them."
        )
    return True


def set_warnings() -> None:
    """Make Pillow's size limit an error, and keep its remarks on odd files out of the terminal."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def _format_not_admitted(file: ImageFile) -> str | None:
    """Return what Pillow would take a file for that is of none of `FORMATS`: by its first bytes, it is not opened."""
    try:
        if isinstance(file, Path):
            require_regular(file)
            with file.open("rb") as opened:
                start = opened.read(START)
        else:
            start = file.start(START)
    except OSError:  # since it was tried
        return None
    for name, (_, accept) in Image.OPEN.items():
        with suppress(Exception):  # of fewer bytes than they look at, Pillow's functions raise one thing or another
            if name not in FORMATS and accept is not None and accept(start) is True:
                return name
    return None


def reason_of(file: ImageFile, error: BaseException) -> str:
    """Return in a few words why a file could not be decoded."""
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than Pillow's limit of {Image.MAX_IMAGE_PIXELS or 0:,} pixels: a photo has to be scaled down"
    if (file.is_file() and file.stat().st_size == 0) if isinstance(file, Path) else not file.size:
        return "empty file"
    if isinstance(error, UnidentifiedImageError):
        known = _format_not_admitted(file)
        admitted = f"{', '.join(formats()[:-1])} and {formats()[-1]}"
        return f"{known}, which is not admitted: {admitted} are" if known else "no image that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # the whole text would name the file a second time
    return str(error) or type(error).__name__
