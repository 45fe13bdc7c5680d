"""How the processes of a run find each other, and how they part.

torchrun starts them, and `joined` connects them for the length of a run. When one ends with an error, it leaves its
words in torchrun's store and closes its connections; the others notice that, find these words, and end with them.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from finetune.launch import launched
from finetune.machine import cores
from finetune.ranks import ENDED, STEP_TIMEOUT, WAIT_TIMEOUT, Ranks, words
from weights.errors import FinetuneError, RunError, StoppedError, UsageError

LOST = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")  # in PyTorch's words for a lost one

_runs = itertools.count()  # of this process: each has keys of its own in the store
_stuck: list[Any] = []  # default groups that this process could not leave
_waiting: list[Any] = []  # groups that it left while it waited in them


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes of a run where torchrun started several, and leave them at its end.

    Raises:
        RunError: another process ended or cannot be reached, or an earlier run's group could not be left.
        UsageError: this build of PyTorch cannot do it, or this process has a process group already.
    """
    if not launched():
        yield Ranks()
        return
    ranks = _join()
    try:
        yield ranks
    except BaseException as error:
        own = explained(ranks, error)
        _part_after(ranks, error)
        if own is error:
            raise
        raise own from error
    _part(ranks)


def _part(ranks: Ranks) -> None:
    """Leave the groups, so that another run of this process can make its own.

    gloo takes a group apart when nothing refers to it any more, and first waits for what is under way in it. While
    another process computes features that may be long, so such a group is kept; the others look into the store.
    """
    if ranks.pending is not None and not ranks.pending.is_completed():
        _waiting.append(ranks.patient)
    ranks.store = ranks.patient = ranks.pending = None
    _leave_groups()


def _leave_groups() -> None:
    """Leave PyTorch's groups. Where that fails this run has ended all the same, and the next one will be told."""
    everyone = distributed.group.WORLD
    if everyone is not None:
        try:
            distributed.destroy_process_group()
        except RuntimeError:
            _stuck.append(everyone)


def _part_after(ranks: Ranks, error: BaseException) -> None:
    """Leave the groups and close the connections to the others, who may be waiting for this process.

    gloo closes a connection when nothing refers to its group any more. An error refers to the frames that it came
    through, and these to DistributedDataParallel and to what is under way; whoever catches it may keep it. So what
    these frames hold is let go.
    """
    if (everyone := distributed.group.WORLD) is not None:
        with suppress(RuntimeError):
            everyone.abort()  # nccl's part: leaving it would wait for what the others no longer do
    del everyone
    _part(ranks)
    seen: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is not None and each not in seen:
            seen.append(each)
            traceback.clear_frames(each.__traceback__)
            left += [each.__cause__, each.__context__]
    gc.collect()  # DistributedDataParallel is in circles of references


def _join() -> Ranks:
    if not distributed.is_available():
        raise UsageError(
            f"{os.environ['WORLD_SIZE']} processes are to share this run, and this build of PyTorch has no distributed "
            "part; start one process without torchrun, or install a build that has it."
        )
    if distributed.is_initialized():
        if any(group is distributed.group.WORLD for group in _stuck):
            raise RunError("An earlier run of this process could not leave its process group; start a new process.")
        raise UsageError(
            "This process has a process group of PyTorch already (torch.distributed.init_process_group), and a run "
            "under torchrun makes its own; call torch.distributed.destroy_process_group() before it."
        )
    from torch.distributed import rendezvous  # type: ignore[attr-defined]  # absent where PyTorch has no such part

    rank, size, local, local_size = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    _share_cores(local_size)
    gpus = torch.cuda.is_available() and distributed.is_nccl_available()
    try:
        everything, _, _ = next(iter(rendezvous("env://", timeout=STEP_TIMEOUT)))
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = distributed.PrefixStore(  # type: ignore[attr-defined]
            f"finetune/{restart}/{next(_runs)}", everything
        )
        with _nothing_told():
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank, world_size=size, timeout=STEP_TIMEOUT
            )
            patient: Any = distributed.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    except RuntimeError as error:
        _leave_groups()  # for the next run of this process
        raise RunError(
            f"The {size} processes of this run do not reach each other ({_first_line(error)}); check the address that "
            "torchrun was given, and whether each machine can open connections to the others."
        ) from error
    return Ranks(rank, size, local, local_size, store=store, patient=patient)


@contextmanager
def _nothing_told() -> Iterator[None]:
    """Drop what is written to standard output: gloo of PyTorch 2.9 tells of each connection there, past Python.

    Standard output is the caller's: with --json a program reads it.
    """
    try:
        kept = os.dup(1)
    except OSError:  # closed: there is nothing to keep clean
        yield
        return
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _share_cores(processes: int) -> None:
    """Give each process of this machine its share of the cores, where the user has not said how many.

    torchrun says 1 for a user who has said nothing, so 1 counts as nothing said.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, cores().usable // processes))


def explained(ranks: Ranks, error: BaseException) -> BaseException:
    """Return what to raise for an error of this process, and leave its words to the others.

    A lost connection is no error of this process: it gets the words of the one that ended first, where that left any.
    So does a stop that torchrun asked for because another process had ended. What another process says on the same
    screen is marked as told.

    Args:
        ranks: of this process.
        error: what ends it.
    """
    if _is_lost(error):
        left = ranks.words_of_another()
        lost = RunError(
            left
            or f"Another process of this run has ended or cannot be reached any more ({_first_line(error)}), so this "
            f"one ends as well; {ranks.advice}"
        )
        machine = os.environ.get("GROUP_RANK", "0")
        lost.told = not ranks.first if left else _leave(ranks, f"lost/{machine}", "")["rank"] != ranks.rank
        return lost
    text = str(error) if isinstance(error, FinetuneError) else f"{type(error).__name__}: {_first_line(error)}"
    first = _leave(ranks, ENDED, text)
    if first["rank"] != ranks.rank and isinstance(error, FinetuneError):
        if first["text"] == text:
            error.told = True
        elif text == words(first):
            error.told = not ranks.first
        elif isinstance(error, StoppedError):
            lost = RunError(words(first))
            lost.told = not ranks.first
            return lost
    return error


def _leave(ranks: Ranks, key: str, text: str) -> dict[str, Any]:
    """Leave words in the store unless others are there; return those that are, with the rank of who left them."""
    own = {"rank": ranks.rank, "text": text}
    if ranks.store is None:
        return own
    try:
        kept: dict[str, Any] = json.loads(ranks.store.compare_set(key, "", json.dumps(own)))
    except RuntimeError:
        return own  # torchrun has gone, and its store with it
    return kept


def _is_lost(error: BaseException) -> bool:
    """Whether an error is PyTorch's for another process that is gone; it has no type of its own for that."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
