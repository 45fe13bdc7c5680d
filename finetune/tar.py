"""Tar files that are read in place: where each member lies, found once by its header. Nothing is ever unpacked.

Only plain files are read. A link, a device or a sparse file where a file is wanted is an error, so no name in an
archive, absolute or not, leads to anything but bytes of the archive itself. The headers are read by the standard
library's `tarfile`. What it would take for the end of the archive, such as a damaged header, is told from the real end
here, and what it would follow without end, or take into memory at any size, is refused.
"""

from __future__ import annotations

import errno
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self, cast

from weights.errors import DataError
from weights.guard import require_size, shortened

BLOCK = 512
"""Bytes of a header, and of each of the two blocks of zeros that end an archive (POSIX.1-2017, pax, "ustar")."""

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of compressed files."""

LARGEST_HEADERS = 2**15
"""Bytes that the headers of one member may have. A name has up to 4 KiB on Linux. Older versions of Python believe what
a record says of its length, and records that all reach to the end of a header take the square of its size."""

LARGEST_HEADER = 2**11
"""The same of each header in an archive that is read as a stream; some hundred of them may belong to one member."""

EXTENSIONS = frozenset(
    {
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
    }
)
"""Types of headers with content: long names, and records."""

MOST_RECORDS = 100
"""Records that hold for all members that follow (pax, type "g") and are copied for each; `git archive` writes one."""

LONG_NUMBER = re.compile(rb"\d{64}")
"""Digits in a row that no header needs; in older versions of Python `tarfile` takes the square of their number of steps
(CVE-2024-6232)."""

ODD = {
    tarfile.LNKTYPE: ("a hard link", " (GNU tar: --hard-dereference)"),
    tarfile.SYMTYPE: ("a symbolic link", " (GNU tar: --dereference)"),
    tarfile.GNUTYPE_SPARSE: ("a sparse file", " (GNU tar: without --sparse)"),
    tarfile.FIFOTYPE: ("a named pipe", ""),
    tarfile.CHRTYPE: ("a device", ""),
    tarfile.BLKTYPE: ("a device", ""),
}
"""What is no plain file, by its type: its name, and how an archive is written without it."""


@dataclass(frozen=True, order=True, slots=True)
class Member:
    """A plain file in a tar file.

    Attributes:
        tar: the archive.
        name: as the archive has it.
        offset: of its first byte in the archive.
        size: in bytes.
    """

    tar: Path
    name: str
    offset: int
    size: int

    def read(self, largest: int) -> bytes:
        """Return the file's bytes.

        Args:
            largest: bytes that it may have.

        Raises:
            ValueError: it has more.
            OSError: the archive cannot be read, or is shorter than it was.
        """
        require_size(self.size, largest)
        return self.start(self.size)

    def start(self, count: int) -> bytes:
        """Return the first bytes of the file, or all that it has.

        Raises:
            OSError: as for `read`.
        """
        count = min(count, self.size)
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            content = file.read(count)
        if len(content) != count:
            raise OSError(errno.EIO, "the shard has become shorter", str(self.tar))
        return content

    def __str__(self) -> str:
        """Name it for people."""
        return f"{self.tar}: {shortened(self.name)}"


def index_tar(tar: Path, wanted: Callable[[str], bool]) -> list[Member]:
    """List the files of an uncompressed tar file that are wanted, by its headers.

    Args:
        tar: the archive.
        wanted: tells by its name whether a file is to be read, now or later.

    Returns:
        Each such file, in the order of the archive.

    Raises:
        DataError: no uncompressed tar file, or one that is cut short or damaged (the last sound member is named), or
            one in which something wanted is no plain file.
        OSError: it cannot be opened or read.
    """
    found: list[Member] = []
    last, end = "", 0
    with tar.open("rb") as file:
        _refuse_compressed(tar, file.read(8))
        file.seek(0, 2)
        total = file.tell()
        file.seek(0)
        headers = _Headers(file)
        try:
            with tarfile.open(fileobj=cast(BinaryIO, headers), mode="r:") as archive:
                while (info := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # a kilobyte each, of perhaps a million
                    if reason := _wrong(archive, info, end, total):
                        raise _damaged(tar, last, reason)
                    last, end = info.name, archive.offset
                    headers.left = LARGEST_HEADERS
                    if info.isdir() or not wanted(info.name):
                        continue
                    member = Member(tar, info.name, info.offset_data, info.size)
                    if info.issparse() or not info.isreg():
                        raise _odd(member, tarfile.GNUTYPE_SPARSE if info.issparse() else info.type)
                    found.append(member)
                end = archive.offset
        except DataError:
            raise
        except OSError as error:
            if error.errno != errno.EINVAL:  # a place before the start or beyond all files
                raise
            raise _damaged(tar, last, "a header leads nowhere") from error
        except Exception as error:  # headers that are damaged, or made to do harm, make `tarfile` raise nearly anything
            raise _damaged(tar, last, str(error) or type(error).__name__) from error
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise _damaged(tar, last, "there is neither a header nor the end of an archive")
    return found


def _wrong(archive: tarfile.TarFile, info: tarfile.TarInfo, before: int, total: int) -> str:
    """Return what is wrong with the place of a member, "" where nothing is.

    Args:
        archive: has just read its headers, and is to go on where the next ones begin.
        info: the member.
        before: where its own headers began.
        total: bytes of the archive.
    """
    has_content = info.isreg() and not info.issparse()
    if info.size < 0 or (has_content and info.offset_data + info.size > min(archive.offset, total)):
        return f"{shortened(info.name)} claims {info.size:,} bytes, which do not follow"
    if archive.offset <= before:
        return f"after {shortened(info.name)} a header leads backwards"
    if len(archive.pax_headers or ()) > MOST_RECORDS:
        return f"more than {MOST_RECORDS} records of one header hold for all members"
    return ""


class _Headers:
    """An archive as `tarfile` sees it: it reads headers, and not more of them for one member than there may be.

    Args:
        file: the archive.

    Attributes:
        left: bytes that may still be read; to be set again after each member.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.left = file, LARGEST_HEADERS

    def read(self, size: int) -> bytes:
        """Return at most this many bytes."""
        if not 0 <= size <= self.left:
            raise ValueError(f"the headers of one member have more than {LARGEST_HEADERS:,} bytes")
        self.left -= size
        content = self._file.read(size)
        if size > BLOCK and LONG_NUMBER.search(content):
            raise ValueError("a header holds a number of very many digits")
        return content

    def seek(self, place: int) -> int:
        """Go to a place."""
        return self._file.seek(place)

    def tell(self) -> int:
        """Return the place."""
        return self._file.tell()


class ShortHeader(tarfile.TarInfo):
    """A header of an archive that is read as a stream: with no long records, and of no sparse file with a long map."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Return the header in a block.

        Raises:
            ValueError: `tarfile` would make too much of it.
        """
        header = super().frombuf(buf, encoding, errors)
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise ValueError("it holds a sparse file")
        if header.type in EXTENSIONS and not 0 <= header.size <= LARGEST_HEADER:
            raise ValueError(f"a header has {header.size:,} bytes, and may have {LARGEST_HEADER:,}")
        return header

    def _proc_gnusparse_10(self, *_: object) -> None:
        raise ValueError("it holds a sparse file")


def _odd(member: Member, kind: bytes) -> DataError:
    found, how = ODD.get(kind, ("something else", ""))
    return DataError(f"{member} is {found}, not a plain file; write this shard again with plain files{how}.")


def _refuse_compressed(tar: Path, start: bytes) -> None:
    kind = next((kind for magic, kind in COMPRESSED.items() if start.startswith(magic)), None)
    if kind is not None:
        raise compressed(tar, kind)


def compressed(tar: Path, kind: str) -> DataError:
    """Return the error for a shard in which no place can be found without unpacking what comes before."""
    return DataError(
        f"{tar} is compressed ({kind}), and shards are read in place; decompress it to a .tar (its images are "
        "compressed already)."
    )


def _damaged(tar: Path, last: str, reason: str) -> DataError:
    again, reason = "fetch or write this shard again", shortened(reason)
    if not last:
        return DataError(f"{tar} is no tar file, or damaged at its start ({reason}); {again}.")
    return DataError(f"{tar} is damaged or cut short after {shortened(last)} ({reason}); {again}.")
