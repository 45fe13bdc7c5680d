"""The folders that a run writes to and the caches that stay: can they be written, how much is free, what do they take.

Nothing here imports PyTorch, for `finetune doctor`.
"""

from __future__ import annotations

import getpass
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from finetune.machine import user_cache


@dataclass(frozen=True)
class Folder:
    """A folder that a run writes to; it need not exist yet.

    Attributes:
        name: what it is for.
        path: where it is.
        free: bytes free on its disk.
        error: why it cannot be written, "" when it can.
        option: what names another one.
    """

    name: str
    path: Path
    free: int
    error: str
    option: str


@dataclass(frozen=True)
class Cache:
    """Something that is kept for the next time.

    Attributes:
        name: what it holds.
        path: where it is.
        bytes: its size.
    """

    name: str
    path: Path
    bytes: int


def folders(cache: Path, output: Path) -> tuple[Folder, ...]:
    """Return the folders that a run writes to.

    Args:
        cache: of features.
        output: of the run, or of all runs.
    """
    try:
        temporary = Path(tempfile.gettempdir())
    except OSError:  # none of the usual places can be written
        temporary = Path(os.environ.get("TMPDIR") or os.curdir)
    return (
        _folder("cache folder", cache, "--cache-dir"),
        _folder("output folder", output, "--output"),
        _folder("temporary files", temporary, "TMPDIR"),
    )


def caches(cache: Path, hub: Path | None, hugging_face: Path | None) -> tuple[Cache, ...]:
    """Return what is kept for the next time, with its size.

    Args:
        cache: of features.
        hub: torch hub's folder; None leaves it out.
        hugging_face: the Hugging Face cache; None leaves it out.
    """
    places = [
        ("cached features", cache / "features"),
        ("downloaded data", user_cache() / "data"),
        ("compiled code", _compiled_code()),
    ]
    if hub:
        places.append(("torch hub's weights", hub / "checkpoints"))
    if hugging_face:
        places.append(("Hugging Face cache", hugging_face))
    return tuple(Cache(name, path, folder_bytes(path)) for name, path in places)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder, 0 when there is none; links count as links."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(root) / name).lstat().st_size
            except OSError:
                continue  # gone meanwhile
    return total


def _folder(name: str, path: Path, option: str) -> Folder:
    path = path.expanduser().absolute()
    there = next((one for one in (path, *path.parents) if _exists(one)), path)
    try:
        with tempfile.TemporaryFile(dir=there):
            error = ""
    except OSError as refusal:
        error = refusal.strerror or str(refusal)
    return Folder(name, path, int(psutil.disk_usage(str(there)).free), error, option)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # below a folder that this user may not enter
        return False


def _compiled_code() -> Path:
    """Return where torch.compile keeps code (torch/_inductor/runtime/cache_dir_utils.py, default_cache_dir)."""
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if named:
        return Path(named)
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):
        user = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
    return Path(tempfile.gettempdir()) / f"torchinductor_{user}"
