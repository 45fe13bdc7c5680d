"""The drawn data sets: the same for everybody, balanced, and neither trivial nor impossible."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier

from finetune.images import RawData
from finetune.outlines import CELLS, OUTLINES, SHAPES10_OUTLINES, SHAPES100_OUTLINES, templates
from finetune.shapes import FILLS, SHAPES, Dice, class_names, draw_shapes


@pytest.fixture(scope="module")
def shapes10() -> RawData:
    return draw_shapes("shapes10")


def test_sizes_and_balance(shapes10: RawData) -> None:
    assert shapes10.test is not None
    for part, count in ((shapes10.train, 5_000), (shapes10.test, 1_000)):
        assert part.images.shape == (count, 3, 32, 32)
        assert part.images.dtype == torch.uint8
        assert part.labels.dtype == torch.int64
        assert torch.bincount(part.labels).tolist() == [count // 10] * 10
        assert part.classes == SHAPES10_OUTLINES


def test_the_pixels_are_the_same_on_every_machine(shapes10: RawData) -> None:
    # Made by this test itself; a change of these pictures makes every stored result on them worthless.
    digest = hashlib.sha256(shapes10.train.images.numpy().tobytes() + shapes10.train.labels.numpy().tobytes())
    assert digest.hexdigest()[:16] == "a6606656fd23d0d6"


def test_shapes100_is_every_outline_in_every_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "shapes100", SHAPES["shapes100"]._replace(train=400, test=100))
    calls: list[tuple[str, int, int]] = []
    raw = draw_shapes("shapes100", progress=lambda *call: calls.append(call))
    assert raw.test is not None
    assert torch.bincount(raw.train.labels).tolist() == [4] * 100
    assert torch.bincount(raw.test.labels).tolist() == [1] * 100
    assert len(set(raw.train.classes)) == 100
    assert raw.train.classes[4:6] == ("chevron_solid", "chevron_striped")
    assert calls == [("draw", done, 500) for done in (100, 200, 300, 400, 500)]


def test_the_two_sets_share_no_outline() -> None:
    assert len(SHAPES10_OUTLINES) == 10
    assert len(SHAPES100_OUTLINES) * len(FILLS) == 100
    assert not set(SHAPES10_OUTLINES) & set(SHAPES100_OUTLINES)
    assert len(class_names("shapes100")) == 100


def test_every_outline_fills_its_template_and_leaves_the_border_free() -> None:
    drawn = templates(tuple(OUTLINES))
    assert drawn.shape == (35, CELLS, CELLS)
    border = np.ones((CELLS, CELLS), dtype=bool)
    border[1:-1, 1:-1] = False
    for name, template in zip(OUTLINES, drawn, strict=True):
        assert (template[border] == 0).all(), name
        assert set(np.unique(template)) == {0, 1, 2}, name
        assert 0.15 < (template > 0).mean() < 0.8, name
        assert (template == 2).sum() > 0.2 * (template > 0).sum(), name  # room for a fill that differs from hollow
    assert len({template.tobytes() for template in drawn}) == 35


def test_dice_are_fair_and_fixed() -> None:
    throws = Dice(1).between(1, 6, 60_000)
    assert throws.min() == 1
    assert throws.max() == 6
    assert np.abs(np.bincount(throws)[1:] - 10_000).max() < 400
    assert Dice(1).below(1000, 5).tolist() == [511, 950, 144, 948, 311]
    assert Dice(2).bytes(5).tolist() == [193, 88, 107, 214, 72]
    assert sorted(Dice(3).shuffle(np.arange(50)).tolist()) == list(range(50))


def test_images_differ_and_use_the_range(shapes10: RawData) -> None:
    pixels = shapes10.train.images
    assert len({image.numpy().tobytes() for image in pixels}) == 5_000
    assert pixels.min() == 0
    assert pixels.max() == 255
    assert 90 < pixels.float().mean() < 165


def test_a_linear_model_on_pixels_fails(shapes10: RawData) -> None:
    assert shapes10.test is not None
    train, test = (part.images.flatten(1).float().numpy() / 255 for part in (shapes10.train, shapes10.test))
    model = RidgeClassifier(alpha=1e3).fit(train, shapes10.train.labels.numpy())
    assert model.score(test, shapes10.test.labels.numpy()) < 0.4
