"""One basis in the making: what is there of it, where its arrays lie, how a layer's result is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import zarr
from torch import Tensor, nn

from ...errors import PrepError
from ...linear import dtype_name, layer_shape, weight_hash
from ...store import BasisWriter, LayerRecord, open_store
from ...store.bases import LayerDone
from ...store.format.schema import DTYPES
from ..model import loading
from ..numerics.methods import Method
from ..numerics.whitening import WhitenedSVD, spectrum_size
from ..options import BASIS_DTYPES
from ..progress import say
from .crossing import tells_output, to_note
from .existing import check_same_weights, is_of, made_already, problem_of, same_basis
from .request import Request
from .workers import Decomposed

Shape = tuple[int, int]


class Target:
    """The basis of one request. `begin` on the process that writes, `open` on all, then `put` for every layer."""

    def __init__(self, request: Request, net: nn.Module, modules: Mapping[str, nn.Module]):
        self.name, self.request = request.name, request
        self._net, self._modules = net, modules
        self._shapes = {layer: layer_shape(module) for layer, module in modules.items()}
        self._groups = groups_of(self._shapes, request.method, self._told())

    @property
    def bytes(self) -> int:
        """What the basis takes on disk."""
        return stored_bytes(self._groups, self.request.options.dtype)

    def begin(self, quiet: bool) -> list[str] | None:
        """Begin or find the basis, and list the layers to do; None where it is complete. For the lock's holder."""
        request = self.request
        basis = same_basis(request)
        if basis is None:
            problem = problem_of(request)
            if problem is not None:
                say(f"basis {self.name!r} is {problem}: made anew", quiet)
            self._create()
            return list(self._modules)
        if basis.status == "complete":
            check_same_weights(request, basis, self._modules)
            say(made_already(request), quiet)
            return None
        say(f"basis {self.name!r}: resumed after {len(basis.layers)} of {len(basis.expected)} layers", quiet)
        return [layer for layer, module in self._modules.items() if not is_of(request, basis, layer, module)]

    def open(self, root: zarr.Group) -> BasisWriter:
        """The writer of what was begun."""
        self.writer = BasisWriter.resume(root, self.name)
        return self.writer

    def crossed(self) -> frozenset[str]:
        """The layers whose record says what bases of the two parts of their tokens lose."""
        count = 0 if "unseen" in self.writer.shares else self.request.options.sample
        return to_note(self.request.layers or {}, self.request.method, count, self.request.repair is not None)

    def _told(self) -> list[str]:
        """What is stored of every direction: `kept` where all moments tell it, `unseen` where all are cross-fitted."""
        layers, method, repairs = self.request.layers or {}, self.request.method, self.request.repair is not None
        full = method.metric == "components" or repairs
        if not layers or not all(tells_output(one, full) for one in layers.values()):
            return []
        everywhere = to_note(layers, method, self.request.options.sample, repairs) == set(layers)
        return ["kept", "unseen"] if everywhere else ["kept"]

    def put(self, done: Decomposed) -> LayerDone:
        """Store U and P of a layer."""
        result, shape = done.result, self._shapes[done.layer]
        group = self._groups[shape]
        record = record_of(result, shape, group["layers"].index(done.layer), done.W)
        record = replace(record, crossed=done.crossed, repaired=done.repaired)
        shares = {role: torch.from_numpy(values) for role, values in done.shares.items()}
        U, S, P, spectrum = map(torch.from_numpy, (result.U, result.S, result.P, result.spectrum))
        check_storable(done.layer, P, self.request.options.dtype)
        return self.writer.put(done.layer, U, S, P, spectrum[: group["spectrum"]], record, shares)

    def _create(self) -> None:
        request = self.request
        BasisWriter.create(
            open_store(request.options.store, "r+").root,
            self.name,
            method=asdict(request.method),
            dtype=request.options.dtype,
            model=loading.describe(self._net, request.model_id, request.revision),
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
