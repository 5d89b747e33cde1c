"""One decomposition from its first byte on disk to its last: lock, room, progress, layers, the finished basis."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ... import __version__
from ...errors import PrepError, StoreError
from ...linear import dtype_name, layer_shape, weight_hash, weight_matrix
from ...store import BasisSet, BasisWriter, LayerRecord, Moments, create_store, open_store
from ...store.bases import LayerDone
from ...store.format.schema import DTYPES, content_hash, disk_guard
from ...store.lock import writer_lock
from ...store.staging import occupied
from ..distributed import World, dealt
from ..model import loading
from ..numerics.methods import Method
from ..numerics.whitening import WhitenedSVD, spectrum_size
from ..options import BASIS_DTYPES
from ..progress import Progress, say
from .crossing import SAMPLE, to_cross
from .request import Request, check_same_weights, made_already, same_basis
from .workers import cost, decomposed

Shape = tuple[int, int]


class Decomposition:
    """The basis of a request from the model's modules: `with` it, every one of `layers` is to be noted.

    Each of several processes decomposes some of the layers, and the first one notes all. Entering takes the lock
    and begins or resumes. PrepError where the store is being written, holds another basis of that name,
    or the disk has no room.
    """

    def __init__(self, request: Request, net: nn.Module, modules: Mapping[str, nn.Module], world: World):
        self._request, self._net, self._modules, self._world = request, net, modules, world
        self._shapes = {layer: layer_shape(module) for layer, module in modules.items()}
        self._groups = groups_of(self._shapes, request.method)
        self._quiet = request.options.quiet or world.rank > 0

    def __enter__(self) -> Decomposition:
        options, name = self._request.options, self._request.name
        with contextlib.ExitStack() as stack:
            size = stored_bytes(self._groups, options.dtype)
            stack.enter_context(disk_guard(options.store, size if self._world.rank == 0 else 0))
            todo = self._world.on_rank_zero(self._begin, stack)
            self._complete, self._todo = todo is None, todo or []
            if not self._complete:
                self._writer = BasisWriter.resume(open_store(options.store, "r+").root, name)
                self._progress = stack.enter_context(
                    Progress(f"decompose {name}", len(self._todo), "layers", self._quiet)
                )
            self._held = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            if error is not None and not self._complete and self._world.rank == 0:
                self._writer.flush()  # an interruption loses no layer
        finally:
            suppressed = self._held.__exit__(kind, error, trace)
        return suppressed

    def layers(self) -> Iterator[LayerDone]:
        """The layers of all processes as they are done, on the first one."""
        if not self._complete:
            yield from self._world.gather_iter(self._own(self._todo))

    def note(self, done: LayerDone) -> None:
        """Count a layer as done."""
        self._writer.note(done)
        self._progress.advance(1)

    def basis(self) -> BasisSet | None:
        """The finished basis on the process that wrote it, None on the others."""
        if not self._complete:
            self._world.on_rank_zero(self._writer.finish)
        return open_store(self._request.options.store).bases[self._request.name] if self._world.rank == 0 else None

    def _begin(self, stack: contextlib.ExitStack) -> list[str] | None:
        """Take the lock, begin or find the basis, and list the layers to do; None where it is complete."""
        request, options = self._request, self._request.options
        stack.enter_context(writer_lock(options.store, options.break_lock))
        if request.store is None:
            if occupied(options.store):
                raise StoreError(f"{options.store} was made by another process meanwhile: run the same command again")
            self._store_without_moments()
        basis = same_basis(request)
        if basis is None:
            self._create()
            return list(self._modules)
        if basis.status == "complete":
            check_same_weights(request, basis, self._modules)
            say(made_already(request), self._quiet)
            return None
        done = f"{len(basis.layers)} of {len(basis.expected)} layers"
        say(f"basis {request.name!r}: resumed after {done}", self._quiet)
        hashes = {layer: record.weight_hash for layer, record in basis.layers.items()}
        return [
            layer for layer, module in self._modules.items() if hashes.get(layer) != weight_hash(weight_matrix(module))
        ]

    def _create(self) -> None:
        request = self._request
        BasisWriter.create(
            open_store(request.options.store, "r+").root,
            request.name,
            method=asdict(request.method),
            dtype=request.options.dtype,
            model=loading.describe(self._net, request.model_id, self._revision),
            groups=self._groups,
        )

    @property
    def _revision(self) -> str | None:
        store = self._request.store
        if self._request.options.model is None and store is not None:
            return store.model.get("revision")
        return self._request.options.revision

    def _own(self, todo: list[str]) -> Iterator[LayerDone]:
        """The layers of this process, U and P stored."""
        request, moments = self._request, self._request.moments
        mine = {layer: self._modules[layer] for layer in share_of(todo, moments, self._shapes, self._world)}
        crossed = to_cross(request.layers or {}, request.method, SAMPLE) if moments is not None else frozenset()
        for done in decomposed(moments, mine, request.method, self._world.local_size, crossed):
            layer, result = done.layer, done.result
            group = self._groups[self._shapes[layer]]
            record = record_of(result, self._shapes[layer], group["layers"].index(layer), done.W)
            record = replace(record, crossed=done.crossed)
            U, S, P, spectrum = map(torch.from_numpy, (result.U, result.S, result.P, result.spectrum))
            check_storable(layer, P, request.options.dtype)
            yield self._writer.put(layer, U, S, P, spectrum[: group["spectrum"]], record)

    def _store_without_moments(self) -> None:
        """A store that holds bases only, for metric identity."""
        model = loading.describe(self._net, self._request.model_id, self._revision)
        stamp = None
        if self._request.model_id is not None:
            stamp = loading.checkpoint_stamp(self._request.model_id, getattr(self._net, "config", None))
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        attrs = {
            "model": model,
            "corpus": None,
            "options": None,
            "prep_version": __version__,
            "id": content_hash([str(sorted(model.items(), key=str))]),
            "status": "complete",
            "run": {"host": platform.node(), "started": started, "files": stamp},
        }
        create_store(self._request.options.store, attrs)


def groups_of(shapes: Mapping[str, Shape], method: Method) -> dict[Shape, dict[str, Any]]:
    """Layers by shape, with the rank and the length of the spectrum that all of one shape have."""
    groups: dict[Shape, dict[str, Any]] = {}
    for layer, shape in shapes.items():
        rank = min(method.rank, *shape)
        entry = groups.setdefault(shape, {"layers": [], "rank": rank, "spectrum": spectrum_size(shape, method)})
        entry["layers"].append(layer)
    return groups


def stored_bytes(groups: Mapping[Shape, dict[str, Any]], dtype: str) -> int:
    """Bytes that a basis takes on disk."""
    return sum(
        len(g["layers"]) * (g["rank"] * (d_out + d_in) * BASIS_DTYPES[dtype] + 8 * (g["rank"] + g["spectrum"]))
        for (d_out, d_in), g in groups.items()
    )


def share_of(todo: list[str], moments: Moments | None, shapes: Mapping[str, Shape], world: World) -> list[str]:
    """The layers of one process: whole sites, so that each moment is read once, and about the same work for all."""
    sites = moments.sites if moments is not None else {layer: [layer] for layer in todo}
    site = {layer: name for name, layers in sites.items() for layer in layers}
    work: dict[str, int] = {}
    for layer in todo:
        work[site[layer]] = work.get(site[layer], 0) + cost(shapes[layer])
    rank = dealt(work, world.size)
    return [layer for layer in todo if rank[site[layer]] == world.rank]


def check_storable(layer: str, P: Tensor, dtype: str) -> None:
    """PrepError where a dtype has no room for P, as float16 for the weakest directions, whose S is small."""
    largest, most = float(P.abs().max()), torch.finfo(DTYPES[dtype]).max
    if not largest <= most:
        raise PrepError(
            f"{layer}: P has entries up to {largest:.0e}, {dtype} ends at {most:.0e}: store this basis with "
            "--dtype float32 or bfloat16 (and --overwrite what is there)"
        )


def record_of(result: WhitenedSVD, shape: Shape, index: int, W: Tensor) -> LayerRecord:
    """What the store records of a layer beside its arrays."""
    return LayerRecord(
        shape=shape,
        index=index,
        rank=len(result.S),
        energy=float(result.energy),
        tail=float(result.tail),
        numerical_rank=int(result.numerical_rank),
        solver=result.solver,
        bound=float(result.bound),
        weight_hash=weight_hash(W),
        weight_dtype=dtype_name(W.dtype),
    )
