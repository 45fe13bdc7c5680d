"""Downloads, through the clients that own the caches: torch.hub and huggingface_hub.

torchvision's own files come from torchvision's address, whose file name carries a hash to check; everything else comes
from the Hugging Face hub first (whose client checks the length alone: the sha256 that the hub states is checked here)
and from timm's address second. Each client writes to its own cache, so other programs find the files too, and shows its
own progress bar.

What is asked for travels by https, also after a redirect, and a file whose sha256 nobody states is not fetched.
"""

from __future__ import annotations

import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPMessage
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import huggingface_hub
import torch.hub
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from weights.arch import Arch, weights_url
from weights.errors import WeightsError
from weights.reach import trusted
from weights.record import DIGITS_IN_NAME, SHA256, file_sha256

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names that timm's repositories on the hub keep weights under, in order of preference."""

TIMEOUT = 10.0
"""Seconds without an answer before a server counts as unreachable."""

_TORCHVISION = "download.pytorch.org"
WAYS_ON = (
    "Put the file in --weights-dir, name it with --weights FILE, start from random weights with --weights none, "
    "or run again with a network."
)


def download(arch: Arch, searched: Sequence[str] = (), ways_on: str = WAYS_ON) -> Path:
    """Download the pretrained weights of a network into the client's own cache.

    Args:
        arch: the network; its configuration names the sources.
        searched: places already searched on this machine, for the error message.
        ways_on: what the error message advises.

    Returns:
        The downloaded file.

    Raises:
        WeightsError: when no source gives the file, or gives one with the wrong hash; nothing is left behind.
    """
    reasons = []
    for name, fetch in _sources(arch):
        try:
            return fetch(arch)
        except WeightsError as error:
            reasons.append(f"{name} ({error})")
    raise not_found(arch, [*searched, *reasons], ways_on)


def not_found(arch: Arch, searched: Sequence[str], ways_on: str = WAYS_ON) -> WeightsError:
    """Return the error for weights that are nowhere: the places searched, and the ways on.

    Args:
        arch: the network whose weights are missing.
        searched: places in the order they were searched, each with what was wrong there.
        ways_on: what to advise where there is a source to download from.
    """
    if not has_source(arch):
        return WeightsError(
            f"There are no pretrained weights for {arch.full_name} in timm, and none in {_listed(searched)}. "
            "Give --weights FILE, or --weights none to start from random weights."
        )
    return WeightsError(f"Found no weights for {arch.full_name}: searched {_listed(searched)}. {ways_on}")


def has_source(arch: Arch) -> bool:
    """Say whether timm's configuration names any place to download this network's weights from.

    Args:
        arch: the network.
    """
    return bool(_sources(arch))


def hub_files(arch: Arch) -> tuple[str, ...]:
    """Return the file names to ask the Hugging Face hub for, in order of preference.

    Args:
        arch: the network; a few configurations name a file of their own.
    """
    own = arch.config.get("hf_hub_filename")
    if not own:
        return HUB_FILES
    safe = str(Path(own).with_suffix(".safetensors"))
    return (own,) if safe == own else (safe, own)


def hub_id(arch: Arch) -> tuple[str, str | None]:
    """Return repository and revision on the Hugging Face hub, ("", None) when there is none.

    Args:
        arch: the network; timm writes a revision as `owner/name@revision`.
    """
    repo, _, revision = str(arch.config.get("hf_hub_id") or "").partition("@")
    return repo, revision or None


def from_url(url: str, target: Path) -> Path:
    """Download one file with torch.hub's client and check it against the hash in its name.

    Args:
        url: an https address; plain http only on this machine.
        target: where it goes; a name such as `resnet18-f37072fd.pth` carries the first digits of its sha256.

    Raises:
        WeightsError: when the address is not https or leads to one that is not, the name carries no hash, the server
            gives nothing, or the hash is wrong; nothing is left behind.
    """
    _require_trusted(url)
    expected = DIGITS_IN_NAME.search(target.name)
    if expected is None:
        raise WeightsError(f"refused {target.name}: neither its name nor its server states a sha256 to check it with")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _socket_timeout(TIMEOUT), _trusted_redirects():
            torch.hub.download_url_to_file(url, str(target), hash_prefix=expected[1], progress=sys.stderr.isatty())
    except OSError as error:  # urllib's errors and timeouts are OSErrors
        raise WeightsError(f"{getattr(error, 'reason', None) or error}") from error
    except RuntimeError as error:  # torch.hub's word for a wrong hash; its temporary file is already gone
        raise WeightsError(f"the file that came does not match its hash and was thrown away: {error}") from error
    return target


def _sources(arch: Arch) -> list[tuple[str, Callable[[Arch], Path]]]:
    found: list[tuple[str, Callable[[Arch], Path]]] = []
    repo, url = hub_id(arch)[0], weights_url(arch.config)[0]
    if repo:
        found.append((f"Hugging Face hub {repo}", _from_hub))
    if url and not url.endswith((".npz", ".npy")):  # arrays of another framework, which nothing here reads
        found.append((url, _from_config_url))
    if urlsplit(url).hostname == _TORCHVISION:
        found.reverse()
    return found


def _from_config_url(arch: Arch) -> Path:
    url, name = weights_url(arch.config)
    return from_url(url, Path(torch.hub.get_dir()) / "checkpoints" / name)


def _from_hub(arch: Arch) -> Path:
    repo, revision = hub_id(arch)
    reason = "it has no weight file"
    for name in hub_files(arch):
        try:
            # One question without retries first: hf_hub_download retries for 25 seconds before it gives up.
            address = huggingface_hub.hf_hub_url(repo, name, revision=revision)
            _require_trusted(address)  # $HF_ENDPOINT may name any
            stated = huggingface_hub.get_hf_file_metadata(address, timeout=TIMEOUT)
            _require_trusted(stated.location)
            if not SHA256.fullmatch(stated.etag or ""):
                raise WeightsError(f"refused {name}: the hub states no sha256 to check it with")
            path = Path(huggingface_hub.hf_hub_download(repo, name, revision=revision, etag_timeout=TIMEOUT))
            return _checked(path, str(stated.etag))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # its subclass for a network that went away
                reason = "the connection was lost"
                break
        except Exception as error:  # its transport (requests, httpx) and so its errors change between versions
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            break
    raise WeightsError(reason)


def _checked(path: Path, expected: str) -> Path:
    """Return a file of the Hugging Face cache, or throw it away: its client compares lengths and no hashes."""
    digest = file_sha256(path)
    if digest == expected:
        return path
    path.resolve().unlink()
    path.unlink(missing_ok=True)  # a link to it, where the system has links
    raise WeightsError(
        f"the file that came does not match its hash and was thrown away: expected {expected}, got {digest}"
    )


def _require_trusted(url: str) -> None:
    if not trusted(url):
        raise WeightsError(f"refused {url}: only https addresses are trusted")


class _TrustedRedirects(urllib.request.HTTPRedirectHandler):
    """Follow a redirect to an address that is trusted; urllib's own would go from https to http and ftp as well."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """Return the request that follows."""
        if not trusted(newurl):
            place = f"{urlsplit(newurl).scheme}://{urlsplit(newurl).netloc}"  # the rest may be long, and signed
            raise urllib.error.URLError(f"refused {place}, to which it leads: only https addresses are trusted")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextmanager
def _trusted_redirects() -> Iterator[None]:
    # torch.hub's client takes no opener either; it uses the one that is installed
    before = getattr(urllib.request, "_opener", None)
    urllib.request.install_opener(urllib.request.build_opener(_TrustedRedirects))
    try:
        yield
    finally:
        urllib.request.install_opener(before)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    # torch.hub's client takes no timeout and would wait for a silent server for ever
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _listed(places: Sequence[str]) -> str:
    return ", ".join(places) if places else "no local folder"
