"""CIFAR-10 and CIFAR-100 as published: python pickles, binary files, and the .tar.gz archives of both.

The layouts are told apart by the files they hold, not by checksums or folder names. Pickles are read by an unpickler
that admits only what those files need, and archives are read in memory: no path inside one is ever written to.

Legend: N images of 3 channels, 32 x 32 pixels, one byte each: 3072 bytes, all red first, then green, then blue.
"""

from __future__ import annotations

import gzip
import posixpath
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.images import ImageSet, RawData, first_few
from finetune.tar import MOST_RECORDS, ShortHeader
from finetune.unpickle import as_text, describe, load_pickle
from weights.errors import DataError, UsageError
from weights.guard import read_bytes, require_regular, shortened, told

Kind = Literal["cifar10", "cifar100"]
Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]

KINDS: tuple[Kind, ...] = ("cifar10", "cifar100")
PIXELS = 3 * 32 * 32
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz")
LARGEST_FILE = 1 << 30
"""Bytes. The largest published file has 155 MB; more than this is no CIFAR, and is not read into memory."""

LARGEST_NAMES = 1 << 20
"""Bytes of a file with class names; the published ones have a few kB."""

LARGEST_UNPACKED = 1 << 29
"""Bytes that an archive may unpack to. The published ones have 186 MB; gzip makes a thousand times less of zeros."""

MOST_MEMBERS = 10_000
"""Files and folders in an archive. The published ones have about ten."""

ATTEMPTS = 100  # reads behind the end of an archive; a sound one needs two

_KNOWN_FILE = re.compile(
    r"(train|test|meta|batches\.meta|test_batch|data_batch_\d{1,4})"
    r"|((train|test|test_batch|data_batch_\d{1,4})\.bin|(batches\.meta|fine_label_names|coarse_label_names)\.txt)"
)


@dataclass(frozen=True)
class CifarFiles:
    """The files of one CIFAR data set, in a folder or in an archive.

    Attributes:
        place: the folder or archive.
        kind: `cifar10` or `cifar100`.
        binary: True for the binary layout, False for python pickles.
        names: names of the known files that are there.
        read: returns a file's bytes.
    """

    place: Path
    kind: Kind
    binary: bool
    names: frozenset[str]
    read: Callable[[str], bytes]


def cifar_folder(folder: Path) -> CifarFiles | None:
    """Return the CIFAR files lying directly in a folder, or None when it holds no such layout.

    Raises:
        DataError: the folder mixes two layouts.
    """
    names = frozenset(entry.name for entry in folder.iterdir() if _KNOWN_FILE.fullmatch(entry.name) and entry.is_file())
    layout = _recognise(folder, names)
    if layout is None:
        return None
    return CifarFiles(folder, *layout, names, lambda name: _file(folder / name))


def cifar_archive(archive: Path) -> CifarFiles:
    """Read the CIFAR files out of a .tar.gz into memory.

    Raises:
        DataError: the archive is damaged, holds a path that leaves it, or does not hold exactly one CIFAR layout.
    """
    try:
        require_regular(archive)
        folders = _members(archive)
    except DataError:
        raise
    except Exception as error:  # damaged bytes make the readers of archives raise nearly anything
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            raise  # the system does not give the file
        reason = shortened(str(error) or type(error).__name__)
        raise DataError(f"{archive} cannot be read as a .tar.gz ({reason}); fetch it again.") from error
    found = []
    for contents in folders.values():
        layout = _recognise(archive, frozenset(contents))
        if layout is not None:
            found.append(CifarFiles(archive, *layout, frozenset(contents), contents.__getitem__))
    if len(found) != 1:
        raise DataError(
            f"{archive} holds {len(found)} CIFAR data sets; expected exactly one, in the python or the binary layout: "
            "pack one alone, or unpack it and give --data a folder."
        )
    return found[0]


def archive_kind(archive: Path) -> Kind | None:
    """Return what an archive's file name says it holds, without opening it (None: the name says nothing)."""
    match = re.match(r"cifar-?(100|10)(?!\d)", archive.name.lower())
    if match is None:
        return None
    return "cifar100" if match[1] == "100" else "cifar10"


def read_cifar(files: CifarFiles, *, labels: str = "fine") -> RawData:
    """Read a CIFAR data set, its images in file order.

    Args:
        files: what `cifar_folder` or `cifar_archive` found.
        labels: `fine`, or `coarse` for CIFAR-100's twenty superclasses.

    Returns:
        Train and test split; images uint8 (N, 3, 32, 32), labels int64 (N,). Class order is the meta file's.

    Raises:
        UsageError: coarse labels are asked of data without them.
        DataError: a file is missing, damaged, unsafe or disagrees with another.
    """
    if labels == "coarse" and files.kind == "cifar10":
        raise UsageError(f"--labels coarse needs CIFAR-100, but {files.place} is CIFAR-10, which has no coarse labels.")
    train_files, test_file = _split_files(files)
    reader = _read_binary if files.binary else _read_pickle
    classes = _class_names(files, labels)
    train = [reader(files, name, labels) for name in train_files]
    test = [reader(files, test_file, labels)]
    sets = []
    for names, parts in ((train_files, train), ((test_file,), test)):
        for name, (_, part_labels) in zip(names, parts, strict=True):
            _check_labels(files.place / name, part_labels, classes)
        sets.append(_image_set(parts, classes))
    notes: tuple[str, ...] = ()
    if files.kind == "cifar10" and len(train_files) != 5:
        notes = (f"{files.place} holds {len(train_files)} of CIFAR-10's five training batches.",)
    return RawData(files.kind, sets[0], None, sets[1], notes)


def _members(archive: Path) -> dict[PurePosixPath, dict[str, bytes]]:
    """Return the bytes of an archive's known files, by folder and name.

    The stream is read to its end, where gzip keeps the checksum: `tarfile` stops before it, and a flipped bit in pixels
    that are stored uncompressed would go unnoticed.
    """
    folders: dict[PurePosixPath, dict[str, bytes]] = {}
    with gzip.open(archive) as unpacked:
        stream = _Limited(cast(BinaryIO, unpacked))
        # "r|" reads forward only, so that no member can lead the reader round in a circle.
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=ShortHeader) as tar:  # type: ignore[call-overload]  # `read`
            for number, member in enumerate(tar, start=1):
                _refuse_outside(archive, member)
                if number > MOST_MEMBERS:
                    raise ValueError(f"it has more than {MOST_MEMBERS:,} members, and CIFAR about ten")
                if len(tar.pax_headers) > MOST_RECORDS:
                    raise ValueError(f"more than {MOST_RECORDS} records hold for all its members")
                if not 0 <= member.size <= LARGEST_UNPACKED:
                    raise ValueError(f"its member {number:,} has {member.size:,} bytes, and none of CIFAR's has")
                path = PurePosixPath(member.name)
                if not member.isreg() or member.issparse() or not _KNOWN_FILE.fullmatch(path.name):
                    continue
                content = tar.extractfile(member)
                if content is not None:
                    folders.setdefault(path.parent, {})[path.name] = content.read()
        while stream.read(1 << 20):
            pass
    return folders


class _Limited:
    """A stream that ends with an error after LARGEST_UNPACKED bytes, or when it is read on and on behind its end.

    Args:
        stream: what is read.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._read, self._behind = stream, 0, 0

    def read(self, size: int) -> bytes:
        """Return at most this many bytes."""
        content = self._stream.read(min(size, LARGEST_UNPACKED))
        self._read += len(content)
        self._behind += not content
        if self._read > LARGEST_UNPACKED:
            raise ValueError(f"it unpacks to more than {LARGEST_UNPACKED:,} bytes, and CIFAR has less")
        if self._behind > ATTEMPTS:
            raise ValueError("it ends too early")
        return content


def _file(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        DataError: it is too large to be CIFAR's.
    """
    try:
        return read_bytes(path, LARGEST_FILE)
    except ValueError as error:
        raise DataError(f"{path} cannot be CIFAR: {error}; fetch the data set again.") from error


def _refuse_outside(archive: Path, member: tarfile.TarInfo) -> None:
    """Refuse a member or link that leads out of the archive. Nothing is unpacked, but no honest archive has one.

    Raises:
        DataError: the path is absolute, or climbs above the top.
    """
    paths = [member.name]
    if member.issym():
        paths.append(posixpath.join(posixpath.dirname(member.name), member.linkname))
    elif member.islnk():
        paths.append(member.linkname)
    if any(posixpath.normpath(path).split("/")[0] in ("", "..") for path in paths):
        raise DataError(
            f"{archive} holds {told(member.name)}, a path that leads out of it; expected only the data set's own "
            "files, so do not unpack it, and fetch the published archive."
        )


def _recognise(place: Path, names: frozenset[str]) -> tuple[Kind, bool] | None:
    """Return (kind, binary) for a folder's file names. One file may be missing, so that reading can name it."""
    layouts: list[tuple[Kind, bool]] = []
    if len(names & {"train", "test", "meta"}) >= 2:
        layouts.append(("cifar100", False))
    if len(names & {"train.bin", "test.bin", "fine_label_names.txt"}) >= 2:
        layouts.append(("cifar100", True))
    batches = {re.sub(r"\d+", "N", name) for name in names}
    if len(batches & {"data_batch_N", "test_batch", "batches.meta"}) >= 2:
        layouts.append(("cifar10", False))
    if len(batches & {"data_batch_N.bin", "test_batch.bin", "batches.meta.txt"}) >= 2:
        layouts.append(("cifar10", True))
    if len(layouts) > 1:
        listed = " and ".join(f"{kind} in the {'binary' if binary else 'python'} layout" for kind, binary in layouts)
        raise DataError(f"{place} holds {listed} side by side; give each a folder of its own.")
    return layouts[0] if layouts else None


def _split_files(files: CifarFiles) -> tuple[tuple[str, ...], str]:
    """Return the names of the training files in order, and of the test file; all are there."""
    suffix = ".bin" if files.binary else ""
    train: tuple[str, ...]
    if files.kind == "cifar100":
        train, test = ("train" + suffix,), "test" + suffix
    else:
        numbers = [int(match[1]) for name in files.names if (match := re.match(r"data_batch_(\d+)", name))]
        train = tuple(f"data_batch_{number}{suffix}" for number in range(1, max(numbers, default=1) + 1))
        test = "test_batch" + suffix
    for name in (*train, test):
        _require(files, name)
    return train, test


def _require(files: CifarFiles, name: str) -> None:
    if name not in files.names:
        there = ", ".join(sorted(files.names))
        raise DataError(f"{files.place} has no file {name} (it holds {there}); fetch the data set again.")


def _class_names(files: CifarFiles, labels: str) -> tuple[str, ...]:
    """Read the class names, in label order."""
    if files.kind == "cifar10":
        name, key = ("batches.meta.txt" if files.binary else "batches.meta"), "label_names"
    else:
        name, key = (f"{labels}_label_names.txt" if files.binary else "meta"), f"{labels}_label_names"
    if labels == "coarse" and files.binary and name not in files.names:
        raise UsageError(f"--labels coarse needs coarse labels, but {files.place} has no file {name}.")
    _require(files, name)
    path, content = files.place / name, files.read(name)
    if len(content) > LARGEST_NAMES:
        raise DataError(f"{path} has {len(content):,} bytes, too many for names of classes; fetch the data set again.")
    if files.binary:
        names = [line.strip() for line in content.decode("utf-8", "replace").splitlines() if line.strip()]
    else:
        meta = load_pickle(content, path)
        if key not in meta and labels == "coarse":
            raise UsageError(f"--labels coarse needs coarse labels, but {path} names none.")
        listed = meta.get(key)
        if not isinstance(listed, list) or not all(isinstance(one, bytes | str) for one in listed):
            raise DataError(
                f"{path} has no list {key}; expected the meta file of {files.kind}: fetch the data set again."
            )
        names = [one.decode("utf-8", "replace") if isinstance(one, bytes) else one for one in listed]
    if len(names) < 2 or len(set(names)) != len(names):
        raise DataError(
            f"{path} names {len(names)} classes, {len(set(names))} of them different; expected 2 or more, each once: "
            "correct it or fetch the data set again."
        )
    return tuple(names)


def _read_binary(files: CifarFiles, name: str, labels: str) -> tuple[Pixels, Labels]:
    """Read one binary file: pixels uint8 (N, 3072) and labels int64 (N,)."""
    header = 1 if files.kind == "cifar10" else 2  # CIFAR-100 has the coarse label, then the fine one
    record = header + PIXELS
    path, data = files.place / name, files.read(name)
    if not data or len(data) % record:
        raise DataError(
            f"{path} has {len(data):,} bytes; expected a multiple of {record:,}, the bytes of one {files.kind} image: "
            "it is cut short or something else, so fetch the data set again."
        )
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, record)
    column = 0 if labels == "coarse" else header - 1
    return records[:, header:], records[:, column].astype(np.int64)


def _read_pickle(files: CifarFiles, name: str, labels: str) -> tuple[Pixels, Labels]:
    """Read one python pickle: pixels uint8 (N, 3072) and labels int64 (N,)."""
    path = files.place / name
    batch = load_pickle(files.read(name), path)
    key = "labels" if files.kind == "cifar10" else f"{labels}_labels"
    if labels == "coarse" and "data" in batch and key not in batch:
        raise UsageError(f"--labels coarse needs coarse labels, but {path} has none.")
    pixels, listed = batch.get("data"), batch.get(key)
    if pixels is None or listed is None:
        keys = first_few(sorted(map(shortened, batch))) or "none"
        raise DataError(f"{path} has the keys {keys}; expected data and {key}: fetch the data set again.")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (PIXELS,):
        raise DataError(
            f"{path} holds data of {describe(pixels)}; expected a uint8 array of N x {PIXELS}: "
            "fetch the data set again."
        )
    numbers = listed.tolist() if isinstance(listed, np.ndarray) else listed
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise DataError(
            f"{path} holds {key} that are no list of whole numbers; expected one label an image: "
            "fetch the data set again."
        )
    if len(numbers) != len(pixels) or not numbers:
        raise DataError(
            f"{path} holds {len(pixels):,} images but {len(numbers):,} {key}; expected one label an image: "
            "fetch the data set again."
        )
    label = batch.get("batch_label", "")
    parts = re.search(r"of (\d{1,4})$", as_text(label) if isinstance(label, bytes | str) else "")
    if files.kind == "cifar10" and name != "test_batch" and parts and f"data_batch_{parts[1]}" not in files.names:
        raise DataError(
            f"{path} is one of {parts[1]} batches, but data_batch_{parts[1]} is not in {files.place}; "
            "fetch the data set again."
        )
    try:
        return pixels, np.array(numbers, dtype=np.int64)
    except OverflowError as error:
        raise DataError(f"{path} holds {key} too large to be labels; fetch the data set again.") from error


def _check_labels(path: Path, labels: Labels, classes: tuple[str, ...]) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(classes):
        raise DataError(
            f"{path} has labels from {low} to {high}, but there are {len(classes)} class names "
            f"(labels 0 to {len(classes) - 1}); the two are not of one data set: fetch it again."
        )


def _image_set(parts: list[tuple[Pixels, Labels]], classes: tuple[str, ...]) -> ImageSet:
    pixels = np.concatenate([part for part, _ in parts])  # a copy: what came from a buffer cannot be written to
    labels = np.concatenate([part for _, part in parts])
    return ImageSet(torch.from_numpy(pixels.reshape(-1, 3, 32, 32)), torch.from_numpy(labels), classes)
