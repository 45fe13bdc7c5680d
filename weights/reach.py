"""Is an address one to trust, and does its server answer? Nothing here imports torch: `finetune doctor` asks too."""

from __future__ import annotations

import urllib.error
import urllib.request
from urllib.parse import urlsplit

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def trusted(url: str) -> bool:
    """Say whether an address is https, or plain http on this machine.

    Args:
        url: the address.
    """
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)


def unreachable(url: str, timeout: float) -> str:
    """Return why nothing can be had from an address, "" when its server has what it names.

    Args:
        url: the address of a file, of which only the head is asked for.
        timeout: seconds without an answer before the server counts as unreachable.
    """
    if not trusted(url):
        return "only https addresses are trusted"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout):
            return ""
    except urllib.error.HTTPError as error:
        with error:
            return f"it answers {error.code} {error.reason}".rstrip()
    except (OSError, ValueError) as error:  # urllib's errors and timeouts are OSErrors
        return str(getattr(error, "reason", None) or error) or type(error).__name__
