"""One basis in the making: what is there of it, where its arrays lie, how a layer's result is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import zarr
from torch import Tensor, nn

from ...commands import OF_INPUTS
from ...errors import PrepError
from ...linear import layer_shape
from ...store import BasisWriter, LayerRecord, open_store
from ...store.bases import goes_at_once
from ...store.basis_places import take_back
from ...store.basis_writer import LayerDone
from ...store.format.schema import DTYPES
from ..model import loading
from ..numerics.methods import Method
from ..numerics.whitening import spectrum_size
from ..options import BASIS_DTYPES
from ..progress import say
from .crossing import tells_output, to_note
from .existing import check_same_weights, is_of, made_already, problem_of, same_basis
from .request import Request
from .weights import Weigh
from .workers import Decomposed

Shape = tuple[int, int]


class Target:
    """The basis of one request. `begin` on the process that writes, `open` on all, then `put` for every layer.

    weigh: reads and checks a layer's weight. shares: what is stored of every direction, as `BasisWriter.shares`.
    """

    def __init__(self, request: Request, net: nn.Module, modules: Mapping[str, nn.Module], weigh: Weigh):
        self.name, self.request = request.name, request
        self._net, self._modules, self._weigh = net, modules, weigh
        self._begun = False
        self._shapes = {layer: layer_shape(module) for layer, module in modules.items()}
        self.shares = self._told()
        self._groups = groups_of(self._shapes, request.method, self.shares)

    @property
    def bytes(self) -> int:
        """What the basis takes on disk."""
        return self.bytes_of(list(self._shapes))

    def bytes_of(self, layers: Sequence[str]) -> int:
        """What some of its layers take on disk."""
        shapes = {layer: self._shapes[layer] for layer in layers}
        return stored_bytes(groups_of(shapes, self.request.method, self.shares), self.request.options.dtype)

    def left(self) -> list[str]:
        """The layers to do, as far as records tell, without beginning anything."""
        basis = same_basis(self.request)
        if basis is not None and basis.status == "complete":
            return []
        return [layer for layer in self._modules if basis is None or layer not in basis.layers]

    def begin(self, quiet: bool) -> list[str] | None:
        """Begin or find the basis, and list the layers to do; None where it is complete. For the lock's holder.

        The weights of layers that are done are read only where the checkpoint's files may have changed since.
        """
        request = self.request
        basis = same_basis(request)
        if basis is None:
            problem = problem_of(request)
            if problem is not None:
                say(f"basis {self.name!r} is {problem}: made anew", quiet)
            self._create()
            return list(self._modules)
        if basis.status == "complete":
            check_same_weights(request, basis, self._modules, self._weigh)
            say(made_already(request), quiet)
            return None
        say(f"basis {self.name!r}: resumed after {len(basis.layers)} of {len(basis.expected)} layers", quiet)
        untouched = basis.files is not None and basis.files == request.stamp(self._net)
        done = {
            layer
            for layer, record in basis.layers.items()
            if is_of(request, record, layer, record.weight_hash if untouched else self._hash(layer))
        }
        return [layer for layer in self._modules if layer not in done]

    def _hash(self, layer: str) -> str:
        return self._weigh(layer, self._modules[layer]).hash

    def open(self, root: zarr.Group) -> BasisWriter:
        """The writer of what was begun."""
        self.writer = BasisWriter.resume(root, self.name)
        self.shares = self.writer.shares
        return self.writer

    def crossed(self) -> frozenset[str]:
        """The layers whose record says what bases of the two parts of their tokens lose."""
        count = 0 if "unseen" in self.shares else self.request.options.sample
        return to_note(self.request.layers or {}, self.request.method, count, self.request.repair is not None)

    def _told(self) -> list[str]:
        """What is stored of every direction: `kept` where all moments tell it, `unseen` where all are cross-fitted."""
        layers, method, repairs = self.request.layers or {}, self.request.method, self.request.repair is not None
        full = method.metric in OF_INPUTS or repairs
        if not layers or not all(tells_output(one, full) for one in layers.values()):
            return []
        everywhere = to_note(layers, method, self.request.options.sample, repairs) == set(layers)
        return ["kept", "unseen"] if everywhere else ["kept"]

    def put(self, done: Decomposed) -> LayerDone:
        """Store U and P of a layer."""
        result, shape = done.result, self._shapes[done.layer]
        group = self._groups[shape]
        record = record_of(done, shape, group["layers"].index(done.layer))
        shares = {role: torch.from_numpy(values) for role, values in done.shares.items()}
        U, S, P, spectrum = map(torch.from_numpy, (result.U, result.S, result.P, result.spectrum))
        check_storable(done.layer, P, self.request.options.dtype)
        return self.writer.put(done.layer, U, S, P, spectrum[: group["spectrum"]], record, shares)

    def take_back(self) -> None:
        """Remove the basis if it was begun here; one that it was to replace stays. For the lock's holder."""
        if self._begun:
            take_back(open_store(self.request.options.store, "r+").root, self.name)

    def _create(self) -> None:
        request = self.request
        root = open_store(request.options.store, "r+").root
        if goes_at_once(root, self.name):  # then no weight may turn out to be wrong afterwards
            for layer, module in self._modules.items():
                self._weigh(layer, module)
        self._begun = True
        BasisWriter.create(
            root,
            self.name,
            method=asdict(request.method),
            dtype=request.options.dtype,
            model=loading.describe(self._net, request.model_id, request.revision),
            files=request.stamp(self._net),
            groups=self._groups,
            repair=None if request.repair is None else request.repair.said,
        )


def groups_of(shapes: Mapping[str, Shape], method: Method, shares: Sequence[str]) -> dict[Shape, dict[str, Any]]:
    """Layers by shape, with the rank, the length of the spectrum and the `shares` that all of one shape have."""
    groups: dict[Shape, dict[str, Any]] = {}
    for layer, shape in shapes.items():
        rank = min(method.rank, *shape)
        entry = groups.setdefault(shape, {"layers": [], "rank": rank, "spectrum": spectrum_size(shape, method)})
        entry["layers"].append(layer)
    for entry in groups.values() if shares else ():
        entry["shares"] = list(shares)
    return groups


def stored_bytes(groups: Mapping[Shape, dict[str, Any]], dtype: str) -> int:
    """Bytes that a basis takes on disk."""
    return sum(
        len(g["layers"]) * (g["rank"] * (d_out + d_in) * BASIS_DTYPES[dtype])
        + 8 * len(g["layers"]) * (g["rank"] * (1 + len(g.get("shares", ()))) + g["spectrum"])
        for (d_out, d_in), g in groups.items()
    )


def check_storable(layer: str, P: Tensor, dtype: str) -> None:
    """PrepError where a dtype has no room for P, as float16 for the weakest directions, whose S is small."""
    largest, most = float(P.abs().max()), torch.finfo(DTYPES[dtype]).max
    if not largest <= most:
        raise PrepError(
            f"{layer}: P has entries up to {largest:.0e}, {dtype} ends at {most:.0e}: store this basis with "
            "--dtype float32 or bfloat16 (and --overwrite what is there)"
        )


def record_of(done: Decomposed, shape: Shape, index: int) -> LayerRecord:
    """What the store records of a layer beside its arrays."""
    result = done.result
    return LayerRecord(
        shape=shape,
        index=index,
        rank=len(result.S),
        energy=float(result.energy),
        tail=float(result.tail),
        numerical_rank=int(result.numerical_rank),
        solver=result.solver,
        bound=float(result.bound),
        weight_hash=done.weight_hash,
        weight_dtype=done.weight_dtype,
        crossed=done.crossed,
        repaired=done.repaired,
    )
