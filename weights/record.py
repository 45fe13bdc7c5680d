"""The sha256 of a weight file, and the places where it is written down.

Three places know what the bytes of a file should be: a file beside it, `NAME.sha256`, in the form that
`sha256sum --check` reads; the Hugging Face cache, which keeps a file under its sha256; and the names of published
files, which end in its first digits (`resnet18-f37072fd.pth`). The last are believed only of files that timm knows:
in a user's own file name such digits may be a date.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from weights.atomic import write_atomically
from weights.errors import WeightsError
from weights.guard import read_text, require_regular

SUFFIX = ".sha256"
DIGITS_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")
LONGEST = 2**16  # bytes of a file that holds a sha256 and a name
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Record:
    """What a file's sha256 should be.

    Attributes:
        digits: in hexadecimal, all 64 or the first of them.
        where: what says so, for people.
    """

    digits: str
    where: str

    @property
    def whole(self) -> bool:
        """Whether all digits are known."""
        return len(self.digits) == 64

    def agrees(self, digest: str) -> bool:
        """Say whether a file with this sha256 is the recorded one."""
        return digest.startswith(self.digits)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal.

    Args:
        path: the file.

    Raises:
        WeightsError: when it cannot be read.
    """
    try:
        require_regular(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(
            f"Could not read the weights {path} ({error.strerror}); give a file that can be read."
        ) from error


def recorded(path: Path, *, published: bool = False) -> Record | None:
    """Return what is recorded of a file, None when nothing is.

    Args:
        path: the file.
        published: whether its name is that of a published file, so that digits in it are believed.
    """
    beside = record_path(path)
    try:
        words = read_text(beside, LONGEST).split()
    except (OSError, ValueError):
        words = []
    if words and SHA256.fullmatch(words[0].lower()):
        return Record(words[0].lower(), beside.name)
    if path.is_symlink() and SHA256.fullmatch(name := path.resolve().name):
        return Record(name, "the Hugging Face cache")
    found = DIGITS_IN_NAME.search(path.name) if published else None
    return Record(found[1], "its name") if found else None


def record_path(path: Path) -> Path:
    """Return the file beside a weight file that holds its sha256.

    Args:
        path: the weight file.
    """
    return path.with_name(path.name + SUFFIX)


def write_record(path: Path, digest: str) -> None:
    """Write a file's sha256 beside it.

    Args:
        path: the weight file.
        digest: its sha256 in hexadecimal.

    Raises:
        RunError: when the file cannot be written.
    """
    write_atomically(record_path(path), f"{digest}  {path.name}\n".encode())
