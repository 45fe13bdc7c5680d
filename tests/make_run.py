"""Weights and recipes for whole runs on tiny data, so that no test needs a network or a user's cache.

Import with `from make_run import ...`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from make_data import make_images, write_cifar100_python
from torch import Tensor

from finetune.recipe import Recipe

TRAINED = {"test_resnet": ("layer4", "fc"), "resnet18": ("layer4", "fc"), "test_vit": ("blocks.5", "norm", "head")}
"""What the tests train of each network: its last stage and its head."""

TINY: dict[str, Any] = {
    "image_size": 32,
    "epochs": 2,
    "batch_size": 16,
    "device": "cpu",
    "precision": "fp32",
    "compile": "off",
}
"""What the tests' runs share, as names of settings."""


def write_weights(path: Path, arch: str = "test_resnet", *, seed: int = 1, without: tuple[str, ...] = ()) -> Path:
    """Write random weights of a timm network for 32 x 32 pixels, with 1000 classes and used batch norms.

    Args:
        path: the safetensors file.
        arch: a timm name.
        seed: of the values.
        without: prefixes of tensor names to leave out.
    """
    torch.manual_seed(seed)
    size = {"img_size": 32} if arch == "test_vit" else {}
    state = timm.create_model(arch, num_classes=1000, **size).state_dict()
    for name, value in state.items():
        if name.endswith("running_mean"):
            value.normal_(std=0.1)
        if name.endswith("running_var") or (name.endswith("weight") and value.ndim == 1):
            value.uniform_(0.5, 1.5)  # timm's new networks begin with batch norms of 0, through which nothing learns
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in state.items() if not name.startswith(without)} if without else state
    safetensors.torch.save_file(kept, path)
    return path


def tiny_recipe(data: Path, weights: Path, cache: Path, arch: str = "test_resnet", **settings: Any) -> Recipe:
    """Return a recipe of two epochs at 32 x 32 pixels in fp32, eager, on the CPU.

    Args:
        data: what `--data` names.
        weights: a file of `write_weights`.
        cache: folder for cached features.
        arch: the network.
        settings: whatever differs.
    """
    recipe = Recipe(
        arch=arch,
        train_layers=TRAINED.get(arch, ("head",)),
        data=str(data),
        weights=str(weights),
        cache_dir=cache,
        **TINY,
    )
    return dataclasses.replace(recipe, **settings)


def cifar_recipe(root: Path, **settings: Any) -> Recipe:
    """Write 64 training and 20 test images and weights into `root`; return a tiny recipe on them."""
    write_cifar100_python(root / "cifar", made=make_images(64, 20))
    weights = write_weights(root / "test_resnet.safetensors")
    return tiny_recipe(root / "cifar", weights, root / "cache", **settings)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return a run's rows of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "eval_seconds", "images_per_second")
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]


def model_bytes(folder: Path) -> bytes:
    """Return a run's model.safetensors."""
    return (folder / "model.safetensors").read_bytes()


def tensors(path: Path) -> dict[str, Tensor]:
    """Return a safetensors file's tensors."""
    return safetensors.torch.load(path.read_bytes())  # older load_file maps the file, which a test may overwrite


def change_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a model's config.json after `edit` has changed it in place."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
