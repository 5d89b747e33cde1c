"""What an evaluation is asked for, checked against the stores: bases, moments, ranks, the model's modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ...commands import OF_INPUTS
from ...copies import named
from ...errors import PrepError, StoreError
from ...store import BasisSet, LayerMoment, Moments, Store, open_store
from ...store.excess import at_rank, doubled
from ..decomposition.crossing import SAMPLE, tells_output, to_cross
from ..decomposition.request import Request, calibrated_id, load_layers
from ..decomposition.weights import Weigh, Weight, weigher
from ..model.quantised import Copy
from ..numerics.methods import Method
from ..options import DecomposeOptions, check_sample


@dataclass(frozen=True)
class Evaluation:
    """moments: of the tokens that are scored on; modules: of the layers.

    weigh: reads a layer's weight and checks it. noted: what the records of a basis say of cross-fitted layers, by
    basis; crossed: those to be cross-fitted anew. copies: what the bases of errors repair, by basis.
    """

    moments: Moments
    bases: dict[str, BasisSet]
    ranks: tuple[int, ...]
    modules: dict[str, nn.Module]
    weigh: Weigh
    noted: dict[str, dict[str, dict[str, Any]]]
    crossed: dict[str, frozenset[str]]
    copies: dict[str, Copy]


def open_evaluation(
    store: str | Path,
    on: str | Path | None,
    bases: str | Sequence[str] | None,
    ranks: int | Sequence[int] | None,
    sample: int | None,
    model: str | nn.Module | None,
    revision: str | None,
    trust_remote_code: bool,
) -> Evaluation:
    """The request after all checks but those of the weights, the model opened.

    PrepError or StoreError that says what cannot be served.
    """
    found = open_store(store)
    names = [bases] if isinstance(bases, str) else list(bases or found.bases)
    if not names:
        raise StoreError(f"{store} holds no basis: run `prep decompose` first")
    sets = {name: found.bases[name] for name in names}
    copies = _copies(sets, trust_remote_code)
    wanted = _ranks(ranks, sets)
    if sample is not None:
        check_sample(sample)
    other = found if on is None else _same_model(found, open_store(on))
    moments = other.moments
    layers = {layer: moments[layer] for layer in moments if any(layer in basis for basis in sets.values())}
    if not layers:
        raise StoreError(f"{other.location} has moments of none of the layers of {', '.join(names)}: name another one")
    for layer, moment in layers.items():
        _check_kind(layer, moment, sets.values())
    options = DecomposeOptions(store=store, model=model, revision=revision, trust_remote_code=trust_remote_code)
    model_id = None if isinstance(model, nn.Module) else calibrated_id(model, found)
    request = Request(options, Method(), "", found, layers, model_id)
    _, modules = load_layers([request])
    weigh = partial(_weighed, weigher(request), sets)
    for name, copy in copies.items():
        copy.check({layer: module for layer, module in modules.items() if layer in sets[name]})
    if on is not None:
        return Evaluation(moments, sets, wanted, modules, weigh, {}, {}, copies)
    noted = {name: _noted(basis, wanted) if sample is None else {} for name, basis in sets.items()}
    count = SAMPLE if sample is None else sample
    crossed = {
        name: to_cross(layers, method_of(sets[name]), count, name in copies)
        for name, known in noted.items()
        if not known
    }
    return Evaluation(moments, sets, wanted, modules, weigh, noted, crossed, copies)


def _weighed(weigh: Weigh, bases: Mapping[str, BasisSet], layer: str, module: nn.Module) -> Weight:
    """A layer's weight, if its bases were made from it."""
    weight = weigh(layer, module)
    for name, basis in bases.items():
        if layer in basis and basis.layers[layer].weight_hash != weight.hash:
            raise PrepError(
                f"basis {name!r} was made from other weights of {layer} than the model has: give its --model"
            )
    return weight


def method_of(basis: BasisSet, rank: int | None = None) -> Method:
    """How a basis was made; rank: another one than its own."""
    known = {one.name for one in fields(Method)}
    method = Method(**{name: value for name, value in basis.method.items() if name in known})
    return method if rank is None else replace(method, rank=rank)


def _copies(bases: dict[str, BasisSet], trust_remote_code: bool) -> dict[str, Copy]:
    """The copies that bases repair, of which those of modules cannot be had again; each opened once."""
    opened: dict[str | None, Copy] = {}
    copies = {}
    for name, basis in bases.items():
        if basis.repair is None:
            continue
        if basis.repair["source"] == "module":
            others = [other for other in bases if (bases[other].repair or {}).get("source") != "module"]
            raise PrepError(
                f"basis {name!r} repairs a module, which is not in the store, so that its error cannot be scored: "
                + (f"name others with --basis, such as {others[0]}" if others else "repair a checkpoint or a recipe")
            )
        what = named(basis.repair)
        if what not in opened:
            opened[what] = Copy(basis.repair.get("id", basis.repair["name"]), trust_remote_code)
        copies[name] = opened[what]
    return copies


def _noted(basis: BasisSet, ranks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """What the records say, by layer; nothing where they do not know of all the ranks."""
    held = [rank for rank in ranks if rank <= int(basis.method["rank"])]
    said = {layer: record.crossed for layer, record in basis.layers.items() if record.crossed is not None}
    whole = all(at_rank(one, rank) is not None for one in said.values() for rank in held)
    return said if whole else {}


def _ranks(asked: int | Sequence[int] | None, bases: dict[str, BasisSet]) -> tuple[int, ...]:
    stored = {name: int(basis.method["rank"]) for name, basis in bases.items()}
    if not asked:
        return doubled(max(min(rank, max(map(min, bases[name].shapes))) for name, rank in stored.items()))
    wanted = (asked,) if isinstance(asked, int) else tuple(sorted(set(asked)))
    if wanted[0] < 1:
        raise PrepError(f"--rank {wanted[0]} is too small: ask for at least 1")
    for name, rank in stored.items():
        if wanted[-1] > rank:
            raise StoreError(
                f"basis {name!r} holds rank {rank}, {wanted[-1]} was asked for: make it with "
                f"{bases[name].command(wanted[-1])}"
            )
    return wanted


def _same_model(store: Store, other: Store) -> Store:
    """StoreError where two stores are of different models."""
    for name in ("class", "config_hash"):
        a, b = store.model.get(name), other.model.get(name)
        if a != b:
            raise StoreError(
                f"{store.location} and {other.location} are of different models (the model's {name} is {a} and {b}): "
                "evaluate on a store of the same model"
            )
    return other


def _check_kind(layer: str, moment: LayerMoment, bases: Iterable[BasisSet]) -> None:
    """StoreError where the moments of a layer do not tell what a basis keeps of it."""
    for basis in bases:
        full = basis.method["metric"] in OF_INPUTS or basis.repair is not None
        if layer in basis and not tells_output(moment, full):
            what, kinds = "which does not tell its output", "full` or `--moment output"
            if full:
                what, kinds = f"basis {basis.name!r} is scored on the full second moment", "full"
            raise StoreError(
                f"{layer} has the moment kind {moment.kind}, {what}: calibrate with `prep covariance --moment {kinds}`"
            )
