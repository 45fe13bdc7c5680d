"""Lengths of time and sizes as people write them: "90s", "2h", "500MB", "8GiB"."""

from __future__ import annotations

from weights.errors import UsageError

SECONDS = {"S": 1, "SEC": 1, "M": 60, "MIN": 60, "H": 3600, "D": 86400}


def parse_seconds(text: str, name: str) -> float:
    """Return seconds from text such as "90s", "20m" or "1.5h".

    Raises:
        UsageError: the text is no length of time above 0.
    """
    stripped = text.strip().upper()
    digits = stripped.rstrip("SECMINHD ")
    try:
        seconds = float(digits) * SECONDS[stripped[len(digits) :].strip()]
    except (ValueError, KeyError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UsageError(f"{name} is '{text}'; give a time such as 90s, 20m or 2h.")
    return seconds


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_bytes(text: str, name: str) -> int:
    """Return a number of bytes from text such as "500MB" or "8GiB".

    Raises:
        UsageError: the text is no size above 0.
    """
    stripped = text.strip().upper()
    digits = stripped.rstrip("KMGTIB ")
    try:
        size = int(float(digits) * UNITS[stripped[len(digits) :].strip()])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise UsageError(f"{name} is '{text}'; give a size above 0 such as 500MB or 8GB.")
    return size
