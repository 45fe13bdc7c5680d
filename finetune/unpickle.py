"""Pickles of CIFAR files, read by an unpickler that runs nothing but what those files need.

A pickle is a program: it may name any function and call it. The published CIFAR files, and copies of them written again
by any numpy, call five: numpy's array reconstruction under its old and new name, `numpy.dtype`, `numpy.ndarray`, and
`_codecs.encode`, by which python 3 writes bytes at protocol 2. Everything else is refused by name.

Nor do these five run as they are: stand-ins note what the pickle says of an array, and the array is made from that once
it has been found to be plain numbers. numpy's own reconstruction believes sizes and layouts of records that are not so.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weights.dry_run import BoundedUnpickler
from weights.errors import DataError
from weights.guard import SHOWN, shortened

LONGEST = 2**31
"""Images or bytes in a row; numbers of thousands of digits would take for ever to be multiplied."""

_KINDS = frozenset({"b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8"})
"""Types of numbers that an array may have, as numpy writes them."""


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
        if isinstance(loaded, dict):
            # Keys of other kinds are none that a CIFAR file has.
            return {as_text(key): _made(value) for key, value in loaded.items() if isinstance(key, bytes | str)}
    except _RefusedError as error:
        raise DataError(
            f"{path} asks to run {error}, which no CIFAR file needs; it was refused, not run: "
            "fetch the published data set."
        ) from error
    except Exception as error:  # damaged bytes can make an unpickler raise nearly anything
        reason = shortened(str(error) or type(error).__name__)
        raise DataError(f"{path} is damaged or no pickle ({reason}); fetch the data set again.") from error
    raise DataError(f"{path} holds {describe(loaded)}; expected the dict of a CIFAR file: fetch the data set again.")


class _RefusedError(Exception):
    """A pickle names a global that is not admitted; the text is its name."""


class _Type:
    """What a pickle says of an array's numbers, in place of `numpy.dtype`."""

    __slots__ = ("order", "text")

    def __init__(self, text: object, *_: object) -> None:
        self.text = as_text(text[:SHOWN]) if isinstance(text, bytes | str) else ""
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        self.order = as_text(state[1]) if state[1] in ("<", ">", "|", b"<", b">", b"|") else "="

    def made(self) -> np.dtype[Any]:
        kind = self.text.lstrip("<>=|")
        if kind not in _KINDS:
            raise ValueError(f"an array of {shortened(repr(self.text))} is none of plain numbers")
        return np.dtype(kind) if self.order == "=" else np.dtype(kind).newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """What a pickle says of an array, in place of `numpy.ndarray`."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, tuple) else ()

    def made(self) -> NDArray[Any]:
        """Return the array.

        Raises:
            ValueError, TypeError: what the pickle says does not fit together.
        """
        _, shape, kind, by_column, content = self.state
        whole = isinstance(shape, tuple) and all(type(side) is int and 0 <= side < LONGEST for side in shape)
        if not whole or len(shape) > 4 or not isinstance(kind, _Type) or not isinstance(content, bytes):
            raise ValueError("an array's description is no such thing")
        numbers = kind.made()
        if math.prod(shape) * numbers.itemsize != len(content):
            raise ValueError(f"an array of {len(content):,} bytes is said to have the shape {shape}")
        flat = np.frombuffer(content, numbers)  # not to be written to, as it is the pickle's own bytes
        return flat.reshape(shape, order="F" if by_column else "C")


class _Call:
    """A function that a pickle may call, as an object to which a pickle cannot add anything."""

    __slots__ = ("_name",)
    _name: str

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __setattr__(self, name: str, value: object) -> None:
        raise _RefusedError(f"a change of {self._name}")

    def __call__(self, *args: Any) -> Any:
        if self._name == "dtype":
            return _Type(*args)
        if self._name == "_reconstruct":
            return _Array()
        if self._name == "encode":
            return _encode(*args)
        raise _RefusedError(f"numpy.{self._name}")


def _encode(text: str, codec: object = "") -> bytes:
    """`_codecs.encode` as python 3 uses it to write bytes at protocol 2, and for no other codec."""
    if codec not in ("latin1", "latin-1"):
        other = repr(codec) if isinstance(codec, str) else f"a {type(codec).__name__}"  # a list may hold itself twice
        raise _RefusedError(f"_codecs.encode with {shortened(other)}")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], _Call] = {
    ("numpy.core.multiarray", "_reconstruct"): _Call("_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"): _Call("_reconstruct"),
    ("numpy", "dtype"): _Call("dtype"),
    ("numpy", "ndarray"): _Call("ndarray"),  # named as what to reconstruct, never called
    ("_codecs", "encode"): _Call("encode"),
}


class _CifarUnpickler(BoundedUnpickler):
    """Finds only the globals in `_ADMITTED`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise _RefusedError(shortened(f"{module}.{name}"))
        return _ADMITTED[module, name]


def _made(value: object) -> object:
    return value.made() if isinstance(value, _Array) else value


def as_text(value: bytes | str) -> str:
    """Return text, bytes decoded."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def describe(value: object) -> str:
    """Return what a value is, for an error message: an array's dtype and shape, or the type."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {' x '.join(str(size) for size in value.shape)}"
    return f"a {type(value).__name__}"
