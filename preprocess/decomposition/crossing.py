"""The two parts of a layer's tokens: which layers are cross-fitted between them, and what is found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...store import LayerMoment
from ...store.excess import doubled
from ...store.info import pattern
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
from ..numerics.whitening import WhitenedSVD

SAMPLE = 2  # layers of each kind whose excess a decomposition notes


@dataclass(frozen=True)
class Parts:
    """Moments of the tokens: of all, of the first half, which has the share `share` in them, and of the others."""

    whole: InputStatistics
    a: InputStatistics
    b: InputStatistics
    share: float


def statistics_of(stored: LayerMoment) -> InputStatistics:
    """A stored moment as float64 arrays."""

    def array(x: Tensor) -> np.ndarray:
        return x.to(torch.float64).numpy()

    return InputStatistics(
        kind=stored.kind,
        second_moment=array(stored.second_moment) if stored.kind == "full" else None,
        diagonal=array(stored.diagonal) if stored.kind != "full" else None,
        output=array(stored.output) if stored.kind == "output" else None,
        mean=array(stored.mean),
    )


def parts_of(stored: LayerMoment, whole: InputStatistics) -> Parts:
    """The parts of a stored moment, which has a half."""
    half = stored.half
    assert half is not None
    a = statistics_of(half)
    return Parts(whole, a, rest(whole, a, half.share), half.share)


def of_error(moment: InputStatistics) -> InputStatistics:
    """What a moment says of the error E = W - Q: that of the output of W says nothing of E's."""
    if moment.output is None:
        return moment
    return InputStatistics("diagonal", diagonal=moment.diagonal, mean=moment.mean)


def tells_output(moment: LayerMoment, full: bool) -> bool:
    """Whether what a basis keeps follows from a moment; full: it is of metric components (EVA), or of an error."""
    return moment.kind == "full" or (moment.kind == "output" and not full)


def to_cross(layers: Mapping[str, LayerMoment], method: Method, count: int, repair: bool = False) -> frozenset[str]:
    """The layers, `count` of each kind (0: all), that are cross-fitted: those of which a half was kept.

    repair: the basis is one of an error.
    """
    full = method.metric == "components" or repair
    known = [layer for layer, one in layers.items() if one.half is not None and tells_output(one, full)]
    return frozenset(sampled(known, count))


def sampled(layers: Iterable[str], count: int) -> list[str]:
    """`count` layers of each kind, evenly spread over the blocks; all where count is 0 or there are no more."""
    kinds: dict[str, list[str]] = {}
    for layer in layers:
        kinds.setdefault(pattern(layer), []).append(layer)
    chosen = []
    for members in kinds.values():
        n = min(count, len(members)) or len(members)
        chosen += [members[(2 * i + 1) * len(members) // (2 * n)] for i in range(n)]
    return chosen


def cross(W: np.ndarray, parts: Parts, method: Method) -> Crossed:
    """Bases of either part, scored on both."""
    totals = (0.0, 0.0) if method.metric == "components" else (output_energy(W, parts.a), output_energy(W, parts.b))
    return crossed(W, parts.a, parts.b, parts.share, method, totals)


def noted(W: np.ndarray, result: WhitenedSVD, parts: Parts, method: Method) -> dict[str, Any]:
    """What a layer's record says of its cross-fitted errors (`crossed`), at ranks 8, 16, 32 ... and the stored one."""
    found = cross(W, parts, method)
    if method.metric == "components":
        energy = Energy(input_variance(parts.whole), kept_variance(result.P, parts.whole))
    else:
        total = parts.share * found.a_on_a.total + (1 - parts.share) * found.b_on_b.total
        energy = Energy(total, kept_output(result.U, result.S, result.P, parts.whole))
    return found.shares(doubled(len(result.S)), energy)
