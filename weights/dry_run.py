"""Pickles gone through before, or instead of, being loaded: an unpickler with bounds, and a run without effect.

The unpickler is the one that is written in Python. The other takes 16 bytes of memory for every number up to the
largest that a pickle gives to a place of its memo, and ten bytes of pickle can name two thousand million.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import IO, Any, ClassVar

HEAVIEST = 100_000
"""Values in a tuple, those of tuples in it counted each time they are met. As a key its hash visits all of them, and
thirty tuples that each hold the one before twice make a thousand million."""


class StrangeError(pickle.UnpicklingError):
    """A pickle that no honest program writes; the text says what it does."""


class BoundedUnpickler(pickle._Unpickler):
    """Python's unpickler, which refuses tuples that would take for ever to be hashed.

    Args:
        file: open for reading.
        encoding: of text that Python 2 wrote; `bytes` leaves it as it is.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    stack: list[Any]  # of what is made, as Python's unpickler keeps it

    def __init__(self, file: IO[bytes], *, encoding: str = "ASCII") -> None:
        super().__init__(file, encoding=encoding)
        self._weights: dict[int, tuple[int, tuple[Any, ...]]] = {}  # by id; the tuple is kept, and so its id

    def weigh(self) -> None:
        """Note the weight of the tuple that was made last.

        Raises:
            StrangeError: it is too heavy.
        """
        made = self.stack[-1]
        weight = 1 + sum(self._weights[id(part)][0] if id(part) in self._weights else 1 for part in made)
        if weight > HEAVIEST:
            raise StrangeError("it holds tuples in tuples without end")
        self._weights[id(made)] = (weight, made)


def _weighed(load: Callable[[Any], None]) -> Callable[[BoundedUnpickler], None]:
    def load_and_weigh(unpickler: BoundedUnpickler) -> None:
        load(unpickler)
        unpickler.weigh()

    return load_and_weigh


for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    BoundedUnpickler.dispatch[_code[0]] = _weighed(BoundedUnpickler.dispatch[_code[0]])


class Thing:
    """Stands for whatever a pickle names or makes; it can be called and filled, and nothing comes of it.

    Args:
        name: dotted, of what is named; of what is made, the name of what made it.
    """

    __slots__ = ("name",)
    name: str
    CONTAINERS = ("collections.OrderedDict", "collections.Counter")

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "name", name)

    def __call__(self, *_: object) -> Thing:
        return Thing(self.name)

    def __setstate__(self, _: object) -> None:
        """Take no notice."""

    def __setattr__(self, name: str, _: object) -> None:
        raise StrangeError(f"it sets {name} of {self.name}")

    def __setitem__(self, _: object, __: object) -> None:
        if self.name not in self.CONTAINERS:
            raise StrangeError(f"it puts entries into {self.name}")

    def append(self, _: object) -> None:
        """Refuse what a pickle does to a list or a deque of its own."""
        raise StrangeError(f"it puts entries into {self.name}")

    extend = add = append


class DryRun(BoundedUnpickler):
    """Goes through a pickle of `torch.save` and notes the storages that it names; nothing of it is made.

    Attributes:
        storages: (type, key, elements) of each, as the pickle has them.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="bytes")
        self.storages: list[tuple[str, object, object]] = []

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for it."""
        return Thing(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """Note a storage."""
        if isinstance(pid, tuple) and len(pid) >= 5 and isinstance(pid[1], Thing):
            self.storages.append((pid[1].name, pid[2], pid[4]))
        return Thing("storage")

    def make_object(self) -> None:
        """Stand in for the opcode NEWOBJ, which would make an instance of a class."""
        self.stack.pop()
        self.stack[-1] = Thing(getattr(self.stack[-1], "name", "nothing"))


DryRun.dispatch = {**BoundedUnpickler.dispatch, pickle.NEWOBJ[0]: DryRun.make_object}
