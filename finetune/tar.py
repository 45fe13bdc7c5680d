"""Tar files that are read in place: where each member lies, found once by its header. Nothing is ever unpacked.

Only regular files count. Links, devices and sparse files are passed over, so no name in an archive, absolute or not,
leads to anything but bytes of the archive itself. The headers are read by the standard library's `tarfile`; what it
would take for the end of the archive, such as a damaged header, is told from the real end here.
"""

from __future__ import annotations

import errno
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from weights.errors import DataError

BLOCK = 512
"""Bytes of a header, and of each of the two blocks of zeros that end an archive (POSIX.1-2017, pax, "ustar")."""

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of compressed files."""

LARGEST_TEXT = 2**20
"""Bytes of a member that is read with the headers: labels are a few."""

REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
DAMAGE = (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError)
"""What `tarfile` raises for headers that are damaged, or made to do harm."""


@dataclass(frozen=True, order=True, slots=True)
class Member:
    """A regular file in a tar file.

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

    def read(self) -> bytes:
        """Return the file's bytes.

        Raises:
            OSError: the archive cannot be read, or is shorter than it was.
        """
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) != self.size:
            raise OSError(errno.EIO, "the shard has become shorter", str(self.tar))
        return content

    def __str__(self) -> str:
        """Name it for people; what cannot be printed is spelt out."""
        return f"{self.tar}: {printable(self.name)}"


def printable(name: str) -> str:
    """Return a name in which control characters, and bytes that are not UTF-8, are spelt out."""
    return "".join(sign if sign.isprintable() else f"\\x{ord(sign):02x}" for sign in name)


def index_tar(tar: Path, wanted: Callable[[str], bool]) -> list[tuple[Member, bytes | None]]:
    """List the regular files of an uncompressed tar file, by its headers.

    Args:
        tar: the archive.
        wanted: tells by its name whether a file's content is to be read at once.

    Returns:
        Each file in the order of the archive, with its content where that was wanted.

    Raises:
        DataError: no uncompressed tar file, or one that is cut short or damaged; the last sound member is named.
        OSError: it cannot be opened or read.
    """
    found: list[tuple[Member, bytes | None]] = []
    last = ""
    with tar.open("rb") as file:
        _refuse_compressed(tar, file.read(8))
        file.seek(0, 2)
        total = file.tell()
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (info := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # a kilobyte each, of perhaps a million
                    if info.size < 0 or info.offset_data + info.size > total:
                        reason = f"{printable(info.name)} claims {info.size:,} bytes, which do not follow"
                        raise _damaged(tar, last, reason)
                    last = printable(info.name)
                    if info.type not in REGULAR or info.sparse is not None:
                        continue
                    member = Member(tar, info.name, info.offset_data, info.size)
                    found.append((member, _content(member) if wanted(info.name) else None))
                end = archive.offset
        except DAMAGE as error:
            raise _damaged(tar, last, str(error) or type(error).__name__) from error
        except OSError as error:
            if error.errno != errno.EINVAL:  # a place before the start or beyond all files
                raise
            raise _damaged(tar, last, "a header leads nowhere") from error
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise _damaged(tar, last, "there is neither a header nor the end of an archive")
    return found


def _content(member: Member) -> bytes:
    """Read a small member."""
    if member.size > LARGEST_TEXT:
        raise DataError(f"{member} has {member.size:,} bytes; a label of at most {LARGEST_TEXT:,} was expected.")
    return member.read()


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
    if not last:
        return DataError(f"{tar} is no tar file, or damaged at its start ({reason}); fetch or write this shard again.")
    return DataError(f"{tar} is damaged or cut short after {last} ({reason}); fetch or write this shard again.")
