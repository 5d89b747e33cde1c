"""The two parts of a layer's tokens: which layers are cross-fitted between them, and what is found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...commands import OF_INPUTS
from ...store import LayerMoment
from ...store.excess import doubled
from ...store.info import pattern
from ..numerics.evaluation import Crossed, Energy, crossed, rest
from ..numerics.methods import Method, check
from ..numerics.metric import InputStatistics

SAMPLE = 2  # layers of each kind whose excess a decomposition notes, unless it is told


@dataclass(frozen=True)
class Parts:
    """Moments of the tokens: of all, of the first half, which has the share `share` in them, and of the others."""

    whole: InputStatistics
    a: InputStatistics
    b: InputStatistics
    share: float


def statistics_of(stored: LayerMoment, sampled: bool = False) -> InputStatistics:
    """A stored moment as float64 arrays; sampled: with its sample of tokens, if it has one."""

    def array(x: Tensor) -> np.ndarray:
        return x.to(torch.float64).numpy()

    tokens = stored.tokens if sampled else None
    return InputStatistics(
        kind=stored.kind,
        second_moment=array(stored.second_moment) if stored.kind == "full" else None,
        diagonal=array(stored.diagonal) if stored.kind != "full" else None,
        output=array(stored.output) if stored.kind == "output" else None,
        mean=array(stored.mean),
        tokens=tokens.numpy() if tokens is not None else None,
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

    repair: the basis is one of an error. None where directions were ordered by a sample of the tokens: it has no
    halves.
    """
    if method.pooling != "rms":
        return frozenset()
    full = method.metric in OF_INPUTS or repair
    known = [layer for layer, one in layers.items() if one.half is not None and tells_output(one, full)]
    return frozenset(sampled(known, count))


def to_note(
    layers: Mapping[str, LayerMoment], method: Method, sample: int | None, repair: bool = False
) -> frozenset[str]:
    """The layers that a decomposition cross-fits, `sample` of each kind; none where no token has a say in the basis.

    repair: the basis is one of an error.
    """
    if check(None, method) is None:
        return frozenset()
    return to_cross(layers, method, SAMPLE if sample is None else sample, repair)


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
    return crossed(W, parts.a, parts.b, parts.share, method)


def noted(found: Crossed, energy: Energy) -> dict[str, Any]:
    """What a layer's record says of its cross-fitted errors (`crossed`), at ranks 8, 16, 32 ... and the stored one."""
    return found.shares(doubled(len(energy.kept)), energy)
