"""How the processes of a run part, whatever is kept of an error, and meet again for the next run."""

from __future__ import annotations

import os
import runpy
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from make_process import ROOT, as_rank, finish, start
from torch import distributed, nn
from torch.distributed import HashStore, TCPStore

from finetune import rendezvous
from finetune.ranks import Ranks
from finetune.rendezvous import joined
from weights.errors import DataError, FinetuneError, RunError, StoppedError, UsageError

WAITS: tuple[Callable[[Ranks], object], ...] = (lambda ranks: ranks.sum(torch.ones(1)), Ranks.wait)
"""What the first process waits in when the second one ends: in a group of its own each."""


def train(ranks: Ranks, wait: Callable[[Ranks], object]) -> None:
    """Take a step; then the second process fails, and the first one waits for it."""
    forward = ranks.wrap(nn.Linear(3, 1), torch.device("cpu"))
    forward(torch.ones(2, 3)).sum().backward()
    if not ranks.first:
        raise DataError("photos is damaged.")
    wait(ranks)


def stop_first(ranks: Ranks, left: Path) -> None:
    """Stop the first process while it waits for the second one, which is busy until the first one has left."""

    def stop() -> None:
        raise StoppedError("Stopped.")

    if ranks.first:
        ranks.wait(stop)
    until = time.monotonic() + 60  # looked at only where the first process does not leave
    while not left.exists():
        if time.monotonic() > until:
            sys.exit("The first process has not left.")
        time.sleep(0.01)
    ranks.check()


def part_and_meet() -> None:
    """Fail three times and keep the errors, as a caller may, and do it right the fourth time."""
    kept: list[FinetuneError] = []
    left = Path("../left")
    try:
        with joined() as ranks:
            stop_first(ranks, left)
    except FinetuneError as error:
        left.touch()
        kept.append(error)
        print(error)
    for number, wait in enumerate(WAITS):
        heard = Path(f"../heard-{number}")
        try:
            with joined() as ranks:
                train(ranks, wait)
        except FinetuneError as error:
            kept.append(error)
            print(error)
        if ranks.first:
            heard.touch()
        until = time.monotonic() + 60  # looked at only where the first process is left waiting
        while not heard.exists():
            if time.monotonic() > until:
                sys.exit("The first process was not left.")
            time.sleep(0.01)
    with joined() as ranks:
        print(f"{ranks.sum(torch.ones(1)).item():.0f} together after {len(kept)} errors")
    sys.exit()


def test_a_process_whose_error_is_kept_has_left_and_the_next_run_has_both(tmp_path: Path) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has one
    folders = [tmp_path / "first", tmp_path / "second"]
    processes = [
        start(folder, prepare=partial(as_rank, rank, store.port, part_and_meet)) for rank, folder in enumerate(folders)
    ]
    codes = [finish(process) for process in processes]
    told = [(folder / "out.txt").read_text().splitlines() for folder in folders]
    assert codes == [0, 0], [(folder / "err.txt").read_text() for folder in folders]
    assert told == [
        ["Stopped.", *["Process 1 of this run ended: photos is damaged."] * 2, "2 together after 3 errors"],
        ["Process 0 of this run ended: Stopped.", *["photos is damaged."] * 2, "2 together after 3 errors"],
    ]


@pytest.fixture
def _launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seem to be started by torchrun."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.usefixtures("_launched")
def test_a_process_that_is_in_a_group_already() -> None:
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UsageError) as error, joined():
            pass
    finally:
        distributed.destroy_process_group()
    assert str(error.value) == (
        "This process has a process group of PyTorch already (torch.distributed.init_process_group), and a run under "
        "torchrun makes its own; call torch.distributed.destroy_process_group() before it."
    )


@pytest.mark.usefixtures("_launched")
def test_a_group_that_an_earlier_run_could_not_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("ncclCommAbort failed")

    destroy = distributed.destroy_process_group
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(distributed, "destroy_process_group", fail)
        rendezvous._part(Ranks(0, 2))
        with pytest.raises(RunError) as error, joined():
            pass
    finally:
        destroy()
    assert str(error.value) == (
        "An earlier run of this process could not leave its process group; start a new process."
    )


@pytest.mark.usefixtures("_launched")
def test_a_pytorch_without_its_distributed_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process does without it; several are refused."""
    bare = ModuleType("torch.distributed")
    bare.is_available = lambda: False  # type: ignore[attr-defined]  # all that such a build has there
    monkeypatch.setitem(sys.modules, "torch.distributed", bare)
    monkeypatch.setattr(torch, "distributed", bare)
    alone = runpy.run_path(str(ROOT / "finetune" / "ranks.py"))["Ranks"]()
    assert float(alone.sum(torch.ones(1))) == 1
    assert alone.wrap(nn.Identity(), torch.device("cpu"))(2) == 2
    joining = runpy.run_path(str(ROOT / "finetune" / "rendezvous.py"))["joined"]
    with pytest.raises(UsageError) as error, joining():
        pass
    assert str(error.value) == (
        "2 processes are to share this run, and this build of PyTorch has no distributed part; start one process "
        "without torchrun, or install a build that has it."
    )
    monkeypatch.delenv("WORLD_SIZE")
    with joining() as ranks:
        assert ranks.alone


@pytest.mark.usefixtures("_launched")
def test_standard_output_is_kept_for_the_caller(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """gloo of PyTorch 2.9 writes a line for each connection to it, past Python."""

    def connect(*given: object, **named: object) -> None:
        os.write(1, b"[Gloo] Rank 0 is connected to 1 peer ranks.\n")
        raise RuntimeError("timed out")

    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(rendezvous, "_share_cores", lambda processes: None)
    monkeypatch.setattr(distributed, "rendezvous", lambda *given, **named: iter([(HashStore(), 0, 2)]))
    monkeypatch.setattr(distributed, "init_process_group", connect)
    print('{"epochs": ', end="")
    with pytest.raises(RunError, match=r"do not reach each other \(timed out\)"), joined():
        pass
    print("1}")
    assert capfd.readouterr().out == '{"epochs": 1}\n'
