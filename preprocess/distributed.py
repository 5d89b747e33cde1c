"""Several processes on one calibration or decomposition, by torch.distributed (gloo on CPUs, nccl on GPUs).

Rank r of n takes the batches r, r + n, r + 2n ...; a round is one batch of each. Within a node the accumulators of a
site are kept by one rank, its owner, which is handed the products of all others batch by batch; the sums of several
nodes are added on the first one when they are stored. Sums are float64, so the result is that of one process up to
the order of its additions.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import PrepError
from ..store import SiteData
from .numerics.accumulators import Collect, alone

T = TypeVar("T")
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = timedelta(hours=2)  # a rank may wait this long for another one that loads a model or writes a checkpoint


@dataclass(frozen=True)
class Ranks:
    """This process among its `size` peers. node: the group of its node's ranks; peers: one rank of every node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: Any = None
    peers: Any = None

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.size // self.local_size

    @property
    def writes(self) -> bool:
        """Whether this rank is on the first node, which writes the store."""
        return self.rank < self.local_size

    @property
    def device(self) -> str:
        """The device that a model of this rank belongs on: a GPU of its own where there are any."""
        if not torch.cuda.is_available():
            return "cpu"
        return "cuda" if self.local_size == 1 else f"cuda:{self.local_rank % torch.cuda.device_count()}"

    def first(self, action: Callable[[], T]) -> T:
        """The result of `action` on rank 0, on every rank. A PrepError there is raised everywhere and told once."""
        with self.together():
            result = [action() if self.rank == 0 else None]
        if self.size > 1:
            with _in_contact():
                dist.broadcast_object_list(result, src=0)
        return result[0]  # type: ignore[return-value]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A PrepError inside ends all ranks; the first rank that has one tells it, the others are `silent`."""
        if self.size == 1:
            yield
            return
        own = None
        try:
            yield
        except PrepError as error:
            own = error
        errors = self.gather(None if own is None else str(own))
        failed = [rank for rank, error in enumerate(errors) if error is not None]
        if failed:
            told = own or PrepError(str(errors[failed[0]]))
            told.silent = self.rank != failed[0]
            raise told

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _in_contact():
            dist.all_gather_object(values, value)
        return values

    def added(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Numbers by name, added over all ranks."""
        total: dict[str, int] = {}
        for part in self.gather(dict(counts)):
            for name, count in part.items():
                total[name] = total.get(name, 0) + count
        return total

    def most(self, *values: int) -> list[int]:
        """The largest of every number over all ranks."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values)
        with _in_contact():
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return numbers.tolist()

    def wait(self) -> None:
        """Return when every rank is here."""
        self.gather(None)

    def collector(self, owner: int) -> Collect:
        """A function that hands a tensor of every rank of the node to the local rank `owner`, in their order.

        It is called by all of them at the same point, and gives the other ranks nothing.
        """
        if self.local_size == 1:
            return alone

        def collect(x: Tensor) -> list[Tensor]:
            mine = self.local_rank == owner
            parts = [torch.empty_like(x) for _ in range(self.local_size)] if mine else None
            with _in_contact():
                dist.gather(x, parts, group=self.node, group_dst=owner)
            return parts or []

        return collect

    def share(self, batches: Iterable[T]) -> Iterator[T | None]:
        """The batches of this rank; None in a last round that has none for it."""
        number = -1
        for number, batch in enumerate(batches):
            if number % self.size == self.rank:
                yield batch
        if 0 < (number + 1) % self.size <= self.rank:
            yield None

    def brought_together(self, own: Iterable[T]) -> Iterator[T]:
        """What the iterables of all ranks give, on rank 0 as it comes; the others hand theirs over and give nothing."""
        if self.rank > 0:
            for item in itertools.chain(own, [None]):
                with _in_contact():
                    dist.send_object_list([item], dst=0, device=torch.device("cpu"))
            return
        inbox: SimpleQueue = SimpleQueue()

        def receive(source: int) -> None:
            box: list[Any] = [()]
            while box[0] is not None:
                try:
                    with _in_contact():
                        dist.recv_object_list(box, src=source, device=torch.device("cpu"))
                except PrepError as error:
                    box[0] = None
                    inbox.put(error)
                inbox.put(box[0])

        for source in range(1, self.size):
            threading.Thread(target=receive, args=(source,), daemon=True).start()
        open_ = self.size - 1

        def arrived(wait: bool) -> Iterator[T]:
            nonlocal open_
            while open_ and (wait or not inbox.empty()):
                item = inbox.get()
                if isinstance(item, PrepError):
                    raise item
                if item is None:
                    open_ -= 1
                else:
                    yield item

        for item in own:
            yield item
            yield from arrived(wait=False)
        yield from arrived(wait=True)

    def over_nodes(self, sums: SiteData, count: int) -> SiteData:
        """Sums of one site added over the nodes, right on the first one, where `count` tokens are in them."""
        if self.nodes == 1:
            return sums

        def add(x: Tensor) -> Tensor:
            x = x.clone()
            with _in_contact():
                dist.reduce(x, group=self.peers, group_dst=0)
            return x

        return replace(
            sums,
            count=count,
            mean=add(sums.mean),
            second_moment=[add(panel) for panel in sums.second_moment] if sums.second_moment else None,
            diagonal=add(sums.diagonal) if sums.diagonal is not None else None,
            outputs={name: [add(panel) for panel in sums.outputs[name]] for name in sorted(sums.outputs)}
            if sums.outputs
            else None,
        )


ALONE = Ranks()


def dealt(sizes: Mapping[str, int], shares: int) -> dict[str, int]:
    """A share's number for every name, so that all shares have about the same sum of sizes: the largest first."""
    loads, share = [0] * shares, {}
    for name in sorted(sizes, key=lambda name: sizes[name], reverse=True):
        share[name] = loads.index(min(loads))
        loads[share[name]] += sizes[name]
    return share


@contextlib.contextmanager
def joined(distributed: bool) -> Iterator[Ranks]:
    """The ranks of this job, joined by the environment that torchrun sets, unless torch.distributed has begun already.

    PrepError where the environment is incomplete, or nodes have different numbers of processes.
    """
    if not distributed:
        yield ALONE
        return
    begun = dist.is_initialized()
    if not begun:
        missing = [name for name in _NEEDED if name not in os.environ]
        if missing:
            raise PrepError(f"several processes need {', '.join(missing)} in the environment: start them with torchrun")
        with _in_contact():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    found = _ranks()
    yield found
    found.wait()  # a rank that is gone while another still talks to it takes that one down
    if not begun:
        dist.destroy_process_group()


def launched() -> bool:
    """Whether torchrun, or a scheduler that sets its variables, started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def _ranks() -> Ranks:
    rank, size = dist.get_rank(), dist.get_world_size()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    found = Ranks(rank, size, local_rank, local_size)
    sizes = found.gather((local_rank, local_size))
    if any(given != (other % local_size, local_size) for other, given in enumerate(sizes)):
        raise PrepError("the nodes run different numbers of processes: start as many on each")
    nodes = [range(a, a + local_size) for a in range(0, size, local_size)]
    peers = [range(r, size, local_size) for r in range(local_size)]
    with _in_contact():  # every rank takes part in making every group
        groups = [dist.new_group(list(ranks)) for ranks in [*nodes, *peers]]
    return replace(found, node=groups[rank // local_size], peers=groups[len(nodes) + local_rank])


@contextlib.contextmanager
def _in_contact() -> Iterator[None]:
    """Turn a broken connection into one line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # torch raises its own kinds of RuntimeError
        raise PrepError(
            f"rank {os.environ.get('RANK', '?')} lost contact with another rank, which has failed or was stopped "
            f"({str(error).splitlines()[0]:.120}): run the same command again, it resumes"
        ) from error
