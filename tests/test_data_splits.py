"""Which images are held out and kept: stratified, by what they are, whatever the order of the files."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from make_data import make_images

from finetune.images import ImageSet, RawData
from finetune.splits import choose, identity, image_digests, make_splits, places_of_shots, take, with_shots
from weights.errors import UsageError


def image_set(count: int = 100, classes: int = 4, seed: int = 0) -> ImageSet:
    made = make_images(count, 0, classes=classes, size=4, seed=seed)
    return ImageSet(torch.from_numpy(made.train), torch.from_numpy(made.train_labels), made.classes)


def of_sizes(*sizes: int) -> ImageSet:
    """A set whose classes have these sizes."""
    images = image_set(sum(sizes))
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return ImageSet(images.images, labels, tuple(f"c{index}" for index in range(len(sizes))))


def raw(train: ImageSet, **parts: ImageSet | None) -> RawData:
    return RawData("made", train, parts.get("val"), parts.get("test"))


def shuffled(images: ImageSet, seed: int) -> ImageSet:
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    return ImageSet(images.images[order], images.labels[order], images.classes)


def contents(images: ImageSet | None) -> set[bytes]:
    assert images is not None
    return set(image_digests(images))


def counts(images: ImageSet | None) -> list[int]:
    assert images is not None
    return torch.bincount(images.labels, minlength=len(images.classes)).tolist()


def test_validation_is_stratified_and_apart_from_train() -> None:
    images = image_set(100)
    splits = make_splits(raw(images), val_fraction=0.2)
    assert counts(splits.val) == [5, 5, 5, 5]
    assert counts(splits.train) == [20, 20, 20, 20]
    assert contents(splits.val) | contents(splits.train) == contents(images)
    assert not contents(splits.val) & contents(splits.train)


@pytest.mark.parametrize("limit", [None, 13])
def test_file_order_does_not_matter(limit: int | None) -> None:
    images = image_set(100)
    first = make_splits(raw(images, test=image_set(20, seed=1)), limit=limit)
    second = make_splits(raw(shuffled(images, 5), test=shuffled(image_set(20, seed=1), 6)), limit=limit)
    assert contents(first.val) == contents(second.val)
    assert image_digests(first.train) == image_digests(second.train)  # the same images in the same order
    assert (first.sha256, first.test_sha256) == (second.sha256, second.test_sha256)


def test_validation_and_test_images_keep_their_order() -> None:
    images, test = image_set(100), image_set(20, seed=1)
    place = {digest: index for index, digest in enumerate(image_digests(images))}
    splits = make_splits(raw(images, test=test), limit=30)
    assert splits.val is not None
    assert splits.test is not None
    order = [place[digest] for digest in image_digests(splits.val)]
    assert order == sorted(order)
    assert image_digests(splits.test) == image_digests(test)


def test_another_seed_is_another_choice() -> None:
    images = image_set(100)
    first, second = (make_splits(raw(images), limit=20, seed=seed) for seed in (0, 1))
    assert contents(first.val) != contents(second.val)
    assert contents(first.train) != contents(second.train)
    assert first.sha256 == second.sha256


def test_shots_are_nested_and_the_same_images_of_whatever_set_they_are_drawn() -> None:
    images = of_sizes(30, 30, 4)
    whole, few, more = (make_splits(raw(images), val_fraction=0.1, shots=shots) for shots in (None, 2, 5))
    assert counts(few.train) == [2, 2, 2]
    assert counts(more.train)[:2] == [5, 5]
    assert counts(more.train)[2] == counts(whole.train)[2] < 5
    assert contents(few.train) < contents(more.train) < contents(whole.train)
    assert contents(few.val) == contents(whole.val)
    assert few.sha256 == whole.sha256
    assert more.notes[-1] == "--shots 5 is more than 1 of 3 classes have: all of their images are used."
    assert few.notes == whole.notes
    derived = with_shots(whole, 2, 0)
    assert image_digests(derived.train) == image_digests(few.train), "the same images in the same order"
    places = places_of_shots(more.train, 2, 0)
    assert image_digests(take(more.train, places)) == image_digests(few.train)
    assert contents(with_shots(whole, 2, 1).train) != contents(few.train)


def test_validation_is_the_same_for_every_limit_and_limits_are_nested() -> None:
    images = image_set(100)
    small, large, whole = (make_splits(raw(images), limit=limit) for limit in (10, 40, None))
    assert contents(small.val) == contents(large.val) == contents(whole.val)
    assert contents(small.train) < contents(large.train) < contents(whole.train)


def test_a_class_always_keeps_a_training_image() -> None:
    splits = make_splits(raw(of_sizes(1, 2, 40)), val_fraction=0.9)
    assert counts(splits.train) == [1, 1, 2]
    assert counts(splits.val) == [0, 1, 38]


def test_no_class_can_spare_an_image() -> None:
    splits = make_splits(raw(of_sizes(1, 1, 1)), val_fraction=0.5)
    assert splits.val is None
    assert "There is no validation split: no class can spare an image for it." in splits.notes


def test_val_fraction_zero_holds_out_nothing() -> None:
    splits = make_splits(raw(image_set(20), test=image_set(8, seed=1)), val_fraction=0)
    assert splits.val is None
    assert len(splits.train) == 20
    assert splits.notes == ()


def test_a_validation_split_that_the_data_bring_is_used() -> None:
    val, test = image_set(8, seed=1), image_set(8, seed=2)
    for fraction in (0.1, 0.5, 0):
        splits = make_splits(raw(image_set(20), val=val, test=test), val_fraction=fraction)
        assert splits.val is val
        assert len(splits.train) == 20
    assert splits.notes == ("The data bring a validation split of 8 images: it is used as it is.",)


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ((25, 25, 25, 25), 12, [3, 3, 3, 3]),
        ((25, 25, 25, 25), 10, [3, 3, 2, 2]),
        ((80, 10, 10), 10, [8, 1, 1]),
        ((97, 2, 1), 10, [8, 1, 1]),  # every class before a second of any
        ((25, 25, 25, 25), 2, [1, 1, 0, 0]),
    ],
)
def test_limit_is_stratified(sizes: tuple[int, ...], limit: int, expected: list[int]) -> None:
    splits = make_splits(raw(of_sizes(*sizes), test=image_set(30, seed=1)), val_fraction=0, limit=limit)
    assert counts(splits.train) == expected
    assert splits.test is not None
    assert len(splits.test) == 30


def test_limits_that_are_too_small_or_too_large_are_noted() -> None:
    images, test = image_set(20), image_set(8, seed=1)
    small = make_splits(raw(images, test=test), val_fraction=0, limit=3)
    assert small.notes == ("--limit 3 leaves 1 of 4 classes without a training image.",)
    large = make_splits(raw(images, test=test), val_fraction=0, limit=21)
    assert len(large.train) == 20
    assert large.notes == ("--limit 21 is more than there is: all 20 images are used for training.",)


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_shares_that_cannot_be(fraction: float) -> None:
    with pytest.raises(UsageError, match=r"--val-fraction is .*; expected 0 or more and less than 1"):
        make_splits(raw(image_set(20)), val_fraction=fraction)


@pytest.mark.parametrize("limit", [0, -3])
def test_limits_that_cannot_be(limit: int) -> None:
    with pytest.raises(UsageError, match=f"--limit is {limit}; expected at least 1 training image"):
        make_splits(raw(image_set(20)), limit=limit)


def test_digests_are_what_the_documentation_says() -> None:
    images = image_set(3)
    expected = hashlib.sha256(b"class_01\0" + b"3,4,4\0" + images.images[1].numpy().tobytes()).digest()
    assert image_digests(images)[1] == expected


def test_identity_changes_with_every_ingredient() -> None:
    images = image_set(20)
    base = make_splits(raw(images, test=image_set(8, seed=1))).sha256
    pixel = ImageSet(images.images.clone(), images.labels, images.classes)
    pixel.images[3, 1, 2, 2] ^= 1
    label = ImageSet(images.images, images.labels.roll(1), images.classes)
    names = ImageSet(images.images, images.labels, ("other", *images.classes[1:]))
    shape = ImageSet(images.images.reshape(20, 3, 2, 8), images.labels, images.classes)
    others = [make_splits(raw(other, test=image_set(8, seed=1))).sha256 for other in (pixel, label, names, shape)]
    others.append(make_splits(raw(images, val=image_set(8, seed=1))).sha256)  # the same images in another split
    others.append(make_splits(raw(images)).sha256)
    assert len({base, *others}) == 7


def test_identity_counts_images_twice_that_are_there_twice() -> None:
    digests = image_digests(image_set(4))
    assert identity({"train": digests}) != identity({"train": digests + digests[:1]})


def test_choose_agrees_with_a_plain_ranking() -> None:
    images = of_sizes(7, 13, 30)
    digests = image_digests(images)
    standing = []
    for label in range(3):
        members = [index for index in range(50) if images.labels[index] == label]
        members.sort(key=lambda index: hashlib.sha256(b"salt\0" + digests[index]).digest())
        standing += [((rank + 0.5) / len(members), label, index) for rank, index in enumerate(members)]
    expected = sorted(index for _, _, index in sorted(standing)[:17])
    mask = choose(images.labels, digests, 17, salt="salt")
    assert np.flatnonzero(mask).tolist() == expected
    assert torch.equal(take(images, np.flatnonzero(mask)).images, images.images[expected])
