"""How far a basis is from the best one, as its decomposition noted for some layers, and what more tokens would gain."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from .basis import BasisSet

EXPONENT = 0.8  # the excess of a basis falls as tokens^-EXPONENT (measured)
FIRST_RANK = 8
SHOWN = 64  # the rank at which a basis is judged, or its own where that is smaller
ENOUGH = 0.01  # an excess below this is no reason to read more
MORE = 4  # times as many tokens, which is what the advice speaks of
_NOTHING = 1e-9  # of the output: what is lost where all directions are kept, up to rounding


def doubled(last: int) -> tuple[int, ...]:
    """8, 16, 32 ... below last, and last."""
    ranks = [FIRST_RANK * 2**i for i in range(last.bit_length()) if FIRST_RANK * 2**i < last]
    return (*ranks, last)


def at_rank(crossed: dict[str, Any], rank: int) -> dict[str, float] | None:
    """`unseen`, `excess` and `least` of a layer at a rank, None where they are not known there.

    Beyond the last rank they are those of the last one, which holds all directions of the layer.
    """
    ranks = crossed["ranks"]
    at = min(rank, ranks[-1])
    return {name: crossed[name][ranks.index(at)] for name in ("unseen", "excess", "least")} if at in ranks else None


def relative(excess: float, least: float) -> float:
    """The excess as a share of the least possible loss; 0 where nothing is lost."""
    return excess / least if least > _NOTHING else 0.0


def excess_of(basis: BasisSet) -> dict[str, Any] | None:
    """The `rank` at which a basis is judged and `relative`, the median excess there, of `layers` layers.

    None where it is known of none.
    """
    rank = min(SHOWN, int(basis.method["rank"]))
    known = [record.crossed for record in basis.layers.values() if record.crossed]
    values = _relatives(known, rank)
    return {"rank": rank, "relative": statistics.median(values), "layers": len(values)} if values else None


def median_excess(known: Iterable[dict[str, Any]], rank: int) -> float | None:
    """The median of the relative excess of layers at a rank; None where it is known of none."""
    values = _relatives(known, rank)
    return statistics.median(values) if values else None


def _relatives(known: Iterable[dict[str, Any]], rank: int) -> list[float]:
    """Without the layers that lose nothing at that rank."""
    found = [one for crossed in known if (one := at_rank(crossed, rank)) is not None]
    return [relative(one["excess"], one["least"]) for one in found if one["least"] > _NOTHING]


def advice(tokens: int, known: Iterable[dict[str, Any] | None]) -> str | None:
    """One line on whether more tokens are worth reading, by the basis that would gain most; known: `excess_of` each."""
    worst = max((one for one in known if one is not None), key=lambda one: one["relative"], default=None)
    if worst is None:
        return None
    now = worst["relative"]
    lose = f"{tokens:,} tokens: rank-{worst['rank']} bases lose {percent(now)} more output than they need to"
    if now < ENOUGH:
        return f"{lose}: they are enough"
    return f"{lose}; {MORE} times the tokens would bring that to about {percent(now * MORE**-EXPONENT)}"


def percent(share: float) -> str:
    """With two digits or more, such as `12 %` and `0.31 %`."""
    digits = 0 if share >= 0.0995 else 1 if share >= 0.00995 else 2
    return f"{100 * share:.{digits}f} %"
