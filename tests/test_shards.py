"""WebDataset shards: what is found in them, and what is refused in which words."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from make_data import Made, as_png, make_images, write_image_folder, write_shards, write_tar

from finetune.check import check_data
from finetune.data import load_data, read_data
from finetune.images import DataSplits
from finetune.splits import image_digests
from weights.errors import DataError

PNG = as_png(make_images(1, 0, size=4).train[0])


@pytest.fixture(scope="module")
def made() -> Made:
    return make_images(40, 12)


def refused(path: Path) -> str:
    with pytest.raises(DataError) as error:
        load_data(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def write_two(root: Path, more: dict[str, bytes] | None = None, *, name: str = "train-000000.tar") -> Path:
    """Write a shard of two samples of two classes, and more files behind them."""
    root.mkdir(parents=True, exist_ok=True)
    samples = {"0.png": PNG, "0.cls": b"ant", "1.png": PNG, "1.cls": b"bee"}
    write_tar(root / name, {**samples, **(more or {})})
    return root / name


# What is found


def equal(one: DataSplits, other: DataSplits) -> bool:
    """Whether two data sets have the same identity, and the same images in the same order in each split."""
    parts = [(one.train, other.train), (one.val, other.val), (one.test, other.test)]
    return (one.sha256, one.classes) == (other.sha256, other.classes) and all(
        a is not None and b is not None and set(image_digests(a)) == set(image_digests(b)) for a, b in parts
    )


@pytest.mark.parametrize("names", [True, False])
def test_shards_hold_the_data_set_that_a_folder_of_the_same_images_holds(
    tmp_path: Path, made: Made, names: bool
) -> None:
    write_image_folder(tmp_path / "folder", made=made)
    write_shards(tmp_path / "shards", made, each=15, names=names)
    assert len(list((tmp_path / "shards").glob("train-*.tar"))) == 3
    folder, shards = load_data(str(tmp_path / "folder")), load_data(str(tmp_path / "shards"))
    assert equal(folder, shards)
    assert torch.equal(folder.train.images[:], shards.train.images[:]), "training images are in an order of their own"
    assert torch.equal(folder.train.labels, shards.train.labels)
    assert shards.name == "shards"


def test_the_shards_that_data_md_writes(tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_image_folder(tmp_path / "photos", suffix=".jpg", made=made)
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code) == 1
    exec(compile(code[0], "docs/data.md", "exec"), {})
    folder, shards = read_data("photos").train, read_data("shards").train
    assert shards.classes == folder.classes
    assert image_digests(shards) == image_digests(folder)


def test_splits_are_words_of_names_or_folders(tmp_path: Path, made: Made) -> None:
    write_shards(tmp_path / "words", made)
    usual = load_data(str(tmp_path / "words"))
    for old, new in (("train-000000", "imagenet-train-00000-of-00001"), ("test-000000", "imagenet_testing")):
        (tmp_path / "words" / f"{old}.tar").rename(tmp_path / "words" / f"{new}.tar")
    assert equal(load_data(str(tmp_path / "words")), usual)
    for new, folder in (("imagenet-train-00000-of-00001", "Training"), ("imagenet_testing", "test")):
        (tmp_path / "parent" / "set" / folder).mkdir(parents=True)
        (tmp_path / "words" / f"{new}.tar").rename(tmp_path / "parent" / "set" / folder / "0.tar")
    assert equal(load_data(str(tmp_path / "parent" / "set")), usual)
    assert equal(load_data(str(tmp_path / "parent")), usual), "a folder that holds one such folder will do"


def test_a_pile_of_shards_and_a_single_one_have_a_test_held_out(tmp_path: Path, made: Made) -> None:
    write_shards(tmp_path, made)
    (tmp_path / "test-000000.tar").unlink()
    (tmp_path / "train-000000.tar").rename(tmp_path / "photos.tar")
    pile, single = load_data(str(tmp_path)), load_data(str(tmp_path / "photos.tar"))
    assert equal(pile, single)
    assert single.name == "photos"
    assert single.notes[0] == "The data bring no test split: 4 images were held out, the same for every seed."


def test_every_form_of_a_label(tmp_path: Path) -> None:
    samples = {
        "a/0.png": PNG, "a/0.cls": b" 7\n",
        "a/1.jpg": PNG, "a/1.json": json.dumps({"label": 12}).encode(), "a/1.txt": b"a caption",
        "./a/2.PNG": PNG, "a/2.json": json.dumps({"label": " 07 "}).encode(),
        "b/0.png": PNG, "b/0.json": json.dumps({"width": 4}).encode(), "b/0.cls": b"100",
        "readme.txt": b"no sample", "about.json": json.dumps({"version": 1}).encode(), "a/._0.png": b"hidden",
    }  # fmt: skip
    write_tar(tmp_path / "train.tar", samples)
    train = read_data(str(tmp_path)).train
    assert train.classes == ("7", "12", "100")
    assert train.labels.tolist() == [0, 1, 0, 2]


def test_check_reads_shards(tmp_path: Path, made: Made) -> None:
    write_shards(tmp_path, made, each=30)
    write_tar(tmp_path / "test-000000.tar", {"x.png": as_png(made.train[33]), "x.cls": b"class_01", "y.png": b"no"})
    assert refused(tmp_path).startswith(f"{tmp_path}/test-000000.tar: y.png has no label; expected y.cls, or y.json")
    write_tar(
        tmp_path / "test-000000.tar",
        {"x.png": as_png(made.train[33]), "x.cls": b"class_01", "y.png": b"no", "y.cls": b"class_02"},
    )
    found = check_data(str(tmp_path))
    texts = [one.text for one in found.findings if one.level == "error"]
    assert texts == [
        "1 image cannot be read: test-000000.tar: y.png (no image that Pillow knows); replace or remove it.",
        "1 test image is pixel-identical to a training image: test-000000.tar: x.png is train-000001.tar: 000033.png; "
        "remove one of each two, or let finetune check --allow-leaks pass.",
    ]
    assert found.originals.picture(33).size == (32, 32)


# Damage


def cut(to: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:to]


def patched(at: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + new + content[at + len(new) :]


# Of the shard of `write_two`: a header and a block of content for each of four members, then the end.
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut(0), "is no tar file, or damaged at its start (empty file)"),
        (cut(300), "is no tar file, or damaged at its start (truncated header)"),
        (cut(512 + 20), "is no tar file, or damaged at its start (0.png claims"),
        (cut(5 * 512 + 10), "is damaged or cut short after 0.cls (1.png claims"),
        (
            cut(4 * 512 + 100),
            "is damaged or cut short after 0.cls (there is neither a header nor the end of an archive",
        ),
        (cut(4 * 512), "is damaged or cut short after 0.cls (there is neither a header nor the end of an archive"),
        (patched(4 * 512 + 3, b"x"), "is damaged or cut short after 0.cls (there is neither a header nor"),
        (patched(0, b"photo"), "is no tar file, or damaged at its start (bad checksum)"),
    ],
    ids=["empty", "header cut", "image cut", "second image cut", "second header cut", "no end", "bad header", "no tar"],
)
def test_a_damaged_shard_is_named_with_the_last_sound_member(
    tmp_path: Path, damage: Callable[[bytes], bytes], words: str
) -> None:
    shard = write_two(tmp_path)
    assert len(PNG) <= 512
    shard.write_bytes(damage(shard.read_bytes()))
    message = refused(tmp_path)
    assert message.startswith(f"{shard} {words}"), message
    assert message.endswith("; fetch or write this shard again.")


def test_a_size_that_leads_backwards_is_refused(tmp_path: Path) -> None:
    """Base-256 sizes may be negative: `tarfile` alone would read the same headers for ever."""
    shard = write_two(tmp_path)
    header = bytearray(shard.read_bytes()[:512])
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    shard.write_bytes(patched(0, bytes(header))(shard.read_bytes()))
    assert refused(tmp_path).startswith(f"{shard} is no tar file, or damaged at its start (0.png claims -1,024 bytes")


def test_a_damaged_image_is_named_with_its_shard(tmp_path: Path) -> None:
    write_two(tmp_path, {"2.png": PNG[:40], "2.cls": b"ant", "3.png": b"", "3.cls": b"ant"})
    message = refused(tmp_path)
    assert message.startswith(f"2 of 4 images cannot be read: {tmp_path}/train-000000.tar: 2.png (")
    assert message.endswith(f"{tmp_path}/train-000000.tar: 3.png (empty file); replace or remove them.")


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    shard = write_two(tmp_path)
    packed = gzip.compress(shard.read_bytes())
    shard.write_bytes(packed)
    advice = "and shards are read in place; decompress it to a .tar (its images are compressed already)."
    assert refused(tmp_path) == f"{shard} is compressed (gzip), {advice}"
    shard.rename(tmp_path / "train-000000.tar.gz")
    assert refused(tmp_path) == f"{tmp_path}/train-000000.tar.gz is compressed (gz), {advice}"


# Shards that are missing, or of no split


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("train-000000", "train-000002"), "lacks 1 of 3 shards: train-000001.tar; bring it back, or number the"),
        (("train-8", "train-14"), "lacks 5 of 7 shards: train-9.tar, train-10.tar, train-11.tar and 2 more; bring"),
        (("a-train-0-of-3", "a-train-1-of-3"), "lacks 1 of 3 shards: a-train-2-of-3.tar; bring it back"),
        (("train-1-of-2", "val-2-of-2"), "lacks 1 of 2 shards: train-0-of-2.tar; bring it back"),
        (("train-0", "photos-0"), "holds shards of train, and photos-0.tar, whose name says no split; put train, val"),
        (("test-0", "val-0"), "holds shards of val and test but none of train to learn from."),
    ],
)
def test_shards_that_are_missing(tmp_path: Path, names: tuple[str, str], words: str) -> None:
    for name in names:
        write_two(tmp_path, name=f"{name}.tar")
    assert refused(tmp_path).startswith(f"{tmp_path} {words}")


def test_a_name_of_two_splits(tmp_path: Path) -> None:
    shard = write_two(tmp_path, name="train-test-0.tar")
    assert refused(tmp_path) == f"The name of {shard} says train and test; expected the shard of one split."


def test_shards_without_samples(tmp_path: Path) -> None:
    write_two(tmp_path)
    write_tar(tmp_path / "val-000000.tar", {"readme.txt": b"nothing here"})
    assert refused(tmp_path) == (
        f"The val shards of {tmp_path} (1) hold no samples; expected images with labels beside them, such as "
        "0001.jpg and 0001.cls."
    )
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty") == (
        f"{tmp_path}/empty holds nothing; expected CIFAR files, a CIFAR .tar.gz, a folder of images for each class, "
        "or .tar shards."
    )


# Samples


@pytest.mark.parametrize(
    ("more", "classes", "words"),
    [
        ({"2.png": PNG}, "", ": 2.png has no label; expected 2.cls, or 2.json with a \"label\", in the same shard."),
        ({"2.cls": b"ant"}, "", " holds a label of 2 (2.cls) and no image; expected both"),
        ({"1.jpg": PNG}, "", " holds two files of one sample: 1.png and 1.jpg; expected one image and one label of a"),
        ({"2.png": PNG, "2.cls": b""}, "", ": 2.cls holds no label; expected a whole number, or the name of a class."),
        ({"2.png": PNG, "2.json": b"{"}, "", ": 2.json holds no label; expected a whole number, or the name of a"),
        ({"2.png": PNG, "2.json": b'{"label": [1]}'}, "", ": 2.json holds no label; expected a whole number"),
        ({"2.png": PNG, "2.cls": bytes(2**20 + 1)}, "", ": 2.cls has 1,048,577 bytes; a label of at most 1,048,576"),
        ({"2.png": PNG, "2.cls": b"-1"}, "", ": 2.png has the label -1; expected 0 or more."),
        ({"2.png": PNG, "2.cls": b"2"}, "ant\nbee\n\n", ": 2.png has the label 2; classes.txt names 2 classes, 0 to"),
        (
            {"2.png": PNG, "2.cls": b"bees"},
            "ant\nbee",
            ": 2.png has the label 'bees', which is no class of classes.txt; expected one of ant, bee; did you",
        ),
        ({"\x1b[1m\udcff.png": PNG}, "", r": \x1b[1m\udcff.png has no label; expected \x1b[1m\udcff.cls, or"),
        ({"y" * 300 + ".png": PNG}, "", f": {'y' * 200}… has no label; expected {'y' * 200}….cls, or"),
        ({"2.png": PNG, "2.cls": b"z" * 256}, "", ": 2.cls holds a label of 256 characters; expected a whole"),
        ({"2.png": PNG, "2.cls": b"z" * 255}, "ant\nbee", f": 2.png has the label '{'z' * 199}…, which is no class of"),
    ],
    ids=[
        "no label", "no image", "two images", "empty", "no JSON", "a list", "too large", "negative", "out of range",
        "unknown", "odd name", "long name", "long label", "long unknown",
    ],
)  # fmt: skip
def test_samples_that_are_refused(tmp_path: Path, more: dict[str, bytes], classes: str, words: str) -> None:
    shard = write_two(tmp_path, more)
    if classes:
        (tmp_path / "classes.txt").write_text(classes)
    message = refused(tmp_path)
    assert message.startswith(f"{shard}{words}"), message


def test_a_label_that_train_does_not_have(tmp_path: Path) -> None:
    write_two(tmp_path)
    write_tar(tmp_path / "test-0.tar", {"9.png": PNG, "9.cls": b"wasp"})
    assert refused(tmp_path) == (
        f"{tmp_path}/test-0.tar: 9.png has the label 'wasp', which is no class of the training images; expected one "
        "of ant, bee."
    )


def test_one_class_is_none(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", {"0.png": PNG, "0.cls": b"0"})
    assert refused(tmp_path) == f"{tmp_path} holds images of one class (0); expected two or more."


def test_names_of_classes(tmp_path: Path) -> None:
    write_two(tmp_path)
    (tmp_path / "classes.txt").write_text("cat\nbee\nant\n")
    raw = read_data(str(tmp_path))
    assert raw.train.labels.tolist() == [2, 1]
    assert raw.notes == ("classes.txt names cat, of which train holds no image.",)
    for text, reason in (
        ("ant\nbee\nant", "names 'ant' twice"),
        ("ant\n\nbee", "has a line without a name"),
        ("ant\n" + "b" * 256, "has a line of 256 characters, and a name may have 255"),
    ):
        (tmp_path / "classes.txt").write_text(text)
        assert refused(tmp_path).startswith(f"{tmp_path}/classes.txt {reason}; expected the name of a class in each")
    (tmp_path / "classes.txt").write_text("ant\n" * 2**19)
    assert refused(tmp_path).startswith(f"{tmp_path}/classes.txt cannot be read (")
