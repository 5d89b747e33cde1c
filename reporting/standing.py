"""Layers that stand out: by their inputs, and by what their bases resolve."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..store import BasisSet
from .inputs import LOUD, SiteFacts
from .layers import joined

SHOWN = 8  # layers of one finding; the others are counted
CONSTANT = 0.7  # of the mean square: an input that is hardly more than a constant
RESOLVED = 0.9  # of the spectrum: a numerical rank below that is noted


@dataclass(frozen=True)
class Finding:
    """What some layers have in common. head: of the columns; rows: the worst SHOWN of `count`."""

    title: str
    advice: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    count: int


def findings(sites: Iterable[SiteFacts], bases: Iterable[BasisSet]) -> list[Finding]:
    """Everything that is noted, without the findings that no layer has."""
    sites, bases = list(sites), list(bases)
    made = [_few(sites), _dead(sites), _loud(sites), _constant(sites), _ill(bases), _below(bases)]
    return [finding for finding in made if finding.count]


def _few(sites: list[SiteFacts]) -> Finding:
    found = sorted((s for s in sites if s.count < s.width), key=lambda s: s.count / s.width)
    return _finding(
        "Fewer tokens than the input is wide",
        "Their second moment has directions that no token used, which only damping fills. More sequences help: run the "
        "same prep covariance with a larger --num-sequences.",
        ("layers", "tokens", "width"),
        [(joined(s.layers), f"{s.count:,}", f"{s.width:,}") for s in found],
    )


def _dead(sites: list[SiteFacts]) -> Finding:
    found = sorted((s for s in sites if s.dead), key=lambda s: -(s.dead or 0) / s.width)
    return _finding(
        "Dead input channels",
        "Channels whose mean square is next to nothing: whitened bases do not read them, and an adapter on other data, "
        "which may use them, cannot reach them through such a basis.",
        ("layers", "dead", "of"),
        [(joined(s.layers), f"{s.dead:,}", f"{s.width:,}") for s in found],
    )


def _loud(sites: list[SiteFacts]) -> Finding:
    found = sorted((s for s in sites if s.loud), key=lambda s: -(s.peak or 0.0))
    return _finding(
        "Outlier channels",
        f"Channels whose mean square is more than {LOUD:,.0f} times the median of their layer: they take the first "
        "directions of a whitened basis, and they are what low precision rounds worst.",
        ("layers", "channels", "largest / median"),
        [(joined(s.layers), f"{s.loud:,}", f"{s.peak or 0.0:,.0f}") for s in found],
    )


def _constant(sites: list[SiteFacts]) -> Finding:
    found = sorted((s for s in sites if (s.mean or 0.0) > CONSTANT), key=lambda s: -(s.mean or 0.0))
    return _finding(
        "Large means",
        f"More than {100 * CONSTANT:.0f} % of the mean square of the input is that of its mean, so one direction holds "
        "a constant. prep decompose --center leaves it out of the metric.",
        ("layers", "share of the mean"),
        [(joined(s.layers), f"{100 * (s.mean or 0.0):.0f} %") for s in found],
    )


def _ill(bases: list[BasisSet]) -> Finding:
    worst: dict[str, tuple[float, int, int, str]] = {}
    for basis in bases:
        if basis.method["metric"] == "full" and basis.method.get("power", 0.5) > 0.5:
            continue  # C^1 squares the condition: its small values are lost in every layer
        lengths = {shape: basis.arrays(shape)["spectrum"].shape[1] for shape in basis.shapes}
        for layer, record in basis.layers.items():
            length = lengths[record.shape]
            one = (record.numerical_rank / length, record.numerical_rank, length, basis.name)
            worst[layer] = min(worst.get(layer, one), one)
    found = sorted((one, layer) for layer, one in worst.items() if one[0] < RESOLVED)
    return _finding(
        "Ill-conditioned layers",
        "Many singular values of W M are below rounding: directions beyond the numerical rank are noise. A rank above "
        "it buys nothing.",
        ("layer", "numerical rank", "of", "basis"),
        [(layer, f"{rank:,}", f"{length:,}", name) for (_, rank, length, name), layer in found],
    )


def _below(bases: list[BasisSet]) -> Finding:
    found = [
        (record.numerical_rank - record.rank, layer, record, basis.name)
        for basis in bases
        for layer, record in basis.layers.items()
        if record.rank > record.numerical_rank
    ]
    return _finding(
        "Bases that keep unresolved directions",
        "The stored rank is above the numerical rank: attach these layers with a smaller rank.",
        ("layer", "stored rank", "numerical rank", "basis"),
        [
            (layer, f"{r.rank:,}", f"{r.numerical_rank:,}", name)
            for _, layer, r, name in sorted(found, key=lambda f: f[:2])
        ],
    )


def _finding(title: str, advice: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Finding:
    return Finding(title, advice, head, rows[:SHOWN], len(rows))
