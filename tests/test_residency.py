"""Rows come to the device from wherever they lie, the same ones, and without the host waiting.

What asks a tensor for its values makes the host wait for a GPU. Tensors on PyTorch's meta device have none, so code
that asks fails there, on every machine.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from make_features import TWO_TENSORS, Counted, builder, expected, image_set, same
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from finetune import inference
from finetune.augment import Preprocessing, make_views
from finetune.features import Features
from finetune.images import ImageSet
from finetune.inference import predict
from finetune.optim import update_average
from finetune.order import epoch_batches, on_both
from finetune.recipe import Recipe
from finetune.residency import BUFFERS, ImagePlace, Staging, Store
from finetune.sources import Live
from finetune.windows import Windows

CPU, META = torch.device("cpu"), torch.device("meta")
V, N = 3, 40
WHOLE = torch.arange(V * N * 2 * 3 * 4, dtype=torch.float32).reshape(V, N, 2, 3, 4)


def batches(count: int, *, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows and views of a few batches that differ in size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [5 + number % 4 for number in range(count)]
    return [
        (torch.randint(N, (size,), generator=generator), torch.randint(V, (size,), generator=generator))
        for size in sizes
    ]


def test_rows_of_any_view_in_their_order_from_one_tensor_or_from_several() -> None:
    one, several = Store(list(WHOLE), CPU, WHOLE), Store([view.clone() for view in WHOLE], CPU)
    plain = Store([WHOLE[1]], CPU)
    for rows, views in batches(4):
        pairs = zip(views.tolist(), rows.tolist(), strict=True)
        wanted = torch.stack([WHOLE[view, row] for view, row in pairs])
        assert torch.equal(one.take(rows, views), wanted)
        assert torch.equal(several.take(rows, views), wanted)
        assert torch.equal(plain.take(rows, views), WHOLE[1][rows])


@pytest.mark.parametrize("whole", [WHOLE, None], ids=["one tensor", "several"])
def test_batches_that_pass_through_the_buffers_are_the_same_and_stay_so(whole: torch.Tensor | None) -> None:
    direct, staged = Store(list(WHOLE), CPU, whole), Store(list(WHOLE), CPU, whole)
    staged.staging = Staging(WHOLE.shape[2:], WHOLE.dtype, CPU)
    planned = batches(3 * BUFFERS)
    taken = [staged.take(rows, views) for rows, views in planned]  # all are held while the buffers are filled again
    for (rows, views), batch in zip(planned, taken, strict=True):
        assert torch.equal(batch, direct.take(rows, views))
    assert len({buffer.data_ptr() for buffer in staged.staging.buffers}) == BUFFERS


def test_each_set_of_images_goes_to_the_device_once() -> None:
    images = ImagePlace("device", META)
    train, test = (torch.zeros(4, 3, 8, 8, dtype=torch.uint8) for _ in range(2))
    assert images.store(train) is images.store(train)
    assert images.store(train) is not images.store(test)
    assert images.store(train).on_device
    assert not ImagePlace("pinned", META).store(train).on_device


def test_an_epoch_is_sent_at_once_in_the_batches_that_are_planned() -> None:
    planned = list(epoch_batches(30, 4, 2, 0, Recipe(epochs=1)))
    here = [batch for batch, _ in on_both(planned, CPU)]
    assert all(one is two for one, two in zip(here, planned, strict=True))
    there = [batch for _, batch in on_both(planned, META)]
    assert [[len(value) for value in batch] for batch in there] == [
        [len(value) for value in batch] for batch in planned
    ]
    assert {value.device.type for batch in there for value in batch} == {"meta"}


def test_no_batch_of_features_asks_the_device_for_a_value() -> None:
    store = torch.empty(2, 30, 8, 8, 4, device=META)
    features = Features([[view] for view in store], META, [store])
    assert features.on_device
    corners = torch.empty(30, 2, dtype=torch.int64, device=META)
    for _, (rows, views) in on_both(epoch_batches(30, 4, 2, 0, Recipe(epochs=1)), META):
        (batch,) = Windows(8, (6,)).cut(features.take(rows, views), 0, corners[rows])
        assert batch.shape == (len(rows), 4, 6, 6)
        assert batch.is_contiguous(memory_format=torch.channels_last)
    apart = Features([[view.clone()] for view in store], META)
    with pytest.raises((RuntimeError, NotImplementedError)):  # this is what the test would notice
        apart.take(rows, views)


@pytest.mark.parametrize("where", ["device", "pinned"])
def test_no_batch_of_images_asks_the_device_for_a_value(where: str) -> None:
    data = ImageSet(torch.zeros(30, 3, 32, 32, dtype=torch.uint8), torch.zeros(30, dtype=torch.int64), ("a", "b"))
    views = make_views("crop", 30, 32, count=2, seed=0, cutout=8)
    preprocessing = Preprocessing(32, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bilinear")
    live = Live(data, views, preprocessing, None, META, torch.float32, ImagePlace(where, META))
    assert live.on_device == (where == "device")
    for here, there in on_both(epoch_batches(30, 4, 2, 0, Recipe(epochs=1)), META):
        (batch,) = live.take(*(there if live.on_device else here))
        assert batch.shape == (len(here[0]), 3, 32, 32)
        assert batch.device.type == "meta"


def test_draws_that_lie_on_the_device_are_the_same_draws() -> None:
    """They are kept in fewer bytes there."""
    views = make_views("crop", 30, 64, count=5, seed=0, cutout=20)
    assert views.draws is not None
    assert torch.equal(views.draws.to(torch.int16).to(torch.int64), views.draws)
    kept = views.on(META).draws
    assert kept is not None
    assert (kept.dtype, kept.device.type) == (torch.int16, "meta")
    assert views.on(CPU) is views


@pytest.mark.parametrize("where", ["device", "pinned", "ram"])
def test_features_in_any_memory_are_the_same(where: str, tmp_path: Path) -> None:
    data, counted = image_set(18), Counted(TWO_TENSORS)
    made = builder(tmp_path, counted.prepared(), where=where, on_disk=False)
    found = made.features(data, make_views("none", 18, 8, count=None, seed=0), "train")
    rows = torch.arange(18)
    assert same(list(found.take(rows, torch.zeros_like(rows))), expected(data))


def test_a_moving_average_is_that_of_pytorch() -> None:
    torch.manual_seed(0)
    linear, norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
    module = nn.Sequential(linear, norm).train()
    ours, theirs = (AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True) for _ in range(2))
    for _ in range(4):
        module(torch.randn(8, 3))
        with torch.no_grad():
            linear.weight.add_(0.1)
        update_average(ours, module)
        theirs.update_parameters(module)
    count = "module.1.num_batches_tracked"
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value) or name == count, name
    assert (int(ours.state_dict()[count]), int(theirs.state_dict()[count])) == (4, 1)  # theirs is a mean, rounded down


def test_logits_are_fetched_now_and_then_and_stay_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class Numbers:
        """ImagePlace whose only feature is their number."""

        def take(self, rows: torch.Tensor, views: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (rows[:, None].float(),)

    monkeypatch.setattr(inference, "HELD", 2)
    for count in (11, 12):  # with and without a rest
        logits = predict(nn.Identity(), Numbers(), torch.arange(count), CPU, torch.float32, batch=2)
        assert logits.flatten().tolist() == list(range(count))
