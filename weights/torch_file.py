"""Files of `torch.save`, read without running code from them and without taking their word for sizes.

`torch.load(weights_only=True)` runs nothing that a pickle names but a few functions of its own. What it does not look
at is checked here: an archive may unpack to a thousand times its size, a key may take for ever to be hashed, and a
tensor may claim more values than there are (one value with a stride of 0 stands for as many as one likes), which is
noticed when somebody copies it.

Before torch 2.10 it did not compare the sizes of storages in the pickle with those in the archive, nor did it look into
what entries are put (CVE-2026-24747), so both are checked here as well.
"""

from __future__ import annotations

import argparse
import copy
import io
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from weights.dry_run import DryRun, StrangeError
from weights.guard import require_regular, shortened

GROWTH = 64
"""Times its size on the disk that a file may take in memory. Layers that share their weights are there once in a file
and count each time they are used. Deflate, by which an archive may be packed, makes up to 1,032 times less of zeros."""

SMALL = 16 * 2**20
"""Bytes that any file may take, however small it is."""

PICKLE = "data.pkl"  # the member of an archive that says what the others are

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
        archived = file.read(2) == b"PK"
        if checked and not archived:
            raise UnfitError("it is no archive of torch.save")
        file.seek(0)
        # training checkpoints often keep their options, a Namespace, beside the weights; it can hold data only
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about pickle protocols and kinds of storage, which the user cannot change
            if archived:
                _require_honest(file, most, checked)
            else:
                _require_light(file)
            file.seek(0)
            held: object = torch.load(file, map_location="cpu", weights_only=True)
    require_plain(held, most)
    return held


def require_plain(held: object, most: int) -> None:
    """Refuse tensors that are not simply values in memory, without looking at a value.

    Args:
        held: containers with tensors.
        most: bytes that all tensors together may have.

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
        for name in archive.namelist():
            if name.lower().endswith(PICKLE):
                member = copy.copy(archive.getinfo(name))
                del member.CRC  # torch.save may be told to leave checksums out, and torch.load does not look at them
                _, run = _dry_run(io.BytesIO(archive.open(member).read()))
                for kind, key, elements in run.storages:
                    _compare(kind, elements, sizes.get(f"{name[: -len(PICKLE)]}data/{key!s:.40}".lower()))


def _require_light(file: BinaryIO) -> None:
    """Look at a bare pickle, or at the five of which a file was made before torch 1.6: the first is a number."""
    number, _ = _dry_run(file)
    for _ in range(4 if isinstance(number, int) else 0):
        _dry_run(file)


def _dry_run(file: BinaryIO) -> tuple[object, DryRun]:
    run = DryRun(file)
    try:
        return run.load(), run
    except StrangeError as error:
        raise UnfitError(str(error)) from error
    except pickle.UnpicklingError as error:  # damaged; what a pickle names is for torch.load to refuse
        raise ValueError(str(error)) from error


def _compare(kind: str, elements: object, size: int | None) -> None:
    """Compare what a pickle says of a storage with its bytes in the archive; what is not known torch.load refuses."""
    name = kind.rpartition(".")[2]
    known = getattr(torch, name, None) if name.endswith("Storage") else None
    each = 1 if name == "UntypedStorage" else getattr(getattr(known, "dtype", None), "itemsize", 0)
    if size is None or not each:
        return
    if type(elements) is not int or elements * each != size:
        raise UnfitError(f"a storage has {size:,} bytes and is said to have {shortened(str(elements))} values")


def _tensors(held: object) -> Iterator[Tensor]:
    """Yield the tensors in nested containers, each container once: a pickle can put one into itself."""
    seen: set[int] = set()
    level = [held]
    for _ in range(NESTED):
        below: list[object] = []
        for one in level:
            if isinstance(one, Tensor):
                yield one
            elif isinstance(one, dict | list | tuple | set | argparse.Namespace) and id(one) not in seen:
                seen.add(id(one))
                if isinstance(one, dict):  # dict's own method: a pickle may have put another `values` on an OrderedDict
                    below += dict.values(one)
                else:
                    below += vars(one).values() if isinstance(one, argparse.Namespace) else one
        if not below:
            return
        level = below
    raise UnfitError(f"it is nested more than {NESTED} deep")
