"""CIFAR in every layout: the same images from each, and a sentence for everything that can be wrong with one."""

from __future__ import annotations

import io
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_data import (
    Made,
    flat,
    make_images,
    write_archive,
    write_cifar10_binary,
    write_cifar10_python,
    write_cifar100_binary,
    write_cifar100_python,
    write_image_folder,
    write_pickle,
)

from finetune.cifar import cifar_archive, cifar_folder, read_cifar
from finetune.data import load_data
from finetune.images import RawData
from weights.errors import DataError, UsageError

Writer = Callable[..., Made]
LAYOUTS = {
    "cifar-10-batches-py": write_cifar10_python,
    "cifar-10-batches-bin": write_cifar10_binary,
    "cifar-100-python": write_cifar100_python,
    "cifar-100-binary": write_cifar100_binary,
}


def read(place: Path) -> RawData:
    """Read a CIFAR folder or archive, its images in the order of the files."""
    files = cifar_archive(place) if place.is_file() else cifar_folder(place)
    assert files is not None
    return read_cifar(files)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("archived", [False, True])
def test_every_layout_gives_what_was_written_in_file_order(tmp_path: Path, name: str, archived: bool) -> None:
    made = LAYOUTS[name](tmp_path / name)
    place = tmp_path / name
    if archived:
        place = tmp_path / f"{name}.tar.gz"
        write_archive(place, tmp_path / name)
    raw = read(place)
    assert raw.name == ("cifar100" if "100" in name else "cifar10")
    assert raw.train.classes == made.classes
    assert raw.train.images.dtype == torch.uint8
    assert raw.train.labels.dtype == torch.int64
    assert torch.equal(raw.train.images, torch.from_numpy(made.train))
    assert torch.equal(raw.train.labels, torch.from_numpy(made.train_labels))
    assert raw.test is not None
    assert torch.equal(raw.test.images, torch.from_numpy(made.test))
    assert torch.equal(raw.test.labels, torch.from_numpy(made.test_labels))
    splits = load_data(str(place), val_fraction=0)
    assert (len(splits.train), splits.val) == (len(made.train), None)
    assert splits.notes == ()


@pytest.mark.parametrize(("python", "binary"), [("100-python", "100-binary"), ("10-batches-py", "10-batches-bin")])
def test_python_and_binary_layouts_give_the_same_run(tmp_path: Path, python: str, binary: str) -> None:
    made = make_images(60, 20)
    for name in (f"cifar-{python}", f"cifar-{binary}"):
        LAYOUTS[name](tmp_path / name, made=made)
    one = load_data(str(tmp_path / f"cifar-{python}"), limit=30, seed=3)
    other = load_data(str(tmp_path / f"cifar-{binary}"), limit=30, seed=3)
    assert one.val is not None
    assert other.val is not None
    for ours, theirs in ((one.train, other.train), (one.val, other.val)):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
    assert (one.sha256, one.test_sha256) == (other.sha256, other.test_sha256)


def test_the_folder_layout_has_the_same_identity(tmp_path: Path) -> None:
    made = write_cifar100_python(tmp_path / "cifar")
    write_image_folder(tmp_path / "folder", made=made)
    one, other = load_data(str(tmp_path / "cifar")), load_data(str(tmp_path / "folder"))
    assert one.sha256 == other.sha256
    assert one.test_sha256 == other.test_sha256


def test_coarse_labels(tmp_path: Path) -> None:
    made = write_cifar100_python(tmp_path / "python")
    write_cifar100_binary(tmp_path / "binary", made=made)
    for place in ("python", "binary"):
        splits = load_data(str(tmp_path / place), labels="coarse", val_fraction=0)
        assert splits.classes == ("first", "second")
        assert splits.test is not None
        assert splits.test.labels.tolist() == (made.test_labels >= 2).astype(int).tolist()
        assert splits.sha256 != load_data(str(tmp_path / place)).sha256


def test_coarse_labels_of_data_without_them(tmp_path: Path) -> None:
    write_cifar10_python(tmp_path / "ten")
    with pytest.raises(UsageError, match=r"--labels coarse needs CIFAR-100, but .*ten is CIFAR-10"):
        load_data(str(tmp_path / "ten"), labels="coarse")
    write_cifar100_python(tmp_path / "hundred")
    change_pickle(tmp_path / "hundred" / "train", lambda content: content.pop(b"coarse_labels"))
    with pytest.raises(UsageError, match=r"needs coarse labels, but .*train has none"):
        load_data(str(tmp_path / "hundred"), labels="coarse")
    write_cifar100_binary(tmp_path / "binary")
    (tmp_path / "binary" / "coarse_label_names.txt").unlink()
    with pytest.raises(UsageError, match=r"needs coarse labels, but .*binary has no file coarse_label_names"):
        load_data(str(tmp_path / "binary"), labels="coarse")


def test_text_keys_arrays_of_labels_and_crlf_names_are_read_too(tmp_path: Path) -> None:
    made = write_cifar100_python(tmp_path / "python")
    for name in ("train", "test"):
        content = pickle.loads((tmp_path / "python" / name).read_bytes())
        content = {key.decode(): value for key, value in content.items()}
        content["fine_labels"] = np.array(content["fine_labels"])
        (tmp_path / "python" / name).write_bytes(pickle.dumps(content, protocol=4))
    assert torch.equal(read(tmp_path / "python").train.images, torch.from_numpy(made.train))
    write_cifar100_binary(tmp_path / "binary")
    (tmp_path / "binary" / "fine_label_names.txt").write_bytes("\r\n".join(made.classes).encode())
    assert load_data(str(tmp_path / "binary")).classes == made.classes


def test_pickles_of_an_older_numpy_are_read(tmp_path: Path) -> None:
    made = write_cifar100_python(tmp_path)
    for name in ("train", "test"):
        content = (tmp_path / name).read_bytes()
        new, old = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
        (tmp_path / name).write_bytes(content.replace(new, old))
        assert old in (tmp_path / name).read_bytes()
    assert torch.equal(read(tmp_path).train.images, torch.from_numpy(made.train))


def test_images_can_be_written_to(tmp_path: Path) -> None:
    write_cifar100_binary(tmp_path)
    splits = load_data(str(tmp_path), val_fraction=0)
    splits.train.images[0] = 7
    assert splits.train.images[0].float().mean() == 7


# What can be wrong


class Attack:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path) -> None:
    write_cifar100_python(tmp_path / "cifar")
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Attack(mark)))
    assert mark.exists()  # the attack works
    mark.unlink()
    write_pickle(tmp_path / "cifar" / "train", {b"data": Attack(mark)})
    with pytest.raises(DataError, match=r"train asks to run .*, which no CIFAR file needs; it was refused, not run: "):
        load_data(str(tmp_path / "cifar"))
    assert not mark.exists()


@pytest.mark.parametrize(
    "called",
    [
        "os\nsystem",
        "builtins\neval",
        "numpy\nload",
        "numpy.core.multiarray\nscalar",
        "_codecs\ndecode",
        "copyreg\n_reconstructor",
    ],
)
def test_the_refused_global_is_named(tmp_path: Path, called: str) -> None:
    write_cifar100_python(tmp_path)
    (tmp_path / "meta").write_bytes(b"\x80\x02c" + called.encode() + b"\nX\x01\x00\x00\x00a\x85R.")
    with pytest.raises(DataError, match=called.replace("\n", r"\.")):
        load_data(str(tmp_path))


def test_other_codecs_are_refused(tmp_path: Path) -> None:
    write_cifar100_python(tmp_path)
    (tmp_path / "meta").write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.")
    with pytest.raises(DataError, match=r"_codecs.encode with 'rot13'"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("keep", [0, 1, 50, 5000])
def test_a_truncated_pickle(tmp_path: Path, keep: int) -> None:
    write_cifar100_python(tmp_path)
    (tmp_path / "train").write_bytes((tmp_path / "train").read_bytes()[:keep])
    with pytest.raises(DataError, match=r"train is damaged or no pickle .*; fetch the data set again"):
        load_data(str(tmp_path))


def change_pickle(path: Path, change: Callable[[dict[bytes, Any]], object]) -> None:
    """Load a pickle, change its dict in place, and write it back."""
    content = pickle.loads(path.read_bytes())
    change(content)
    write_pickle(path, content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop(b"data"), "has the keys .*; expected data and fine_labels: "),
        (lambda d: d.clear(), "has the keys none; expected data and fine_labels: "),
        (lambda d: d.update({b"data": d[b"data"].astype(np.float32)}), "data of float32 40 x 3072; expected a uint8 "),
        (lambda d: d.update({b"data": d[b"data"][:, :100]}), "data of uint8 40 x 100; expected a uint8 array of N x "),
        (lambda d: d.update({b"data": [1, 2]}), "data of a list; expected a uint8 array of N x 3072: "),
        (lambda d: d.update({b"fine_labels": [0] * 39}), "40 images but 39 fine_labels; expected one label an image: "),
        (
            lambda d: d.update({b"fine_labels": [0] * 39 + [4]}),
            r"labels from 0 to 4, but .* \(labels 0 to 3\); the two ",
        ),
        (lambda d: d.update({b"fine_labels": [0] * 39 + [-1]}), "labels from -1 to 0, but there are 4 class names "),
        (lambda d: d.update({b"fine_labels": [0.5] * 40}), "no list of whole numbers; expected one label an image: "),
        (lambda d: d.update({b"fine_labels": [10**30] * 40}), "too large to be labels; "),
    ],
)
def test_pickles_with_other_contents(
    tmp_path: Path, change: Callable[[dict[bytes, Any]], object], message: str
) -> None:
    write_cifar100_python(tmp_path)
    change_pickle(tmp_path / "train", change)
    with pytest.raises(DataError, match=f"train.* {message}.*fetch (the data set|it) again"):
        load_data(str(tmp_path))


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ([1, 2], "meta holds a list; expected the dict of a CIFAR file"),
        ({b"label_names": [b"a"]}, "meta has no list fine_label_names; expected the meta file of cifar100"),
        ({b"fine_label_names": [b"a"]}, "names 1 classes, 1 of them different; expected 2 or more"),
        ({b"fine_label_names": [b"a", b"b", b"a"]}, "names 3 classes, 2 of them different"),
    ],
)
def test_meta_files_with_other_contents(tmp_path: Path, meta: Any, message: str) -> None:
    write_cifar100_python(tmp_path)
    write_pickle(tmp_path / "meta", meta)
    with pytest.raises(DataError, match=f"{message}.*fetch the data set again"):
        load_data(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "file"), [("cifar-10-batches-bin", "data_batch_2.bin"), ("cifar-100-binary", "test.bin")]
)
@pytest.mark.parametrize("cut", [1, 3000, None])
def test_binary_files_of_another_length(tmp_path: Path, name: str, file: str, cut: int | None) -> None:
    LAYOUTS[name](tmp_path)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[:-cut] if cut else b"")
    record = r"3,073" if "10-" in name else r"3,074"
    found = f"{len(whole) - cut if cut else 0:,}"
    with pytest.raises(
        DataError,
        match=f"{file} has {found} bytes; expected a multiple of {record}, the bytes of one .*fetch the data set again",
    ):
        load_data(str(tmp_path))


def test_binary_labels_out_of_range(tmp_path: Path) -> None:
    made = write_cifar100_binary(tmp_path)
    rows = np.concatenate([np.full((40, 2), 9, dtype=np.uint8), flat(made.train)], axis=1)
    (tmp_path / "train.bin").write_bytes(rows.tobytes())
    with pytest.raises(
        DataError, match=r"train\.bin has labels from 9 to 9, but there are 4 class names \(labels 0 to 3\)"
    ):
        load_data(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar-10-batches-py", "test_batch"),
        ("cifar-10-batches-py", "data_batch_3"),
        ("cifar-10-batches-py", "data_batch_5"),
        ("cifar-10-batches-py", "batches.meta"),
        ("cifar-10-batches-bin", "test_batch.bin"),
        ("cifar-10-batches-bin", "batches.meta.txt"),
        ("cifar-100-python", "test"),
        ("cifar-100-python", "train"),
        ("cifar-100-python", "meta"),
        ("cifar-100-binary", "test.bin"),
        ("cifar-100-binary", "fine_label_names.txt"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, name: str, file: str) -> None:
    LAYOUTS[name](tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(DataError, match=rf"no file {file} |{file} is not in"):
        load_data(str(tmp_path))


def test_fewer_batches_than_published_are_noted(tmp_path: Path) -> None:
    write_cifar10_binary(tmp_path, batches=2)
    assert load_data(str(tmp_path)).notes == (f"{tmp_path} holds 2 of CIFAR-10's five training batches.",)


def test_two_layouts_in_one_folder(tmp_path: Path) -> None:
    write_cifar100_python(tmp_path)
    write_cifar100_binary(tmp_path)
    with pytest.raises(DataError, match="cifar100 in the python layout and cifar100 in the binary layout side by side"):
        load_data(str(tmp_path))


# Archives


def write_archive_with(archive: Path, folder: Path, name: str, link: tuple[bytes, str] | None) -> None:
    """Pack a folder and one more member: a file of 4 bytes, or a link (its type, where it leads)."""
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname="cifar")
        member = tarfile.TarInfo(name)
        if link:
            member.type, member.linkname = link
        else:
            member.size = 4
        tar.addfile(member, None if link else io.BytesIO(b"evil"))


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("../../escaped", None),
        ("cifar/../../escaped", None),
        ("/escaped", None),
        ("cifar/escaped", (tarfile.SYMTYPE, "/etc/passwd")),
        ("cifar/escaped", (tarfile.SYMTYPE, "../../passwd")),
        ("cifar/escaped", (tarfile.LNKTYPE, "../passwd")),
    ],
)
def test_archives_with_a_path_that_leaves_them(tmp_path: Path, name: str, link: tuple[bytes, str] | None) -> None:
    write_cifar100_binary(tmp_path / "cifar")
    archive = tmp_path / "place" / "hostile.tar.gz"
    archive.parent.mkdir()
    write_archive_with(archive, tmp_path / "cifar", name, link)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        DataError,
        match=rf"hostile\.tar\.gz holds '{name}', a path that leads out of it; expected only the data set's own files, "
        "so do not unpack it, and fetch the published archive",
    ):
        load_data(str(archive))
    assert sorted(tmp_path.rglob("*")) == before


def test_links_within_an_archive_are_passed_over(tmp_path: Path) -> None:
    made = write_cifar100_binary(tmp_path / "cifar")
    archive = tmp_path / "links.tar.gz"
    write_archive_with(archive, tmp_path / "cifar", "other/train.bin", (tarfile.SYMTYPE, "../cifar/test.bin"))
    before = sorted(tmp_path.rglob("*"))
    assert torch.equal(read(archive).train.images, torch.from_numpy(made.train))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_flipped_bit_in_an_archive(tmp_path: Path) -> None:
    write_cifar100_binary(tmp_path / "cifar")
    archive = tmp_path / "flipped.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=0) as tar:  # stored as it is: gzip's checksum is all that can tell
        tar.add(tmp_path / "cifar", arcname="cifar")
    content = bytearray(archive.read_bytes())
    pixels = (tmp_path / "cifar" / "test.bin").read_bytes()[100:200]
    content[content.index(pixels)] ^= 1
    archive.write_bytes(content)
    with pytest.raises(
        DataError, match=r"flipped\.tar\.gz cannot be read as a \.tar\.gz \(CRC check failed .*; fetch it"
    ):
        load_data(str(archive))


def test_archives_that_are_damaged_or_hold_something_else(tmp_path: Path) -> None:
    write_cifar100_python(tmp_path / "cifar")
    good = tmp_path / "good.tar.gz"
    write_archive(good, tmp_path / "cifar")
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(good.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"cut\.tar\.gz cannot be read as a \.tar\.gz .*; fetch it again"):
        load_data(str(cut))
    text = tmp_path / "text.tar.gz"
    text.write_text("no archive")
    with pytest.raises(DataError, match=r"text\.tar\.gz cannot be read as a \.tar\.gz"):
        load_data(str(text))
    other = tmp_path / "other.tar.gz"
    shutil.copytree(tmp_path / "cifar", tmp_path / "two" / "a")
    shutil.copytree(tmp_path / "cifar", tmp_path / "two" / "b")
    write_archive(other, tmp_path / "two")
    with pytest.raises(DataError, match=r"other\.tar\.gz holds 2 CIFAR data sets; expected exactly one, .*: pack one"):
        load_data(str(other))
