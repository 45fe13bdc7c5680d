"""A pickle is a program: wherever a file is read, none is run, and none takes all memory or all time instead."""

from __future__ import annotations

import pickle
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_data import write_archive, write_cifar10_python, write_cifar100_binary, write_cifar100_python, write_pickle
from make_hostile import (
    Payload,
    bomb_of_tuples,
    damage,
    payload_bytes,
    write_finished,
    write_model,
    write_photos,
)

from finetune.cache import Entry, list_entries
from finetune.data import load_data
from finetune.grid import read_sweep
from finetune.precision import Choice, remembered
from finetune.report import rebuild_report
from finetune.rundir import RunDirectory, open_run_directory
from finetune.sweep import _State
from finetune.trained import load_trained
from weights import dry_run, torch_file
from weights.arch import resolve_arch
from weights.errors import DataError, FinetuneError, RunError, WeightsError
from weights.load import read_tensors
from weights.locate import locate
from weights.record import recorded


def archived(folder: Path) -> object:
    write_archive(folder / "cifar.tar.gz", folder / "cifar")
    return load_data(str(folder / "cifar.tar.gz"))


def snapshot(folder: Path) -> object:
    (folder / "config.json").write_text('{"architecture": "test_resnet"}')
    found = locate(resolve_arch("test_resnet"), str(folder))
    assert found.path is not None
    return read_tensors(found.path)


def measured(folder: Path) -> object:
    kept = remembered(folder, {}, lambda: Choice("fp32", False, 1.0, 0.0, ""))
    for path in (folder / "measurements").glob("*.json"):
        damage(path, (folder / "payload").read_bytes())
    return remembered(folder, {}, lambda: kept)


def features(folder: Path) -> object:
    entry = Entry(folder / "features" / "a", 2, ((1,),), (torch.float32,))
    entry.load_journal()
    return list_entries(folder), entry.read_chunk(0)


SUFFIXES = ("pth", "pt", "bin", "ckpt", "pth.tar", "safetensors")
# What is read, below a folder of its own; how.
PLACES: dict[str, Callable[[Path], object]] = {
    **{f"w.{suffix}": (lambda folder, suffix=suffix: read_tensors(folder / f"w.{suffix}")) for suffix in SUFFIXES},
    "pytorch_model.bin": snapshot,
    "model.safetensors": load_trained,
    "config.json": load_trained,
    "checkpoint.pt": lambda folder: RunDirectory(folder).read_checkpoint(),
    "recipe.toml": open_run_directory,
    "summary.json": rebuild_report,
    "metrics.jsonl": rebuild_report,
    "predictions.safetensors": rebuild_report,
    "sweep.toml": read_sweep,
    "cifar/train": lambda folder: load_data(str(folder / "cifar")),
    "cifar/meta": lambda folder: load_data(str(folder / "cifar")),
    "cifar/data_batch_1": lambda folder: load_data(str(folder / "cifar")),
    "cifar/test.bin": lambda folder: load_data(str(folder / "cifar")),
    "cifar/test": archived,
    "photos/cat/0.png": lambda folder: load_data(str(folder / "photos")),
}
# Where damage is no error: what cannot be believed is made again, or counts as absent.
PASSED_OVER: dict[str, Callable[[Path], object]] = {
    "sweep.json": _State.read,
    "features/a/about.json": features,
    "features/a/chunks.jsonl": features,
    "features/a/tensor-0.bin": features,
    "payload": measured,
    "w.pth.sha256": lambda folder: recorded(folder / "w.pth"),
}


def make_honest(folder: Path, place: str) -> None:
    """Write what lies around a place."""
    if place in ("model.safetensors", "config.json"):
        write_model(folder)
    elif place in ("summary.json", "metrics.jsonl", "predictions.safetensors"):
        write_finished(folder)
    elif place.startswith("cifar/data"):
        write_cifar10_python(folder / "cifar", 10, 2)
    elif place.endswith(".bin") and place.startswith("cifar"):
        write_cifar100_binary(folder / "cifar", 4, 2)
    elif place.startswith("cifar"):
        write_cifar100_python(folder / "cifar", 4, 2)
    elif place.startswith("photos"):
        write_photos(folder / "photos")


@pytest.mark.parametrize("place", [*PLACES, *PASSED_OVER])
def test_a_malicious_pickle_is_not_run(tmp_path: Path, place: str) -> None:
    mark = tmp_path / "mark"
    pickle.loads(payload_bytes(mark))
    mark.rmdir()  # the payload works
    folder = tmp_path / "place"
    folder.mkdir()
    make_honest(folder, place)
    for number, kind in enumerate(("bare", "archive", "protocol 5")):
        if kind == "archive":
            torch.save({"state_dict": Payload(mark), "progress": {}}, damage(folder / place, b""))
        else:
            damage(folder / place, payload_bytes(mark, 2 if number == 0 else 5))
        if place in PASSED_OVER:
            PASSED_OVER[place](folder)
        else:
            with pytest.raises(FinetuneError) as error:
                PLACES[place](folder)
            assert "\n" not in str(error.value)
        assert not mark.exists(), kind


# Memory and time


def test_a_pickle_with_a_key_that_is_never_hashed(tmp_path: Path) -> None:
    for write in (damage, packed):
        path = tmp_path / "w.pth"
        write(path, bomb_of_tuples())
        with pytest.raises(WeightsError, match=r"w\.pth was not loaded: it holds tuples in tuples without end; save"):
            read_tensors(path)
    write_cifar100_python(tmp_path / "cifar", 4, 2)
    damage(tmp_path / "cifar" / "meta", bomb_of_tuples())
    with pytest.raises(DataError, match=r"meta is damaged or no pickle \(it holds tuples in tuples without end\); fet"):
        load_data(str(tmp_path / "cifar"))


def packed(path: Path, pickled: bytes) -> None:
    """Write a pickle as the archive that torch.save writes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", pickled)
        archive.writestr("w/version", b"3\n")


def refused(path: Path, content: bytes) -> str:
    """Return why a pickle is not loaded, packed in an archive and by itself."""
    reasons = set()
    for write in (packed, damage):
        write(path, content)
        with pytest.raises(WeightsError) as error:
            read_tensors(path)
        reasons.add(str(error.value).removeprefix(f"{path.name} was not loaded: ").partition("; save its")[0])
    assert len(reasons) == 1, reasons
    return reasons.pop()


LATIN1 = b"X\x06\x00\x00\x00latin1"
MUCH = b"J\x00\x00\x00\x10"  # 268,435,456


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (b"}" + b"N" + b"\x85" * 1000 + b"K\x01s", "it has tuples of many values as keys"),
        (b"c__builtin__\nset\n]" + b"N" + b"\x85" * 1000 + b"a\x85R", "it has tuples of many values as keys"),
        (b"}ctorch\nSize\n]\x85RNs", "it has a shape as a key"),
        (b"(N\x91", "it holds sets or arrays of bytes in a form that torch.save and CIFAR do not use"),
        (b"\x96" + (2**28).to_bytes(8, "little"), "it holds sets or arrays of bytes in a form"),
        (b"c__builtin__\nbytearray\n" + MUCH + b"\x85R", "it calls bytearray for something else than text in latin1"),
        (
            b"ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nbytearray\nN" + MUCH + b"\x85NtR",
            "it calls bytearray for something else than text in latin1",
        ),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00idna\x86R", "it calls encode for something else than"),
        (b"ctorch\nFloatTensor\n" + MUCH + b"\x85R", "it calls FloatTensor with values or sizes"),
        (b"ctorch\nSize\n]R", "it calls something with no tuple of arguments"),
        (b"])\x81", "it makes an object of what is no class"),
        (b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + LATIN1 + b"N]tQ", "a storage has no name, or no"),
        (
            b"c_codecs\nencode\nq\x00X\x00\x00\x01\x00" + bytes(2**16) + b"q\x01" + LATIN1 + b"q\x02"
            + b"h\x00h\x01h\x02\x86R" * 800,
            "its pickle takes more than 3,000,000 steps",
        ),
    ],
    ids=[
        "deep key", "deep in a set", "shape as key", "set of sets", "array of bytes", "bytearray", "bytearray within",
        "other codec", "tensor of a size", "no tuple", "no class", "storage", "copies",
    ],
)  # fmt: skip
def test_a_short_pickle_that_asks_for_much(tmp_path: Path, pickled: bytes, reason: str) -> None:
    assert refused(tmp_path / "w.pth", b"\x80\x02" + pickled + b".").startswith(reason)


def test_steps_of_a_pickle_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "MOST_STEPS", 1000)
    lists = b"\x80\x02" + b"]" * 1000 + b"."
    assert refused(tmp_path / "w.pth", lists) == "its pickle takes more than 1,000 steps"
    write_cifar100_python(tmp_path / "cifar", 4, 2)
    damage(tmp_path / "cifar" / "meta", lists)
    with pytest.raises(DataError, match=r"meta is damaged or no pickle \(its pickle takes more than 1,000 steps\);"):
        load_data(str(tmp_path / "cifar"))


def test_a_list_that_is_endless_when_it_is_written_out(tmp_path: Path) -> None:
    endless: list[Any] = ["x"]
    for _ in range(40):
        endless = [endless, endless]
    torch.save({"a": torch.zeros(1), "b": endless}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth was not loaded: written out, it would take more than 16,777,216"):
        read_tensors(tmp_path / "w.pth")
    write_cifar100_python(tmp_path / "cifar", 4, 2)
    codec = b"]q\x000" + b"](h\x00h\x00eq\x000" * 40 + b"h\x00"  # in place of the name of one
    damage(tmp_path / "cifar" / "meta", b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00a" + codec + b"\x86R.")
    with pytest.raises(DataError, match=r"meta asks to run _codecs\.encode with a list, which no CIFAR file needs"):
        load_data(str(tmp_path / "cifar"))


def test_a_place_of_the_memo_takes_no_memory(tmp_path: Path) -> None:
    write_cifar100_python(tmp_path, 4, 2)
    (tmp_path / "meta").write_bytes(b"\x80\x02}r\xff\xff\xff\x00.")  # place 16,777,215, for which 268 MB would be taken
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="meta has no list fine_label_names"):
            load_data(str(tmp_path))
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


def array(kind: Any, shape: tuple[int, ...], content: bytes) -> Any:
    """Return what pickles to an array whose description need not fit its content."""

    class Lie:
        def __reduce__(self) -> Any:
            rebuild, args, _ = np.empty(0).__reduce__()  # type: ignore[misc]
            return rebuild, args, (1, shape, np.dtype(kind), False, content)

    return Lie()


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (array("u1", (10**9, 3072), b"a"), "an array of 1 bytes is said to have the shape"),
        (array("u1", (-1, 3072), b"a"), "an array's description is no such thing"),
        (array(object, (2,), [1, 2]), "an array's description is no such thing"),  # type: ignore[arg-type]
        (array("u1", (10**10, 3072), b"a"), "an array's description is no such thing"),
        (array([("a", "i8"), ("b", "i8")], (1,), bytes(16)), "is none of plain numbers"),
        (array("S100", (1,), bytes(100)), "is none of plain numbers"),
    ],
)
def test_an_array_that_is_not_what_its_pickle_says(tmp_path: Path, lie: Any, reason: str) -> None:
    write_cifar100_python(tmp_path, 4, 2)
    write_pickle(tmp_path / "train", {b"data": lie, b"fine_labels": [0] * 4})
    with pytest.raises(DataError, match=rf"train is damaged or no pickle \(.*{reason}.*\); fetch the data set again"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("pickled", [b"c_codecs\nencode\nN}X\x01\x00\x00\x00aK\x01s\x86b.", b"cnumpy\nndarray\n)R."])
def test_admitted_functions_are_not_changed_and_arrays_not_made(tmp_path: Path, pickled: bytes) -> None:
    write_cifar100_python(tmp_path, 4, 2)
    (tmp_path / "meta").write_bytes(b"\x80\x02" + pickled)
    with pytest.raises(DataError, match=r"meta asks to run (a change of encode|numpy\.ndarray), which no CIFAR file"):
        load_data(str(tmp_path))


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


def test_an_archive_with_two_tables_of_contents(tmp_path: Path) -> None:
    """Python's reader finds the second of two archives in a row, and PyTorch's the first."""
    path = tmp_path / "w.pth"
    archives = []
    for value in (0.0, 1.0):
        torch.save({"a": torch.full((1,), value)}, path)
        archives.append(path.read_bytes())
    path.write_bytes(b"".join(archives))
    with pytest.raises(WeightsError, match=r"w\.pth was not loaded: its table of contents is not where it has to be"):
        read_tensors(path)
    path.write_bytes(archives[1])
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
    path.write_bytes(tarfile.TarInfo("\x80\x02K\x01.").tobuf(tarfile.GNU_FORMAT, encoding="latin1"))
    with pytest.raises(WeightsError, match=r"w\.pth was not loaded: it is a tar file as well"):
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
