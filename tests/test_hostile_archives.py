"""Files of torch.save that are not what they say: their archives, their storages, and what they nest."""

from __future__ import annotations

import pickle
import tarfile
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from make_hostile import packed

from finetune.rundir import RunDirectory
from weights import torch_file
from weights.errors import RunError, WeightsError
from weights.load import read_tensors


def test_tensors_that_claim_more_than_there_is(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(2**23)}, tmp_path / "strided.pth")
    torch.save([torch.eye(2).to_sparse()], tmp_path / "sparse.pth")
    torch.save([torch.empty(2, device="meta")], tmp_path / "meta.pth")
    torch.save({"a": {"b": [torch.zeros(1).expand(2**23)]}}, tmp_path / "deep.pth")
    for name, reason in (
        ("strided", "its tensors claim more than 16,777,216 bytes, far more than the file has"),
        ("deep", "its tensors claim more than 16,777,216 bytes, far more than the file has"),
        ("sparse", "it holds sparse, quantised or nested tensors, or some without values"),
        ("meta", "it holds sparse, quantised or nested tensors, or some without values"),
    ):
        with pytest.raises(WeightsError) as error:
            read_tensors(tmp_path / f"{name}.pth")
        assert str(error.value) == (
            f"{name}.pth was not loaded: {reason}; save its state_dict() as plain tensors and give that."
        )


def repacked(path: Path, change: Callable[[str, bytes], bytes], **options: Any) -> None:
    """Write the members of an archive again, each through `change`."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


def test_an_archive_is_not_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(100)}, path)
    repacked(path, lambda name, content: content[:4] if name.endswith("data/0") else content)
    with pytest.raises(WeightsError, match=r"w\.pth was not loaded: a storage has 4 bytes and is said to have 100 val"):
        read_tensors(path)
    torch.save({"a": torch.zeros(1)}, path)
    repacked(
        path,
        lambda name, content: bytes(2**25) if name.endswith("version") else content,
        compression=zipfile.ZIP_DEFLATED,
    )
    assert path.stat().st_size < 10**5
    with pytest.raises(WeightsError, match=r"w\.pth was not loaded: it unpacks to more than 16,777,216 bytes"):
        read_tensors(path)
    with pytest.raises(RunError, match=r"checkpoint\.pt is damaged \(it unpacks to more than 16,777,216 bytes"):
        RunDirectory(path.rename(tmp_path / "checkpoint.pt").parent).read_checkpoint()


def test_an_archive_with_two_pickles(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", b"\x80\x02}.")
    with pytest.raises(WeightsError, match=r"w\.pth was not loaded: it has 2 pickles, one was expected; save"):
        read_tensors(path)
    # by its first two bytes an archive, by its first four a pickle for torch.load; P is the name of a storage
    path.write_bytes(path.read_bytes().replace(b"PK\3\4", b"PK\n.", 1))
    with pytest.raises(WeightsError, match=r"w\.pth is a pickle that holds more than tensors"):
        read_tensors(path)


def test_an_archive_with_two_tables_of_contents(tmp_path: Path) -> None:
    """Python's reader finds the second of two archives in a row, and PyTorch's the first."""
    path = tmp_path / "w.pth"
    archives = []
    for value in (0.0, 1.0):
        torch.save({"a": torch.full((1,), value)}, path)
        archives.append(path.read_bytes())
    path.write_bytes(b"".join(archives))
    first, second = archives
    for content, place in (
        (first + second, f"{len(first):,} bytes after"),
        (second[:100] + second[110:], "10 bytes before"),
    ):
        path.write_bytes(content)
        with pytest.raises(
            WeightsError, match=rf"w\.pth is truncated, .* it ends {place} its table of contents: bytes"
        ):
            read_tensors(path)
    path.write_bytes(second)
    assert read_tensors(path)["a"] == 1


def test_tables_and_pickles_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(77)}, path)
    for name, place in (("LARGEST_PICKLE", "data.pkl"), ("LARGEST_TABLE", "table of contents")):
        usual = getattr(torch_file, name)
        monkeypatch.setattr(torch_file, name, 99)
        with pytest.raises(WeightsError, match=rf"w\.pth was not loaded: its {place} has \d+ bytes, and may have 99"):
            read_tensors(path)
        monkeypatch.setattr(torch_file, name, usual)
    torch.save({"a": torch.zeros(77)}, path, _use_new_zipfile_serialization=False)
    honest = path.read_bytes()
    assert honest.count(b"KMNt") == 1  # the storage's values, in the pickle
    path.write_bytes(honest.replace(b"KMNt", b"\x8a\x05\0\0\0\0\1Nt"))
    with pytest.raises(WeightsError, match=r"w\.pth was not loaded: its tensors claim more than 16,777,216 bytes"):
        read_tensors(path)
    # one storage is named twice, the second time as smaller; each value of it has eight bytes
    storage = b"(X\x07\0\0\0storagectorch\nDoubleStorage\nX\1\0\0\0aN%sNtQ"
    twice = b"\x80\2" + storage % b"J\0\0\x30\0" + storage % b"K\1" + b"."
    magic = pickle.dumps(torch.serialization.MAGIC_NUMBER, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    for content, reason in (
        (twice, "its tensors claim more than 16,777,216 bytes"),
        (b"\x80\2N.\x80\2]N" + b"\x85" * 9 + b"a.", "it does not end with the names of its storages"),
    ):
        path.write_bytes(magic + content)
        with pytest.raises(WeightsError, match=rf"w\.pth was not loaded: {reason}"):
            read_tensors(path)
    path.write_bytes(tarfile.TarInfo("\x80\x02K\x01.").tobuf(tarfile.GNU_FORMAT, encoding="latin1"))
    with pytest.raises(
        WeightsError, match=r"w\.pth was not loaded: it is a tar archive; unpack it and give the file within, or"
    ):
        read_tensors(path)


def test_containers_in_themselves_and_under_false_names(tmp_path: Path) -> None:
    own: dict[str, Any] = {"epoch": 1}
    own["state_dict"] = own
    torch.save(own, tmp_path / "own.pth")
    with pytest.raises(WeightsError, match=r"own\.pth holds epoch, state_dict and no tensors; expected a state dict"):
        read_tensors(tmp_path / "own.pth")
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    torch.save({"a": torch.ones(1), "deep": deep}, tmp_path / "deep.pth")
    with pytest.raises(WeightsError, match=r"deep\.pth was not loaded: it is nested more than 100 deep; save its"):
        read_tensors(tmp_path / "deep.pth")
    # each list holds the one before, and the last holds all of them, so that none is far from it
    places = [number.to_bytes(4, "little") for number in range(1500)]
    links = b"]r" + places[0] + b"".join(b"]r%bj%ba" % (place, last) for last, place in pairwise(places))
    packed(tmp_path / "deep.pth", b"\x80\x02" + links + b"](" + b"".join(b"j" + one for one in places[::-1]) + b"e.")
    with pytest.raises(WeightsError, match=r"deep\.pth was not loaded: it is nested more than 100 deep; save its"):
        read_tensors(tmp_path / "deep.pth")
    # an OrderedDict whose `items` is a number, and one whose entries are put into a shape
    items = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb."
    packed(tmp_path / "items.pth", items)
    with pytest.raises(WeightsError, match=r"items\.pth holds nothing and no tensors"):
        read_tensors(tmp_path / "items.pth")
    packed(tmp_path / "size.pth", b"\x80\x02ctorch\nSize\n]\x85RK\x01K\x02s.")
    with pytest.raises(WeightsError, match=r"size\.pth was not loaded: it puts entries into torch\.Size; save its"):
        read_tensors(tmp_path / "size.pth")
    packed(tmp_path / "deque.pth", b"\x80\x02ccollections\ndeque\n)RK\x01a.")
    with pytest.raises(WeightsError, match=r"deque\.pth was not loaded: it puts entries into collections\.deque; save"):
        read_tensors(tmp_path / "deque.pth")
