"""What a training step needs at least, and what is refused because of it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from make_features import NONE, TWO_TENSORS, Counted, builder, image_set
from torch import nn

from finetune import cache, compute, features, memory
from finetune.augment import Views
from finetune.features import gathered_bytes
from finetune.images import DataSplits
from finetune.memory import GPU_SHARE, StepMemory, exhaustion_explained, gpu_room, step_memory
from finetune.placement import Placement
from finetune.precision import largest_that_runs
from finetune.ranks import Ranks
from finetune.recipe import Recipe
from weights.errors import TrainingError, UsageError

CPU = torch.device("cpu")
GB = 10**9


def of(module: nn.Module, width: int, **settings: str) -> StepMemory:
    return step_memory(module, [(width,)], torch.float32, CPU, Recipe(**settings))


def test_an_image_needs_its_inputs_and_activations() -> None:
    memory = of(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), 8)
    assert memory.image == 4 * (8 + 4)  # bytes of what the two layers keep for their gradients
    assert memory.fixed == 2 * 4 * (8 * 4 + 4)  # gradients and momenta


def test_weights_are_not_counted_for_each_image() -> None:
    # The backward pass of a linear layer keeps its weight transposed: another shape, the same memory.
    narrow = of(nn.Sequential(nn.Linear(8, 1000), nn.ReLU(), nn.Linear(1000, 3)), 8)
    assert narrow.image < 3 * 4 * 1000
    assert narrow.fixed > 4 * 11_000


def test_memory_for_the_optimiser() -> None:
    layer = nn.Linear(8, 4)
    assert of(layer, 8, optimizer="adam").fixed == 3 * 4 * 36


def test_nothing_is_kept_of_what_was_measured() -> None:
    """ReLU saves its own output, which leads back to the graph and so to the weights."""
    module = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    weight = weakref.ref(module[0].weight)
    of(module, 8)
    del module
    gc.collect()
    assert weight() is None


def test_features_beside_training() -> None:
    ram = Placement("ram", True, 6 * GB, "")
    tight = StepMemory(10**6, 10**8, 6 * GB, shared=True)
    assert tight.left(100) == 6 * GB - 10**8 - 10**8
    with pytest.raises(UsageError, match=r"Features in memory need 6\.0 GB, training at least 200\.0 MB more"):
        tight.require_beside(ram, 100)
    of_its_own = StepMemory(10**6, 10**8, 6 * GB, shared=False)  # a GPU: features stay in the computer's memory
    assert of_its_own.left(100) is None
    of_its_own.require_beside(ram, 100)


def test_a_batch_that_does_not_fit() -> None:
    memory = StepMemory(10**6, 10**8, 10**9, shared=True)
    memory.require(900)
    with pytest.raises(UsageError, match=r"at least 1\.1 GB of memory and 1\.0 GB are free; give --batch-size 900"):
        memory.require(1000)


def test_a_gpus_memory_leaves_training_twice_its_lower_bound_or_what_features_take_for_a_while() -> None:
    step = StepMemory(10**6, 10**8, 8 * GB, shared=False)
    assert step.room(100, 8 * GB) == GPU_SHARE * 8 * GB - 2 * (10**8 + 100 * 10**6)
    assert step.room(100, 8 * GB, peak=2 * GB) == GPU_SHARE * 8 * GB - 2 * GB
    assert step.room(100, 10**8) == 0
    assert gpu_room(step, 100, CPU, []) is None  # no memory of its own


def test_features_that_gather_are_counted_beside_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's figures are given here; on one they are measured."""
    monkeypatch.setattr(memory, "_free", lambda device: 8 * GB)
    monkeypatch.setattr(memory, "peak_memory", lambda work, device: work())
    step = StepMemory(0, 0, 8 * GB, shared=False)

    def room(peak: int, gathered: int) -> float:
        found = gpu_room(step, 100, torch.device("cuda"), [(lambda: 0, 0), (lambda: peak, gathered)])
        return GPU_SHARE * 8 * GB - (found or 0)

    assert room(2 * GB, GB) == 3 * GB
    assert room(GB, 2 * GB) == 4 * GB, "twice, when they are put together"


def test_what_is_held_while_features_are_computed_is_what_is_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counted, seen, gathered = Counted(TWO_TENSORS), list[int](), list[int]()
    made, (apply, compute_rows) = counted.prepared(), (Views.apply, features.compute_rows)
    before: list[weakref.ref[torch.Tensor]] = []

    def noted_views(self: Views, images: torch.Tensor, *where: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return apply(self, images, *where)

    def noted_rows(*arguments: Any) -> list[torch.Tensor]:
        assert not any(value() is not None for value in before), "the chunk before is let go of"
        values = compute_rows(*arguments)
        gathered.append(sum(value.nbytes for value in values))
        before[:] = map(weakref.ref, values)
        return values

    monkeypatch.setattr(Views, "apply", noted_views)
    monkeypatch.setattr(features, "compute_rows", noted_rows)
    for module in (cache, features):
        monkeypatch.setattr(module, "CHUNK_BYTES", 20 * sum(row.bytes for row in TWO_TENSORS))
    for on_disk in (False, True):
        builder(tmp_path, made, on_disk=on_disk).features(image_set(50), NONE, "train")
        assert max(gathered) <= gathered_bytes(made.prefix, 50), on_disk
    assert max(gathered) == gathered_bytes(made.prefix, 50)
    assert max(seen) == made.prefix.batch == 2

    asked: list[tuple[Callable[[], object], int]] = []
    monkeypatch.setattr(compute, "gpu_room", lambda step, batch, device, runs: asked.extend(runs))
    data = DataSplits("photos", image_set(12), None, image_set(16), "", None, ())
    memories = StepMemory(0, 0, 0, shared=False)
    compute._room(Recipe(), memories, 4, CPU, made, data, Views("flip", 2), Ranks(1, 3))
    images = counted.images
    for run, size in asked:
        run()
        assert size == gathered_bytes(made.prefix, 6) == 6 * sum(row.bytes for row in TWO_TENSORS), "a third of 16"
    assert counted.images == images + 2 * made.prefix.batch, "a batch in each of both formats"


def test_the_batch_size_that_is_named_is_half_or_less() -> None:
    memory = StepMemory(10**6, 10**8, 8 * GB, shared=False)
    assert memory.smaller(128, taken=0) == 64
    fits = memory.smaller(10_000, taken=5 * GB)
    assert fits == 1000  # 0.9 * 8 GB less 5 GB and twice 0.1 GB, by two activations of 1 MB
    assert memory.smaller(128, taken=7 * GB) is None
    with (
        pytest.raises(
            TrainingError, match=r"Start a new run with --batch-size 64, which should fit, or a smaller --im"
        ),
        exhaustion_explained(64),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_batch_size_that_was_tried_is_the_largest_that_runs() -> None:
    asked = []

    def build(images: int) -> Callable[[], None]:
        def step() -> None:
            asked.append(images)
            if images > 40:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return step

    assert largest_that_runs(build, 256) == 32
    assert asked == [128, 64, 32]
    assert largest_that_runs(lambda images: build(100 * images), 256) is None
