"""What is asked of a file before it is read, because it may come from a stranger.

Only regular files are read: a named pipe would be waited for without end, and a device may never end. Nothing is read
that is larger than what it is for, and JSON may be nested as it likes. Whoever reads a file says in an error of its own
which file it is and what to do; here everything that can be wrong is an OSError or a ValueError, in a few words.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

LARGEST_TEXT = 16 * 2**20
"""Bytes of JSON, TOML or text. metrics.jsonl grows by about 250 bytes an epoch and a sweep's summary by about 400 a
run, so nothing of this project comes near; parsed, the worst of this size takes a few hundred MB of memory."""

SHOWN = 200  # characters of somebody else's text in a message


def require_regular(path: Path) -> None:
    """Refuse what is no regular file; links are followed.

    Args:
        path: what is to be opened.

    Raises:
        OSError: nothing is there, or it is a folder, a named pipe, a socket or a device.
    """
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if kind != stat.S_IFREG:
        name = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}.get(kind, "a device")
        raise OSError(errno.EINVAL, f"{name}, not a file", str(path))


def refuse_link(path: Path) -> None:
    """Refuse a link where a file or folder of our own is to be written: it could lead anywhere.

    Args:
        path: what is to be written; it need not be there.

    Raises:
        OSError: it is a link.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "a link that leads elsewhere", str(path))


def require_size(size: int, largest: int) -> None:
    """Refuse what has too many bytes to be read whole.

    Args:
        size: bytes that it has.
        largest: bytes that it may have.

    Raises:
        ValueError: it has more.
    """
    if size > largest:
        raise ValueError(f"it has {size:,} bytes, and such a file may have {largest:,}")


def read_bytes(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    """Return a regular file's bytes: those that it says to have, for some files of the system say none and never end.

    Args:
        path: the file.
        largest: bytes that it may have.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is larger.
    """
    require_regular(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise ValueError(f"it is larger than the {largest:,} bytes that such a file may have")
        return file.read(size)


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """Return a regular file's text.

    Args:
        path: of the file.
        largest: most bytes that it may have.

    Raises:
        OSError, ValueError: as of `read_bytes`; ValueError for what is no UTF-8 as well.
    """
    return read_bytes(path, largest).decode()


def parse_json(text: str) -> Any:
    """Return what JSON says.

    Args:
        text: of the file.

    Raises:
        ValueError: it is no JSON, nested too deeply, or holds a number of thousands of digits or half a character.
    """
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair could not be written anywhere
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def read_json(path: Path) -> Any:
    """Return what a JSON file says.

    Args:
        path: of the file.

    Raises:
        OSError, ValueError: as of `read_text` and `parse_json`.
    """
    return parse_json(read_text(path))


def told(value: object) -> str:
    """Return a value that somebody else wrote for a message: the beginning of it, in Python's words.

    Args:
        value: anything.
    """
    try:
        return shortened(repr(value))
    except (RecursionError, ValueError):  # nested too deeply, or a whole number of thousands of digits
        return f"a {type(value).__name__}"


def shortened(text: str) -> str:
    """Return somebody else's text for a message, on one line: its beginning, where it is long.

    Args:
        text: of any length.
    """
    start = "".join(one if one.isprintable() else repr(one)[1:-1] for one in text[:SHOWN])
    return start if len(text) <= SHOWN else start + "…"
