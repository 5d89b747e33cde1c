"""The bases of a store on moments, layer by layer, on worker threads with one BLAS thread each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from torch import Tensor

from ...errors import PrepError
from ...linear import layer_shape
from ...store.basis import Basis
from ..decomposition.crossing import Parts, cross, parts_of, statistics_of
from ..decomposition.workers import cost, matrix_of
from ..memory import free_memory
from ..model.quantised import Copy
from ..numerics.evaluation import (
    Energy,
    input_variance,
    kept_by,
    kept_variance,
    output_energy,
)
from ..numerics.metric import InputStatistics
from .request import Evaluation, method_of


@dataclass(frozen=True)
class Score:
    """One basis of one layer: its energy on some tokens and, where its parts were looked at, its cross-fitted errors.

    crossed: as a record has them (`LayerRecord.crossed`).
    """

    layer: str
    basis: str
    energy: Energy
    crossed: dict[str, Any] | None


@dataclass
class Scoring:
    """What an evaluation asks to be scored."""

    asked: Evaluation

    def scores(self) -> Iterator[Score]:
        """Those of all layers, in any order. PrepError names the layer whose moments cannot serve."""
        modules = self.asked.modules
        sites = [[layer for layer in site if layer in modules] for site in self.asked.moments.sites.values()]
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
            stored = self.asked.moments[layer]
            if whole is None or stored.kind == "output":
                whole, parts = statistics_of(stored), None
            if parts is None and any(layer in layers for layers in self.asked.crossed.values()):
                parts = parts_of(stored, whole)
            W = self.asked.weigh(layer, self.asked.modules[layer]).W
            try:
                found += self._layer(layer, W, whole, parts)
            except PrepError as error:
                raise PrepError(f"{layer}: {error}") from error
        return found

    def _layer(self, layer: str, W: Tensor, whole: InputStatistics, parts: Parts | None) -> Iterator[Score]:
        """The scores of one layer with the weight W (d_out, d_in) in every basis that holds it."""
        asked, rank = self.asked, max(self.asked.ranks)
        matrices: dict[Copy | None, tuple[np.ndarray, Any]] = {}  # W itself, and the error of each copy
        totals: dict[Copy | None, float] = {}
        for name, basis in asked.bases.items():
            if layer not in basis:
                continue
            stored, copy = basis.read([layer], rank)[layer], asked.copies.get(name)
            if copy not in matrices:
                matrices[copy] = matrix_of(layer, W, copy)
            matrix, known = matrices[copy]
            if known is not None and known["hash"] != (stored.record.repaired or {}).get("hash"):
                raise PrepError(f"the copy that basis {name!r} repairs has another weight by now: decompose it anew")
            if basis.method["metric"] == "components":
                energy = Energy(input_variance(whole), kept_variance(_array(stored.P), whole))
            else:
                totals[copy] = totals[copy] if copy in totals else output_energy(matrix, whole)
                energy = Energy(totals[copy], _kept(basis.method["metric"], matrix, stored, whole))
            found = asked.noted.get(name, {}).get(layer)
            if parts is not None and layer in asked.crossed.get(name, ()):
                found = cross(matrix, parts, method_of(basis, rank)).shares(asked.ranks, energy)
            yield Score(layer, name, energy, found)

    def _work(self, layers: Sequence[str]) -> int:
        """About what a site takes: a product for each layer, two decompositions where it is cross-fitted."""
        times = {layer: 1 + 2 * sum(layer in chosen for chosen in self.asked.crossed.values()) for layer in layers}
        return sum(cost(layer_shape(self.asked.modules[layer])) * times[layer] for layer in layers)

    def _memory(self, layers: Sequence[str]) -> int:
        """Bytes that a worker takes for a site: its moment, those of two parts, copies of the largest layer."""
        shapes = [layer_shape(self.asked.modules[layer]) for layer in layers]
        d_in = shapes[0][1]
        return 8 * (4 * d_in * d_in + max(5 * d_out * d_in + 4 * min(d_out, d_in) ** 2 for d_out, _ in shapes))


def _kept(metric: str, W: np.ndarray, stored: Basis, moment: InputStatistics) -> Any:
    rank = stored.record.rank
    U, S, P = _array(stored.U[:, :rank]), _array(stored.S[:rank]), _array(stored.P[:rank])
    return kept_by(metric, W, U, S, P, moment)


def _array(x: Tensor) -> Any:
    return x.double().numpy()
