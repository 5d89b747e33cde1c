"""Scores as rows, one for each layer, basis and rank, and their summary by kind of layer."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...store import BasisSet
from ...store.excess import at_rank, relative
from ...store.info import aligned, pattern
from .score import Score


@dataclass(frozen=True)
class Row:
    """What a basis loses of a layer's output at a rank, in shares of `E||W x||^2` (of the input variance for EVA).

    lost: on the tokens scored on. unseen: on tokens that the basis has not seen, the mean over two halves, each basis
    made of one and scored on the other. excess: how far the basis is from the best one, which more data would gain.
    least: the estimated loss of that best one. The last three are None where no halves were looked at.
    """

    layer: str
    basis: str
    rank: int
    lost: float
    unseen: float | None = None
    excess: float | None = None
    least: float | None = None

    @property
    def relative(self) -> float | None:
        """The excess as a share of the least possible loss."""
        if self.excess is None or self.least is None:
            return None
        return relative(self.excess, self.least)


def rows_of(scores: Iterable[Score], bases: Mapping[str, BasisSet], ranks: Sequence[int]) -> list[Row]:
    """One row for each score and rank that its basis holds, in the order of bases, layers and ranks."""
    rows: dict[tuple[str, str], list[Row]] = {}
    for score in scores:
        held = min(int(bases[score.basis].method["rank"]), max(ranks))
        rows[score.basis, score.layer] = [_row(score, rank) for rank in ranks if rank <= held]
    return [row for name, basis in bases.items() for layer in basis for row in rows.get((name, layer), ())]


def summary(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """By basis, kind of layer and rank, and over all layers (kind `all`): the mean loss, the median of the excess.

    excess is relative to the least possible loss here; unseen and excess are those of the layers that have them.
    """
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        for kind in (pattern(row.layer), "all"):
            groups.setdefault((row.basis, kind, row.rank), []).append(row)
    found = []
    for (basis, kind, rank), members in groups.items():
        crossed = [row for row in members if row.excess is not None]
        found.append(
            {
                "basis": basis,
                "layers": kind,
                "count": len(members),
                "rank": rank,
                "lost": statistics.fmean(row.lost for row in members),
                "unseen": statistics.fmean(row.unseen or 0.0 for row in crossed) if crossed else None,
                "excess": statistics.median(row.relative or 0.0 for row in crossed) if crossed else None,
            }
        )
    return found


def table(rows: Sequence[Row]) -> list[str]:
    """The lines that `prep evaluate` prints: a line for each basis and kind of layer, a column for each rank."""
    ranks = sorted({row.rank for row in rows})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    counts: dict[tuple[str, str], int] = {}
    for one in summary(rows):
        more = "" if one["excess"] is None else f" +{one['excess']:.1%}"
        place = one["basis"], one["layers"]
        cells.setdefault(place, {})[one["rank"]] = f"{one['lost']:.2%}{more}"
        counts[place] = one["count"]
    order = {basis: i for i, basis in enumerate(dict.fromkeys(basis for basis, _ in cells))}
    last = sorted(cells, key=lambda place: (order[place[0]], place[1] == "all"))
    lines = [["basis", "layers", "count", *(f"rank {rank}" for rank in ranks)]]
    lines += [[*place, str(counts[place]), *(cells[place].get(rank, "") for rank in ranks)] for place in last]
    return aligned(lines)


def _row(score: Score, rank: int) -> Row:
    lost = _share(score.energy.lost(rank), score.energy.total)
    known = at_rank(score.crossed, rank) if score.crossed else None
    return Row(score.layer, score.basis, rank, lost, **(known or {}))


def _share(value: float, total: float) -> float:
    return value / total if total > 0 else 0.0
