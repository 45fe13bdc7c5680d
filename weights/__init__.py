"""Weights: from the name of a network to verified tensors, and back to a file other tools can read.

    arch      a timm name, with or without a pretrained tag  →  `Arch` (name, tag, timm's configuration)
    locate    an `Arch` and `--weights`                      →  `Found` (which file, with which preprocessing)
    fetch     nothing on this machine                        →  a file in the clients' own caches, hash checked
    reach     an address                                     →  is it trusted, and does its server answer?
    load      a file                                         →  tensors  →  a model, with an `Account` of every tensor
    check     tensors and a model                            →  nothing, or the sentence that says what does not fit
    convert   other people's tensor names                    →  the names timm uses
    guess     tensors of an unknown network                  →  what they look like, for error messages
    record    a file                                         →  its sha256, and what it should be
    inventory the local model directory and the caches       →  `WeightFile`s: what each is, and its licence
    verify    a `WeightFile`                                 →  a `Verdict`: whole, and of its network?
    keep      an `Arch`, or a file of torch.save             →  a file in the local model directory, or safetensors
    save      a trained model                                →  model.safetensors and config.json, never half-written
    errors    every error of the project

This package imports nothing from `finetune` or `cli`. Importing it does not import torch: the names below are
loaded when they are first used. The function `locate` is not among them, because the module has that name: use
`from weights.locate import locate`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weights.errors import (
    DataError,
    FinetuneError,
    RunError,
    StoppedError,
    TrainingError,
    UsageError,
    WeightsError,
    near_matches,
)

if TYPE_CHECKING:
    from weights.arch import Arch, resolve_arch
    from weights.atomic import write_atomically
    from weights.convert import plain_names, timm_names
    from weights.fetch import download
    from weights.guess import guess_network
    from weights.load import Account, hash_tensors, load_into, read_tensors
    from weights.locate import Found
    from weights.save import read_about, save_checkpoint, write_config

__all__ = [
    "Account",
    "Arch",
    "DataError",
    "FinetuneError",
    "Found",
    "RunError",
    "StoppedError",
    "TrainingError",
    "UsageError",
    "WeightsError",
    "download",
    "guess_network",
    "hash_tensors",
    "load_into",
    "near_matches",
    "plain_names",
    "read_about",
    "read_tensors",
    "resolve_arch",
    "save_checkpoint",
    "timm_names",
    "write_atomically",
    "write_config",
]

_HOME = {
    "Account": "load",
    "Arch": "arch",
    "Found": "locate",
    "download": "fetch",
    "guess_network": "guess",
    "hash_tensors": "load",
    "load_into": "load",
    "plain_names": "convert",
    "read_about": "save",
    "read_tensors": "load",
    "resolve_arch": "arch",
    "save_checkpoint": "save",
    "timm_names": "convert",
    "write_atomically": "atomic",
    "write_config": "save",
}
"""Which module a lazily loaded name lives in."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'weights' has no attribute {name!r}")
    return getattr(importlib.import_module(f"weights.{_HOME[name]}"), name)
