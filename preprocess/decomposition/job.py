"""One decomposition from its first byte on disk to its last: lock, room, progress, layers, the finished bases."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType

from torch import nn

from ... import __version__
from ...errors import StoreError
from ...linear import layer_shape
from ...store import Moments, create_store, open_store
from ...store.basis_writer import LayerDone
from ...store.format.schema import content_hash, disk_guard
from ...store.lock import writer_lock
from ...store.staging import occupied, place, remove
from ..distributed import World, dealt
from ..model import loading
from ..progress import Progress
from .request import Request
from .target import Target
from .weights import Weigh, WrongWeight, weigher
from .workers import Jobs, cost, decomposed


class Decomposition:
    """The bases of requests of one store from the model's modules: `with` it, every one of `layers` is to be noted.

    Of several processes each decomposes some of the layers, and the first one notes all. Entering takes the lock, looks
    what is there and begins or resumes. PrepError where the store is being written, holds another basis of that name,
    or the disk has no room.

    Weights are checked when they are read, next to the work. Where one is wrong, a single process takes back what it
    has begun, so that the store is as it was; what it resumed stays as it is, and so does what several processes began.
    """

    def __init__(self, requests: Sequence[Request], net: nn.Module, modules: Mapping[str, nn.Module], world: World):
        self._requests, self._net, self._modules, self._world = requests, net, modules, world
        self._weigh = weigher(requests[0])
        self._targets = {request.name: Target(request, net, modules, self._weigh) for request in requests}
        self._made_store = False
        self._quiet = requests[0].options.quiet or world.rank > 0

    def __enter__(self) -> Decomposition:
        store, world = self._requests[0].options.store, self._world
        with contextlib.ExitStack() as stack:
            size = sum(target.bytes for target in self._targets.values())
            stack.enter_context(disk_guard(store, size if world.rank == 0 else 0))
            self._todo = world.on_rank_zero(self._begin, stack)
            self._open = {name: target for name, target in self._targets.items() if name in self._todo}
            if self._open:
                root, count = open_store(store, "r+").root, sum(map(len, self._todo.values()))
                for target in self._open.values():
                    target.open(root)
                label = f"decompose {', '.join(self._open)}"
                self._progress = stack.enter_context(Progress(label, count, "layers", self._quiet))
            self._held = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            if isinstance(error, WrongWeight) and self._world.size == 1:
                self._take_back()
            elif error is not None and self._world.rank == 0:
                for target in self._open.values():
                    target.writer.flush()  # an interruption loses no layer
        finally:
            suppressed = self._held.__exit__(kind, error, trace)
        return suppressed

    def layers(self) -> Iterator[tuple[str, LayerDone]]:
        """(name of the basis, layer) of all processes as they are done, on the first one."""
        if self._open:
            yield from self._world.gather_iter(self._own())

    def note(self, name: str, done: LayerDone) -> None:
        """Count a layer of a basis as done."""
        self._open[name].writer.note(done)
        self._progress.advance(1)

    def finish(self) -> None:
        """Mark the bases complete, on the process that writes them."""
        for target in self._open.values():
            self._world.on_rank_zero(target.writer.finish)

    def _begin(self, stack: contextlib.ExitStack) -> dict[str, list[str]]:
        """Take the lock, begin or find the bases, and list the layers to do of those that are not complete."""
        options = self._requests[0].options
        stack.enter_context(writer_lock(options.store, options.break_lock))
        if self._requests[0].store is None:
            if occupied(options.store):
                raise StoreError(f"{options.store} was made by another process meanwhile: run the same command again")
            self._store_without_moments()
        try:
            todo = {name: target.begin(self._quiet) for name, target in self._targets.items()}
        except WrongWeight:
            self._take_back()
            raise
        return {name: layers for name, layers in todo.items() if layers is not None}

    def _take_back(self) -> None:
        """Remove what was begun. For the lock's holder."""
        for target in self._targets.values():
            target.take_back()
        if self._made_store:
            remove(place(self._requests[0].options.store))

    def _own(self) -> Iterator[tuple[str, LayerDone]]:
        """The layers of this process, U and P stored."""
        moments = moments_of(self._open)
        jobs = jobs_of(self._open, self._todo, self._weigh)
        jobs = replace(jobs, wanted=share_of(jobs.wanted, moments, self._modules, self._world))
        for name, done in decomposed(moments, self._modules, jobs, self._world.local_size):
            yield name, self._open[name].put(done)

    def _store_without_moments(self) -> None:
        """A store that holds bases only, for metric identity."""
        request = self._requests[0]
        model = loading.describe(self._net, request.model_id, request.revision)
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        attrs = {
            "model": model,
            "corpus": None,
            "options": None,
            "prep_version": __version__,
            "id": content_hash([str(sorted(model.items(), key=str))]),
            "status": "complete",
            "run": {"host": platform.node(), "started": started, "files": request.stamp(self._net)},
        }
        self._made_store = True
        create_store(request.options.store, attrs)


def moments_of(targets: Mapping[str, Target]) -> Moments | None:
    """Those of the layers' inputs, if a method needs them or directions are scored on them."""
    needed = [target.request for target in targets.values() if target.request.moments is not None or target.shares]
    store = needed[0].store if needed else None
    return None if store is None else store.moments


def jobs_of(targets: Mapping[str, Target], todo: Mapping[str, Sequence[str]], weigh: Weigh) -> Jobs:
    """The work for bases by name. todo: the layers of each that are left."""
    wanted: dict[str, list[str]] = {}
    for name, layers in todo.items():
        for layer in layers:
            wanted.setdefault(layer, []).append(name)
    methods = {name: target.request.method for name, target in targets.items()}
    scored = [name for name, target in targets.items() if target.shares]
    crossed = {name: target.crossed() for name, target in targets.items()}
    repair = next((target.request.repair for target in targets.values()), None)  # of all requests alike
    return Jobs(methods, wanted, scored, crossed, weigh, repair)


def share_of(
    wanted: Mapping[str, Sequence[str]], moments: Moments | None, modules: Mapping[str, nn.Module], world: World
) -> dict[str, Sequence[str]]:
    """What one process does of the layers and their bases: whole sites, so that each moment is read once, and about
    the same work for all.
    """
    sites = moments.sites if moments is not None else {layer: [layer] for layer in wanted}
    site = {layer: name for name, layers in sites.items() for layer in layers}
    work: dict[str, int] = {}
    for layer, names in wanted.items():
        work[site[layer]] = work.get(site[layer], 0) + cost(layer_shape(modules[layer])) * len(names)
    rank = dealt(work, world.size)
    return {layer: names for layer, names in wanted.items() if rank[site[layer]] == world.rank}
