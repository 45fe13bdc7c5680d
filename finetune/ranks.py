"""Several processes that train one model: torchrun starts them, PyTorch's process groups connect them.

Everything that is known of ranks is in a `Ranks`, and the rest asks it. A process that is alone has one as well, which
hands back as it is what it is asked to add up or to wrap.

Gradients, sums and the question whether to stop go through the default group: gloo between CPUs, nccl between GPUs.
What one process may have to wait for at length, while another computes features or writes files, goes through a second
group of gloo, which gives up after days; a process that dies closes its connections, and then nobody waits any longer.
A process that ends with an error leaves its words in torchrun's store, for the others to repeat.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from weights.errors import RunError, UsageError

if TYPE_CHECKING:
    # Absent where PyTorch is built without its distributed part.
    from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]

STEP_TIMEOUT = timedelta(minutes=10)  # the most that one process may be behind the others within a step
WAIT_TIMEOUT = timedelta(days=7)  # the most that one may be behind with its features or with rank 0's files
POLL = 0.05  # seconds between two looks at what is waited for
LOOK = 1.0  # seconds between two looks at the store while features are computed
ENDED = "ended"  # the store's key for the words of the first process that ended with an error

T = TypeVar("T")


@dataclass
class Ranks:
    """This process among those of a run; `Ranks()` is alone.

    Attributes:
        rank: its number, from 0.
        size: processes in all.
        local: its number among those of this machine.
        local_size: processes on this machine.
        advice: how a user goes on when another process is lost.
        store: what every process can read and write; None when alone.
        patient: the group that waits at length; None when alone.
        pending: what it waits for now; None where it does not.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1
    advice: str = "start the run again"
    store: Store | None = None
    patient: ProcessGroup | None = None
    pending: Any = None
    _looked: float = 0.0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def device(self, picked: torch.device) -> torch.device:
        """Return this process's own device, given what `--device` came to, and settle there.

        Raises:
            UsageError: the processes of this machine cannot have one each.
        """
        if self.alone or picked.type == "cpu":
            return picked
        if picked.type != "cuda":
            raise UsageError(f"Several processes train on CPUs or on CUDA GPUs, and this is {picked}; use one process.")
        if picked.index is not None and self.local_size > 1:
            raise UsageError(
                f"--device {picked} is one GPU and {self.local_size} processes of the run are on this machine; give "
                "--device cuda, and each takes its own."
            )
        here = torch.cuda.device_count()
        if self.local_size > here:
            raise UsageError(
                f"{self.local_size} processes of the run are on this machine, which has {here} "
                f"GPU{'' if here == 1 else 's'}; give torchrun --nproc-per-node {here}, or the run --device cpu."
            )
        own = picked if picked.index is not None else torch.device("cuda", self.local)
        torch.cuda.set_device(own)
        return own

    def part(self, count: int) -> range:
        """Return the rows of a split of `count` images whose features this process holds: a block of them."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what `make` returns in the first process; it is called only there, and the others wait."""
        if self.alone:
            return make()
        held: list[Any] = [make() if self.first else None]
        distributed.broadcast_object_list(held, src=0, group=self.patient, device=torch.device("cpu"))
        made: T = held[0]
        return made

    def number_of_first(self, value: float) -> float:
        """Return the first process's number."""
        if self.alone:
            return value
        number = torch.tensor([value], dtype=torch.float64)
        distributed.broadcast(number, src=0)
        return float(number)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return a tensor added up over all processes: on the CPU, or as it is when alone."""
        if self.alone:
            return values
        total = values.detach().cpu().clone().contiguous()
        distributed.all_reduce(total)
        return total

    def stops(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """Return a question that all processes answer alike: was any of them asked to stop?

        It has to be asked equally often everywhere. The answer is that to the question before, so that no step waits.
        """
        if self.alone:
            return stop
        asked: list[tuple[Any, torch.Tensor]] = []

        def any_stops() -> bool:
            flag = torch.tensor([int(stop())], dtype=torch.int32)
            asked.append((distributed.all_reduce(flag, distributed.ReduceOp.MAX, async_op=True), flag))
            if len(asked) == 1:
                return False
            work, answer = asked.pop(0)
            work.wait()
            return bool(answer)

        return any_stops

    def wait(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait until every process has come here, however long that takes.

        Args:
            check: called meanwhile; may raise to end the run.
        """
        if self.alone:
            return
        self.pending = work = distributed.all_reduce(torch.zeros(1), group=self.patient, async_op=True)
        while work is not None and not work.is_completed():
            check()
            time.sleep(POLL)
        if work is not None:
            work.wait()
        self.pending = None

    def check(self) -> None:
        """Look now and then whether another process has ended with an error, where none is waited for.

        Raises:
            RunError: with that process's words.
        """
        if self.alone or time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        if (left := self.words_of_another()) is not None:
            raise RunError(left)

    def share_buffers(self, module: nn.Module) -> None:
        """Give all processes the first one's running statistics: a number for each channel, and counts of batches."""
        if self.alone:
            return
        for value in module.buffers():
            if value.ndim <= 1:
                distributed.broadcast(value, src=0)

    def wrap(self, module: nn.Module, device: torch.device) -> Callable[..., torch.Tensor]:
        """Return what to call in training: DistributedDataParallel, which averages gradients; alone, the module.

        The graph counts as static because a step always uses the same parameters; there may be some that none uses.
        """
        if self.alone:
            return module
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # not in torch 2.9
        no_buffers: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        return DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            static_graph=True,
            **no_buffers,  # share_buffers does it once an epoch
        )

    def require_same(self, facts: Mapping[str, object]) -> None:
        """Refuse a process that differs from the first one.

        Args:
            facts: what has to be equal everywhere, by the names that a user knows.

        Raises:
            RunError: naming the process and what is different; the same in all of them.
        """
        if self.alone:
            return
        everyone: list[Any] = [None] * self.size
        distributed.all_gather_object(everyone, dict(facts), group=self.patient)
        if (found := difference(everyone)) is not None:
            raise RunError(found)

    def words_of_another(self) -> str | None:
        """Return what another process left that ended with an error, None where none did."""
        try:
            if self.store is None or not self.store.check([ENDED]):
                return None
            first = json.loads(self.store.get(ENDED))
        except RuntimeError:
            return None
        return words(first) if first["rank"] != self.rank else None


def words(ended: Mapping[str, Any]) -> str:
    """Return a sentence on a process that ended, from what it left in the store."""
    return f"Process {ended['rank']} of this run ended: {ended['text']}"


def difference(everyone: Sequence[Mapping[str, object]]) -> str | None:
    """Return a sentence on the first thing in which a process differs from process 0; None where all agree.

    Args:
        everyone: the facts of each process, by rank.
    """
    first = everyone[0]
    for rank, facts in enumerate(everyone):
        for name in {**first, **facts}:
            there, here = first.get(name, "not given"), facts.get(name, "not given")
            if there != here:
                return (
                    f"Process {rank} of this run has {name} {here} and process 0 has {there}; start all of them with "
                    "the same command, data, weights and versions."
                )
    return None
