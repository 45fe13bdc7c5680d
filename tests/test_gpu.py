"""What only a GPU can show: the host waits for nothing within an epoch, and every place for rows gives the same rows.

None of these tests has run so far: there was no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from make_run import cifar_recipe, metrics
from torch import nn

from finetune.augment import Preprocessing, make_views, scale
from finetune.features import Features
from finetune.fit import Split, Trainer
from finetune.images import ImageSet
from finetune.pipeline import run
from finetune.precision import largest_that_runs
from finetune.recipe import Recipe
from finetune.residency import ImagePlace
from finetune.sources import Live
from finetune.windows import Windows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and PyTorch sees none here")

CUDA = torch.device("cuda")
N, BATCHES = 96, 12
RECIPE = Recipe(epochs=3, batch_size=8, augment="crop", views=3, ema=0.9, skip_easy=0.5, optimizer="adamw", lr=1e-3)


def not_waiting(batches: int) -> Callable[[int, int], None]:
    """Return a `report` that forbids waiting between the first batch of an epoch and its last but one."""

    def report(done: int, of: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if done < batches - 1 else "default")

    return report


def epoch_without_waiting(source: Live | Features, suffix: nn.Module, windows: Windows | None) -> None:
    trainer = Trainer(suffix.to(CUDA), frozenset(), RECIPE, N, torch.bfloat16, CUDA, windows=windows)
    split = Split(source, torch.arange(N) % 4, 3)
    try:
        for epoch in range(3):
            figures = trainer.train_epoch(split, epoch, not_waiting(trainer.batches[epoch]), lambda: False)
            assert figures is not None
    finally:
        torch.cuda.set_sync_debug_mode("default")


def new_suffix() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 4))  # fmt: skip


@pytest.mark.parametrize("where", ["device", "pinned"])
def test_training_on_features_waits_for_nothing(where: str) -> None:
    store = torch.randn(3, N, 12, 12, 3, device=CUDA if where == "device" else "cpu")
    source = Features([[view] for view in store], CUDA, [store])
    assert source.on_device == (where == "device")
    epoch_without_waiting(source, new_suffix(), Windows(12, (10, 10, 12)))


@pytest.mark.parametrize("where", ["device", "pinned"])
def test_training_on_images_waits_for_nothing(where: str) -> None:
    data = ImageSet(torch.randint(256, (N, 3, 32, 32), dtype=torch.uint8), torch.arange(N) % 4, tuple("abcd"))
    views = make_views("crop", N, 32, count=3, seed=0, cutout=8, fill=(1, 2, 3))
    preprocessing = Preprocessing(40, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bilinear")
    live = Live(data, views, preprocessing, None, CUDA, torch.float32, ImagePlace(where, CUDA))
    epoch_without_waiting(live, new_suffix(), None)


def test_what_passes_through_pinned_buffers_is_what_lies_on_the_device() -> None:
    store = torch.randn(2, 200, 14, 14, 64, dtype=torch.bfloat16)
    there = Features([[view] for view in store.to(CUDA)], CUDA, [store.to(CUDA)])
    here = Features([[view] for view in store], CUDA, [store])
    apart = Features([[view.clone()] for view in store], CUDA)  # as mapped files are
    rows, views = torch.randint(200, (50, 64)), torch.randint(2, (50, 64))
    taken = [(here.take(*pair), apart.take(*pair)) for pair in zip(rows, views, strict=True)]  # more than the buffers
    for pair, values in zip(zip(rows, views, strict=True), taken, strict=True):
        for (value,) in values:
            assert torch.equal(value, there.take(*pair)[0])


def test_images_are_the_same_from_the_device_and_from_memory() -> None:
    data = ImageSet(torch.randint(256, (N, 3, 32, 32), dtype=torch.uint8), torch.arange(N) % 4, tuple("abcd"))
    views = make_views("crop", N, 32, count=3, seed=0, cutout=8, fill=(1, 2, 3))
    preprocessing = Preprocessing(32, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bilinear")
    rows, chosen = torch.arange(N), torch.arange(N) % 3
    on_cpu = Live(data, views, preprocessing, None, torch.device("cpu"), torch.float32).take(rows, chosen)[0]
    for where in ("device", "pinned"):
        live = Live(data, views, preprocessing, None, CUDA, torch.float32, ImagePlace(where, CUDA))
        torch.testing.assert_close(live.take(rows, chosen)[0].cpu(), on_cpu)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_are_scaled_as_on_the_processor(interpolation: str) -> None:
    images = torch.randint(256, (N, 3, 32, 32), dtype=torch.uint8)
    there = scale(images.to(CUDA), 224, interpolation).cpu().int()
    assert int((there - scale(images, 224, interpolation).int()).abs().max()) <= 2


def test_a_run_on_a_gpu_gives_the_losses_of_the_processor(tmp_path: Path) -> None:
    recipe = replace(cifar_recipe(tmp_path), device="cuda")
    summary = run(recipe, tmp_path / "gpu")
    assert summary["device"] == "cuda"
    assert summary["features"]["where"] == "device"
    assert run(replace(recipe, memory_budget="1kB"), tmp_path / "mapped")["features"]["where"] == "disk"
    uncut = replace(recipe, train_layers=("all",))
    assert run(uncut, tmp_path / "uncut")["features"]["where"] == "uncut"
    run(replace(recipe, device="cpu"), tmp_path / "cpu")
    for name in ("gpu", "mapped"):
        for row, other in zip(metrics(tmp_path / name), metrics(tmp_path / "cpu"), strict=True):
            assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-2)  # a GPU multiplies in TF32


def test_the_batch_size_that_is_named_fits() -> None:
    layer = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()).to(CUDA)  # 17 MB of activations for each image

    def build(images: int) -> Callable[[], None]:
        return lambda: layer(torch.randn(images, 3, 256, 256, device=CUDA)).square().mean().backward()

    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + 2**29
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info()[1])
    try:
        with pytest.raises(torch.OutOfMemoryError):
            build(64)()
        found = largest_that_runs(build, 64)
        assert found is not None
        build(found)()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
