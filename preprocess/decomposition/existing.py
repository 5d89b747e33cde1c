"""What is there of the bases that are asked for: made already, to be resumed, of other options, damaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from ...copies import named
from ...errors import StoreError
from ...linear import weight_hash, weight_matrix
from ...store import Bases, BasisSet, LayerRecord, open_store
from ...store.basis_layout import LAYOUT
from ...store.condition import fault
from ...store.info import pattern
from ..model import loading
from ..progress import say
from .crossing import to_note
from .request import Request
from .weights import Weigh


def not_made(requests: Sequence[Request]) -> list[str]:
    """The names of those whose basis is to be made or resumed; of the others a line says that they are there."""
    left = []
    for request in requests:
        if is_made(request):
            say(made_already(request), request.options.quiet)
        else:
            left.append(request.name)
    return left


def same_basis(request: Request) -> BasisSet | None:
    """The basis that is there and was made with the same options, complete or not; None where one is to be begun.

    The store is looked at anew. A damaged basis is begun anew. An unfinished replacement counts where a basis is to be
    overwritten, a complete one does not. StoreError where another basis has the name.
    """
    if request.store is None:
        return None
    bases, name = open_store(request.options.store).bases, request.name
    if name not in bases:
        return None
    problem = fault(bases, name)
    if problem is not None and (request.options.overwrite or not _opens(bases, name)):
        return None
    basis = bases.open(name)
    differences = _differences(request, basis)
    if problem is not None and (not differences or _covers(basis, request, differences)):
        return None
    if request.options.overwrite:
        if not differences and basis.status != "complete":
            return basis if _goes_on(basis) else None
        pending = bases.pending(name)
        return pending if pending is not None and _goes_on(pending) and not _differences(request, pending) else None
    if _covers(basis, request, differences):
        return basis
    if differences:
        raise StoreError(
            f"{request.options.store} holds a basis {name!r} with other options ({'; '.join(differences)}): "
            "give this one another --name, or replace it with --overwrite"
        )
    return basis if _goes_on(basis) else None


def problem_of(request: Request) -> str | None:
    """Why the basis of that name is to be made anew although it is there."""
    bases = None if request.store is None else open_store(request.options.store).bases
    if bases is None or request.name not in bases:
        return None
    problem = fault(bases, request.name)
    old = problem is None and not _goes_on(bases.open(request.name))
    return "not complete, and of an earlier format" if old else problem


def _goes_on(basis: BasisSet) -> bool:
    """Whether a basis is complete, or may be resumed: it is of the layout of now."""
    return basis.status == "complete" or basis.layout == LAYOUT


def _opens(bases: Bases, name: str) -> bool:
    try:
        bases.open(name)
    except StoreError:
        return False
    return True


def _covers(basis: BasisSet, request: Request, differences: list[str]) -> bool:
    """Whether a complete basis has every direction asked for and differs in nothing else: a slice of it is that one."""
    if request.method.metric == "null":
        return False
    only_rank = len(differences) == 1 and differences[0].startswith("rank:")
    enough = all(min(request.method.rank, *record.shape) <= record.rank for record in basis.layers.values())
    return basis.status == "complete" and only_rank and enough


def made_already(request: Request) -> str:
    """The line for a basis that is there already."""
    basis = open_store(request.options.store).bases[request.name]
    asked, rank = request.method.rank, basis.rank
    if basis.method["rank"] == asked:
        return f"basis {request.name!r} is complete and was made with the same options: nothing to do"
    if asked >= rank:
        return f"basis {request.name!r} is there already with every direction of its layers, up to {rank}"
    return f"basis {request.name!r} is there already at rank {rank}: any rank up to {rank} is a slice of it"


def is_made(request: Request) -> bool:
    """Whether the basis is there, complete and of the same options, from weights that have not been touched since."""
    basis = same_basis(request)
    if basis is None or basis.status != "complete" or request.options.overwrite:
        return False
    assert request.store is not None
    if request.model_id is None:
        modules = dict(request.options.model.named_modules())  # type: ignore[union-attr]
        return all(
            layer in modules and is_of(request, record, layer, weight_hash(weight_matrix(modules[layer])))
            for layer, record in basis.layers.items()
        )
    if request.model_id != request.store.model["id"]:
        return False
    stamp = loading.checkpoint_stamp(request.model_id, None)
    if stamp is None or stamp != (request.store.attrs.get("run") or {}).get("files"):
        return False
    return request.repair is None or request.repair.is_unchanged(basis.repair or {}, basis.layers)


def check_same_weights(request: Request, basis: BasisSet, modules: Mapping[str, nn.Module], weigh: Weigh) -> None:
    """StoreError if a complete basis was made from other weights than the modules have, as `weigh` reads them, or than
    the copy that it repairs has.
    """
    for layer, record in basis.layers.items():
        if layer not in modules or not is_of(request, record, layer, weigh(layer, modules[layer]).hash):
            what = "the model has" if request.repair is None else "the model and its copy have"
            raise StoreError(
                f"basis {request.name!r} was made from other weights of {layer} than {what} now: "
                "give this one another --name, or replace it with --overwrite"
            )


def is_of(request: Request, record: LayerRecord, layer: str, known: str) -> bool:
    """Whether a record is of the weight with the hash `known`, and of the copy's weight where that is repaired."""
    if record.weight_hash != known:
        return False
    return request.repair is None or request.repair.is_known(layer, record.repaired)


def _differences(request: Request, basis: BasisSet) -> list[str]:
    """How the way a basis was made differs from the request."""
    if request.model_id is None:
        of_basis, asked = basis.model.get("config_hash"), loading.model_hash(request.options.model)  # type: ignore[arg-type]
    else:
        of_basis, asked = basis.model.get("id"), request.model_id
    repair = None if request.repair is None else request.repair.said
    have: dict[str, Any] = {"pooling": "rms", **basis.method, "dtype": basis.dtype, "model": of_basis}
    have["repair"] = named(basis.repair)
    wanted: dict[str, Any] = {**asdict(request.method), "dtype": request.options.dtype, "model": asked}
    wanted["repair"] = named(repair)
    return [
        f"{key}: {have.get(key)!r} there, {wanted[key]!r} asked for" for key in wanted if have.get(key) != wanted[key]
    ] + _fewer_crossed(request, basis)


def _fewer_crossed(request: Request, basis: BasisSet) -> list[str]:
    """Where --sample asks for more layers of a kind than were cross-fitted, or for all without an array of them."""
    layers, count = request.layers or {}, request.options.sample
    asked = to_note(layers, request.method, count, request.repair is not None) if count is not None else frozenset()
    there = [layer for layer, record in basis.layers.items() if record.crossed is not None]
    more = Counter(map(pattern, asked)) - Counter(map(pattern, there)) if basis.status == "complete" else None
    no_place = asked == set(layers) and not all("unseen" in basis.arrays(shape) for shape in basis.shapes)
    if not asked or not (more or no_place):
        return []
    return [f"sample: {len(there)} layers cross-fitted there, {len(asked)} asked for"]
