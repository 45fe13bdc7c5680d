"""`finetune check`: every planted fault is found and named, in the text, in the JSON and on the page."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_data import make_images, write_cifar100_python, write_class_folders
from make_page import Page, browse, needs_chromium
from PIL import Image
from scipy.ndimage import gaussian_filter
from typer.testing import CliRunner, Result

from cli.check import DEFAULT_THRESHOLD
from cli.main import app
from finetune import check, duplicates
from finetune.check import check_data
from finetune.data import load_data
from finetune.decode import decode_image
from finetune.duplicates import detail_likeness, look_alikes, near_pairs
from finetune.originals import look_at
from weights.errors import DataError, UsageError

CLASSES = ("<script>", "ant", "bee", "dog")


def picture(number: int, *, side: int = 64) -> Image.Image:
    """A smooth coloured pattern, another one for each number: what photos have and noise has not."""
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def save(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(path)


def write_sound(root: Path, *, train: int = 12, test: int = 3, classes: tuple[str, ...] = CLASSES) -> None:
    """Write train/ and test/ without a fault."""
    for label, name in enumerate(classes):
        for index in range(train):
            save(root / "train" / name / f"{index:02d}.png", 1000 * label + index)
        for index in range(test):
            save(root / "test" / name / f"{index:02d}.png", 1000 * label + 500 + index)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each fault."""
    root = tmp_path_factory.mktemp("check") / "photos"
    write_sound(root)
    train, test = root / "train", root / "test"
    (train / "ant/00.png").write_bytes(b"")
    (train / "bee/00.png").write_bytes(b"no image at all")
    whole = (train / "<script>/00.png").read_bytes()
    (train / "<script>/00.png").write_bytes(whole[: len(whole) // 2])
    for index in range(5, 12):
        (train / f"dog/{index:02d}.png").unlink()  # one class with five images
    shutil.rmtree(test / "dog")  # and none of them in the test
    shutil.copy(train / "ant/03.png", test / "ant/copy.png")
    picture(2004).save(test / "bee/again.jpg", quality=80)  # train/bee/04.png, encoded anew
    picture(2005).save(train / "dog/05.bmp")  # train/bee/05.png under another label and in another format
    save(root / "old/1.png", 7000)
    save(train / "loose.png", 7001)
    (train / "ant/notes.txt").write_text("hello")
    return root


def invoke(*words: str) -> Result:
    done = CliRunner().invoke(app, ["check", *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


FAULTS = {
    "unreadable": (
        "error",
        r"3 images cannot be read: train/<script>/00\.png \(.+\), train/ant/00\.png \(empty file\)",
    ),
    "leak": (
        "error",
        r"1 test image is pixel-identical to a training image: test/ant/copy\.png is train/ant/03\.png; ",
    ),
    "labels disagree": ("warning", r"train/bee/05\.png \(bee\) and train/dog/05\.bmp \(dog\)"),
    "identical": (
        "warning",
        r"1 picture is more than once in train, pixel for pixel: train/bee/05\.png and train/dog/05\.bmp",
    ),
    "near leak": (
        "warning",
        r"1 test image looks like a training image \(perceptual hashes within 10 of 64 bits, and the same detail\): "
        r"test/bee/again\.jpg is like train/bee/04\.png",
    ),
    "class missing": ("warning", r"The test split has no image of dog, of 4 classes"),
    "small class": ("warning", r"1 class has fewer than 10 training images: dog \(6\)"),
    "stray folder": ("warning", r"A run passes over 1 folder beside the splits: old\."),
    "loose image": ("warning", r"A run passes over 1 image in no class folder: train/loose\.png"),
    "stray file": ("note", r"A run passes over 1 file that is no image by its suffix: train/ant/notes\.txt"),
}


def test_every_fault_is_named(faulty: Path) -> None:
    before = sorted(faulty.rglob("*"))
    text = invoke(str(faulty))
    assert text.exit_code == 1
    for kind, (level, words) in FAULTS.items():
        assert re.search(rf"^{level} +.*{words}", text.stdout, re.MULTILINE), (kind, text.stdout)
    assert text.stdout.splitlines()[-1] == "2 errors, 7 warnings, 1 note"

    result = json.loads(invoke(str(faulty), "--json").stdout)
    assert result["ok"] is False
    assert {one["kind"]: one["level"] for one in result["findings"]} == {k: level for k, (level, _) in FAULTS.items()}
    for one in result["findings"]:
        assert re.search(FAULTS[one["kind"]][1], one["text"])
    assert [one["place"] for one in result["unreadable"]] == [
        f"train/{name}/00.png" for name in ("<script>", "ant", "bee")
    ]
    assert [(one["test"]["place"], one["train"]["place"]) for one in result["leaks"]] == [
        ("test/ant/copy.png", "train/ant/03.png")
    ]
    assert [(one["test"]["place"], one["train"]["place"]) for one in result["near"]["leaks"]] == [
        ("test/bee/again.jpg", "train/bee/04.png")
    ]
    assert result["near"]["pairs"][0]["images"][0] == {"place": "train/bee/04.png", "split": "train", "class": "bee"}
    assert result["splits"]["train"]["classes"] == {"<script>": 11, "ant": 11, "bee": 11, "dog": 6}
    assert result["splits"]["test"] == {
        "images": 11,
        "classes": {"<script>": 3, "ant": 4, "bee": 4, "dog": 0},
        "sizes": {"64x64": 11},
        "modes": {"RGB": 11},
    }
    assert sorted(faulty.rglob("*")) == before, "a check changes nothing"


def test_a_leak_may_be_accepted(tmp_path: Path) -> None:
    write_sound(tmp_path)
    assert invoke(str(tmp_path)).exit_code == 0
    assert invoke(str(tmp_path)).stdout.splitlines()[-1] == "0 errors, 0 warnings, 0 notes"
    shutil.copy(tmp_path / "train/ant/01.png", tmp_path / "test/dog/copy.png")
    assert invoke(str(tmp_path)).exit_code == 1
    accepted = invoke(str(tmp_path), "--allow-leaks")
    assert accepted.exit_code == 0
    assert re.search(
        r"^warning  1 test image is pixel-identical .*; accepted with --allow-leaks\.$", accepted.stdout, re.M
    )


def test_what_a_run_would_refuse_is_an_error(tmp_path: Path) -> None:
    write_sound(tmp_path, classes=("ant", "bee"))
    (tmp_path / "train/empty").mkdir()
    save(tmp_path / "test/durian/1.png", 1)
    done = invoke(str(tmp_path))
    assert done.exit_code == 1
    assert "error    The folder train/empty holds no image; fill it or remove it." in done.stdout
    assert "The folder test/durian is no class of the training images; rename or remove it." in done.stdout
    (tmp_path / "train").rename(tmp_path / "lessons")
    done = invoke(str(tmp_path))
    assert done.exit_code == 1
    assert "but no train folder to learn from" in done.stderr


def test_uneven_classes_of_one_pile(tmp_path: Path) -> None:
    made = make_images(60, 0, classes=2)
    labels = (np.arange(60) >= 18).astype(np.int64)
    write_class_folders(tmp_path, made.train, labels, ("few", "many"))
    texts = [one.text for one in check_data(str(tmp_path)).findings]
    assert texts == [
        "The classes are uneven: 42 training images of many and 18 of few, 2.3 times as many; look at each class's "
        "accuracy, not at that of all images alone.",
        "The data bring no test split: a run holds out a tenth of the images as its test.",
    ]


def test_cifar_files(tmp_path: Path) -> None:
    made = make_images(60, 20)
    made.test[7] = made.train[3]
    write_cifar100_python(tmp_path, made=made)
    result = check_data(str(tmp_path))
    assert [finding.text for finding in result.findings if finding.level == "error"] == [
        "1 test image is pixel-identical to a training image: test image 7 is train image 3; remove one of each two, "
        "or let finetune check --allow-leaks pass."
    ]
    assert result.originals.counts() == {"train": [15] * 4, "test": [5] * 4}


def test_the_original_pixels_are_compared(tmp_path: Path) -> None:
    """Not what a run decodes, where these two are one: the same centre square."""
    write_sound(tmp_path, classes=("ant", "bee"))
    wide = Image.new("RGB", (96, 64), "white")
    wide.paste(picture(1), (16, 0))
    wide.save(tmp_path / "test/ant/wide.png")
    squares = [decode_image(tmp_path / name, 64) for name in ("test/ant/wide.png", "train/ant/01.png")]
    assert np.array_equal(*squares)
    assert check_data(str(tmp_path)).duplicates.leaks == []


def test_a_split_without_class_folders_is_refused_as_a_run_does(tmp_path: Path) -> None:
    """Test images in one heap, as competitions give them; an empty folder among the classes is passed over."""
    write_sound(tmp_path, classes=("ant", "bee"))
    (tmp_path / "test" / "notes").mkdir()
    assert check_data(str(tmp_path)).ok
    for file in sorted((tmp_path / "test").rglob("*.png")):
        file.rename(tmp_path / "test" / f"{file.parent.name}-{file.name}")
    result = check_data(str(tmp_path))
    assert not result.ok
    assert [one.kind for one in result.findings if one.level == "error"] == ["empty split"]
    with pytest.raises(DataError, match="holds no images in class folders"):
        load_data(str(tmp_path), image_size=32)


def test_plain_pictures_do_not_look_alike(tmp_path: Path) -> None:
    write_sound(tmp_path, classes=("ant", "bee"))
    for split, name, colour in (("train", "ant", "black"), ("train", "bee", "white"), ("test", "bee", "navy")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / split / name / "plain.png")
    assert check_data(str(tmp_path), threshold=16).duplicates.near == []


def test_near_pairs_are_those_of_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "ROWS", 16)
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, 100, dtype=np.uint64)
    flips = [sum(1 << int(bit) for bit in random.choice(64, bits, replace=False)) for bits in range(1, 9)]
    hashes = np.concatenate([hashes, hashes[:8] ^ np.array(flips, dtype=np.uint64), hashes[:1]])
    for threshold in (0, 4, 7):
        expected = [
            [a, b, distance]
            for a, b in combinations(range(len(hashes)), 2)
            if (distance := (int(hashes[a]) ^ int(hashes[b])).bit_count()) <= threshold
        ]
        assert len(expected) >= 1 + threshold
        assert sorted(near_pairs(hashes, threshold)[0].tolist()) == expected
    assert near_pairs(hashes[:0], 4)[0].tolist() == []
    monkeypatch.setattr(duplicates, "MOST_CANDIDATES", 3)
    found, complete = near_pairs(hashes, 7)
    assert (len(found), complete) == (3, False)


def test_what_looks_alike_and_what_only_has_the_same_outline() -> None:
    """One photo as it is, moved by a pixel, paler, and encoded anew; and another one, whose hash is the same here."""
    photo = picture(1, side=32)
    moved = Image.fromarray(np.roll(np.asarray(photo), 1, axis=1))
    paler = Image.fromarray((40 + 0.5 * np.asarray(photo)).astype(np.uint8))
    encoded = io.BytesIO()
    photo.save(encoded, format="JPEG", quality=60)
    given = [photo, moved, paler, Image.open(encoded).convert("RGB"), picture(2, side=32)]
    looks = [dataclasses.replace(look_at(image, image.size, image.mode), hash=5) for image in given]
    found, complete = look_alikes(looks, 0)
    assert complete
    assert {(pair.first, pair.second) for pair in found} == set(combinations(range(4), 2))
    assert all(0.7 <= pair.likeness <= 1.001 and pair.distance == 0 for pair in found)


def test_detail_is_the_correlation_at_the_best_shift() -> None:
    random = np.random.default_rng(0)
    one = random.integers(0, 256, (3, 32, 32)).astype(np.uint8)
    other = np.stack([np.roll(one[0], -1, axis=0), 255 - one[1], random.integers(0, 256, (32, 32)).astype(np.uint8)])
    same, inverse, foreign = detail_likeness(torch.from_numpy(one), torch.from_numpy(other)).tolist()
    assert same > 0.99
    assert inverse < 0.2
    assert abs(foreign) < 0.2
    sharp = [side - gaussian_filter(side.astype(float), 2, mode="mirror", radius=6) for side in (one[2], other[2])]
    shifts = [
        np.corrcoef(sharp[0][1 + y : 31 + y, 1 + x : 31 + x].ravel(), sharp[1][1:31, 1:31].ravel())[0, 1]
        for y, x in product((-1, 0, 1), repeat=2)
    ]
    assert foreign == pytest.approx(max(shifts), abs=0.03)  # there at the same places, here on all that overlap


def test_the_page_shows_pictures_and_trusts_no_name(faulty: Path, tmp_path: Path) -> None:
    page = tmp_path / "check.html"
    done = invoke(str(faulty), "--html", str(page))
    assert done.exit_code == 1
    assert done.stdout.splitlines()[-1] == f"page: {page}"
    source = page.read_text(encoding="utf-8")
    assert "<script" not in source
    assert "&lt;script&gt;" in source
    assert not re.search(r"https?:|url\(|@import", source)
    pictures = re.findall(r'<img src="([^"]{30})[^"]*" alt="([^"]*)"', source)
    assert len(pictures) == source.count("<img") == 6  # the leak, the look-alikes, and the one under two labels
    assert {start for start, _ in pictures} == {"data:image/png;base64,iVBORw0K"}
    for words in (
        "train/ant/00.png</td><td>empty file",
        "Test images that were trained on",
        "test/bee/again.jpg (bee)",
    ):
        assert words in source


@needs_chromium
def test_a_browser_finds_the_json_in_the_page(faulty: Path, tmp_path: Path) -> None:
    html = tmp_path / "check.html"
    found = json.loads(invoke(str(faulty), "--html", str(html), "--json").stdout)
    dom, console, requests = browse(html, tmp_path)
    page = Page(dom)
    figures = [f"{one['level']} {one['text']}" for one in found["findings"]]
    figures += [f"{one['place']} {one['reason']}" for one in found["unreadable"]]
    pairs = [(one["train"], one["test"]) for one in found["leaks"]] + [one["images"] for one in found["near"]["pairs"]]
    figures += [" ".join(f"{one['place']} ({one['class']})" for one in pair) for pair in [*pairs, *found["identical"]]]
    figures += [f"likeness {one['likeness']:.2f}, {one['bits']} bits apart" for one in found["near"]["pairs"]]
    figures += [f"{split} {facts['images']} 64 × 64 ({facts['images']})" for split, facts in found["splits"].items()]
    train, test = (found["splits"][split]["classes"] for split in ("train", "test"))
    figures += [f"{name} {train[name]} {test[name]}" for name in CLASSES]
    assert len(figures) > 20
    for figure in figures:
        assert " ".join(figure.split()) in page.text, figure
    assert "<script>" in CLASSES
    assert page.all("script") == []
    assert "CONSOLE" not in console
    assert requests == []


def test_settings_that_cannot_be_right(tmp_path: Path) -> None:
    assert DEFAULT_THRESHOLD == check.THRESHOLD
    with pytest.raises(
        UsageError, match="--threshold is 17; give the bits of 64 in which look-alikes may differ, from 0"
    ):
        check_data(str(tmp_path), threshold=17)
    with pytest.raises(UsageError, match="--data 'cifar1000' is neither a path that exists nor one of cifar10"):
        check_data("cifar1000")


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "photos")

    monkeypatch.setattr(check, "read_originals", refuse)
    done = invoke(str(tmp_path))
    assert done.exit_code == 1
    assert "photos cannot be read (Permission denied); make it readable, or give --data another path." in done.stderr
