"""The weight files on this machine: in the local model directory and in the caches, and what each of them is.

A file says what it is by config.json beside it (a Hugging Face snapshot, a run directory), by its name (that of a
published file, or one that begins with an architecture), by the repository that it came from, or by what this tool
wrote into it. Of the caches only files that timm knows are listed; other programs keep theirs there too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import safetensors
import torch.hub
from huggingface_hub.errors import CacheNotFound

from weights.arch import Arch, pretrained_archs, resolve_arch
from weights.errors import UsageError, WeightsError
from weights.fetch import HUB_FILES, hub_files, hub_id
from weights.load import SUFFIXES
from weights.locate import local_folder, locate, published_name, read_config, stem_of, tag_of
from weights.record import Record, file_sha256, recorded
from weights.save import read_about

UNKNOWN = "unknown"
_BESIDE_A_MODEL = (
    "predictions.safetensors",
    "checkpoint.pt",
)  # other files of a run directory, no weights of a network
_FETCH = "finetune weights fetch"


@dataclass(frozen=True)
class WeightFile:
    """A weight file and what is known of it without reading its tensors.

    Attributes:
        path: the file.
        source: a short text for people, in the words of a run: `torch hub cache, resnet18-f37072fd.pth`.
        name: the network with the tag that the file states, `unknown` where nothing tells.
        arch: the network, with the preprocessing that belongs to the file; None where nothing tells.
        licence: as the file or timm states it, else `unknown`.
        bytes: its size.
        record: what its sha256 should be; None where nothing is recorded.
        model_args: what `timm.create_model` is to be given beside the class count, as config.json states it.
        problem: why what lies beside it cannot be believed, "" when it can.
    """

    path: Path
    source: str
    name: str
    arch: Arch | None
    licence: str
    bytes: int
    record: Record | None
    model_args: Mapping[str, Any] | None = None
    problem: str = ""

    def sha256(self) -> str:
        """Return the recorded sha256, or the file's own when not all of it is recorded.

        Raises:
            WeightsError: when the file cannot be read.
        """
        return self.record.digits if self.record and self.record.whole else file_sha256(self.path)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, its sha256 included."""
        return {
            "path": str(self.path),
            "source": self.source,
            "arch": self.name,
            "bytes": self.bytes,
            "sha256": self.sha256(),
            "recorded": self.record.where if self.record else None,
            "licence": self.licence,
        }


def weight_files(weights_dir: Path | None = None) -> list[WeightFile]:
    """Return the files of the local model directory, of the torch hub cache and of the Hugging Face cache.

    Args:
        weights_dir: the local model directory; without it `$FINETUNE_WEIGHTS` is used, and neither is needed.

    Raises:
        WeightsError: when the local model directory is named and not a folder.
    """
    folder, option = local_folder(weights_dir)
    if folder and not folder.is_dir():
        raise WeightsError(f"{option} names {folder}, which is not a folder; give one that is.")
    local = [describe(path) for path in files_in(folder)] if folder else []
    return [*local, *_in_torch_hub(), *_in_hugging_face()]


def searched_places(weights_dir: Path | None = None) -> list[str]:
    """Return the places that `weight_files` looks in, for messages.

    Args:
        weights_dir: as there.
    """
    folder, option = local_folder(weights_dir)
    local = f"{option} {folder}" if folder else f"{option} (not set)"
    return [local, f"the torch hub cache {_torch_hub()}", f"the Hugging Face cache {_hugging_face()}"]


def files_in(folder: Path) -> list[Path]:
    """Return a folder's weight files, those of snapshots and run directories in it included; links to nothing are none.

    Args:
        folder: the folder.
    """
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            found += [path / name for name in HUB_FILES if _is_snapshot(path) and (path / name).is_file()]
        elif path.is_file() and stem_of(path.name) and not (path.name in _BESIDE_A_MODEL and _is_snapshot(folder)):
            found.append(path)
    return found


def files_to_verify(paths: Sequence[Path], weights_dir: Path | None = None) -> list[WeightFile]:
    """Return the files that a user named, one by one or by folder; without any, those of `weight_files`.

    Args:
        paths: files and folders.
        weights_dir: as there.

    Raises:
        WeightsError: a path does not exist, a folder holds no weight files, or there are none at all.
    """
    if not paths:
        found = weight_files(weights_dir)
        if not found:
            places = ", ".join(searched_places(weights_dir))
            raise WeightsError(f"There are no weights in {places}; name a file, or get some with {_FETCH}.")
        return found
    chosen = []
    for path in paths:
        if not (path.is_file() or path.is_dir()):
            raise WeightsError(f"There is no file or folder {path}; give one that is there.")
        inside = files_in(path) if path.is_dir() else [path]
        if not inside:
            raise WeightsError(
                f"{path} holds no weight files ({', '.join(SUFFIXES)}); give a folder that does, or get some with "
                f"{_FETCH}."
            )
        chosen += [describe(one) for one in inside]
    return chosen


def describe(path: Path, source: str = "", full_name: str = "") -> WeightFile:
    """Return what is known of a file without reading its tensors.

    Args:
        path: the file.
        source: what to call where it comes from; the file's name when empty.
        full_name: the network with its tag, where the place says it.
    """
    published = _published().get(path.name, "").partition(".")[0]
    first_word = stem_of(path.name).replace("-", ".").partition(".")[0]
    config: dict[str, Any] = {}
    arch, model_args, tag, problem = None, None, "", ""
    try:
        config = read_config(path.parent) if path.name in HUB_FILES else {}
        stated = str(config.get("architecture") or "").partition(".")[0]
        arch = resolve_arch(stated or full_name or published or first_word)
        found = locate(arch, str(path))
        arch, model_args = found.arch, found.model_args
        tag = arch.tag if stated or full_name else tag_of(stem_of(path.name), arch) or ""
    except UsageError:
        arch, tag = _arch_inside(path), ""
    except WeightsError as error:
        problem = str(error)
    return WeightFile(
        path=path,
        source=source or f"local file {path.name}",
        name=UNKNOWN if arch is None else f"{arch.name}.{tag}" if tag else arch.name,
        arch=arch,
        licence=_licence(path, config, arch.config if arch and tag and not config else {}),
        bytes=path.stat().st_size,
        record=recorded(path, published=path.name in _published()),
        model_args=model_args,
        problem=problem,
    )


def _is_snapshot(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _arch_inside(path: Path) -> Arch | None:
    """Return the network that a checkpoint of this tool names in its metadata."""
    about = read_about(path)
    try:
        return resolve_arch(str(about["arch"])) if about and "arch" in about else None
    except UsageError:
        return None


def _licence(path: Path, config: Mapping[str, Any], timms: Mapping[str, Any]) -> str:
    """Return the licence that config.json, the file's metadata or timm's configuration states."""
    own = config.get("pretrained_cfg")
    own = own if isinstance(own, dict) else config
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError):
        metadata = {}
    said = (own.get("license"), metadata.get("license"), metadata.get("licence"), timms.get("license"))
    return next((str(one) for one in said if one), UNKNOWN)


@functools.cache
def _published() -> dict[str, str]:
    """Return the full name of the network for each published file, as NAME and as OWNER/REPOSITORY/NAME on the hub."""
    found: dict[str, str] = {}
    for arch in pretrained_archs():
        repo = hub_id(arch)[0]
        for key in [published_name(arch), *(f"{repo}/{file}" for file in hub_files(arch) if repo)]:
            if key and (key not in found or arch.full_name in key):  # one file may serve several networks
                found[key] = arch.full_name
    return found


def _torch_hub() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _hugging_face() -> Path:
    return Path(huggingface_hub.constants.HF_HUB_CACHE)


def _in_torch_hub() -> Iterator[WeightFile]:
    folder = _torch_hub()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file() and path.name in _published():
            yield describe(path, f"torch hub cache, {path.name}")


def _in_hugging_face() -> Iterator[WeightFile]:
    try:
        repos = huggingface_hub.scan_cache_dir(_hugging_face()).repos
    except (CacheNotFound, ValueError):  # no such folder, or a file in its place
        return
    seen = set()
    for repo in sorted(repos, key=lambda one: one.repo_id):
        files = {file.file_path for revision in repo.revisions for file in revision.files}
        for path in sorted(files):
            full_name = _published().get(f"{repo.repo_id}/{path.name}", "")
            if full_name and path.resolve() not in seen:  # revisions share their files
                seen.add(path.resolve())
                yield describe(path, f"Hugging Face cache, {repo.repo_id}", full_name)
