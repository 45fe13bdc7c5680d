"""What is wrong with a data set, in sentences.

An *error* is what a run refuses, or a test image that was trained on; a *warning* is what may spoil a result; a *note*
is what is good to know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from finetune.duplicates import BITS, Duplicates, leads_to_test
from finetune.folder import class_of
from finetune.images import first_few
from finetune.metrics import is_uneven
from finetune.originals import Originals
from finetune.survey import Survey

LEVELS = ("error", "warning", "note")
FEW = 10  # training images below which a class is named: a tenth held out is none
NAMED = 3  # places that a sentence names; all are in the JSON


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        level: error, warning or note.
        kind: one word or two for programs.
        text: a sentence for people.
        places: everything it is about.
    """

    level: str
    kind: str
    text: str
    places: tuple[str, ...]


def judge(found: Originals, twice: Duplicates, threshold: int, *, allow_leaks: bool) -> tuple[Finding, ...]:
    """Return everything that is to be said about a data set, the worst first.

    Args:
        found: the images.
        twice: the duplicates among them.
        threshold: bits in which look-alikes may differ.
        allow_leaks: test images that are among the training images are a warning, not an error.
    """
    findings = [*_damage(found), *_identical(found, twice, allow_leaks), *_near(found, twice, threshold)]
    findings += [*_classes(found), *_out_of_place(found)]
    return tuple(sorted(findings, key=lambda one: LEVELS.index(one.level)))


def _damage(found: Originals) -> Iterable[Finding]:
    """What a run refuses about the files themselves."""
    if found.unreadable:
        listed = first_few([f"{place} ({reason})" for place, reason in found.unreadable], NAMED)
        count = len(found.unreadable)
        yield Finding(
            "error",
            "unreadable",
            f"{_images(count)} cannot be read: {listed}; replace or remove {_them(count)}.",
            tuple(place for place, _ in found.unreadable),
        )
    if found.survey is None:
        return
    for split in _empty_splits(found.survey):
        text = f"The {split} split holds no images in class folders; sort them into folders, or remove it."
        yield Finding("error", "empty split", text, (split,))
    for kind, folders, words in (
        ("empty class", found.survey.empty, "no image; fill it or remove it"),
        ("unknown class", found.survey.unknown, "no class of the training images; rename or remove it"),
    ):
        for folder in folders:
            place = found.survey.place(folder)
            verb = "holds" if kind == "empty class" else "is"
            yield Finding("error", kind, f"The folder {place} {verb} {words}.", (place,))


def _empty_splits(survey: Survey) -> list[str]:
    """Return the splits that are there without any image in a class folder, which a run refuses."""
    return [split for number, split in enumerate(survey.splits) if number not in survey.split]


def _identical(found: Originals, twice: Duplicates, allow_leaks: bool) -> Iterable[Finding]:
    """What has the same pixels: from train to test, within a split, between other splits, under two labels."""
    if twice.leaks:
        count = len(twice.leaks)
        listed = first_few([f"{found.places[test]} is {found.places[train]}" for test, train in twice.leaks], NAMED)
        advice = (
            "accepted with --allow-leaks"
            if allow_leaks
            else "remove one of each two, or let finetune check --allow-leaks pass"
        )
        yield Finding(
            "warning" if allow_leaks else "error",
            "leak",
            f"{_images(count, 'test ')} {'is' if count == 1 else 'are'} pixel-identical to a training image: {listed}; "
            f"{advice}.",
            tuple(found.places[test] for test, _ in twice.leaks),
        )
    across: dict[tuple[str, str], list[list[int]]] = {}
    for members in twice.groups:
        splits = Counter(found.split_of(image) for image in members)
        for split, count in splits.items():
            if count > 1:
                across.setdefault((split, split), []).append(members)
        for one, other in (("train", "val"), ("val", "test")):
            if splits[one] and splits[other]:
                across.setdefault((one, other), []).append(members)
    for (one, other), pictures in across.items():
        where = f"more than once in {one}" if one == other else f"in {one} and in {other}"
        there = f"{_pictures(len(pictures))} {'is' if len(pictures) == 1 else 'are'} {where}"
        listed = first_few([" and ".join(found.places[image] for image in members) for members in pictures], NAMED)
        places = tuple(found.places[image] for members in pictures for image in members)
        yield Finding("warning", "identical", f"{there}, pixel for pixel: {listed}.", places)
    torn = [members for members in twice.groups if len({int(found.labels[image]) for image in members}) > 1]
    if torn:
        listed = first_few([" and ".join(f"{found.places[i]} ({found.class_of(i)})" for i in m) for m in torn], NAMED)
        text = f"{_pictures(len(torn))} {'has' if len(torn) == 1 else 'have'} more than one label: {listed}."
        yield Finding("warning", "labels disagree", text, tuple(found.places[i] for m in torn for i in m))


def _near(found: Originals, twice: Duplicates, threshold: int) -> Iterable[Finding]:
    """What looks alike."""
    within = f"perceptual hashes within {threshold} of {BITS} bits, and the same detail"
    if not twice.complete:
        text = f"More pairs look alike ({within}) than are listed; lower --threshold."
        yield Finding("warning", "near", text, ())
    if twice.near_leaks:
        count = len(twice.near_leaks)
        listed = [f"{found.places[pair.second]} is like {found.places[pair.first]}" for pair in twice.near_leaks]
        text = f"{_images(count, 'test ')} {'looks' if count == 1 else 'look'} like a training image ({within}): "
        places = tuple(found.places[pair.second] for pair in twice.near_leaks)
        yield Finding("warning", "near leak", f"{text}{first_few(listed, NAMED)}.", places)
    rest = [pair for pair in twice.near if not leads_to_test(found, pair)]
    if rest:
        pairs = [f"{found.places[pair.first]} and {found.places[pair.second]}" for pair in rest]
        more = f"{len(rest):,} {'other ' * bool(twice.near_leaks)}pair{'s' * (len(rest) != 1)}"
        many = f"{more} look{'s' * (len(rest) == 1)} alike ({within})"
        yield Finding("note", "near", f"{many}: {first_few(pairs, NAMED)}.", tuple(pairs))


def _classes(found: Originals) -> Iterable[Finding]:
    """Which classes are absent from a split, small, or much larger than others."""
    counts = found.counts()
    empty = {class_of(folder) for folder in found.survey.empty} if found.survey else set()
    for split, numbers in counts.items():
        if found.survey is not None and split in _empty_splits(found.survey):
            continue  # said already
        absent = [name for name, count in zip(found.classes, numbers, strict=True) if not count and name not in empty]
        if absent:
            text = f"The {split} split has no image of {first_few(absent, NAMED)}, of {len(numbers)} classes."
            yield Finding("warning", "class missing", text, tuple(absent))
    learned = [(count, name) for count, name in zip(counts["train"], found.classes, strict=True) if count]
    if not learned:
        return
    few = sorted((count, name) for count, name in learned if count < FEW)
    if few:
        listed = first_few([f"{name} ({count})" for count, name in few], NAMED)
        text = f"{_classes_are(len(few))} fewer than {FEW} training images: {listed}."
        yield Finding("warning", "small class", text, tuple(name for _, name in few))
    (least, small), (most, large) = min(learned), max(learned)
    if is_uneven(counts["train"]):
        text = (
            f"The classes are uneven: {most:,} training images of {large} and {least:,} of {small}, {most / least:.1f} "
            "times as many; look at each class's accuracy, not at that of all images alone."
        )
        yield Finding("warning", "uneven classes", text, (large, small))


def _out_of_place(found: Originals) -> Iterable[Finding]:
    """What a run passes over, and which splits it has to make."""
    survey = found.survey
    if "test" not in found.splits:
        held = "a run holds out a tenth of the images as its test" if survey and survey.pile else "no test accuracy"
        yield Finding("note", "no test", f"The data bring no test split: {held}.", ())
    if survey is None:
        return
    for level, kind, paths, one, many in (
        ("warning", "stray folder", survey.beside, "folder beside the splits", "folders beside the splits"),
        ("warning", "loose image", survey.loose, "image in no class folder", "images in no class folder"),
        ("note", "stray file", survey.strays, "file that is no image by its suffix", "files that are no images"),
    ):
        if paths:
            places = tuple(survey.place(path) for path in paths)
            what = one if len(places) == 1 else many
            text = f"A run passes over {len(places):,} {what}: {first_few(places, NAMED)}."
            yield Finding(level, kind, text, places)


def _images(count: int, kind: str = "") -> str:
    return f"{count:,} {kind}image{'s' * (count != 1)}"


def _pictures(count: int) -> str:
    return f"{count:,} picture{'s' * (count != 1)}"


def _classes_are(count: int) -> str:
    return "1 class has" if count == 1 else f"{count:,} classes have"


def _them(count: int) -> str:
    return "it" if count == 1 else "them"
