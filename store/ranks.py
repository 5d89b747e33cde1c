"""`prep ranks`: a rank for every layer of a basis under a budget of parameters, by what its directions keep."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..commands import store_option
from ..errors import PrepError, StoreError
from ..units import parse_budget
from .artifact import Store, open_store
from .basis import BasisSet
from .budget import Directions
from .info import aligned, pattern

_ROUNDING = 1e-9  # of a share: all directions of a layer keep the whole output up to it


@dataclass(frozen=True)
class Choice:
    """Ranks of layers, chosen under a budget by the `role`, kept or unseen, of a basis.

    equal: the largest rank that all layers could have within the budget.
    """

    basis: str
    directions: Directions
    role: str
    ranks: dict[str, int]
    equal: int


def ranks(
    store: str | Path | Store, budget: int | str, basis: str = "full", layers: str | None = None
) -> dict[str, int]:
    """The rank of every layer under a budget, such that all layers together lose least of their outputs.

    store: its path, URL, or the opened store. budget: parameters, such as "2M" or 2_000_000, that LoRA of these ranks
    has, `sum r (d_in + d_out)`; or the share of the output to keep, such as "95%", the mean over the layers. basis: its
    name. layers: a regular expression searched in layer names, by default all of the basis. What a direction keeps is
    that of tokens which the basis has not seen where all layers were cross-fitted (`prep decompose --sample 0`), else
    that of its own tokens.

    The result serves as `rank_pattern` of PEFT's LoraConfig and as `rank` of `attach`. Raises PrepError for a budget
    that makes no sense or cannot be met, StoreError where the basis does not say what its directions keep.
    """
    return as_pattern(choose(store, budget, basis, layers).ranks)


def choose(store: str | Path | Store, budget: int | str, basis: str = "full", layers: str | None = None) -> Choice:
    """`ranks`, with what they were chosen by."""
    opened = store if isinstance(store, Store) else open_store(store)
    bases = opened.bases[basis]
    return choice(opened, bases, budget, matching(bases, layers))


def matching(bases: BasisSet, layers: str | None) -> list[str]:
    """The layers of a basis in whose name the regular expression is found. PrepError if there is none."""
    try:
        names = [name for name in bases.layers if layers is None or re.search(layers, name)]
    except re.error as error:
        raise PrepError(f"layers={layers!r} is not a regular expression: {error}") from error
    if not names:
        raise PrepError(f"layers={layers!r} matches none of the basis, such as {next(iter(bases.layers), 'none')}")
    return names


def choice(store: Store, bases: BasisSet, budget: int | str, layers: Sequence[str]) -> Choice:
    """Ranks under a budget for layers of a basis of the store; PrepError or StoreError as in `ranks`."""
    asked = parse_budget(budget)
    role, kept = _shares(store, bases, layers)
    of = Directions(kept, {layer: sum(bases.layers[layer].shape) for layer in layers})
    if isinstance(asked, float):
        reached = of.share(of.most)
        if reached < asked - _ROUNDING:
            raise PrepError(f"all of basis {bases.name!r} keeps {reached:.2%}, not {budget}: {_more(bases, of)}")
        found = of.keeping(asked)
        return Choice(bases.name, of, role, found, of.equal_within(of.parameters(found)))
    least, most = of.parameters(of.least), of.parameters(of.most)
    if asked < least:
        raise PrepError(
            f"a budget of {asked:,} parameters is below rank 1 of the {len(layers)} layers, {least:,}: ask for more"
        )
    if asked > most:
        raise PrepError(
            f"a budget of {asked:,} parameters is above all of basis {bases.name!r}, {most:,}: {_more(bases, of)}"
        )
    return Choice(bases.name, of, role, of.within(asked), of.equal_within(asked))


def as_pattern(ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks as a `rank_pattern`: deeper names first, since PEFT takes the first key that ends a layer's name."""
    return dict(sorted(ranks.items(), key=lambda one: -one[0].count(".")))


def _shares(store: Store, bases: BasisSet, layers: Sequence[str]) -> tuple[str, dict[str, np.ndarray]]:
    """`unseen` or `kept`, and that of each layer. StoreError where the basis holds neither."""
    for role in ("unseen", "kept"):
        found = bases.shares(role, layers)
        if len(found) == len(layers):
            return role, {layer: values.numpy() for layer, values in found.items()}
    again = bases.command(int(bases.method["rank"]))
    remedy = f"make it anew with {again}"
    if store.corpus is None:
        remedy = f"run `prep covariance --model X --data Y{store_option(store.location)}`, then {again}"
    elif any(store.moments[layer].kind == "diagonal" for layer in layers if layer in store.moments):
        remedy = "diagonal moments do not tell; calibrate with `prep covariance --moment full` into another --store"
    raise StoreError(f"basis {bases.name!r} does not say what its directions keep of the outputs: {remedy}")


def _more(bases: BasisSet, of: Directions) -> str:
    """How to have more directions, if there are any."""
    if all(len(kept) == min(bases.layers[layer].shape) for layer, kept in of.kept.items()):
        return "ask for less"
    return f"ask for less, or make it anew with {bases.command(2 * int(bases.method['rank']))}"


def summary(found: Choice) -> dict[str, Any]:
    """What `prep ranks --json` prints."""
    kinds: dict[str, list[str]] = {}
    for layer in found.ranks:
        kinds.setdefault(pattern(layer), []).append(layer)
    kinds["all"] = list(found.ranks)
    return {
        "basis": found.basis,
        "by": found.role,
        "ranks": as_pattern(found.ranks),
        "equal_rank": found.equal,
        "summary": [_kind(kind, members, found) for kind, members in kinds.items()],
    }


def _kind(kind: str, members: list[str], found: Choice) -> dict[str, Any]:
    of, equal = found.directions, found.directions.equal(found.equal)
    chosen, same = ({layer: ranks[layer] for layer in members} for ranks in (found.ranks, equal))
    return {
        "layers": kind,
        "count": len(members),
        "least": min(chosen.values()),
        "mean": sum(chosen.values()) / len(members),
        "most": max(chosen.values()),
        "parameters": of.parameters(chosen),
        "lost": 1 - of.share(chosen),
        "equal_parameters": of.parameters(same),
        "equal_lost": 1 - of.share(same),
    }


def table(found: Choice) -> list[str]:
    """The lines that `prep ranks` prints: a line for each kind of layer, and what the numbers mean."""
    said = summary(found)
    lines = [["layers", "count", "rank", "mean", "parameters", "lost", f"parameters at {found.equal}", "lost"]]
    for one in said["summary"]:
        least, most = one["least"], one["most"]
        lines.append(
            [
                one["layers"],
                str(one["count"]),
                f"{least}" if least == most else f"{least} to {most}",
                f"{one['mean']:.1f}",
                f"{one['parameters']:,}",
                f"{one['lost']:.2%}",
                f"{one['equal_parameters']:,}",
                f"{one['equal_lost']:.2%}",
            ]
        )
    tokens = "tokens that the basis has not seen" if found.role == "unseen" else "the tokens that it was made of"
    return [
        *aligned(lines),
        f"lost: the share of E||W x||^2 on {tokens}, mean of the layers; last columns: equal ranks",
    ]
