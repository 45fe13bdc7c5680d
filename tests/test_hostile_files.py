"""Files of strangers: what is no file, what is too large, what leads elsewhere, and figures that are none."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from make_data import write_cifar100_binary, write_cifar100_python, write_tar
from make_hostile import (
    CLASSES,
    NESTED,
    change_json,
    damage,
    pipe,
    row_of,
    write_finished,
    write_model,
    write_photos,
)
from PIL import Image
from PIL.EpsImagePlugin import EpsImageFile

from finetune import cifar, decode
from finetune.cache import Entry, list_entries, make_room
from finetune.compare import compare
from finetune.data import load_data
from finetune.folder import FOLLOW
from finetune.grid import make_grid
from finetune.inputs import find_images
from finetune.precision import Choice, remembered
from finetune.predictions import read_predictions
from finetune.recipe import Recipe, check, from_table, read_toml
from finetune.report import rebuild_report
from finetune.rundir import RunDirectory
from finetune.trained import load_trained
from weights.arch import resolve_arch
from weights.errors import DataError, FinetuneError, RunError, UsageError, WeightsError
from weights.guard import LARGEST_TEXT, read_bytes
from weights.load import read_tensors
from weights.locate import locate
from weights.record import record_path, recorded


def said(read: Callable[[], object]) -> str:
    """Return the sentence that reading ends with."""
    with pytest.raises(FinetuneError) as error:
        read()
    assert "\n" not in str(error.value)
    return str(error.value)


# What is no file


def test_named_pipes_are_not_waited_for(tmp_path: Path) -> None:
    model, run = write_model(tmp_path / "model"), write_finished(tmp_path / "run")
    photos = write_photos(tmp_path / "photos")
    write_cifar100_binary(tmp_path / "cifar", 4, 2)
    places: list[tuple[Path, Callable[[], object]]] = [
        (tmp_path / "w.pth", lambda: read_tensors(tmp_path / "w.pth")),
        (model / "config.json", lambda: load_trained(model)),
        (run / "summary.json", lambda: rebuild_report(run)),
        (run / "metrics.jsonl", lambda: rebuild_report(run)),
        (run / "predictions.safetensors", lambda: rebuild_report(run)),
        (run / "recipe.toml", lambda: read_toml(run / "recipe.toml")),
        (run / "checkpoint.pt", lambda: RunDirectory(run).read_checkpoint()),
        (tmp_path / "cifar.tar.gz", lambda: cifar.cifar_archive(tmp_path / "cifar.tar.gz")),
        (photos / "cat" / "0.png", lambda: load_data(str(photos))),
    ]
    for path, read in places:
        whole = path.read_bytes() if path.exists() else b""
        with pipe(path) as opened:
            try:
                message = said(read)
            except OSError as error:  # of an archive, which whoever names the data turns into a sentence
                message = str(error)
        assert "a named pipe, not a file" in message, path
        assert opened == [], path
        damage(path, whole)
    with pipe(record_path(tmp_path / "w.pth")) as opened:
        assert recorded(tmp_path / "w.pth") is None
    assert opened == []


def test_devices_are_refused(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    device = damage(tmp_path / "w.pth", Path("/dev/null"))
    assert "(a device, not a file)" in said(lambda: read_tensors(device))
    with pytest.raises(OSError, match="a device, not a file"):
        decode.open_image(damage(photos / "cat" / "0.png", Path("/dev/null")))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="a file of Linux")
def test_files_of_the_system_that_say_to_have_nothing() -> None:
    assert Path("/proc/self/maps").read_bytes() != b"" == read_bytes(Path("/proc/self/maps"))


# Too large, too deep


def test_text_that_is_too_large_or_nested_without_end(tmp_path: Path) -> None:
    model, run = write_model(tmp_path / "model"), write_finished(tmp_path / "run")
    readers: list[tuple[Path, Callable[[], object]]] = [
        (model / "config.json", lambda: load_trained(model)),
        (model / "config.json", lambda: locate(resolve_arch("test_resnet"), str(model))),
        (run / "config.json", lambda: rebuild_report(run)),
        (run / "metrics.jsonl", lambda: rebuild_report(run)),
        (run / "summary.json", lambda: compare([run, model])),
        (run / "summary.json", RunDirectory(run).read_summary),
    ]
    for path, read in readers:
        whole = path.read_bytes()
        path.write_text(NESTED)
        assert "nested too deeply" in said(read), path
        path.write_text('{"a": 1' + "0" * 5000 + "}")
        assert "5001 digits" in said(read), path
        path.write_text('{"label_names": ["\\ud800"]}')
        assert "surrogates not allowed" in said(read), path
        with path.open("r+b") as file:
            file.truncate(LARGEST_TEXT + 1)
        assert "larger than the 16,777,216 bytes that such a file may have" in said(read), path
        path.write_bytes(whole)
    recipe = run / "recipe.toml"
    for content, reason in (("a = " + NESTED, "nested too deeply"), ("seed = 1" + "0" * 5000, "5001 digits")):
        recipe.write_text(content)
        assert reason in said(lambda: read_toml(recipe))
    recipe.write_bytes(b"#" * 2**19)
    assert "larger than the 262,144 bytes" in said(lambda: read_toml(recipe))


def test_settings_that_no_arithmetic_takes() -> None:
    for table in ({"epochs": 10**9 + 1}, {"views": 2**70, "augment": "crop"}, {"patience": 2**70}, {"cutout": 2**70}):
        with pytest.raises(UsageError, match=r"1,000,000,000|number of epochs|number of pixels"):
            check(from_table(table, "r.toml"))
    for table, words in (
        ({"lr": 10**400}, "r.toml has lr = 1000.*…; it must be a number"),
        ({"data_dir": "a\0b"}, r"r.toml has data_dir = 'a\\x00b'; it must be a path in quotes"),
        ({"x" * 10**5: 1}, "r.toml has an unknown setting 'x{200}…'; delete that line"),
    ):
        with pytest.raises(UsageError, match=words):
            from_table(table, "r.toml")
    rates = ",".join(map(str, range(1, 200)))
    with pytest.raises(UsageError, match="These values make 39,601 runs; give fewer, 10,000 runs at most"):
        make_grid(Recipe(), lr=rates, weight_decay=rates).check(Recipe())
    outside = make_grid(Recipe(), train_layers=["../../fc", "..", "layer4,fc"])
    assert [one.name for one in outside.candidates(Recipe())] == ["cut1", "cut2", "layer4+fc"]


# Archives


def tar_of(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], end: bytes = bytes(1024)) -> Path:
    """Write a .tar.gz whose headers say what they are told to; `end` follows the members."""
    content = b"".join(header.tobuf(tarfile.GNU_FORMAT) + data for header, data in members)
    path.write_bytes(gzip.compress(content + end, 1))
    return path


def member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size, header.type = size, kind
    return header


SPARSE = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n".ljust(512, b"\0")
RECORDS = b"".join(b"9 k%d=v\n" % number for number in range(101, 202)).ljust(2**10, b"\0")


def test_archives_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "MOST_MEMBERS", 5)
    monkeypatch.setattr(cifar, "LARGEST_UNPACKED", 2**20)
    path = tmp_path / "a.tar.gz"
    zeros = bytes(2**20 + 512)
    for members, end, reason in (
        ([(member(f"{n}", 0), b"") for n in range(6)], bytes(1024), "it has more than 5 members"),
        ([(member("train", 2**40), b"")], b"", "its member 1 has 1,099,511,627,776 bytes"),
        ([(member("train", -(2**40)), b"")], b"", "its member 1 has -1,099,511,627,776 bytes|.*invalid"),
        ([(member("train", 2**19), bytes(2**19)), (member("x", 2**19), bytes(2**19))], zeros, "it unpacks to more"),
        (
            [(member("long", 2**40, tarfile.GNUTYPE_LONGNAME), b"")],
            b"",
            "a header has 1,099,511,627,776 bytes, and may h",
        ),
        ([(member("x", 4096, tarfile.XHDTYPE), b"3 x" * 1365 + b"=")], zeros, "a header has 4,096 bytes, and may have"),
        ([(member("x", 0, tarfile.GNUTYPE_SPARSE), b"")], zeros, "it holds a sparse file"),
        ([(member("x", 44, tarfile.XHDTYPE), SPARSE), (member("train", 0), b"")], zeros, "it holds a sparse file"),
        (
            [(member("x", len(RECORDS), tarfile.XGLTYPE), RECORDS), (member("x", 0), b"")],
            zeros,
            "more than 100 records",
        ),
        ([(member("train", 2**19), b"cut")], b"", "unexpected end of data|it ends too early"),
    ):
        with pytest.raises(DataError, match=rf"a\.tar\.gz cannot be read as a \.tar\.gz \(({reason}).*\); fetch it"):
            cifar.cifar_archive(tar_of(path, members, end))  # type: ignore[arg-type]
    long = said(lambda: cifar.cifar_archive(tar_of(path, [(member("../" + "a" * 1000, 0), b"")])))
    assert f"a.tar.gz holds '../{'a' * 196}…, a path that leads out of it" in long


def test_cifar_files_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar100_python(tmp_path, 4, 2)
    with (tmp_path / "meta").open("r+b") as file:
        file.truncate(2**20 + 1)
    assert "meta has 1,048,577 bytes, too many for names of classes; fetch" in said(lambda: load_data(str(tmp_path)))
    monkeypatch.setattr(cifar, "LARGEST_FILE", 1000)
    write_cifar100_python(tmp_path, 4, 2)
    assert "train cannot be CIFAR: it is larger than the 1,000 bytes" in said(lambda: load_data(str(tmp_path)))


# Images


def test_an_image_that_is_a_program_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, runs = write_photos(tmp_path / "photos"), []
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n"
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: runs.append("gs") or Image.new("RGB", (8, 8)).im)
    with Image.open(io.BytesIO(eps)) as opened:
        assert isinstance(opened, EpsImageFile)  # Pillow takes it, and would hand it on
        opened.load()
    assert runs == ["gs"]
    damage(photos / "cat" / "0.png", eps)
    write_tar(tmp_path / "a.tar", {"0.png": eps, "0.cls": b"cat", "1.png": eps[:3], "1.cls": b"dog"})
    for path, place in ((photos, photos / "cat" / "0.png"), (tmp_path / "a.tar", f"{tmp_path}/a.tar: 0.png")):
        assert f"{place} (EPS, which is not admitted: JPEG, PNG, " in said(partial(load_data, str(path)))
    message = said(partial(load_data, str(tmp_path / "a.tar")))
    assert message.endswith(
        f"TGA and ICO are), {tmp_path}/a.tar: 1.png (no image that Pillow knows); replace or remove them."
    )
    assert runs == ["gs"]


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = write_photos(tmp_path / "photos")
    for largest, alone in ((8 * 8 - 1, True), (8 * 8, False)):
        monkeypatch.setattr(decode, "LARGE", largest)
        held: list[bool] = []
        with decode.open_image(photos / "cat" / "0.png") as opened:
            monkeypatch.setattr(opened, "load", lambda held=held: held.append(decode._one_at_a_time.locked()))
            decode.upright(opened)
        assert held[0] == alone


# Links


def test_links_that_lead_out_of_a_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = write_photos(tmp_path / "elsewhere")
    for name, target in (("cat/x.png", elsewhere / "dog" / "0.png"), ("cat/x", elsewhere / "dog"), ("bee", elsewhere)):
        photos = write_photos(tmp_path / f"photos {name.replace('/', '-')}")
        damage(photos / name, target)
        for read in (partial(load_data, str(photos)), partial(find_images, [photos])):
            assert said(read) == (
                f"{photos / name} is a link that leads out of {photos}; expected a folder that holds its own files, "
                "so copy what it leads to, or set FINETUNE_FOLLOW_LINKS=1 if the links are your own."
            )
    inside = write_photos(tmp_path / "inside")
    damage(inside / "cat" / "x.png", inside / "dog" / "0.png")
    assert len(find_images([inside]).files) == 5
    monkeypatch.setenv(FOLLOW, "1")
    assert len(find_images([photos]).files) == 8


def test_links_in_a_run_directory_and_in_the_cache(tmp_path: Path) -> None:
    run, mine = write_finished(tmp_path / "run"), tmp_path / "mine"
    mine.write_text("mine")
    for name in (".lock", "tensorboard"):
        link = damage(run / name, mine)
        with pytest.raises(RunError) as error, RunDirectory(run):
            pass
        assert str(error.value) == f"{link} is a link that leads elsewhere; remove it, since a run writes to it."
        link.unlink()
    entry = Entry(tmp_path / "features" / "a", 2, ((25,),), (torch.float32,))
    damage(entry.folder / "tensor-0.bin", mine)
    with pytest.raises(RunError, match=r"a cannot be written \(a link that leads elsewhere\); free some disk space"):
        entry.open({})
    damage(entry.folder.with_suffix(".lock"), mine)
    with pytest.raises(OSError, match="a link that leads elsewhere"):
        _ = entry.lock
    assert mine.read_text() == "mine"


def test_only_the_caches_own_folders_make_room(tmp_path: Path) -> None:
    for name in ("thesis", "entry"):
        entry = Entry(tmp_path / "features" / name, 2, ((25,),), (torch.float32,))
        entry.open({"rows": "many"})
    (tmp_path / "features" / "thesis" / "chapter-1.txt").write_text("mine")
    (tmp_path / "features" / "link").symlink_to(tmp_path / "features" / "entry")
    assert [entry.key for entry in list_entries(tmp_path)] == ["entry"]
    make_room(tmp_path, 10**6, 1, [])
    assert sorted(path.name for path in (tmp_path / "features").iterdir() if path.is_dir()) == ["thesis"]


# Figures that are none


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epochs": "<script>"}, r"summary.json: epochs is '<script>'"),
        ({"epochs": 10**18}, "summary.json: epochs is 10"),
        ({"seconds__total": None}, "summary.json: seconds.total is None"),
        ({"seconds": []}, "summary.json: seconds is no JSON object"),
        ({"seconds__prefix": float("nan")}, "summary.json: seconds.prefix is nan"),
        ({"parameters__total": 0}, "summary.json: parameters.total is 0"),
        ({"calibration__temperature": 0}, "summary.json: calibration is {"),
        ({"test_loss": None}, "summary.json: only some figures of a test are there"),
        ({"test_accuracy": None, "test_loss": None, "test_mean_recall": 1.0}, "only some figures of a test are there"),
        ({"trained_layers": [1]}, r"summary.json: trained_layers is \[1\]"),
        ({"versions": {"torch": [[]]}}, "summary.json: versions is {"),
        ({"data__uneven": "yes"}, "summary.json: data.uneven is 'yes'"),
    ],
)
def test_a_summary_that_no_run_wrote(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    run, other = write_finished(tmp_path / "run", **changes), write_finished(tmp_path / "other")
    for read in (partial(rebuild_report, run), partial(compare, [other, run])):
        with pytest.raises(RunError, match=rf"run is no finished run \(.*{reason}.*\); give a folder that finetune r"):
            read()
    assert not (run / "report.html").exists()


def test_a_row_of_metrics_that_no_run_wrote(tmp_path: Path) -> None:
    run = write_finished(tmp_path / "run")
    rebuild_report(run)
    for row in (row_of(10**12), row_of(1, train_loss="<b>"), row_of(1, val_loss=1e300), [1], {"epoch": 1}):
        (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(RunError, match=r"run is no finished run \(metrics.jsonl: .*\); give a folder"):
            compare([run, write_finished(tmp_path / "other")])


def test_predictions_that_no_run_wrote(tmp_path: Path) -> None:
    path = tmp_path / "predictions.safetensors"
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 2])
    shown, pictures = torch.tensor([1]), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    good = {"logits": logits, "labels": labels, "shown": shown, "pictures": pictures}
    safetensors.torch.save_file(good, path)
    assert read_predictions(path) is not None
    for name, value in (
        ("labels", torch.tensor([0, 3])),
        ("labels", torch.tensor([0, 2**62])),
        ("labels", torch.tensor([0.0, 1.0])),
        ("logits", torch.full((2, 3), torch.nan)),
        ("logits", torch.zeros(2, 3, dtype=torch.int32)),
        ("logits", torch.zeros(2, 0)),
        ("logits", torch.zeros(2, 30_001)),
        ("shown", torch.tensor([2])),
        ("shown", torch.tensor([[1]])),
        ("pictures", torch.zeros(1, 3, 4, 4)),
        ("pictures", torch.zeros(1, 3, 0, 4, dtype=torch.uint8)),
    ):
        safetensors.torch.save_file({**good, name: value}, path)
        with pytest.raises(RunError, match=r"predictions.safetensors is damaged \(.*\); make it again with finetune e"):
            read_predictions(path)
    run = write_finished(tmp_path / "run")
    change_json(run / "config.json", {"label_names": ["ant", "bee"]})
    with pytest.raises(RunError, match=r"config.json: 2 label_names, but predictions.safetensors has 3 cl"):
        rebuild_report(run)


def test_a_config_that_asks_for_files_memory_or_time(tmp_path: Path) -> None:
    for changes, reason in (
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "model_args checkpoint_path, which says what to read"),
        ({"model_args": {"pretrained_cfg": {}}}, "model_args pretrained_cfg, which says what to read"),
        ({"model_args": {"width": 10**9}}, "model_args width 1000000000, more than any network has"),
        ({"model_args": {"channels": [8] * 1000}}, "more than any network has"),
        ({"pretrained_cfg__input_size": [3, 60_000, 60_000]}, "expected 3 colours and a square of at most 2,048 pix"),
        ({"pretrained_cfg__crop_pct": 1e-9}, 'has "crop_pct" 1e-09 in "pretrained_cfg"; expected a number from 0.25'),
        ({"pretrained_cfg__std": [0, 1, 1]}, "expected numbers other than 0"),
        ({"pretrained_cfg__mean": [float("inf")] * 3}, "expected three numbers"),
        ({"architecture": "resnet50"}, "too few for the 23,5"),
        ({"finetune": {"temperature": 1e-300}}, "has a temperature of 1e-300; expected a number above 0"),
    ):
        model = write_model(tmp_path / "model", **changes)
        with pytest.raises(WeightsError) as error:
            load_trained(model)
        assert reason in str(error.value)
    for changes in ({"pretrained_cfg__mean": ["a"] * 3}, {"num_classes": 10**9}, {"pretrained_cfg__classifier": 5}):
        model = write_model(tmp_path / "model", **changes)
        assert "Mend it, or give the weights alone" in said(partial(locate, resolve_arch("test_resnet"), str(model)))
    assert load_trained(write_model(tmp_path / "model")).classes == CLASSES


def test_a_remembered_timing_that_cannot_be(tmp_path: Path) -> None:
    usual = Choice("fp32", False, 10.0, 0.0, "measured")
    remembered(tmp_path, {}, lambda: usual)
    (path,) = (tmp_path / "measurements").glob("*.json")
    for name, value in (("rate", 1e400), ("rate", "10"), ("precision", ["fp32"]), ("compiled", 1), ("reason", None)):
        remembered(tmp_path, {}, lambda: usual)
        content = json.loads(path.read_text())
        path.write_text(json.dumps({"choice": {**content["choice"], name: value}}))
        assert remembered(tmp_path, {}, lambda: usual) == usual
