"""Views of images, and the step from pixels to model input."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from finetune.augment import Preprocessing, Views, alternating_views, make_views, scale, scale_in_float
from weights.errors import UsageError


def noise(count: int, height: int = 32, width: int = 32, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def test_none_has_one_view_the_image() -> None:
    views = make_views("none", 4, 32, count=None, seed=0)
    images = noise(4)
    assert views.count == 1
    assert torch.equal(views.apply(images, torch.arange(4), torch.zeros(4, dtype=torch.int64)), images)


def test_flip_has_exactly_two_views_as_it_is_and_mirrored() -> None:
    views = make_views("flip", 4, 32, count=None, seed=0)
    images, rows = noise(4), torch.arange(4)
    assert views.count == 2
    assert torch.equal(views.apply(images, rows, torch.zeros_like(rows)), images)
    assert torch.equal(views.apply(images, rows, torch.ones_like(rows)), images.flip(-1))
    mixed = views.apply(images, rows, torch.tensor([0, 1, 1, 0]))
    assert torch.equal(mixed, torch.stack([images[0], images[1].flip(-1), images[2].flip(-1), images[3]]))


def slow_crop(image: torch.Tensor, down: int, right: int, mirrored: bool) -> torch.Tensor:
    """Pad one image (3, H, W) by reflection, pixel by pixel, take a window and mirror it."""
    _, height, width = image.shape
    pad = min(height, width) // 8
    window = torch.empty_like(image)
    for y in range(height):
        for x in range(width):
            row, column = abs(y + down - pad), abs(x + right - pad)  # -1 is reflected to 1
            row = min(row, 2 * (height - 1) - row)  # height is reflected to height - 2
            column = min(column, 2 * (width - 1) - column)
            window[:, y, x] = image[:, row, column]
    return window.flip(-1) if mirrored else window


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 24)])
def test_crop_is_what_a_slow_loop_gives(height: int, width: int) -> None:
    images = noise(12, height, width)
    views = make_views("crop", 12, min(height, width), count=3, seed=5)
    assert views.draws is not None
    rows = torch.tensor([11, 0, 3, 3, 7, 5, 1, 2, 9, 10])
    which = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    fast = views.apply(images[rows], rows, which)
    for place, (row, view) in enumerate(zip(rows.tolist(), which.tolist(), strict=True)):
        down, right, mirrored = views.draws[view, row].tolist()
        assert torch.equal(fast[place], slow_crop(images[row], down, right, bool(mirrored)))


def test_crop_draws_every_shift_and_both_sides() -> None:
    views = make_views("crop", 2000, 32, count=1, seed=0)
    assert views.draws is not None
    assert views.draws.shape == (1, 2000, 3)
    for column, values in enumerate((range(9), range(9), range(2))):  # 4 pixels of padding: 9 places
        assert views.draws[0, :, column].unique().tolist() == list(values)


def test_a_view_does_not_depend_on_what_else_is_in_the_batch() -> None:
    images = noise(6)
    views = make_views("crop", 6, 32, count=2, seed=0)
    rows = torch.arange(6)
    together = views.apply(images, rows, torch.ones_like(rows))
    alone = [views.apply(images[row : row + 1], rows[row : row + 1], torch.ones(1, dtype=torch.int64)) for row in rows]
    assert torch.equal(together, torch.cat(alone))


def slow_cutout(image: torch.Tensor, row: int, column: int, side: int, fill: tuple[int, ...]) -> torch.Tensor:
    """Paint a square of one image (3, H, W), pixel by pixel, where it lies inside the image."""
    image = image.clone()
    for y in range(row - side // 2, row - side // 2 + side):
        for x in range(column - side // 2, column - side // 2 + side):
            if 0 <= y < image.shape[1] and 0 <= x < image.shape[2]:
                image[:, y, x] = torch.tensor(fill, dtype=torch.uint8)
    return image


@pytest.mark.parametrize("side", [3, 8])
def test_cutout_is_what_a_slow_loop_gives(side: int) -> None:
    images, rows, fill = noise(40, 16, 16), torch.arange(40), (129, 7, 255)
    plain = make_views("crop", 40, 16, count=2, seed=5)
    views = make_views("crop", 40, 16, count=2, seed=5, cutout=side, fill=fill)
    assert plain.draws is not None
    assert views.draws is not None
    assert torch.equal(views.draws[..., :3], plain.draws)  # the same crops, with a square cut out
    second = torch.ones_like(rows)
    cropped, fast = plain.apply(images, rows, second), views.apply(images, rows, second)
    places = views.draws[1, :, 3:].tolist()
    assert {0, 15} <= {number for place in places for number in place}  # squares that the border cuts off, too
    for number, (row, column) in enumerate(places):
        assert torch.equal(fast[number], slow_cutout(cropped[number], row, column, side, fill))


def test_a_wide_image_has_its_squares_everywhere() -> None:
    views = make_views("crop", 300, 16, count=1, seed=0, cutout=6, fill=(255, 255, 255))
    dark = torch.zeros(300, 3, 16, 48, dtype=torch.uint8)
    made = views.apply(dark, torch.arange(300), torch.zeros(300, dtype=torch.int64))
    assert bool((made > 0).any(0).all())


def test_a_square_as_large_as_the_images() -> None:
    with pytest.raises(UsageError) as error:
        make_views("crop", 4, 32, count=1, seed=0, cutout=32)
    assert str(error.value) == "--cutout 32 covers whole images of 32 pixels; give less, such as 8."


def test_altflip_shows_both_sides_in_any_two_epochs() -> None:
    views = make_views("altflip", 4, 32, count=None, seed=0)
    images, rows = noise(4), torch.arange(4)
    assert views.count == 2
    assert torch.equal(views.apply(images, rows, torch.ones_like(rows)), images.flip(-1))
    first, second, third = (alternating_views(2000, epoch, 0) for epoch in range(3))
    assert torch.equal(first, 1 - second)
    assert torch.equal(first, third)
    assert 0.45 < first.float().mean() < 0.55
    assert not torch.equal(first, alternating_views(2000, 0, 1))


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    first, again, other = (make_views("crop", 10, 32, count=2, seed=seed) for seed in (1, 1, 2))
    assert [first.describe(view) for view in range(2)] == [again.describe(view) for view in range(2)]
    texts = {made.describe(view) for made in (first, other) for view in range(2)}
    assert len(texts) == 4


def test_a_description_differs_when_a_single_draw_does() -> None:
    first = make_views("crop", 10, 32, count=1, seed=1)
    assert first.draws is not None
    draws = first.draws.clone()
    draws[0, 9, 2] = 1 - draws[0, 9, 2]
    assert Views("crop", 1, draws).describe(0) != first.describe(0)


def test_views_of_other_kinds_describe_themselves_apart() -> None:
    flip = Views("flip", 2)
    draws = torch.zeros(1, 4, 5)
    crops = [Views("crop", 1, draws), Views("crop", 1, draws, 8), Views("crop", 1, draws, 4)]
    crops.append(Views("crop", 1, draws, 4, (1, 2, 3)))
    assert len({flip.describe(0), flip.describe(1), *(crop.describe(0) for crop in crops)}) == 6
    assert [Views("altflip", 2).describe(view) for view in range(2)] == [flip.describe(view) for view in range(2)]


def test_crop_without_draws_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="make them with make_views"):
        Views("crop", 1).apply(noise(2), torch.arange(2), torch.zeros(2, dtype=torch.int64))


MEAN, STD = (0.5, 0.45, 0.4), (0.2, 0.25, 0.3)


def pillows(images: torch.Tensor, size: int, interpolation: str) -> torch.Tensor:
    """Return images (N, 3, S, S) that Pillow scaled one by one, uint8."""
    scaled = [to_pil_image(image).resize((size, size), Image.Resampling[interpolation.upper()]) for image in images]
    return torch.stack([pil_to_tensor(image) for image in scaled])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("height", "width", "side"), [(32, 32, 224), (32, 32, 64), (28, 28, 72), (64, 64, 24), (17, 40, 32), (90, 90, 40)]
)
def test_pixels_are_scaled_as_pillow_does(interpolation: str, height: int, width: int, side: int) -> None:
    images = noise(8, height, width)
    truth = pillows(images, side, interpolation).int()
    for way, share in ((scale, 0.05), (scale_in_float, 0.1)):
        difference = (way(images, side, interpolation).int() - truth).abs()
        assert int(difference.max()) <= 2, way  # each axis rounds, and halves go either way
        assert float(difference.float().mean()) < share, way


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_timms_transform_makes_the_same_of_a_picture(interpolation: str) -> None:
    images = noise(8)
    transform = create_transform(
        input_size=(3, 224, 224), interpolation=interpolation, mean=MEAN, std=STD, crop_pct=1.0
    )
    theirs = torch.stack([transform(to_pil_image(image)) for image in images])
    ours = Preprocessing(224, MEAN, STD, interpolation)(images)
    apart = (theirs - ours).abs() > 1e-5
    assert float(apart.float().mean()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_are_normalised_image_by_image(dtype: torch.dtype) -> None:
    images = noise(9, 192, 192)  # more than a piece
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    made = Preprocessing(192, MEAN, STD, "bilinear")(images, dtype)
    torch.testing.assert_close(
        made, ((images / 255 - mean) / std).to(dtype), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.02
    )


def test_no_images_are_no_input() -> None:
    for side in (32, 48):
        assert Preprocessing(side, MEAN, STD, "bilinear")(noise(0)).shape == (0, 3, side, side)


def test_the_model_input_is_channels_last_in_the_wanted_format() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        made = Preprocessing(40, MEAN, STD, "bilinear")(noise(2), dtype)
        assert made.shape == (2, 3, 40, 40)
        assert made.dtype == dtype
        assert made.is_contiguous(memory_format=torch.channels_last)


def test_images_are_left_as_they_are() -> None:
    images = noise(2)
    before = images.clone()
    Preprocessing(32, MEAN, STD, "bilinear")(images)
    make_views("crop", 2, 32, count=1, seed=0).apply(images, torch.arange(2), torch.zeros(2, dtype=torch.int64))
    assert torch.equal(images, before)
