"""Pickles gone through before, or instead of, being loaded: an unpickler with bounds, and a run without effect.

The unpickler is the one that is written in Python. The other takes 16 bytes of memory for every number up to the
largest that a pickle gives to a place of its memo, and ten bytes of pickle can name two thousand million.

A pickle is a program, and a short one may ask for much: a byte makes a set of 216 bytes, four bytes copy whatever has
been made before. So its steps are counted, and what copies counts as many as it copies.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import IO, Any, ClassVar

MOST_STEPS = 3_000_000
"""Operations of a pickle: a DenseNet-201 with its state of Adam takes 100,505. Each may take 225 bytes of memory."""

LETTERS = 1024
"""Letters whose copy counts as one step. CIFAR's pixels may be text, 150 million letters of it."""

HEAVIEST = 100_000
"""Values in a tuple, those of tuples in it counted each time they are met. As a key its hash visits all of them, and
thirty tuples that each hold the one before twice make a thousand million."""

HEAVIEST_KEY = 100
"""The same of a tuple that is a key. Keys are names and numbers, and one may be used again and again."""


class StrangeError(pickle.UnpicklingError):
    """A pickle that no honest program writes; the text says what it does."""


class _Steps(dict[int, Callable[[Any], None]]):
    """Operations by their code; looking one up is a step."""

    left = 0

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.spend(1)
        return super().__getitem__(code)

    def spend(self, count: int) -> None:
        """Count steps.

        Raises:
            StrangeError: there were too many.
        """
        self.left -= count
        if self.left < 0:
            raise StrangeError(f"its pickle takes more than {MOST_STEPS:,} steps")


class BoundedUnpickler(pickle._Unpickler):
    """Python's unpickler, which refuses pickles that would take for ever or all memory.

    Args:
        file: open for reading.
        encoding: of text that Python 2 wrote; `bytes` leaves it as it is.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    stack: list[Any]  # of what is made, as Python's unpickler keeps it

    def __init__(self, file: IO[bytes], *, encoding: str = "ASCII") -> None:
        super().__init__(file, encoding=encoding)
        self._weights: dict[int, tuple[int, tuple[Any, ...]]] = {}  # by id; the tuple is kept, and so its id
        self._steps = _Steps(self.dispatch)
        self._steps.left = MOST_STEPS
        vars(self)["dispatch"] = self._steps  # where `load` looks for each operation

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

    def require_light(self, key: object) -> None:
        """Refuse a key that takes long to be hashed.

        Raises:
            StrangeError: it does.
        """
        if isinstance(key, Thing) and key.name == "torch.Size":
            raise StrangeError("it has a shape as a key")
        if isinstance(key, tuple):
            if self._weights.get(id(key), (1,))[0] > HEAVIEST_KEY:
                raise StrangeError("it has tuples of many values as keys")
            for part in key:
                self.require_light(part)

    def look_at_call(self, called: object, args: object) -> None:
        """Count what a function may copy, before it is called.

        Args:
            called: the function.
            args: of the call.

        Raises:
            StrangeError: it is too much.
        """
        if not isinstance(args, tuple):
            raise StrangeError("it calls something with no tuple of arguments")
        for arg in args:
            self.count_copy(arg)

    def count_copy(self, value: object) -> None:
        """Count a copy of a value.

        Raises:
            StrangeError: it is one too many.
        """
        if isinstance(value, str | bytes):
            self._steps.spend(len(value) // LETTERS)
        elif isinstance(value, list | tuple | dict | set):
            self._steps.spend(len(value))


Load = Callable[[Any], None]


def _weighed(load: Load) -> Load:
    def load_and_weigh(unpickler: BoundedUnpickler) -> None:
        load(unpickler)
        unpickler.weigh()

    return load_and_weigh


def _with_light_keys(load: Load, keys: Callable[[list[Any]], Sequence[Any]]) -> Load:
    def load_light(unpickler: BoundedUnpickler) -> None:
        for key in keys(unpickler.stack):
            unpickler.require_light(key)
        load(unpickler)

    return load_light


def _looked_at(load: Load) -> Load:
    def look_and_call(unpickler: BoundedUnpickler) -> None:
        unpickler.look_at_call(unpickler.stack[-2], unpickler.stack[-1])
        load(unpickler)

    return look_and_call


def _counted(load: Load) -> Load:
    def count_and_build(unpickler: BoundedUnpickler) -> None:
        unpickler.count_copy(unpickler.stack[-1])
        load(unpickler)

    return count_and_build


def _refuse(_: BoundedUnpickler) -> None:
    # A set of sets takes for ever to be compared, and an array of bytes all memory before it is read.
    raise StrangeError("it holds sets or arrays of bytes in a form that torch.save and CIFAR do not use")


for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    BoundedUnpickler.dispatch[_code[0]] = _weighed(BoundedUnpickler.dispatch[_code[0]])
BoundedUnpickler.dispatch[pickle.REDUCE[0]] = _looked_at(BoundedUnpickler.dispatch[pickle.REDUCE[0]])
BoundedUnpickler.dispatch[pickle.BUILD[0]] = _counted(BoundedUnpickler.dispatch[pickle.BUILD[0]])
for _code in (pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8):
    BoundedUnpickler.dispatch[_code[0]] = _refuse
for _code, _keys in (
    (pickle.SETITEM, lambda stack: stack[-2:-1]),
    (pickle.SETITEMS, lambda stack: stack[::2]),
    (pickle.DICT, lambda stack: stack[::2]),
):
    BoundedUnpickler.dispatch[_code[0]] = _with_light_keys(BoundedUnpickler.dispatch[_code[0]], _keys)


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
        self.storages: list[tuple[str, str, int]] = []

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for it."""
        return Thing(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """Note a storage.

        Raises:
            StrangeError: its name is no text, or its size no number.
        """
        if isinstance(pid, tuple) and len(pid) >= 5 and isinstance(pid[1], Thing):
            key = pid[2].decode("utf-8", "replace") if isinstance(pid[2], bytes) else pid[2]
            if not isinstance(key, str) or type(pid[4]) is not int:
                raise StrangeError("a storage has no name, or no number of values")
            self.storages.append((pid[1].name, key, pid[4]))
        return Thing("storage")

    def make_object(self) -> None:
        """Stand in for the opcode NEWOBJ, which would make an instance of a class.

        Raises:
            StrangeError: it is of no class.
        """
        self.look_at_call(self.stack[-2], self.stack[-1])
        self.stack.pop()
        if not isinstance(self.stack[-1], Thing):
            raise StrangeError("it makes an object of what is no class")
        self.stack[-1] = Thing(self.stack[-1].name)

    def look_at_call(self, called: object, args: object) -> None:
        """Look at what `torch.load` would call: some of its functions make as much as they are told to."""
        super().look_at_call(called, args)
        name = called.name if isinstance(called, Thing) else ""
        last, given = name.rpartition(".")[2], args if isinstance(args, tuple) else ()  # it is one, or was refused
        if last in ("bytearray", "encode") and given:  # of latin1, as Python 3 writes bytes for readers of Python 2
            if not isinstance(given[0], str) or given[1:] not in (("latin1",), ("latin-1",)):
                raise StrangeError(f"it calls {last} for something else than text in latin1")
            self._steps.spend(len(given[0]) // 16)
        elif last in ("set", "OrderedDict", "Counter"):
            for group in given:
                for one in group if isinstance(group, list | tuple) else ():
                    pair = last == "OrderedDict" and isinstance(one, list | tuple) and one
                    self.require_light(one[0] if pair else one)
        elif name.startswith("torch.") and last.endswith("Tensor") and given:
            raise StrangeError(f"it calls {last} with values or sizes")
        elif last == "_rebuild_from_type_v2" and len(given) > 2:  # calls the first with the third
            self.look_at_call(given[0], given[2])


DryRun.dispatch = {**BoundedUnpickler.dispatch, pickle.NEWOBJ[0]: DryRun.make_object}
