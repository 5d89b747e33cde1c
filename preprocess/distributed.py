"""Several processes on one calibration or decomposition, by torch.distributed.

Rank r of n takes the batches r, r + n, r + 2n ...; a round is one batch of each. Within a node the sums of a site are
kept by one rank, its owner, which is handed the products of all others batch by batch; the sums of several nodes are
added on the first one when they are stored. Sums are float64, so the result is that of one process up to the order of
its additions. Everything goes over gloo groups of the project's own, so the job's own backend does not matter.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import chain
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import PrepError
from .numerics.accumulators import Collect, alone

T = TypeVar("T")
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = timedelta(hours=2)  # a rank may wait this long for another one that loads a model or writes a checkpoint


@dataclass(frozen=True)
class World:
    """This process among its `size` peers. Groups: all ranks; those of this node; one rank of every node; all
    ranks over NCCL, where each has a GPU of its own."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    everyone: Any = None
    node: Any = None
    peers: Any = None
    gpus: Any = None

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.size // self.local_size

    @property
    def writes(self) -> bool:
        """Whether this rank is on the first node, which writes the store."""
        return self.rank < self.local_size

    def device(self, asked: str | None) -> str:
        """The device of this rank's model: the one asked for, by default a GPU of its own where there are any."""
        asked = asked or ("cuda" if torch.cuda.is_available() else "cpu")
        if asked != "cuda" or self.local_size == 1:
            return asked
        return f"cuda:{self.local_rank % max(1, torch.cuda.device_count())}"

    def on_rank_zero(self, action: Callable[..., T], *args: Any) -> T:
        """`action(*args)` on rank 0, its result on every rank. A PrepError there is raised everywhere."""
        with self.agreed():
            result = [action(*args) if self.rank == 0 else None]
        if self.size > 1:
            with _in_contact():
                dist.broadcast_object_list(result, src=0, group=self.everyone)
        return result[0]  # type: ignore[return-value]

    def on_all(self, action: Callable[..., T], *args: Any) -> T:
        """`action(*args)` on every rank; a PrepError on one of them is raised on all."""
        with self.agreed():
            return action(*args)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """A PrepError inside ends all ranks; the first rank that has one prints it, the others are `silent`."""
        if self.size == 1:
            yield
            return
        own = None
        try:
            yield
        except PrepError as error:
            own = error
        errors = self.all_gather(None if own is None else str(own))
        failed = [rank for rank, error in enumerate(errors) if error is not None]
        if failed:
            told = own or PrepError(str(errors[failed[0]]))
            told.silent = self.rank != failed[0]
            raise told

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _in_contact():
            dist.all_gather_object(values, value, group=self.everyone)
        return values

    def sum(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Numbers by name, added over all ranks."""
        total: dict[str, int] = {}
        for part in self.all_gather(dict(counts)):
            for name, count in part.items():
                total[name] = total.get(name, 0) + count
        return total

    def max(self, *values: int) -> list[int]:
        """The largest of every number over all ranks."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values)
        with _in_contact():
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.everyone)
        return numbers.tolist()

    def barrier(self) -> None:
        """Return when every rank is here."""
        self.all_gather(None)

    def collector(self, owner: int) -> Collect:
        """A function that hands a tensor of every rank of the node to the local rank `owner`, in their order, on CPU.

        It is called by all of them at the same point, and gives the other ranks nothing.
        """
        if self.local_size == 1:
            return alone

        def collect(x: Tensor) -> list[Tensor]:
            # products of long batches are float64, and every process must hand over the same
            x, mine = (x.double() if x.is_floating_point() else x).cpu(), self.local_rank == owner
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

    def reduce(self, x: Tensor) -> Tensor:
        """x added over the nodes, right on the first one; each rank must be the owner of the same sums."""
        if self.nodes == 1:
            return x
        x = x.clone()
        with _in_contact():
            dist.reduce(x, group=self.peers, group_dst=0)
        return x

    def reduce_to(self, owner: int, x: Tensor) -> Tensor:
        """x added over all ranks, right on rank `owner`; between GPUs where x is on one."""
        if self.size == 1:
            return x
        between = self.gpus if x.is_cuda else None
        x = x.clone() if x.device.type == "cpu" or between else x.cpu()
        with _in_contact():
            dist.reduce(x, group=between or self.everyone, group_dst=owner)
        return x

    def gather_rows(self, owner: int, x: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """x (n, d) of every rank, on the host of rank `owner`; nothing on the others. counts: n of each rank."""
        if self.size == 1:
            return [x]
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts] if self.rank == owner else None
        with _in_contact():
            dist.gather(padded, parts, group=self.everyone, group_dst=owner)
        return [part[:count] for part, count in zip(parts, counts, strict=True)] if parts else []

    def gather_iter(self, own: Iterable[T]) -> Iterator[T]:
        """Yield all ranks' items on rank 0 as they arrive; other ranks send theirs and yield nothing.

        A PrepError of another rank is raised here, too, where it is told.
        """
        if self.rank > 0:
            try:
                for item in chain(own, [None]):
                    self._send(item)
            except PrepError as error:
                if not error.silent:
                    self._send(error)
                    error.silent = True
                raise
            return
        inbox: SimpleQueue = SimpleQueue()
        for source in range(1, self.size):
            threading.Thread(target=_receive, args=(source, self.everyone, inbox), daemon=True).start()
        sending = self.size - 1
        for item in own:
            yield item
            while sending and not inbox.empty():
                arrived = _checked(inbox.get())
                sending -= arrived is None
                if arrived is not None:
                    yield arrived
        while sending:
            arrived = _checked(inbox.get())
            sending -= arrived is None
            if arrived is not None:
                yield arrived

    def _send(self, item: Any) -> None:
        with _in_contact():
            dist.send_object_list([item], dst=0, group=self.everyone, device=torch.device("cpu"))


ALONE = World()


def dealt(sizes: Mapping[str, int], shares: int) -> dict[str, int]:
    """Deal names to shares, the largest first, so that all shares have about the same sum of sizes: name -> share."""
    loads, share = [0] * shares, {}
    for name in sorted(sizes, key=lambda name: sizes[name], reverse=True):
        share[name] = loads.index(min(loads))
        loads[share[name]] += sizes[name]
    return share


@contextlib.contextmanager
def joined(distributed: bool) -> Iterator[World]:
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
            dist.init_process_group("gloo", timeout=_PATIENCE)
    world = _world()
    yield world
    world.barrier()  # a rank that is gone while another still talks to it takes that one down
    if not begun:
        dist.destroy_process_group()


def launched() -> bool:
    """Whether torchrun, or a scheduler that sets its variables, started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def check_devices(world: World, device: str | None, device_map: Any, seen: Sequence[Sequence[str]]) -> None:
    """Refuse devices that the processes of a node would have to share; seen: `visible_devices` of every rank."""
    if world.local_size == 1:
        return
    if device is not None and ":" in device:
        raise PrepError(f"--device {device} would hold {world.local_size} processes: leave it out, each takes its own")
    node = seen[world.rank - world.local_rank :][: world.local_size]
    distinct = len({name for names in node for name in names})
    if device_map is not None and distinct < sum(map(len, node)):
        raise PrepError(
            "--device-map spreads the model over every device that a process sees, and the processes of a node see "
            "the same ones: start one per node, or give each its own CUDA_VISIBLE_DEVICES"
        )
    if device_map is None and world.device(device).startswith("cuda") and world.local_size > distinct:
        raise PrepError(
            f"{world.local_size} processes on a node with {distinct} GPUs: start one per GPU, "
            f"torchrun --nproc-per-node {distinct}, or all with --device cpu"
        )


def visible_devices() -> list[str]:
    """Names of the GPUs that this process sees; those of a machine without any are its one CPU."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return named.split(",")
    return [str(i) for i in range(torch.cuda.device_count())] or ["cpu"]


def _world() -> World:
    everyone = _gloo(range(dist.get_world_size()))
    rank, size = dist.get_rank(), dist.get_world_size()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    world = World(rank, size, local_rank, local_size, everyone)
    sizes = world.all_gather((local_rank, local_size))
    if any(given != (other % local_size, local_size) for other, given in enumerate(sizes)):
        raise PrepError("the nodes run different numbers of processes: start as many on each")
    nodes = [_gloo(range(a, a + local_size)) for a in range(0, size, local_size)]  # every rank makes every group
    peers = [_gloo(range(r, size, local_size)) for r in range(local_size)]
    return replace(world, node=nodes[rank // local_size], peers=peers[local_rank], gpus=_nccl(world))


def _gloo(ranks: Sequence[int]) -> Any:
    with _in_contact():
        return dist.new_group(list(ranks), timeout=_PATIENCE, backend="gloo")


def _nccl(world: World) -> Any:
    """A group of all ranks over NCCL; None unless every rank of a node has a GPU of its own."""
    possible = dist.is_nccl_available() and torch.cuda.device_count() >= world.local_size
    if not all(world.all_gather(possible)):
        return None
    if world.local_size > 1:
        torch.cuda.set_device(world.local_rank)
    with _in_contact():
        return dist.new_group(timeout=_PATIENCE, backend="nccl")


def _receive(source: int, group: Any, inbox: SimpleQueue) -> None:
    """Put what a rank sends into the inbox: items, None at the end, or the PrepError that ends it or its connection."""
    box: list[Any] = [()]
    while box[0] is not None:
        try:
            with _in_contact():
                dist.recv_object_list(box, src=source, group=group, device=torch.device("cpu"))
        except PrepError as error:
            inbox.put(error)
            return
        inbox.put(box[0])
        if isinstance(box[0], PrepError):
            return


def _checked(item: Any) -> Any:
    if isinstance(item, PrepError):
        raise item
    return item


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
