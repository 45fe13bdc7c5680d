"""Decoded images that stay in the cache, so that the next command on the same files decodes nothing.

An entry lies among the cached features, in the same form (`finetune/cache.py`), and counts towards the same limit. It
is found by what the system says of every file: path, inode, size, and the times of the last change of its content and
of the file itself, in nanoseconds. The last of these no program can set, so a file with other content is another
entry. A file that changed just before it was read could change once more at the same time; such files are not kept.

Legend: N images, side S.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
import psutil
import torch
from filelock import Timeout
from PIL import features as codecs

from finetune.cache import Entry, clear, key_of, list_entries
from finetune.decode import ImageFile
from finetune.images import Progress
from finetune.placement import DISK_RESERVE
from weights.errors import RunError
from weights.guard import read_json

FORMAT = 1  # counts up whenever the same files would give other pixels than before
LEAST_SECONDS = 1.0  # of decoding; what took less is not worth the space
SETTLED_SECONDS = 2.0  # since the last change of any file; FAT, the coarsest, counts time in twos
SHARE = 0.5  # of what is free for the cache: features, which took longer to make, want the rest


@dataclass(frozen=True)
class DecodedCache:
    """Keeps the decoded images of data sets.

    Attributes:
        cache_dir: folder of the cache.
        limit: most bytes that everything in it may take.
        note: told what was used or could not be kept.
    """

    cache_dir: Path
    limit: int
    note: Callable[[str], None]

    def identity(self, files: Sequence[ImageFile], image_size: int) -> dict[str, Any] | None:
        """Return what the decoded images of these files depend on; None where they cannot be told from later ones.

        Args:
            files: in their order.
            image_size: side of the decoded squares, at most.
        """
        whole, newest, stats = hashlib.sha256(), 0, {}
        try:
            for file in files:
                path, place = (file, "") if isinstance(file, Path) else (file.tar, f"{file.offset},{file.size}")
                if path not in stats:
                    stats[path] = path.stat()
                found = stats[path]
                newest = max(newest, found.st_mtime_ns, found.st_ctime_ns)
                numbers = f"{found.st_ino},{found.st_size},{found.st_mtime_ns},{found.st_ctime_ns}"
                whole.update(os.fsencode(f"{path.absolute()}\0{place}\0{numbers}\n"))
        except OSError:
            return None  # decoding meets the file again, and says what is wrong with it
        if newest > time.time_ns() - SETTLED_SECONDS * 10**9:
            return None
        libraries = f"Pillow {PIL.__version__}, libjpeg-turbo {codecs.version('libjpeg_turbo')}"
        return {"decoded": FORMAT, "files": whole.hexdigest(), "image_size": image_size, "libraries": libraries}

    def recall(self, about: dict[str, Any], rows: int, room: int, progress: Progress | None) -> torch.Tensor | None:
        """Return the images of an earlier command, uint8 (N, 3, S, S); None where they are not there, whole and sound.

        Args:
            about: of `identity`.
            rows: N.
            room: bytes that they may take.
            progress: called as progress("read kept images", done, total).
        """
        folder = self._folder(about)
        try:
            side = read_json(folder / "about.json")["side"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        if not isinstance(side, int) or not 1 <= side <= about["image_size"] or 3 * rows * side * side > room:
            return None
        entry = _entry(folder, rows, side)
        entry.load_journal()
        if entry.missing_rows():
            return None
        images = torch.empty((rows, 3, side, side), dtype=torch.uint8)
        for number in range(-(-rows // entry.chunk_rows)):
            values = entry.read_chunk(number)
            if values is None:
                self.note(f"Kept images {folder.name} were damaged; they are decoded anew.")
                clear(self.cache_dir, [one for one in list_entries(self.cache_dir) if one.key == folder.name])
                return None
            own = entry.rows_of(number)
            images[own] = values[0]
            if progress is not None:
                progress("read kept images", own.stop, rows)
        with suppress(RunError):  # a cache that this user may only read
            entry.finish()
        self.note(f"The {rows:,} images were decoded by an earlier command, and no file has changed since.")
        return images

    def keep(
        self,
        about: dict[str, Any],
        files: Sequence[ImageFile],
        images: torch.Tensor,
        *,
        seconds: float,
        name: str,
        progress: Progress | None = None,
    ) -> None:
        """Keep decoded images for the next command where that is worth the space, and there is room for them.

        Nothing else is deleted for them. Where a file has changed since `about` was made, nothing is kept.

        Args:
            about: of `identity`, before the first of them was decoded.
            files: in their order.
            images: uint8 (N, 3, S, S).
            seconds: that decoding took.
            name: of the data, for `finetune cache list`.
            progress: called as progress("keep images", done, total).
        """
        if seconds < LEAST_SECONDS or self.identity(files, about["image_size"]) != about:
            return
        rows, side = len(images), images.shape[-1]
        entry = _entry(self._folder(about), rows, side)
        told = {"side": side, "data": name, "view": "decoded", "arch": "any network", "dtype": "uint8"}
        try:
            entry.folder.parent.mkdir(parents=True, exist_ok=True)
            if images.nbytes > SHARE * self._free():
                return
            with entry.lock.acquire(timeout=0):
                entry.open({**about, **told})
                for number in range(-(-rows // entry.chunk_rows)):
                    own = entry.rows_of(number)
                    if not entry.holds(number):
                        entry.write_chunk(number, [images[own]])
                    if progress is not None:
                        progress("keep images", own.stop, rows)
                entry.finish()
        except Timeout:
            return  # another command keeps the same
        except (OSError, RunError) as error:
            self.note(f"The decoded images are not kept for the next command: {error}")

    def _folder(self, about: dict[str, Any]) -> Path:
        return self.cache_dir / "features" / key_of(about)

    def _free(self) -> int:
        """Return the bytes that more entries may take."""
        used = sum(entry.bytes for entry in list_entries(self.cache_dir))
        return min(self.limit - used, int(psutil.disk_usage(str(self.cache_dir)).free) - DISK_RESERVE)


def _entry(folder: Path, rows: int, side: int) -> Entry:
    return Entry(folder, rows, ((3, side, side),), (torch.uint8,))
