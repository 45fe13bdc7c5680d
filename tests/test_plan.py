"""Where features go, and how a plan reads."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune.budget import Budget, closing_seconds, keep_time
from finetune.cache import room_on_disk
from finetune.placement import DISK_RESERVE, Placement, place, size
from finetune.plan import Disk, Plan, duration
from finetune.precision import Choice
from weights.errors import UsageError

GB = 10**9
Usage = namedtuple("Usage", "free")


@pytest.fixture(autouse=True)
def _disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with 100 GB to use."""
    monkeypatch.setattr(psutil, "disk_usage", lambda path: Usage(100 * GB + DISK_RESERVE))


def placed(needed: int, **settings: Any) -> Placement:
    usual: dict[str, Any] = {
        "mode": "auto",
        "free": room_on_disk(Path("/nowhere/at/all")),
        "limit": 50 * GB,
        "memory": 8 * GB,
        "held": 0,
        "fresh_each_epoch": False,
    }
    return place(needed, **{**usual, **settings})


def test_what_fits_memory_and_disk_is_kept_in_both() -> None:
    assert placed(5 * GB) == Placement("ram", True, 5 * GB, "5.0 GB in memory, kept on disk for the next run")


def test_what_does_not_fit_memory_is_read_from_disk() -> None:
    reason = "11.0 GB on disk, read as needed (memory budget 8.0 GB)"
    assert placed(11 * GB) == Placement("disk", True, 11 * GB, reason)


def test_what_does_not_fit_the_disk_stays_in_memory_alone() -> None:
    reason = "5.0 GB in memory; the disk budget is too small to keep them"
    assert placed(5 * GB, limit=4 * GB) == Placement("ram", False, 5 * GB, reason)


def test_what_fits_nowhere_is_computed_in_every_epoch() -> None:
    reason = "60.0 GB fit neither disk nor memory, so they are computed in every epoch"
    assert placed(60 * GB) == Placement("off", False, 0, reason)


def test_a_nearly_full_disk_counts_as_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "disk_usage", lambda path: Usage(5 * GB))
    assert placed(4 * GB).on_disk is False  # 2 GB stay free for everything else
    assert placed(3 * GB).on_disk is True
    assert placed(4 * GB, held=GB).on_disk is True  # what is there already needs no room


def test_off_is_off() -> None:
    assert placed(GB, mode="off") == Placement("off", False, 0, "computed anew in every epoch, as asked")


def test_ram_never_touches_the_disk() -> None:
    assert placed(GB, mode="ram") == Placement("ram", False, GB, "1.0 GB in memory, nothing on disk")


def test_ram_that_is_too_small_is_an_error() -> None:
    with pytest.raises(UsageError) as error:
        placed(9 * GB, mode="ram")
    assert str(error.value) == (
        "--cache ram needs 9.0 GB for features and the memory budget is 8.0 GB; raise --memory-budget, lower --limit "
        "or --views, or use --cache disk."
    )


def test_disk_stays_on_disk_though_memory_would_do() -> None:
    reason = "1.0 GB on disk, read as needed (memory budget 8.0 GB)"
    assert placed(GB, mode="disk") == Placement("disk", True, GB, reason)


def test_a_disk_that_is_too_small_is_an_error() -> None:
    with pytest.raises(UsageError) as error:
        placed(60 * GB, mode="disk")
    assert str(error.value) == (
        "--cache disk needs 60.0 GB for features; --cache-limit is 50.0 GB and 100.0 GB can be used on that disk: "
        "raise the limit, point --cache-dir elsewhere, or use --cache off."
    )


def test_views_that_are_used_once_are_not_kept_unless_they_are_there() -> None:
    reason = "every epoch has views of its own, so they are computed as it goes"
    assert placed(GB, fresh_each_epoch=True) == Placement("off", False, 0, reason)
    assert placed(GB, fresh_each_epoch=True, held=GB).where == "off"  # what is held may be of another split
    assert placed(GB, fresh_each_epoch=True, mode="disk").where == "disk"


def test_a_gpus_own_memory_comes_before_the_computers_and_that_before_the_disk() -> None:
    own = placed(5 * GB, device=6 * GB)
    assert own == Placement("device", True, 5 * GB, "5.0 GB in the GPU's memory, kept on disk for the next run")
    assert placed(7 * GB, device=6 * GB).where == "pinned"
    assert placed(9 * GB, device=6 * GB).where == "disk"
    assert placed(60 * GB, device=6 * GB).where == "off"
    larger = placed(9 * GB, device=10 * GB, mode="ram")  # than the computer's memory
    assert larger == Placement("device", False, 9 * GB, "9.0 GB in the GPU's memory, nothing on disk")
    asked = placed(7 * GB, device=6 * GB, mode="ram").reason
    assert asked == "7.0 GB in memory, sent to the GPU batch by batch, nothing on disk"
    assert placed(5 * GB, device=6 * GB, mode="disk").where == "disk"


def test_what_a_gpu_computes_faster_than_a_disk_gives_it_back_is_not_kept() -> None:
    reason = "5.0 GB in the GPU's memory, not kept: a disk is slower than computing them again"
    assert placed(5 * GB, device=6 * GB, quick=True) == Placement("device", False, 5 * GB, reason)
    assert placed(5 * GB, device=6 * GB, quick=True, held=5 * GB).on_disk  # all of it is there already
    assert placed(9 * GB, device=6 * GB, quick=True).where == "disk"


def test_the_disk_that_is_asked_about_is_the_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(psutil, "disk_usage", lambda path: asked.append(path) or Usage(100 * GB))
    assert room_on_disk(tmp_path / "not" / "yet" / "there") == 100 * GB - DISK_RESERVE
    assert asked == [str(tmp_path)]


def test_decoded_photos_count_as_room(tmp_path: Path) -> None:
    for key, about in {"photos": {"decoded": 1}, "features": {"prefix": "ab"}}.items():
        folder = tmp_path / "features" / key
        folder.mkdir(parents=True)
        (folder / "about.json").write_text(json.dumps(about))
        (folder / "tensor-0.bin").write_bytes(b"0" * 1000)
    photos = sum(file.stat().st_size for file in (tmp_path / "features" / "photos").iterdir())
    assert room_on_disk(tmp_path) == 100 * GB + photos


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "under 1 s"),
        (8.4, "8 s"),
        (99.4, "99 s"),
        (100, "1 min 40 s"),
        (200.2, "3 min 20 s"),
        (3599.6, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (10**6, "1.0 MB"), (11 * 10**9, "11.0 GB")],
)
def test_sizes_read_well(count: int, text: str) -> None:
    assert size(count) == text


def make_plan(**changes: Any) -> Plan:
    usual: dict[str, Any] = {
        "arch": "resnet18.tv_in1k",
        "image_size": 224,
        "data": "cifar100",
        "classes": 100,
        "counts": (45000, 5000, 10000),
        "device": "a processor, 2 threads",
        "parameters": (11_227_812, 8_445_028, 0),
        "multiply_adds": (1_404_000_000, 410_000_000),
        "trained_layers": ("layer4", "fc"),
        "prefix": Choice("bf16", True, 300.0, 40.0, "fp32 100 img/s, bf16 300 img/s"),
        "training": Choice("fp32", False, 1000.0, 0.0, "fp32 1000 img/s"),
        "placement": Placement("ram", True, 11 * GB, "11.0 GB in memory, kept on disk for the next run"),
        "window_share": 1.0,
        "seen_share": 1.0,
        "feature_views": 105_000,
        "disk": Disk(Path("cache"), held=0, write=11 * GB, free=100 * GB, model=45_000_000, checkpoint=68_000_000),
        "epochs": 8,
        "budget": None,
        "batch_size": 128,
        "feature_seconds": 350.0,
        "epoch_seconds": 45.0,
        "eval_seconds": 18.0,
        "start_seconds": 12.0,
    }
    return Plan(**{**usual, **changes})


def test_a_plan_reads_as_sentences() -> None:
    plan = make_plan()
    assert plan.total_seconds == 350 + 8 * 45 + 18
    assert plan.sentences() == [
        "resnet18.tv_in1k on cifar100: 45,000 train, 5,000 validation, 10,000 test images",
        "trains layer4, fc: 8,445,028 of 11,227,812 parameters",
        "device a processor, 2 threads; training in fp32, eager (fp32 1000 img/s)",
        "frozen part, 77 % of a forward pass, in bf16, compiled (fp32 100 img/s, bf16 300 img/s)",
        "features: 11.0 GB in memory, kept on disk for the next run",
        "expected: 5 min 50 s for 105,000 feature rows, 8 epochs of 45 s, 12 min 8 s in all",
    ]


def test_an_uncut_plan_has_no_line_about_a_frozen_part() -> None:
    plan = make_plan(
        prefix=None, trained_layers=("",), placement=Placement("uncut", False, 0, "none: every layer trains")
    )
    assert plan.sentences()[1] == "trains all: 8,445,028 of 11,227,812 parameters"
    assert plan.sentences()[3] == "features: none: every layer trains"


def test_a_plan_says_where_images_lie_that_every_epoch_looks_at() -> None:
    for where, words in (("device", "in the GPU's memory"), ("pinned", "in memory, sent to the GPU batch by batch")):
        plan = make_plan(images=(where, 184_320_000))
        assert plan.sentences()[5] == f"images: 184.3 MB {words}"
        assert plan.as_dict()["images"] == {"streamed": False, "where": where, "bytes": 184_320_000}
    assert len(make_plan(images=("ram", 10)).sentences()) == len(make_plan().sentences())
    assert make_plan().as_dict()["images"] == {"streamed": False}


def test_what_a_budget_leaves_for_epochs() -> None:
    """12 s of start and 80 s of features come first, each of 8 epochs takes 51 s, twice 31 s are kept for the end."""
    seconds = {"feature_seconds": 100.0, "test_feature_seconds": 20.0, "epoch_seconds": 50.0}
    seconds |= {"eval_seconds": 18.0, "test_seconds": 10.0}
    assert make_plan(**seconds).epochs_in_budget == make_plan(**seconds, budget=10_000).epochs_in_budget == 8
    assert (
        make_plan(**seconds, budget=10_000)
        .sentences()[-1]
        .endswith("8 epochs of 50 s, 8 min 38 s in all, within --budget, 2 h 46 min")
    )
    plan = make_plan(**seconds, budget=12 + 80 + 62 + 2.5 * 51)
    assert plan.epochs_in_budget == pytest.approx(2.5)
    plan.require_time("282s")
    assert plan.sentences()[-1] == (
        "expected: 1 min 40 s for 105,000 feature rows, about 2.5 of 8 epochs of 50 s, ended by --budget after "
        "4 min 42 s"
    )
    with pytest.raises(UsageError) as error:
        make_plan(**seconds, budget=154.0).require_time("154s")
    assert str(error.value) == (
        "--budget 154s leaves no time to train: start, features, evaluation and test need 2 min 34 s; give more time, "
        "or fewer images with --limit."
    )


def test_what_a_budget_keeps_for_the_end_follows_the_epochs() -> None:
    """Planned are 50 s of training and 1 s of validation in each epoch, and 31 s from the last one on."""
    plan = make_plan(epoch_seconds=50.0, eval_seconds=18.0, test_seconds=10.0, test_feature_seconds=20.0, budget=600.0)
    usual = {"seconds": 50.0, "eval_seconds": 1.0}
    assert closing_seconds(plan, [], 0.0) == closing_seconds(plan, [usual] * 3, 0.0) == plan.reserved_seconds == 62
    assert closing_seconds(plan, [{**usual, "seconds": 500.0}], 0.0) == 62, "the first epoch may have compiled"
    assert closing_seconds(plan, [usual, {**usual, "seconds": 101.0}], 0.0) == pytest.approx(2 * 62)
    slow = [{**usual, "eval_seconds": 3.0}]
    assert closing_seconds(plan, slow, 0.0) == pytest.approx(2 * 62 + 2 * 4 * 1), "twice as slow, and a second a pass"
    assert closing_seconds(plan, [usual], 3.0) == 62 + 2 * 2 * 3
    few = make_plan(eval_seconds=10.008, test_seconds=10.0, test_feature_seconds=20.0)
    instant = [{"seconds": 45.0, "eval_seconds": 0.1}]  # a hundred times what was planned says little of the rest
    assert few.reserved_seconds < closing_seconds(few, instant, 0.0) < 1.2 * few.reserved_seconds
    budget = Budget(500.0, lambda: 0.0)
    keep_time(budget, plan, slow, 0.0)
    assert budget.until == pytest.approx(600 - 132)
    keep_time(budget, plan, [usual], 0.0)
    assert budget.until == pytest.approx(600 - 132), "the end is never put off"


def test_an_estimate_counts_what_was_spent_before_the_plan() -> None:
    """As the summary does, which it is set against."""
    seconds = {"prefix": 350.0, "train": 360.0, "eval": 18.0, "total": 740.0}
    assert make_plan().estimate() == {"epochs": 8, "seconds": seconds}
