"""Curves: spectra and losses by kind of layer, the excess by tokens, losses by parameters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ..store.excess import ENOUGH, EXPONENT, percent
from .gather import MORE, BasisFacts, at
from .layers import Places
from .style import COLOURS, TEMPLATE, cell, choice, line, marks, panels, rounded, text

FLOOR = 1e-4  # of the output: axes end where less than this is lost
KINDS = 24  # panels; the kinds with most layers


def spectra(bases: Sequence[BasisFacts], places: Places) -> go.Figure:
    """S_i / S_1 by kind of layer: the median over the blocks, and their range."""
    kinds = largest(places.members(dict.fromkeys(layer for basis in bases for layer in basis.spectra)))
    figure = panels(list(kinds), "direction", "S<sub>i</sub> / S<sub>1</sub>")
    owners: list[int] = []
    for number, basis in enumerate(bases):
        groups = places.members(basis.spectra)
        for i, kind in enumerate(kinds):
            for trace in _band(basis, groups.get(kind, []), number == 0):
                row, column = cell(i, len(kinds))
                figure.add_trace(trace, row, column)
                owners.append(number)
    shown = [[owner == number for owner in owners] for number in range(len(bases))]
    menu = choice([basis.name for basis in bases], shown) | {"pad": {"b": 30}}  # above the titles
    figure.update_layout(showlegend=False, updatemenus=[menu])
    figure.update_xaxes(type="log", dtick=1)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1, tickfont_size=10)
    return figure


def _band(basis: BasisFacts, layers: Sequence[str], visible: bool) -> list[go.Scatter]:
    """Range and median of the spectra of some layers, as far as all of them reach."""
    if not layers:
        return []
    places = min((basis.spectra[layer][0] for layer in layers), key=lambda places: places[-1])
    values = np.array([np.interp(places, *basis.spectra[layer]) for layer in layers])
    low, middle, high = (_positive(part) for part in (values.min(0), np.median(values, axis=0), values.max(0)))
    x = [int(place) for place in places]
    band = {"x": x, "mode": "lines", "line": {"width": 0, "color": COLOURS[0]}, "hoverinfo": "skip", "visible": visible}
    fill = {"fill": "tonexty", "fillcolor": "rgba(68,119,170,0.25)"}
    hover = "direction %{x}<br>%{y:.3g} of the first, median of " + f"{len(layers)}<extra></extra>"
    return [
        go.Scatter(y=low, **band),
        go.Scatter(y=high, **band, **fill),
        go.Scatter(x=x, y=middle, mode="lines", line=line(0), hovertemplate=hover, visible=visible),
    ]


def _positive(values: np.ndarray) -> list[float | None]:
    """What a logarithmic axis can show."""
    return rounded([float(value) if value > 0 else None for value in values])


def largest(groups: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The KINDS kinds with most layers, in their order."""
    kept = sorted(groups, key=lambda kind: -len(groups[kind]))[:KINDS]
    return {kind: members for kind, members in groups.items() if kind in kept}


def excess(bases: Sequence[BasisFacts], tokens: int) -> go.Figure:
    """The relative excess at each rank: now, and what n^-EXPONENT predicts for more tokens."""
    figure = go.Figure()
    owners: list[int] = []
    counts = [tokens, *(tokens * more for more in MORE)]
    for number, basis in enumerate(bases):
        found = {rank: now for rank, now in sorted(basis.excess.items()) if now > 0}
        for i, (rank, now) in enumerate(found.items()):
            y = [now * (count / tokens) ** -EXPONENT for count in counts]
            figure.add_scatter(
                x=counts,
                y=rounded(y),
                name=f"rank {rank}",
                mode="lines+markers+text",
                line={**line(0), "color": _shade(i, len(found)), "dash": "dot"},
                marker={"size": 8, "symbol": ["circle", *["circle-open"] * len(MORE)]},
                text=[percent(y[0]), *[""] * (len(MORE) - 1), percent(y[-1])],
                textposition="top center",
                hovertemplate=f"rank {rank}, %{{x:,}} tokens<br>%{{y:.2%}} more than needed<extra></extra>",
                cliponaxis=False,
                visible=number == 0,
            )
            owners.append(number)
    figure.add_hline(ENOUGH, line={"dash": "dash", "width": 1, "color": "#999999"})
    shown = [[owner == number for owner in owners] for number in range(len(bases))]
    menu = choice([basis.name for basis in bases], shown)
    figure.update_layout(template=TEMPLATE, height=350, updatemenus=[menu], margin={"t": 60}, showlegend=True)
    figure.update_layout(legend={"orientation": "v", "x": 1.02, "yanchor": "top", "traceorder": "reversed"})
    figure.update_xaxes(type="log", title_text="tokens", tickvals=counts, ticktext=[f"{count:,}" for count in counts])
    _shares(figure, title_text="lost more than needed")
    return figure


def _shares(figure: go.Figure, **axis: Any) -> None:
    """A logarithmic axis of shares."""
    drawn = [value for trace in figure.data for value in trace.y]
    ticks = marks(min(drawn) / 1.5, min(1.5 * max(drawn), max(1, *drawn)))
    names = [f"{100 * tick:g} %" for tick in ticks]
    figure.update_yaxes(type="log", tickvals=ticks, ticktext=names, **axis)


def _shade(i: int, count: int) -> str:
    """From blue to purple: ranks have an order."""
    share = i / max(count - 1, 1)
    low, high = (0x55, 0xAA, 0xDD), (0xAA, 0x44, 0x99)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))


def losses(bases: Sequence[BasisFacts], places: Places) -> go.Figure:
    """Lost output by rank, the mean over the layers of a kind: a line for each basis."""
    kinds = places.members(dict.fromkeys(layer for basis in bases for layer in basis.kept))
    groups = {"all layers": [layer for members in kinds.values() for layer in members], **largest(kinds)}
    figure = panels(list(groups), "rank", "lost output")
    for number, basis in enumerate(bases):
        for i, members in enumerate(groups.values()):
            points = mean_losses(basis, members)
            figure.add_trace(
                go.Scatter(
                    x=list(points),
                    y=rounded([max(lost, FLOOR) for lost in points.values()]),
                    name=text(basis.name),
                    mode="lines+markers",
                    marker={"size": 4},
                    line=line(number),
                    legendgroup=basis.name,
                    showlegend=i == 0,
                    hovertemplate="rank %{x}<br>%{y:.2%} lost<extra>%{fullData.name}</extra>",
                ),
                *cell(i, len(groups)),
            )
    figure.update_xaxes(type="log", dtick=math.log10(4))
    _shares(figure, tickfont_size=10)
    figure.update_layout(legend={"y": 1, "yref": "container", "yanchor": "top"})
    return figure


def mean_losses(basis: BasisFacts, layers: Sequence[str]) -> dict[int, float]:
    """rank -> mean share of the output that is lost, of those of the layers that the basis knows."""
    own = {layer: basis.kept[layer] for layer in layers if layer in basis.kept}
    return {rank: 1 - statistics.fmean(at(own, rank, basis.ranks[-1]).values()) for rank in basis.ranks if own}


def budget_curves(bases: Sequence[BasisFacts]) -> go.Figure:
    """Lost output against parameters: ranks by layer (full lines) and equal ranks (dotted)."""
    figure = go.Figure()
    for number, basis in enumerate(bases):
        for words, dash, kept in (
            ("", "solid", [one.kept for one in basis.budgets]),
            (", equal ranks", "dot", [one.kept_equal for one in basis.budgets]),
        ):
            figure.add_scatter(
                x=[one.parameters for one in basis.budgets],
                y=rounded([max(1 - share, FLOOR) for share in kept]),
                text=[f"{one.parameters:,} parameters, those of rank {one.equal}" for one in basis.budgets],
                name=text(basis.name + words),
                mode="lines+markers",
                marker={"size": 5},
                line=line(number) | {"dash": dash},
                showlegend=not words,
                hovertemplate="%{text}<br>%{y:.2%} lost<extra>%{fullData.name}</extra>",
            )
    figure.update_layout(template=TEMPLATE, height=340, showlegend=True, margin={"t": 60})
    figure.update_xaxes(type="log", title_text="parameters: sum of r (d<sub>in</sub> + d<sub>out</sub>)", dtick=1)
    _shares(figure, title_text="lost output")
    return figure
