"""From a file to tensors, and from tensors into a model, with an account of every tensor.

Nothing starts from random values silently: a tensor is loaded, re-initialised on purpose (the head), fresh because the
user allowed it, or an error. Nothing is copied before everything has been checked, so a refused file leaves the model
as it was. No file is read in a way that could run code from it, and no switch allows that.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from weights.check import (
    check_allowed,
    check_classes,
    check_complete,
    check_finite,
    check_same_network,
    check_whole_layers,
    misfit,
    network_name,
    some,
    under,
)
from weights.convert import plain_names, timm_names
from weights.errors import WeightsError
from weights.guard import require_regular, shortened
from weights.torch_file import UnfitError, read_torch

SUFFIXES = (".safetensors", ".pth.tar", ".pth", ".pt", ".bin", ".ckpt")
"""Suffixes of weight files; the content decides how a file is read."""

READ_WHOLE = 2**28
"""Bytes up to which a safetensors file is read at once, so that nothing that happens to it later is seen. Larger ones
are mapped, which takes half of the memory; of each that is mapped, safetensors keeps a few kB (docs/reliability.md)."""


@dataclass(frozen=True)
class Account:
    """What became of every tensor in a load.

    Attributes:
        loaded: names that took their values from the file.
        reinitialised: names of the head, which keep the values the new model has, on purpose.
        fresh: names that were absent and allowed to be; they keep the values the new model has.
        unexpected: names in the file that the model has no place for.
        sha256: identity of the loaded tensors, as `hash_tensors` gives it; the file's format does not matter.
        fresh_layers: what the user wrote in `allow_missing` and was needed.
        resized: loaded ones that were interpolated to the model's image size, such as position embeddings.
    """

    loaded: tuple[str, ...]
    reinitialised: tuple[str, ...]
    fresh: tuple[str, ...]
    unexpected: tuple[str, ...]
    sha256: str
    fresh_layers: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()

    def sentence(self) -> str:
        """Return the account as one line for the terminal."""
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.resized:
            parts.append(f"resized to the image size: {some(self.resized)}")
        if self.reinitialised:
            head = dict.fromkeys(name.rpartition(".")[0] for name in self.reinitialised)
            parts.append(f"the head ({', '.join(head)}) starts fresh")
        if self.fresh:
            parts.append(f"{', '.join(self.fresh_layers)} starts fresh as allowed ({len(self.fresh)} tensors absent)")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} without a place here ignored: {some(self.unexpected)}")
        return "; ".join(parts)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a weight file without ever running code from it.

    The first bytes say whether it is safetensors or a file of `torch.save`, whatever its suffix. State dicts inside
    training checkpoints are found and wrappers' prefixes stripped (`plain_names`).

    Args:
        path: the file.

    Returns:
        Tensors by name on the CPU, in the dtypes of the file.

    Raises:
        WeightsError: when the file is absent, empty, damaged, of another kind, or a pickle of more than tensors.
    """
    path = Path(path)
    try:
        require_regular(path)
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise WeightsError(
            f"Could not read the weights {path} ({error.strerror}); give a file that can be read."
        ) from error
    json_header = start[8:9] == b"{"  # safetensors: eight bytes of length, then JSON
    if not json_header:
        _refuse_impostors(path, start)
    torch_saved = start.startswith((b"PK", b"\x80"))  # a zip archive, or a bare pickle as before torch 1.6
    checkpoint = _read_pickle(path) if torch_saved and not json_header else _read_safetensors(path)
    return plain_names(checkpoint, path.name)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of named tensors: names in sorted order, dtypes, shapes and bytes.

    Args:
        tensors: tensors by name, of any dtype, shape, device and memory layout.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_into(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    head: tuple[str, ...],
    allow_missing: tuple[str, ...] = (),
    where: str,
    keep_head: bool = False,
) -> Account:
    """Copy tensors into a model, or refuse with the list of what does not fit.

    Values are cast to the dtype of their parameter. `num_batches_tracked` may be absent: old files do not have it.
    A layer named in `allow_missing` must be absent as a whole: half a layer is more likely a mistake, and the error
    names the part that is absent as a whole, which can be allowed on its own.

    Args:
        model: the model, freshly made; what is not loaded keeps its values.
        tensors: tensors by name, as `read_tensors` gives them.
        head: module names of the classifier, such as ("fc",); not loaded unless `keep_head`.
        allow_missing: dotted module or tensor names that may be absent and start fresh.
        where: where the tensors came from, for messages.
        keep_head: load the head too, to continue from a checkpoint with the same classes.

    Raises:
        UsageError: when the model has no layer of a name in `allow_missing`.
        WeightsError: when tensors are missing, of the wrong shape or not finite, most belong to another network, or the
            head is kept and has another number of classes.
    """
    wanted = model.state_dict()
    check_allowed(model, allow_missing)
    try:
        given = timm_names(tensors, model, () if keep_head else head)
    except WeightsError as error:  # the network knows this kind of file, and something in it has no place
        raise WeightsError(f"The weights ({where}) do not fit {network_name(model)}: {error}") from error
    reinitialised = () if keep_head else tuple(n for n in wanted if under(n, head))
    body = {n: t for n, t in wanted.items() if n not in reinitialised}
    given_body = {n: t for n, t in given.items() if keep_head or not under(n, head)}
    fitting = {n: t for n, t in given_body.items() if n in body and not misfit(t, body[n])}
    unexpected = tuple(n for n in given_body if n not in body)
    needed = {n: t for n, t in body.items() if n in given or not n.endswith("num_batches_tracked")}
    missing = [n for n in needed if n not in given]
    fresh = tuple(n for n in missing if under(n, allow_missing))
    name = network_name(model)

    check_same_network(
        name, where, given_body, fitting, unexpected, {n: t for n, t in needed.items() if n not in fresh}
    )
    if keep_head:
        check_classes(where, head, wanted, given)
    check_whole_layers(where, allow_missing, needed, missing)
    check_complete(name, where, needed, [n for n in missing if n not in fresh], given_body, keep_head)
    check_finite(where, fitting)
    model.load_state_dict(fitting, strict=False)
    loaded = model.state_dict()
    used = tuple(a for a in allow_missing if any(under(n, (a,)) for n in fresh))
    digest = hash_tensors({n: loaded[n] for n in fitting})
    resized = tuple(n for n, t in fitting.items() if n in tensors and t.numel() != tensors[n].numel())
    return Account(tuple(fitting), reinitialised, fresh, unexpected, digest, used, resized)


def _refuse_impostors(path: Path, start: bytes) -> None:
    """Name the files that are mistaken for weights most often."""
    if not start:
        raise WeightsError(f"{path.name} is empty; copy or download it again.")
    if start.startswith(b"version https://"):
        raise WeightsError(f"{path.name} is a Git LFS pointer and not the weights; fetch the file with `git lfs pull`.")
    if start.lstrip().startswith(b"<"):
        raise WeightsError(f"{path.name} is a web page and not weights; download it again.")
    if path.suffix in (".npz", ".npy"):
        raise WeightsError(f"{path.name} is a NumPy file; expected safetensors or a state dict saved with torch.save.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.stat().st_size <= READ_WHOLE:
            return dict(safetensors.torch.load(path.read_bytes()))
        return dict(safetensors.torch.load_file(path, device="cpu"))
    except Exception as error:  # besides its own errors, whatever a header with odd types and sizes makes torch raise
        raise _damaged(path, error) from error


def _read_pickle(path: Path) -> object:
    try:
        return read_torch(path)
    except pickle.UnpicklingError as error:
        held = _unsafe_globals(path) or sorted(set(re.findall(r"GLOBAL (\w[\w.]*)", str(error))))
        named = f" ({some([shortened(name) for name in held])})" if held else ""
        raise WeightsError(
            f"{path.name} is a pickle that holds more than tensors{named} and could run code, so it was not loaded; "
            "save its state_dict() with safetensors or torch.save and give that."
        ) from error
    except UnfitError as error:
        raise WeightsError(
            f"{path.name} was not loaded: {error}; save its state_dict() as plain tensors and give that."
        ) from error
    except Exception as error:  # damaged bytes make the readers of archives and pickles raise nearly anything
        if "TorchScript" in str(error):
            raise WeightsError(f"{path.name} is a TorchScript program; save its state_dict() and give that.") from error
        raise _damaged(path, error) from error


def _unsafe_globals(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not an archive of today's torch.save, or a damaged one
        return []


def _damaged(path: Path, error: Exception) -> WeightsError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    try:
        size = path.stat().st_size
    except OSError as gone:  # since it was opened
        return WeightsError(f"Could not read the weights {path} ({gone.strerror}); give a file that can be read.")
    return WeightsError(
        f"{path.name} is truncated, damaged or not a weight file ({size:,} bytes: {reason}); copy or download it again."
    )
