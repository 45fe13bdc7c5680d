"""Pickles of CIFAR files, read by an unpickler that runs nothing but what those files need.

A pickle is a program: it may name any function and call it. The published CIFAR files, and copies of them written again
by any numpy, call five: numpy's array reconstruction under its old and new name, `numpy.dtype`, `numpy.ndarray`, and
`_codecs.encode`, by which python 3 writes bytes at protocol 2. Everything else is refused by name.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from weights.errors import DataError


def load_pickle(data: bytes, path: Path) -> dict[str, Any]:
    """Read a pickled dict that holds only numbers, text, lists and arrays; its bytes keys become text.

    Args:
        data: the pickle.
        path: named in errors.

    Raises:
        DataError: the pickle is damaged, names anything outside the few admitted globals, or holds no dict.
    """
    try:
        loaded = _CifarUnpickler(io.BytesIO(data), encoding="bytes").load()
    except _RefusedError as error:
        raise DataError(
            f"{path} asks to run {error}, which no CIFAR file needs; it was refused, not run: "
            "fetch the published data set."
        ) from error
    except Exception as error:  # damaged bytes can make an unpickler raise nearly anything
        raise DataError(f"{path} is damaged or no pickle ({error}); fetch the data set again.") from error
    if not isinstance(loaded, dict):
        raise DataError(
            f"{path} holds {describe(loaded)}; expected the dict of a CIFAR file: fetch the data set again."
        )
    return {as_text(key): value for key, value in loaded.items()}


class _RefusedError(Exception):
    """A pickle names a global that is not admitted; the text is its name."""


def _encode(text: str, codec: str) -> bytes:
    """`_codecs.encode` as python 3 uses it to write bytes at protocol 2, and for no other codec."""
    if codec not in ("latin1", "latin-1"):
        raise _RefusedError(f"_codecs.encode with {codec!r}")
    return text.encode("latin1")


# How numpy rebuilds an array; asking an array for it finds it under the name that this numpy has for it.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("_codecs", "encode"): _encode,
}


class _CifarUnpickler(pickle.Unpickler):
    """Finds only the globals in `_ADMITTED`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise _RefusedError(f"{module}.{name}")
        return _ADMITTED[module, name]


def as_text(value: object) -> str:
    """Return bytes decoded, and anything else as str."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def describe(value: object) -> str:
    """Return what a value is, for an error message: an array's dtype and shape, or the type."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {' x '.join(str(size) for size in value.shape)}"
    return f"a {type(value).__name__}"
