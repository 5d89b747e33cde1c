"""The inputs of layers: how many tokens they saw, and which of their channels stand out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..store import LayerMoment, Moments
from ..store.format.schema import is_url

DEAD = 1e-10  # of the mean: a channel with less mean square carries nothing
LOUD = 1000.0  # times the median: about 30 times the amplitude of the others
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class SiteFacts:
    """One input x (width d) of the layers that share it, over `count` tokens.

    dead, loud: channels with hardly any mean square, and with LOUD times the median. peak: the largest E[x_i^2] over
    the median. mean: share of E||x||^2 that is ||E[x]||^2. They are None where the store is too far away to read them.
    matrix: whether the moments tell what a basis keeps of the output; half: whether there are those of the first half.
    """

    layers: list[str]
    count: int
    width: int
    matrix: bool
    half: bool
    dead: int | None = None
    loud: int | None = None
    peak: float | None = None
    mean: float | None = None

    @property
    def expert(self) -> bool:
        """Whether it is the input of one expert."""
        return _EXPERT.search(self.layers[0]) is not None


def site_facts(location: str, moments: Moments) -> list[SiteFacts]:
    """Every site; of full moments at URLs the channels are not read: that would fetch a large part of them."""
    return [_facts(moments[layers[0]], layers, is_url(location)) for layers in moments.sites.values()]


def _facts(moment: LayerMoment, layers: Iterable[str], far: bool) -> SiteFacts:
    known = (list(layers), moment.count, moment.shape[1], moment.kind != "diagonal", moment.half is not None)
    if far and moment.kind == "full":
        return SiteFacts(*known)
    squares = moment.squares().double().numpy()
    total, median = float(squares.sum()), float(np.median(squares))
    dead = int(np.sum(squares <= DEAD * squares.mean()))
    loud = int(np.sum(squares > LOUD * median)) if median > 0 else 0
    mean = float(np.sum(moment.mean.double().numpy() ** 2))
    return SiteFacts(
        *known,
        dead=dead,
        loud=loud,
        peak=float(squares.max() / median) if median > 0 else 0.0,
        mean=mean / total if total > 0 else 0.0,
    )
