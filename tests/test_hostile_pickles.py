"""A pickle is a program: wherever a file is read, none is run, and none takes all memory or all time instead."""

from __future__ import annotations

import pickle
import tracemalloc
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
    packed,
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
from finetune.unpickle import load_pickle
from weights import dry_run
from weights.arch import resolve_arch
from weights.errors import DataError, FinetuneError, WeightsError
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
        with pytest.raises(
            WeightsError, match=r"w\.pth was not loaded: it has keys that are neither short text nor small nu"
        ):
            read_tensors(path)
    write_cifar100_python(tmp_path / "cifar", 4, 2)
    damage(tmp_path / "cifar" / "meta", bomb_of_tuples())
    with pytest.raises(
        DataError, match=r"meta is damaged or no pickle \(it has keys that are neither short text nor sma"
    ):
        load_data(str(tmp_path / "cifar"))


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
MADE = b"ccollections\nOrderedDict\n)R"
KEYS = "it has keys that are neither short text nor small numbers"
UNREAD = "w.pth is a pickle that holds more than tensors"
KINDS = "it holds sparse, quantised or nested tensors, or some without values"
COPIES = "it makes something of what an earlier call made"


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (b"}" + b"N" + b"\x85" * 1000 + b"K\x01s", KEYS),
        (b"c__builtin__\nset\n]" + b"N" + b"\x85" * 1000 + b"a\x85R", KEYS),
        (b"}ctorch\nSize\n]\x85RNs", KEYS),
        (b"}\x8a\x08" + (2**60).to_bytes(8, "little") + b"Ns", KEYS),
        (b"}X\x11\x27\x00\x00" + b"a" * 10_001 + b"Ns", KEYS),
        (b"(N\x91", UNREAD),
        (b"\x96" + (2**28).to_bytes(8, "little"), UNREAD),
        (b"c__builtin__\nbytearray\n" + MUCH + b"\x85R", "it calls bytearray for something else than text in latin1"),
        (
            b"ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nbytearray\nN" + MUCH + b"\x85NtR",
            "it makes a tensor by what makes none",
        ),
        (
            b"(X\x06\x00\x00\x00modulec__builtin__\nbytearray\nNNtQ" + MUCH + b"\x85R",
            "it calls bytearray for something else than text in latin1",
        ),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00idna\x86R", "it calls encode for something else than"),
        (b"ctorch\nFloatTensor\n" + MUCH + b"\x85R", KINDS),
        (b"ctorch.storage\nUntypedStorage\n" + MUCH + b"\x85R", KINDS),
        (b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n)R", KINDS),
        (b"c__builtin__\nset\n" + MADE + b"\x85R", "it makes a set or a dict of what is no list"),
        (b"cUserDict\nOrderedDict\n" + MADE + b"\x85R", "it makes a set or a dict of what is no list"),
        (b"ccollections\nOrderedDict\n]" + MADE + b"a\x85R", "it makes a dict of what are no pairs"),
        (b"ctorch\nSize\n" + MADE + b"\x85R", COPIES),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNNN" + MADE + b"tR", COPIES),
        (b"ctorch._utils\n_rebuild_parameter_with_state\n(NNN" + MADE + b"N\x86tR", COPIES),
        (MADE + MADE + b"b", "it gives an object attributes that are in no dict"),
        (b"cargparse\nNamespace\n)\x81](NNeb", "it gives an object attributes that are in no dict"),
        (b"ctorch\nSize\n]R", "it calls something with no tuple of arguments"),
        (b"])\x81", "it makes an object of what is no class"),
        (b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + LATIN1 + b"N]tQ", "a storage has no name, or no"),
        (
            b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + LATIN1 + b"NK\x01)\x85K\x00K\x00\x87tQ",
            KEYS,
        ),
        (
            b"c_codecs\nencode\nq\x00X\x00\x00\x01\x00" + bytes(2**16) + b"q\x01" + LATIN1 + b"q\x02"
            + b"h\x00h\x01h\x02\x86R" * 800,
            "its pickle takes more than 3,000,000 steps",
        ),
    ],
    ids=[
        "deep key", "deep in a set", "shape as key", "large number as key", "long key", "set of sets", "array of bytes",
        "bytearray", "bytearray within", "bytearray by another way", "other codec", "tensor of a size",
        "storage of a size", "tensor that is copied", "set of a dict", "dict of a dict by another name",
        "dict of no pairs", "shape of what was made", "metadata", "state", "state of a dict", "state of a namespace",
        "no tuple", "no class", "storage", "view", "copies",
    ],
)  # fmt: skip
def test_a_short_pickle_that_asks_for_much(tmp_path: Path, pickled: bytes, reason: str) -> None:
    assert refused(tmp_path / "w.pth", b"\x80\x02" + pickled + b".").startswith(reason)


def test_steps_of_a_pickle_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "MOST_STEPS", 1000)
    lists = b"\x80\x02" + b"]" * 1000 + b"."
    # a tuple of 300 values that is the arguments of a call four times, and once more in a tuple in the arguments
    again = b"\x80\x02cx\ny\nq\x00(" + b"N" * 300 + b"tq\x01"
    for asked in (lists, again + b"h\x00h\x01R" * 4 + b".", again + b"h\x00h\x01\x85\x85R" * 4 + b"."):
        assert refused(tmp_path / "w.pth", asked) == "its pickle takes more than 1,000 steps"
    write_cifar100_python(tmp_path / "cifar", 4, 2)
    damage(tmp_path / "cifar" / "meta", lists)
    with pytest.raises(DataError, match=r"meta is damaged or no pickle \(its pickle takes more than 1,000 steps\);"):
        load_data(str(tmp_path / "cifar"))


def test_operations_that_cifar_does_not_use(tmp_path: Path) -> None:
    """Some call what they are given without being looked at."""
    write_cifar100_python(tmp_path, 4, 2)
    latin1 = b"X\x01\x00\x00\x00a" + LATIN1
    for asked in (
        b"(N\x91",
        b"\x96" + (2**28).to_bytes(8, "little"),
        b"(c_codecs\nencode\n" + latin1 + b"o",
        b"(" + latin1 + b"i_codecs\nencode\n",
        b"c_codecs\nencode\n" + latin1 + b"\x86}\x92",
    ):
        damage(tmp_path / "meta", b"\x80\x02" + asked + b".")
        with pytest.raises(
            DataError, match=r"meta is damaged or no pickle \(it holds sets, arrays of bytes or objects in"
        ):
            load_data(str(tmp_path))


def test_a_description_of_an_array_is_not_copied(tmp_path: Path) -> None:
    """A tuple of the bytes would take eight times as much, and text of two letters for each two."""
    pickled = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)RX\x00\x00\x20\x00" + b"a" * 2**21
    pickled += b"bcnumpy\ndtype\nT\x00\x00\x20\x00" + b"\xff" * 2**21 + b"\x85R."
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="meta holds a _Type"):
            load_pickle(pickled, tmp_path / "meta")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


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
        (array("u1", (10**10, 0), b"a"), "an array's description is no such thing"),
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
