"""Pickles gone through before, or instead of, being loaded: an unpickler with bounds, and a run without effect.

The unpickler is the one that is written in Python. The other takes 16 bytes of memory for every number up to the
largest that a pickle gives to a place of its memo, and ten bytes of pickle can name two thousand million.

A pickle is a program, and a short one may ask for much: a byte makes a set of 216 bytes, four bytes copy whatever has
been made before. So its steps are counted, and what copies counts as many as it copies.
"""

from __future__ import annotations

import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Sequence
from typing import IO, Any, ClassVar

from weights.guard import shortened

MOST_STEPS = 3_000_000
"""Operations of a pickle: a DenseNet-201 with its state of Adam takes 100,505. Each may take some hundred bytes."""

LETTERS = 1024
"""Letters whose copy counts as one step. CIFAR's pixels may be text, 150 million letters of it."""

LONGEST_KEY = 10_000
"""Letters of a key. Two long keys that are alike are compared each time that one is met."""

LARGEST_KEY = 2**60
"""Whole numbers below it have hashes of their own; Python takes them modulo 2 ** 61 - 1."""

OPERATIONS = b".(ab)]cehjKJMNGQRXUqrstu}\x80\x81\x85\x86\x87\x88\x89\x8a\x8f"
"""What `torch.load(weights_only=True)` takes; torch.save writes protocol 2."""

REBUILT: dict[str, tuple[int, ...]] = {
    "torch._utils._rebuild_tensor": (2, 3),
    "torch._utils._rebuild_tensor_v2": (2, 3, 6),
    "torch._utils._rebuild_tensor_v3": (2, 3, 7),
    "torch._utils._rebuild_parameter": (),
    "torch._utils._rebuild_parameter_with_state": (3,),
    "torch._tensor._rebuild_from_type_v2": (3,),
    "torch.Size": (0,),
}
"""Functions of torch that plain tensors need, and the places of those arguments that they copy or go through."""


class StrangeError(pickle.UnpicklingError):
    """A pickle that no honest program writes; the text says what it does."""


class ForeignError(pickle.UnpicklingError):
    """An operation that `torch.load(weights_only=True)` does not take."""


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
        self._steps = _Steps(self.dispatch)
        self._steps.left = MOST_STEPS
        vars(self)["dispatch"] = self._steps  # where `load` looks for each operation

    def require_light(self, key: object) -> None:
        """Refuse a key that may take long to be hashed or compared, or whose hash others may have as well.

        Raises:
            StrangeError: it is neither short text nor a small number.
        """
        if isinstance(key, str | bytes):
            light = len(key) <= LONGEST_KEY
        else:
            light = key is None or isinstance(key, float) or (isinstance(key, int) and abs(key) < LARGEST_KEY)
        if not light:
            raise StrangeError("it has keys that are neither short text nor small numbers")

    def look_at_call(self, called: object, args: Any) -> None:
        """Count what a function may copy, before it is called.

        Args:
            called: the function.
            args: of the call.

        Raises:
            StrangeError: it is too much.
        """
        if not isinstance(args, tuple):
            raise StrangeError("it calls something with no tuple of arguments")
        self.count_copy(args)

    def count_copy(self, value: object) -> None:
        """Count a copy of a value, and of those in a tuple.

        Raises:
            StrangeError: it is one too many.
        """
        if isinstance(value, str | bytes):
            self._steps.spend(len(value) // LETTERS)
        elif isinstance(value, list | tuple | dict | set):
            self._steps.spend(len(value))
        for part in value if isinstance(value, tuple) else ():
            self.count_copy(part)


Load = Callable[[Any], None]

_reduce, _fill = (BoundedUnpickler.dispatch[_code[0]] for _code in (pickle.REDUCE, pickle.BUILD))


def _with_light_keys(load: Load, keys: Callable[[list[Any]], Sequence[Any]]) -> Load:
    def load_light(unpickler: BoundedUnpickler) -> None:
        for key in keys(unpickler.stack):
            unpickler.require_light(key)
        load(unpickler)

    return load_light


def _call(unpickler: BoundedUnpickler) -> None:
    unpickler.look_at_call(unpickler.stack[-2], unpickler.stack[-1])
    _reduce(unpickler)


def _build(unpickler: BoundedUnpickler) -> None:
    unpickler.count_copy(unpickler.stack[-1])
    _fill(unpickler)


def _refuse(_: BoundedUnpickler) -> None:
    # A set of sets takes for ever to be compared, an array of bytes all memory before it is read, and the others call
    # something without being looked at.
    raise StrangeError("it holds sets, arrays of bytes or objects in a form that torch.save and CIFAR do not use")


BoundedUnpickler.dispatch |= {pickle.REDUCE[0]: _call, pickle.BUILD[0]: _build}
for _code in (pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8, pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX):
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
    CONTAINERS = ("collections.OrderedDict", "collections.Counter")

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: object) -> Thing:
        return Thing(self.name)

    def __setitem__(self, _: object, __: object) -> None:
        if self.name not in self.CONTAINERS:
            raise StrangeError(f"it puts entries into {shortened(self.name)}")

    def append(self, _: object) -> None:
        """Refuse what a pickle does to a list or a deque of its own."""
        raise StrangeError(f"it puts entries into {shortened(self.name)}")

    extend = append


class DryRun(BoundedUnpickler):
    """Goes through a pickle of `torch.save` and notes the storages that it names; nothing of it is made.

    Attributes:
        storages: (type, key, elements) of each, as the pickle has them.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="bytes")
        self.storages: list[tuple[str, str, int]] = []

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for it, under the name that `torch.load` looks up."""
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        return Thing(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """Note a storage.

        Raises:
            StrangeError: its name is no text, or its size no number.
        """
        match pid:
            case ("module" | b"module", held, *_):  # before torch 1.6: a class, and where its source is
                return held
            case ("storage" | b"storage", Thing() as kind, str() | bytes() as key, _, int() as elements, *view):
                for name in (key, view[0][0] if view and view[0] is not None else ""):
                    self.require_light(name)
                self.storages.append((kind.name, key.decode() if isinstance(key, bytes) else key, elements))
                return Thing("storage")
        raise StrangeError("a storage has no name, or no number of values")

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

    def fill_object(self) -> None:
        """Stand in for the opcode BUILD, which would give an object its attributes.

        Raises:
            StrangeError: they are in something else than a dict, whose keys were looked at.
        """
        state = self.stack.pop()
        if not isinstance(state, dict):
            raise StrangeError("it gives an object attributes that are in no dict")
        self.count_copy(state)

    def leave(self) -> None:
        """Refuse an operation that is not in `OPERATIONS`."""
        raise ForeignError("its pickle has operations that torch.load does not take")

    def look_at_call(self, called: object, args: Any) -> None:
        """Look at what `torch.load` would call: some of its functions make as much as they are told to."""
        super().look_at_call(called, args)
        name = called.name if isinstance(called, Thing) else ""
        last = name.rpartition(".")[2]
        if name in ("builtins.bytearray", "_codecs.encode") and args:
            # of latin1, as Python 3 writes bytes for readers of Python 2
            if not isinstance(args[0], str) or args[1:] not in (("latin1",), ("latin-1",)):
                raise StrangeError(f"it calls {last} for something else than text in latin1")
            self._steps.spend(len(args[0]) // 16)
        elif name in ("builtins.set", *Thing.CONTAINERS):
            for group in args:
                self._require_entries(group, pairs=last == "OrderedDict" and isinstance(group, list))
        elif name in REBUILT:
            self._look_at_rebuilding(name, args)
        elif name.startswith("torch.") and (last.startswith("_") or last.endswith(("Tensor", "Storage"))):
            raise StrangeError("it holds sparse, quantised or nested tensors, or some without values")

    def _require_entries(self, group: object, *, pairs: bool) -> None:
        """Refuse to make a set or a dict of anything but a list or a dict: a tensor may have endless rows."""
        if not isinstance(group, list | dict):
            raise StrangeError("it makes a set or a dict of what is no list")
        for one in group:
            if pairs and not (isinstance(one, list | tuple) and len(one) == 2):
                raise StrangeError("it makes a dict of what are no pairs")
            self.require_light(one[0] if pairs else one)

    def _look_at_rebuilding(self, name: str, args: tuple[Any, ...]) -> None:
        """Refuse copies of what an earlier call made: how large it is, is not known."""
        for place in REBUILT[name]:
            for given in args[place : place + 1]:
                if any(isinstance(part, Thing) for part in (given, *(given if isinstance(given, tuple) else ()))):
                    raise StrangeError("it makes something of what an earlier call made")
        if name.endswith("_rebuild_from_type_v2") and len(args) > 2:  # calls the first with the third
            if not isinstance(args[0], Thing) or args[0].name not in REBUILT or args[0].name == name:
                raise StrangeError("it makes a tensor by what makes none")
            self.look_at_call(args[0], args[2])


DryRun.dispatch = {
    code: load if code in OPERATIONS else DryRun.leave for code, load in BoundedUnpickler.dispatch.items()
}
DryRun.dispatch |= {pickle.NEWOBJ[0]: DryRun.make_object, pickle.BUILD[0]: DryRun.fill_object}
