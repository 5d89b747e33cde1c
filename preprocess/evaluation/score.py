"""The bases of a store on moments, layer by layer, on worker threads with one BLAS thread each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any

from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from ...errors import PrepError
from ...linear import layer_shape, weight_matrix
from ...store import BasisSet, Moments
from ...store.basis import Basis
from ..decomposition.workers import cost, statistics_of
from ..memory import free_memory
from ..numerics.evaluation import (
    Crossed,
    Energy,
    crossed,
    input_variance,
    kept_output,
    kept_variance,
    output_energy,
    rest,
)
from ..numerics.methods import Method
from ..numerics.metric import InputStatistics

Parts = tuple[InputStatistics, InputStatistics, float]  # of A and of B, and the share of A


@dataclass(frozen=True)
class Score:
    """One basis of one layer: its energy on some tokens and, where they are in two parts, its cross-fitted errors."""

    layer: str
    basis: str
    energy: Energy
    crossed: Crossed | None


@dataclass
class Scoring:
    """What is scored: bases by name at ranks up to `rank`, on `moments`, of the layers `modules`.

    crossed: the layers that are cross-fitted between the two parts of their tokens, where the moments have them.
    """

    moments: Moments
    bases: Mapping[str, BasisSet]
    modules: Mapping[str, nn.Module]
    rank: int
    crossed: frozenset[str] = field(default_factory=frozenset)

    def scores(self) -> Iterator[Score]:
        """Those of all layers, in any order. PrepError names the layer whose moments cannot serve."""
        sites = [[layer for layer in site if layer in self.modules] for site in self.moments.sites.values()]
        sites = sorted(filter(None, sites), key=self._work, reverse=True)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        room = free_memory() // max(map(self._memory, sites), default=1)
        workers = max(1, min(cores, len(sites), room))
        with threadpool_limits(max(1, cores // workers)), ThreadPoolExecutor(workers) as pool:
            for scores in pool.map(self._site, sites):
                yield from scores

    def _site(self, layers: Sequence[str]) -> list[Score]:
        """The layers of one site, whose second moment is read once."""
        found: list[Score] = []
        whole: InputStatistics | None = None
        parts: Parts | None = None
        for layer in layers:
            stored = self.moments[layer]
            if whole is None or stored.kind == "output":
                whole, parts = statistics_of(stored), None
            if layer in self.crossed and stored.half is not None and parts is None:
                half = statistics_of(stored.half)
                parts = half, rest(whole, half, stored.half.share), stored.half.share
            try:
                found += self._layer(layer, whole, parts if layer in self.crossed else None)
            except PrepError as error:
                raise PrepError(f"{layer}: {error}") from error
        return found

    def _layer(self, layer: str, whole: InputStatistics, parts: Parts | None) -> Iterator[Score]:
        W = weight_matrix(self.modules[layer]).to("cpu").double().numpy()
        total: float | None = None
        totals: tuple[float, float] | None = None
        for name, basis in self.bases.items():
            if layer not in basis:
                continue
            stored = basis.read([layer], self.rank)[layer]
            if basis.method["metric"] == "components":
                energy = Energy(input_variance(whole), kept_variance(_array(stored.P), whole))
            else:
                total = output_energy(W, whole) if total is None else total
                energy = Energy(total, _kept(stored, whole))
            found = None
            if parts is not None:
                a, b, share = parts
                if totals is None:
                    totals = output_energy(W, a), output_energy(W, b)
                found = crossed(W, a, b, share, _method(basis, self.rank), totals)
            yield Score(layer, name, energy, found)

    def _work(self, layers: Sequence[str]) -> int:
        return sum(cost(layer_shape(self.modules[layer])) * (1 + 2 * (layer in self.crossed)) for layer in layers)

    def _memory(self, layers: Sequence[str]) -> int:
        """Bytes that a worker takes for a site: its moment, those of two parts, copies of the largest layer."""
        shapes = [layer_shape(self.modules[layer]) for layer in layers]
        d_in = shapes[0][1]
        return 8 * (4 * d_in * d_in + max(5 * d_out * d_in + 4 * min(d_out, d_in) ** 2 for d_out, _ in shapes))


def _kept(stored: Basis, moment: InputStatistics) -> Any:
    rank = stored.record.rank
    return kept_output(_array(stored.U[:, :rank]), _array(stored.S[:rank]), _array(stored.P[:rank]), moment)


def _array(x: Tensor) -> Any:
    return x.double().numpy()


def _method(basis: BasisSet, rank: int) -> Method:
    """How the basis was made, at the rank that is scored."""
    known = {one.name for one in fields(Method)}
    return Method(**{**{name: value for name, value in basis.method.items() if name in known}, "rank": rank})
