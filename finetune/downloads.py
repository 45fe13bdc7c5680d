"""CIFAR fetched into the user's cache by torchvision's own client, checked against torchvision's own checksum.

The archive is kept as it comes and read in memory. It is fetched into a folder of its own beside its place and moved
there once its checksum is right, so that a cut line leaves nothing that a later run would believe.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from finetune.cifar import Kind
from weights.errors import DataError

TIMEOUT = 30.0
"""Seconds without a byte after which the server counts as out of reach."""

TITLES: dict[Kind, str] = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


def data_cache() -> Path:
    """Return the folder that downloaded data sets are kept in (it need not be there yet)."""
    return platformdirs.user_cache_path("finetune-timm") / "data"


def download_cifar(kind: Kind, searched: Sequence[str]) -> Path:
    """Download a CIFAR archive (python layout) into `data_cache()`; a progress bar goes to standard error.

    Args:
        kind: `cifar10` or `cifar100`.
        searched: the places that did not have it, for the error message.

    Returns:
        Path of the archive.

    Raises:
        DataError: no network, a wrong checksum, or a cache that cannot be written.
    """
    from torchvision.datasets import CIFAR10, CIFAR100  # seconds to import, and only a download needs it
    from torchvision.datasets.utils import download_url

    client = {"cifar10": CIFAR10, "cifar100": CIFAR100}[kind]
    target: Path = data_cache() / client.filename
    timeout = socket.getdefaulttimeout()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(TIMEOUT)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
            download_url(client.url, folder, client.filename, client.tgz_md5)
            (Path(folder) / client.filename).replace(target)
    except (OSError, RuntimeError) as error:  # RuntimeError is torchvision's word for a wrong checksum
        reason = getattr(error, "reason", None) or error
        raise not_found(kind, searched, f"the download failed ({reason})") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return target


def not_found(kind: Kind, searched: Sequence[str], why: str) -> DataError:
    """Return the error for a CIFAR that is nowhere: the places searched, and three ways on.

    Args:
        kind: `cifar10` or `cifar100`.
        searched: the places.
        why: why it was not downloaded either.
    """
    archive = f"{kind.replace('cifar', 'cifar-')}-python.tar.gz"
    return DataError(
        f"{TITLES[kind]} is not in {', '.join(searched)}, and {why}. Put {archive} from "
        f"https://www.cs.toronto.edu/~kriz/{archive} into one of these folders, give --data the path of a copy, or use "
        f"--data shapes{kind.removeprefix('cifar')}, which is drawn and needs no download."
    )
