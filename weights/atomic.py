"""Files that are whole or not there.

Nothing here needs torch, so that commands which only write a text start at once.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from weights.errors import RunError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no more of this user's share, no larger file


def write_atomically(path: Path, write: Callable[[BinaryIO], object] | bytes) -> None:
    """Write a file so that a reader sees the old one or the whole new one, whatever happens on the way.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and then take the target's name.

    Args:
        path: the file to write; its folder exists.
        write: the bytes, or a function that writes them to the open file it is given.

    Raises:
        RunError: when the system refuses (no space, no permission, no such folder); nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                if isinstance(write, bytes):
                    file.write(write)
                else:
                    write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # Ctrl-C as well: no temporary file stays
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save answers the system's refusal with a RuntimeError of its own, in whose context the refusal is.
        refusal = error if isinstance(error, OSError) else error.__context__
        if not isinstance(refusal, OSError):
            raise
        raise cannot_write(path, refusal) from refusal


def cannot_write(path: Path, refusal: OSError) -> RunError:
    """Return the error for a file that the system does not let be written.

    Args:
        path: the file or folder.
        refusal: the system's.
    """
    advice = "free the space" if refusal.errno in FULL else "make it writable"
    return RunError(f"Could not write {path}: {refusal.strerror or refusal}; {advice} or choose another folder.")


def _sync_folder(folder: Path) -> None:
    # the rename itself must reach the disk; systems that cannot open a folder (Windows) do this on their own
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
