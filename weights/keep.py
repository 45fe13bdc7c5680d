"""Weight files that are put somewhere for good: pretrained ones in the local model directory, and conversions.

A file is checked before it is kept, is whole or not there, and has its sha256 beside it (`record`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import safetensors
import safetensors.torch

from weights.arch import Arch
from weights.atomic import write_atomically
from weights.check import check_finite
from weights.errors import RunError, UsageError, WeightsError
from weights.fetch import download, has_source
from weights.inventory import describe
from weights.load import SUFFIXES, read_tensors
from weights.locate import best_in, in_caches, local_folder, stem_of, tag_of
from weights.record import record_path, write_record
from weights.verify import verify

_WAYS_ON = "Run this again with a network, or copy the file into the folder from a machine that has one."

_CHUNK = 2**20  # bytes copied at a time


@dataclass(frozen=True)
class Kept:
    """A weight file in its place.

    Attributes:
        path: the file.
        source: where it came from, for people.
        tensors: how many it holds.
        sha256: of its bytes.
        new: False when it was there already.
    """

    path: Path
    source: str
    tensors: int
    sha256: str
    new: bool = True


def fetch(arch: Arch, weights_dir: Path | None = None, *, force: bool = False) -> Kept:
    """Put a network's pretrained weights into the local model directory, from the caches or from the network.

    The file keeps its bytes and is named after the network, so that a run with this `--weights-dir` finds it.

    Args:
        arch: the network, with the tag of the weights that are wanted.
        weights_dir: the local model directory, made where absent; without it `$FINETUNE_WEIGHTS` is used.
        force: replace a file that is there.

    Raises:
        UsageError: no local model directory is named.
        WeightsError: timm knows no such weights, no source gives them, or a file on the way is damaged.
        RunError: the folder cannot be written.
    """
    folder, option = local_folder(weights_dir)
    if folder is None:
        raise UsageError(f"No local model directory is named; give --weights-dir DIR, or set {option}.")
    if not has_source(arch):
        raise WeightsError(
            f"timm has no pretrained weights for {arch.full_name} to fetch; finetune list --search {arch.name} shows "
            "which there are."
        )
    if folder.exists() and not folder.is_dir():
        raise WeightsError(f"{option} names {folder}, which is not a folder; give one that is.")
    there = best_in(folder, arch) if folder.is_dir() else None
    old = there.path if there and (there.exact or tag_of(stem_of(there.path.name), arch) == arch.tag) else None
    if old and not force:
        return Kept(old, "there already", *_sound(old, arch), new=False)
    if old and old.parent != folder:
        raise WeightsError(f"{old.parent} holds {arch.full_name} as a folder; remove it, or leave --force out.")
    cached = in_caches(arch)
    places = ["the torch hub cache", "the Hugging Face cache"]
    source = cached.path if cached and cached.path else download(arch, places, _WAYS_ON)
    tensors, digest = _sound(source, arch)
    suffix = next((suffix for suffix in SUFFIXES if source.name.endswith(suffix)), ".pth")
    target = folder / f"{arch.full_name}{suffix}"
    _make_folder(folder)
    _put(target, _copy_of(source, digest), digest)
    if old and old != target:  # two files of one network would be an error in every run
        _remove(record_path(old))
        _remove(old)
    return Kept(target, cached.source if cached else "downloaded", tensors, digest)


def convert(path: Path, output: Path | None = None, *, force: bool = False) -> Kept:
    """Write the tensors of a weight file as safetensors, under plain names.

    The file is read without running code from it. What a training checkpoint holds beside the weights is left out.

    Args:
        path: a file that `read_tensors` reads.
        output: the file to write; beside the other, with the suffix changed, when None.
        force: replace a file that is there.

    Raises:
        UsageError: the output is a folder or is not named as safetensors, or the file is a folder.
        WeightsError: the output exists, or the file is missing, damaged, unsafe, or holds tensors that safetensors
            cannot, or values that are no numbers.
        RunError: the output cannot be written.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the weight file in it.")
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")
    target = output or path.with_name(f"{path.name.removesuffix(suffix)}.safetensors")
    if not target.name.endswith(".safetensors"):
        raise UsageError(f"--output {target} is written as safetensors; give a name that ends in .safetensors.")
    if target.is_dir():
        raise UsageError(f"--output {target} is a folder; give the name of a file.")
    if target.exists() and not force:
        raise WeightsError(f"{target} exists and was kept; give --force to replace it, or another --output.")
    tensors = read_tensors(path)
    check_finite(path.name, tensors)
    try:
        # clone: safetensors refuses tensors that share memory, and tied weights do
        plain = {name: tensors[name].clone().contiguous() for name in sorted(tensors)}
        content = safetensors.torch.save(plain, metadata={"format": "pt"})
    except (KeyError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise WeightsError(
            f"{path.name} holds tensors that safetensors cannot hold ({reason}); save them as plain ones first."
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    _put(target, content, digest)
    return Kept(target, path.name, len(plain), digest)


def _put(target: Path, write: Callable[[BinaryIO], object] | bytes, digest: str) -> None:
    """Write a file whole, and its sha256 beside it."""
    _remove(record_path(target))  # first, so that no kill leaves the new file with the old record
    write_atomically(target, write)
    write_record(target, digest)


def _remove(path: Path) -> None:
    """Delete a file that need not be there."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # a folder that is read-only, or no file
        raise RunError(f"{path} cannot be removed ({error.strerror}); remove it, or use another folder.") from error


def _copy_of(source: Path, digest: str) -> Callable[[BinaryIO], None]:
    """Return what writes a copy of a file, unless its sha256 is not `digest` any more."""

    def write(file: BinaryIO) -> None:
        seen = hashlib.sha256()
        with source.open("rb") as original:
            while chunk := original.read(_CHUNK):
                seen.update(chunk)
                file.write(chunk)
        if seen.hexdigest() != digest:
            raise WeightsError(f"{source} changed while it was copied; run this again.")

    return write


def _sound(path: Path, arch: Arch) -> tuple[int, str]:
    """Return how many tensors a file holds and its sha256.

    Raises:
        WeightsError: it is damaged or of another network, with the way on.
    """
    verdict = verify(describe(path), arch)
    if not verdict.ok:
        raise WeightsError(verdict.problem)
    return verdict.tensors, verdict.sha256


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made ({error.strerror}); give another --weights-dir.") from error
