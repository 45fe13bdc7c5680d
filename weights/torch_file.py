"""Files of `torch.save`, read without running code from them and without taking their word for sizes.

`torch.load(weights_only=True)` runs nothing that a pickle names but a few functions of its own. What it does not look
at is checked here: an archive may unpack to a thousand times its size, a key may take for ever to be hashed, and a
tensor may claim more values than there are (one value with a stride of 0 stands for as many as one likes), which is
noticed when somebody copies it. A list may hold one list a thousand million times, by holding one twice that does, and
is no trouble until somebody writes it out. And an archive may have two tables of contents, one for each of two readers.

Before torch 2.10 it did not compare the sizes of storages in the pickle with those in the archive, nor did it look into
what entries are put (CVE-2026-24747), so both are checked here as well.
"""

from __future__ import annotations

import argparse
import copy
import io
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from weights.dry_run import LONGEST_KEY, DryRun, ForeignError, StrangeError
from weights.guard import require_regular, shortened

GROWTH = 64
"""Times its size on the disk that a file may take in memory. Layers that share their weights are there once in a file
and count each time they are used. Deflate, by which an archive may be packed, makes up to 1,032 times less of zeros."""

SMALL = 16 * 2**20
"""Bytes that any file may take, however small it is."""

PICKLE = "data.pkl"  # the member of an archive that says what the others are

LARGEST_PICKLE = 64 * 2**20
"""Bytes of that member. It holds names and shapes; values lie beside it."""

LARGEST_TABLE = 32 * 2**20
"""Bytes of an archive's table of contents: about a hundred for each tensor, which take ten times as much in memory."""

CONTAINERS = (dict, list, tuple, set, argparse.Namespace)

NESTED = 100
"""Containers in containers that are looked through for tensors; training checkpoints have about five."""


class UnfitError(ValueError):
    """A file that is not loaded although it could be read; the text says what it holds, for whoever names the file."""


def read_torch(path: Path, *, checked: bool = False) -> object:
    """Return what a file of `torch.save` holds.

    Args:
        path: the file; a zip archive, or a bare pickle as before torch 1.6.
        checked: compare each member of the archive with its checksum, which `torch.load` does not.

    Returns:
        Containers, plain values, and tensors on the CPU.

    Raises:
        pickle.UnpicklingError: it names something else than tensors and plain values; nothing of that was run.
        UnfitError: it unpacks to more than it may, or holds tensors that are not simply values.
        Exception: whatever damaged bytes make the readers of archives and pickles raise.
    """
    require_regular(path)
    # an open file, not a path: given a name that ends in .safetensors, torch.load goes by the name
    with path.open("rb") as file:
        most = max(SMALL, GROWTH * path.stat().st_size)
        archived = file.read(4) == b"PK\3\4"  # as torch.load tells them apart
        if checked and not archived:
            raise UnfitError("it is no archive of torch.save")
        file.seek(0)
        # training checkpoints often keep their options, a Namespace, beside the weights; it can hold data only
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about pickle protocols and kinds of storage, which the user cannot change
            if archived:
                _require_one_table(file)
                _require_honest(file, most, checked)
            else:
                _require_light(file, most)
            file.seek(0)
            held: object = torch.load(file, map_location="cpu", weights_only=True)
    require_plain(held, most)
    return held


def require_plain(held: object, most: int) -> None:
    """Refuse tensors that are not simply values in memory, without looking at a value, and endless containers.

    Args:
        held: containers with tensors.
        most: bytes that all tensors together may have, and letters that all else may have when it is written out.

    Raises:
        UnfitError: a tensor that is sparse, quantised or without values, tensors that are larger, or too deep nesting.
    """
    size = 0
    for tensor in _tensors(held):
        # Quantised ones may point outside their memory.
        if tensor.is_quantized or tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested:
            raise UnfitError("it holds sparse, quantised or nested tensors, or some without values")
        size += tensor.numel() * tensor.element_size()
        if size > most:
            raise UnfitError(f"its tensors claim more than {most:,} bytes, far more than the file has")
    try:
        letters = _letters(held, {})
    except RecursionError:  # deep, and all of it in one list as well
        raise UnfitError(f"it is nested more than {NESTED} deep") from None
    if letters > most:
        raise UnfitError(f"written out, it would take more than {most:,} letters, far more than the file has")


def _require_one_table(file: BinaryIO) -> None:
    """Refuse an archive in which two readers may find two tables of contents: Python's, which looks, and PyTorch's.

    Python's takes the table right before the end record, the other goes where that record says. (APPNOTE.TXT of PKWARE,
    4.3.14 to 4.3.16: of the last 22 bytes, those at 12 are the table's size and place; before them there may be a
    larger record of 56 bytes and a pointer to it of 20, as torch.save writes them.)

    Raises:
        UnfitError: the table is too large.
        ValueError: there is no end record, or the two may differ.
    """
    file.seek(0, io.SEEK_END)
    total = file.tell()
    file.seek(max(0, total - 98))
    tail = file.read().rjust(98, b"\0")
    large, pointer, last = tail[:56], tail[56:76], tail[76:]
    if not last.startswith(b"PK\5\6") or not last.endswith(b"\0\0"):
        raise ValueError("it does not end as an archive does")
    end, (size, place) = total - 22, struct.unpack("<II", last[12:20])
    said = end  # where the larger record is
    if pointer.startswith(b"PK\6\7") and large.startswith(b"PK\6\6"):
        end, (size, place), (said,) = total - 98, struct.unpack("<QQ", large[40:]), struct.unpack("<Q", pointer[8:16])
    if gap := (end - place - size) or (end - said):
        raise ValueError(
            f"it ends {abs(gap):,} bytes {'after' if gap > 0 else 'before'} its table of contents: bytes were put "
            "before it, or two archives joined"
        )
    if size > LARGEST_TABLE:
        raise UnfitError(f"its table of contents has {size:,} bytes, and may have {LARGEST_TABLE:,}")


def _require_honest(file: BinaryIO, most: int, checked: bool) -> None:
    """Look at an archive: its size when it is unpacked, and what its pickle says of its storages."""
    with zipfile.ZipFile(file) as archive:
        names = [member.filename.lower() for member in archive.infolist()]  # torch looks them up in any case
        sizes = dict(zip(names, (member.file_size for member in archive.infolist()), strict=True))
        if len(sizes) < len(names):
            raise UnfitError("it has two members of one name")
        if sum(sizes.values()) > most:
            raise UnfitError(f"it unpacks to more than {most:,} bytes, far more than it has")
        if checked and (damaged := archive.testzip()) is not None:
            raise UnfitError(f"{damaged} does not match its checksum")
        pickles = [name for name in archive.namelist() if name.lower().endswith(PICKLE)]
        if len(pickles) > 1:
            raise UnfitError(f"it has {len(pickles):,} pickles, one was expected")
        for name in pickles:
            if (size := archive.getinfo(name).file_size) > LARGEST_PICKLE:
                raise UnfitError(f"its {PICKLE} has {size:,} bytes, and may have {LARGEST_PICKLE:,}")
            member = copy.copy(archive.getinfo(name))
            del member.CRC  # torch.save may be told to leave checksums out, and torch.load does not look at them
            _, run = _dry_run(io.BytesIO(archive.open(member).read()))
            for kind, key, elements in run.storages:
                _compare(kind, elements, sizes.get(f"{name[: -len(PICKLE)]}data/{key}".lower()))


def _require_light(file: BinaryIO, most: int) -> None:
    """Look at a bare pickle, or at the five of which a file was made before torch 1.6: the first is a number.

    Still older ones were tar files, which torch.load refuses only when it has read a member's headers, however long.
    """
    file.seek(0)
    with suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        raise UnfitError(
            "it is a tar archive; unpack it and give the file within, or load it with the PyTorch that wrote it"
        )
    file.seek(0)
    number, _ = _dry_run(file)
    if not isinstance(number, int):
        return
    for _ in range(4):
        held, run = _dry_run(file)
        claimed: dict[str, int] = {}
        for kind, key, elements in run.storages:
            claimed[key] = max(claimed.get(key, 0), elements * (_item_size(kind) or 1))
        if sum(claimed.values()) > most or any(elements < 0 for _, _, elements in run.storages):
            raise UnfitError(f"its tensors claim more than {most:,} bytes, far more than the file has")
    if not isinstance(held, list) or not all(isinstance(key, str | bytes) and len(key) <= LONGEST_KEY for key in held):
        raise UnfitError("it does not end with the names of its storages")


def _dry_run(file: BinaryIO) -> tuple[object, DryRun]:
    run = DryRun(file)
    try:
        return run.load(), run
    except StrangeError as error:
        raise UnfitError(str(error)) from error
    except ForeignError:
        raise
    except pickle.UnpicklingError as error:  # damaged; what a pickle names is for torch.load to refuse
        raise ValueError(str(error)) from error


def _compare(kind: str, elements: int, size: int | None) -> None:
    """Compare what a pickle says of a storage with its bytes in the archive; what is not known torch.load refuses."""
    each = _item_size(kind)
    if size is not None and each and elements * each != size:
        raise UnfitError(f"a storage has {size:,} bytes and is said to have {shortened(str(elements))} values")


def _item_size(kind: str) -> int:
    """Return the bytes of a value in a storage, 0 of a kind that is not known."""
    name = kind.rpartition(".")[2]
    known = getattr(torch, name, None) if name.endswith("Storage") else None
    return 1 if name == "UntypedStorage" else int(getattr(getattr(known, "dtype", None), "itemsize", 0))


def _letters(held: object, known: dict[int, int]) -> int:
    """Return about how many letters containers have when they are written out, what is held twice being written twice.

    Args:
        held: a value; containers nest no deeper than `NESTED`, or hold themselves.
        known: of containers that were met before, by id; one that holds itself is not written again.
    """
    if isinstance(held, str | bytes):
        return 1 + len(held)
    if not isinstance(held, CONTAINERS):
        return 1
    if id(held) not in known:
        known[id(held)] = 1
        keys = dict.keys(held) if isinstance(held, dict) else ()
        known[id(held)] += sum(_letters(one, known) for part in (keys, _within(held)) for one in part)
    return known[id(held)]


def _within(held: Any) -> Iterable[object]:
    """Return what a container holds; a dict by its own method, for a pickle may have put another on an OrderedDict."""
    if isinstance(held, dict):
        return dict.values(held)
    return vars(held).values() if isinstance(held, argparse.Namespace) else held


def _tensors(held: object) -> Iterator[Tensor]:
    """Yield the tensors in nested containers, each container once: a pickle can put one into itself."""
    seen: set[int] = set()
    level = [held]
    for _ in range(NESTED):
        below: list[object] = []
        for one in level:
            if isinstance(one, Tensor):
                yield one
            elif isinstance(one, CONTAINERS) and id(one) not in seen:
                seen.add(id(one))
                below += _within(one)
        if not below:
            return
        level = below
    raise UnfitError(f"it is nested more than {NESTED} deep")
