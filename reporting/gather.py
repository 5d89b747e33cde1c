"""What a report shows, as plain data, from a store alone: attributes, S, spectra and small arrays are read.

Neither U, P nor a whole second moment is read, no model is loaded and nothing is decomposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..store import BasisSet, Store
from ..store.excess import doubled, median_excess
from ..store.info import info
from ..store.moments import IDLE
from .budgets import Budget, budgets
from .inputs import SiteFacts, site_facts
from .layers import Places, places_of

POINTS = 60  # of a spectrum
MORE = (2, 4, 8)  # times as many tokens, for which the excess is predicted


@dataclass(frozen=True)
class BasisFacts:
    """One complete basis.

    ranks: 1, 2, 4 ... and the largest stored one. kept: layer -> share of E||W x||^2 (r,) that its first 1 .. r
    directions keep (of the input variance for EVA, of E||(W - Q) x||^2 for a repair), of the layers of which the store
    knows it. spectra: layer -> (place from 1, S_i / S_1) at up to POINTS of its values, evenly spread on a logarithmic
    axis. excess: rank -> median relative excess, of the layers whose records have it. budgets: those of the ranks,
    where they can be told.
    """

    basis: BasisSet
    ranks: list[int]
    kept: dict[str, np.ndarray]
    spectra: dict[str, tuple[np.ndarray, np.ndarray]]
    excess: dict[int, float]
    budgets: list[Budget]

    @property
    def name(self) -> str:
        """Its name, which says where something else is kept than output: EVA's basis is one of the input, a repair one
        of the error W - Q of a quantised copy."""
        if self.basis.repair is not None:
            return f"{self.basis.name}, of the error"
        return self.basis.name + (", of the input" if self.basis.method["metric"] == "components" else "")


@dataclass(frozen=True)
class Facts:
    """info: what `prep info` says; tokens: calibrated on, 0 where none were; sites: None where there are no moments.

    idle: experts to which no token was routed.
    """

    store: Store
    info: dict[str, Any]
    tokens: int
    places: Places
    bases: dict[str, BasisFacts]
    sites: list[SiteFacts] | None
    idle: list[str]


def gather(store: Store) -> Facts:
    """Read a store. StoreError where it is damaged."""
    facts = info(store)
    bases = {
        name: basis_facts(store.bases[name])
        for name, basis in facts["bases"].items()
        if "problem" not in basis and basis["status"] == "complete"
    }
    whole = facts["moments"] is not None and "problem" not in facts["moments"]
    moments = store.moments if whole else None
    layers = [layer for group in facts["layers"].values() for layer in group["layers"]]
    skipped = {} if moments is None else moments.skipped
    idle = [layer for layer, reason in skipped.items() if reason == IDLE]
    corpus = facts["corpus"] or (facts["removed"] or {}).get("corpus") or {}
    return Facts(
        store,
        facts,
        int(corpus.get("tokens", 0)),
        places_of([*layers, *idle]),
        bases,
        None if moments is None else site_facts(store.location, moments),
        idle,
    )


def basis_facts(basis: BasisSet) -> BasisFacts:
    """What is shown of a complete basis."""
    crossed = [record.crossed for record in basis.layers.values() if record.crossed]
    known = {rank: median_excess(crossed, rank) for rank in sorted({r for one in crossed for r in one["ranks"]})}
    ranks = [rank for rank in (1, 2, 4) if rank < basis.rank] + list(doubled(basis.rank))
    return BasisFacts(
        basis,
        ranks,
        kept_shares(basis),
        {layer: sampled(values.numpy()) for layer, values in basis.spectra()},
        {rank: excess for rank, excess in known.items() if excess is not None},
        budgets(basis, ranks),
    )


def kept_shares(basis: BasisSet) -> dict[str, np.ndarray]:
    """The share of E||W x||^2 (r,) that the first 1 .. r directions keep, of the layers of which it is known."""
    shares = basis.shares("kept")
    return {layer: np.minimum(np.cumsum(kept.numpy()), 1.0) for layer, kept in shares.items()}


def sampled(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places from 1, values / values[0]) of a descending spectrum, evenly spread on a logarithmic axis."""
    places = np.unique(np.geomspace(1, len(values), min(POINTS, len(values))).round().astype(int))
    top = values[0] if values[0] > 0 else 1.0
    return places, values[places - 1] / top


def at(shares: Mapping[str, np.ndarray], rank: int, largest: int) -> dict[str, float]:
    """What layers keep at a rank: all that they have, where they have fewer directions; nothing above `largest`."""
    if rank > largest:
        return {}
    return {layer: float(kept[min(rank, len(kept)) - 1]) for layer, kept in shares.items()}
