"""Ranks under a budget: of all directions of all layers, those that keep most of the outputs for their parameters.

A direction of a layer costs `d_in + d_out` parameters, as in LoRA, and keeps the share `t_i` of the layer's E||W x||^2.
What is kept adds up over directions, so the first r of a layer keep `F(r) = sum_{i<=r} t_i`. A rank is a prefix of the
stored order, in which t_i need not fall (power 1, activation, bottom): what is taken are the sides of the least concave
curve above F, those of all layers, steepest first. A side is a run of directions that together are worth more per
parameter than any part that they begin with. Arithmetic only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

_ROUNDING = 1e-12  # of a share: less is not gained


@dataclass(frozen=True)
class Directions:
    """What the directions of layers keep and cost: layer -> t_i (R,), none below 0, and layer -> d_in + d_out.

    Every layer gets at least rank 1. Ranks are given by layer, in the order of `kept`.
    """

    kept: Mapping[str, np.ndarray]
    costs: Mapping[str, int]

    @cached_property
    def _sums(self) -> dict[str, np.ndarray]:
        """F(0), F(1) ... F(R) of each layer."""
        return {layer: np.concatenate([[0.0], np.cumsum(t)]) for layer, t in self.kept.items()}

    def equal(self, rank: int) -> dict[str, int]:
        """The same rank for all layers; less where a layer has fewer directions."""
        return {layer: min(rank, len(t)) for layer, t in self.kept.items()}

    @property
    def least(self) -> dict[str, int]:
        """Rank 1 everywhere."""
        return self.equal(1)

    @property
    def most(self) -> dict[str, int]:
        """All directions."""
        return self.equal(max(map(len, self.kept.values())))

    def parameters(self, ranks: Mapping[str, int]) -> int:
        """`sum r (d_in + d_out)` over the layers."""
        return sum(rank * self.costs[layer] for layer, rank in ranks.items())

    def share(self, ranks: Mapping[str, int]) -> float:
        """What the ranks keep of the outputs, the mean over the layers."""
        return sum(float(self._sums[layer][rank]) for layer, rank in ranks.items()) / len(ranks)

    def equal_within(self, budget: int) -> int:
        """The largest rank that all layers can have within a budget of parameters; 0 if not even 1."""
        return _largest(max(map(len, self.kept.values())), lambda r: self.parameters(self.equal(r)) <= budget)

    def within(self, budget: int) -> dict[str, int]:
        """The ranks within a budget of parameters that keep most, never less than equal ranks do.

        Least in all is lost where the budget ends with a side; otherwise the rest of it goes to the part of a side, or
        to a later one, that is worth most among those that it pays for. budget: at least that of rank 1.
        """
        ranks = self.least
        left = budget - self.parameters(ranks)
        ended = set()
        for layer, first, last in self._sides():
            price = (last - first) * self.costs[layer]
            if layer in ended or price > left:
                ended.add(layer)  # what comes later would leave a gap
                continue
            ranks[layer], left = last, left - price
        ranks = self._filled(ranks, left)
        equal = self.equal(self.equal_within(budget))
        if self.share(equal) > self.share(ranks):  # a budget that is small beside the sides
            return self._filled(equal, budget - self.parameters(equal))
        return ranks

    def keeping(self, share: float) -> dict[str, int]:
        """The cheapest ranks found that keep a share of the outputs, never dearer than equal ranks that do.

        share: at most that of all directions.
        """
        ranks = self.least
        missing = share * len(ranks) - sum(float(self._sums[layer][1]) for layer in ranks)
        for layer, first, last in self._sides():
            if missing <= _ROUNDING:
                break
            gains = self._sums[layer][first + 1 : last + 1] - self._sums[layer][first]
            taken = min(int(np.searchsorted(gains, missing)) + 1, last - first)
            ranks[layer], missing = first + taken, missing - float(gains[taken - 1])
        most = max(map(len, self.kept.values()))
        equal = self.equal(_largest(most, lambda r: self.share(self.equal(r)) < share) + 1)
        return equal if self.parameters(equal) < self.parameters(ranks) else ranks

    def _sides(self) -> Iterator[tuple[str, int, int]]:
        """(layer, rank before, rank after) of the sides of all layers, those worth most per parameter first."""
        found = [
            ((sums[last] - sums[first]) / ((last - first) * self.costs[layer]), layer, first, last)
            for layer, sums in self._sums.items()
            for first, last in _corners(sums)
        ]
        found.sort(key=lambda side: -side[0])  # stable: the sides of a layer stay in their order
        return ((layer, first, last) for worth, layer, first, last in found if worth > 0)

    def _filled(self, ranks: dict[str, int], left: int) -> dict[str, int]:
        """`ranks` with what `left` parameters more pay for."""
        ranks = dict(ranks)
        while True:
            best: tuple[float, str, int] = (0.0, "", 0)
            for layer, rank in ranks.items():
                more = self._sums[layer][rank + 1 : rank + 1 + left // self.costs[layer]] - self._sums[layer][rank]
                if len(more) and more[-1] > _ROUNDING:
                    worth = more / (self.costs[layer] * np.arange(1, len(more) + 1))
                    most = int(worth.argmax())
                    best = max(best, (float(worth[most]), layer, most + 1), key=lambda one: one[0])
            _, layer, count = best
            if not count:
                return ranks
            ranks[layer], left = ranks[layer] + count, left - count * self.costs[layer]


def _corners(sums: np.ndarray) -> list[tuple[int, int]]:
    """The sides of the least concave curve above F(1) ... F(R): (rank before, rank after). sums: F(0) ... F(R)."""
    corners: list[int] = []
    for rank in range(1, len(sums)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (sums[b] - sums[a]) * (rank - b) > (sums[rank] - sums[b]) * (b - a):
                break
            corners.pop()  # below the line from a to rank
        corners.append(rank)
    return list(pairwise(corners))


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to `most` for which `fits`, which holds up to some number, is true; 0 if for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
