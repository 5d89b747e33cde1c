"""The figures of a report, made of what `gather` found."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ..store.excess import ENOUGH, EXPONENT
from .gather import MORE, BasisFacts, at
from .inputs import SiteFacts
from .layers import Cell, Places, numbers
from .style import (
    COLOURS,
    SCALE,
    TEMPLATE,
    cell,
    choice,
    line,
    marks,
    panels,
    rounded,
    slider,
    text,
)

FLOOR = 1e-4  # of the output: logarithmic axes end where less than this is lost
BRIGHTEST = 1e-3  # and colours there
KINDS = 24  # panels; the kinds with most layers
BEGIN = 32  # the rank that the slider shows first
_TICKS = (0.0, 0.5, 0.9, 0.99, 0.999)  # kept output, on the scale of what is lost


def kept_output(bases: Sequence[BasisFacts], places: Places) -> go.Figure:
    """Kept output by block and kind of layer: a basis by the menu, a rank by the slider."""
    ranks = sorted({rank for basis in bases for rank in basis.ranks})
    cells = {rank: [places.cells(at(basis.kept, rank, basis.ranks[-1])) for basis in bases] for rank in ranks}
    changes = [
        {"z": [_colours(one) for one in cells[rank]], "text": [_texts(one) for one in cells[rank]]} for rank in ranks
    ]
    first = max((i for i, rank in enumerate(ranks) if rank <= BEGIN), default=0)
    bar = {
        "title": {"text": "kept", "side": "top"},
        "tickvals": [-math.log10(max(1 - share, BRIGHTEST)) for share in _TICKS],
        "ticktext": [f"{100 * share:g} %" for share in _TICKS],
        "outlinewidth": 0,
        "thickness": 12,
    }
    scale = {"zmin": 0, "zmax": -math.log10(BRIGHTEST), "colorbar": bar}
    figure = blocks_figure(places, changes[first], scale, len(bases))
    figure.update_layout(
        updatemenus=[choice([basis.name for basis in bases], _one_of(len(bases)))],
        sliders=[slider("rank", [str(rank) for rank in ranks], changes, first)],
    )
    return figure


def blocks_figure(places: Places, shown: Mapping[str, Any], scale: Mapping[str, Any], count: int) -> go.Figure:
    """`count` heat maps (kinds, blocks) in one place. shown: `z` and `text` of each."""
    figure = go.Figure()
    for i in range(count):
        figure.add_heatmap(
            x=[str(block) for block in places.blocks],
            y=[text(kind) for kind in places.kinds],
            z=shown["z"][i],
            text=shown["text"][i],
            hovertemplate="%{y}, block %{x}<br>%{text}<extra></extra>",
            colorscale=SCALE,
            xgap=1,
            ygap=1,
            visible=i == 0,
            **scale,
        )
    figure.update_layout(template=TEMPLATE, height=24 * len(places.kinds) + 210, margin={"t": 50})
    figure.update_xaxes(title_text="block", type="category", showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure


def _colours(cells: list[list[Cell | None]]) -> list[list[float | None]]:
    """-log10 of what is lost: 90, 99 and 99.9 % of the output are equally far apart."""
    return [
        rounded([None if one is None else -math.log10(max(1 - one.mean, BRIGHTEST)) for one in row]) for row in cells
    ]


def _texts(cells: list[list[Cell | None]]) -> list[list[str]]:
    return [["" if one is None else _kept(one) for one in row] for row in cells]


def _kept(one: Cell) -> str:
    several = f"<br>{100 * one.low:.2f} to {100 * one.high:.2f} % of {one.count} layers" if one.count > 1 else ""
    return f"{100 * one.mean:.2f} % kept{several}"


def _one_of(count: int) -> list[list[bool]]:
    return [[i == chosen for i in range(count)] for chosen in range(count)]


def spectra(bases: Sequence[BasisFacts], places: Places) -> go.Figure:
    """S_i / S_1 by kind of layer: the median over the blocks, and their range."""
    kinds = largest(places.members(layer for basis in bases for layer in basis.spectra))
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
    figure.update_layout(
        showlegend=False, updatemenus=[choice([basis.name for basis in bases], shown) | {"y": 1.0, "pad": {"b": 30}}]
    )
    figure.update_xaxes(type="log", dtick=1)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1, tickfont_size=10)
    return figure


def _band(basis: BasisFacts, layers: Sequence[str], visible: bool) -> list[go.Scatter]:
    """Range and median of the spectra of some layers, as far as all of them reach."""
    if not layers:
        return []
    places = min((basis.spectra[layer][0] for layer in layers), key=len)
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
    for number, basis in enumerate(bases):
        for i, (rank, now) in enumerate(sorted(basis.excess.items())):
            counts = [tokens, *(tokens * more for more in MORE)]
            y = [100 * now * (count / tokens) ** -EXPONENT for count in counts]
            figure.add_scatter(
                x=counts,
                y=rounded(y),
                name=f"rank {rank}",
                mode="lines+markers+text",
                line={**line(0), "color": _shade(i, len(basis.excess)), "dash": "dot"},
                marker={"size": 8, "symbol": ["circle", *["circle-open"] * len(MORE)]},
                text=[f"{y[0]:.2g} %", *[""] * (len(MORE) - 1), f"{y[-1]:.2g} %"],
                textposition="top center",
                hovertemplate=f"rank {rank}, %{{x:,}} tokens<br>%{{y:.2g}} % more than needed<extra></extra>",
                cliponaxis=False,
                visible=number == 0,
            )
            owners.append(number)
    figure.add_hline(100 * ENOUGH, line={"dash": "dash", "width": 1, "color": "#999999"})
    shown = [[owner == number for owner in owners] for number in range(len(bases))]
    ticks = [tokens, *(tokens * more for more in MORE)]
    figure.update_layout(
        template=TEMPLATE, height=350, updatemenus=[choice([basis.name for basis in bases], shown)], margin={"t": 60}
    )
    figure.update_layout(
        legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top", "traceorder": "reversed"}, showlegend=True
    )
    figure.update_xaxes(type="log", title_text="tokens", tickvals=ticks, ticktext=[f"{count:,}" for count in ticks])
    drawn = [value for trace in figure.data for value in trace.y]
    levels = marks(min(drawn) / 2, 2 * max(drawn))
    names = [f"{level:g} %" for level in levels]
    figure.update_yaxes(type="log", title_text="lost more than needed", tickvals=levels, ticktext=names)
    return figure


def _shade(i: int, count: int) -> str:
    """From blue to purple: ranks have an order."""
    share = i / max(count - 1, 1)
    low, high = (0x55, 0xAA, 0xDD), (0xAA, 0x44, 0x99)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))


def losses(bases: Sequence[BasisFacts], places: Places) -> go.Figure:
    """Lost output by rank, the mean over the layers of a kind: a line for each basis."""
    kinds = largest(places.members(layer for basis in bases for layer in basis.kept))
    groups = {"all layers": [layer for members in kinds.values() for layer in members], **kinds}
    figure = panels(list(groups), "rank", "lost output")
    for number, basis in enumerate(bases):
        for i, (kind, members) in enumerate(groups.items()):
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
                    hovertemplate=f"{text(basis.name)}, rank %{{x}}<br>%{{y:.2%}} lost<extra>{text(kind)}</extra>",
                ),
                *cell(i, len(groups)),
            )
    figure.update_xaxes(type="log", dtick=math.log10(4))
    lowest = min(lost for trace in figure.data for lost in trace.y)
    ticks = marks(lowest, 1)
    figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{100 * tick:g} %" for tick in ticks], tickfont_size=10)
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
        for words, dash in (("ranks by layer", "solid"), ("equal ranks", "dot")):
            lost = [1 - (one.kept if dash == "solid" else one.kept_equal) for one in basis.budgets]
            figure.add_scatter(
                x=[one.parameters for one in basis.budgets],
                y=rounded([max(share, FLOOR) for share in lost]),
                text=[f"{one.parameters:,} parameters, those of rank {one.equal}" for one in basis.budgets],
                name=text(f"{basis.name}, {words}"),
                mode="lines+markers",
                marker={"size": 5},
                line=line(number) | {"dash": dash},
                hovertemplate=f"%{{text}}<br>%{{y:.2%}} lost<extra>{words}</extra>",
            )
    lowest = min(lost for trace in figure.data for lost in trace.y)
    ticks = marks(lowest, 1)
    figure.update_layout(template=TEMPLATE, height=340, showlegend=True, margin={"t": 60})
    figure.update_xaxes(type="log", title_text="parameters of LoRA, sum of r (d_in + d_out)", dtick=1)
    figure.update_yaxes(type="log", title_text="lost output", tickvals=ticks, ticktext=[f"{100 * t:g} %" for t in ticks])
    return figure


def budget_ranks(bases: Sequence[BasisFacts], places: Places) -> go.Figure:
    """Ranks by block and kind of layer: a basis by the menu, a budget by the slider."""
    equal = sorted({one.equal for basis in bases for one in basis.budgets})
    cells = [
        [places.cells(next((one.ranks for one in basis.budgets if one.equal == rank), {})) for basis in bases]
        for rank in equal
    ]
    changes = [
        {"z": [_logarithms(one) for one in row], "text": [_rank_texts(one) for one in row]} for row in cells
    ]
    most = max(max(one.ranks.values()) for basis in bases for one in basis.budgets)
    ticks = [2**i for i in range(most.bit_length())]
    bar = {"title": {"text": "rank", "side": "top"}, "outlinewidth": 0, "thickness": 12}
    bar |= {"tickvals": [math.log2(tick) for tick in ticks], "ticktext": [str(tick) for tick in ticks]}
    first = max((i for i, rank in enumerate(equal) if rank <= BEGIN), default=0)
    scale = {"zmin": 0, "zmax": math.log2(most), "colorbar": bar}
    figure = blocks_figure(places, changes[first], scale, len(bases))
    figure.update_layout(
        updatemenus=[choice([basis.name for basis in bases], _one_of(len(bases)))],
        sliders=[slider("as many parameters as rank", [str(rank) for rank in equal], changes, first)],
    )
    return figure


def _logarithms(cells: list[list[Cell | None]]) -> list[list[float | None]]:
    return [rounded([None if one is None else math.log2(one.mean) for one in row]) for row in cells]


def _rank_texts(cells: list[list[Cell | None]]) -> list[list[str]]:
    def said(one: Cell) -> str:
        return f"rank {one.mean:g}" if one.count == 1 else f"rank {one.low:g} to {one.high:g}, mean {one.mean:.1f}"

    return [["" if one is None else said(one) for one in row] for row in cells]


def experts(sites: Sequence[SiteFacts], idle: Sequence[str]) -> go.Figure:
    """Tokens of every expert by block: of its inputs, the one that saw most; `idle` ones saw none."""
    counts: dict[tuple[int, int], int] = dict.fromkeys((_expert(layer) for layer in idle), 0)
    for site in sites:
        place = _expert(site.layers[0])
        counts[place] = max(counts.get(place, 0), site.count)
    blocks, numbers_ = (sorted({place[i] for place in counts}) for i in (0, 1))
    table = [[counts.get((block, expert)) for block in blocks] for expert in numbers_]
    seen = [count for count in counts.values() if count]
    ticks = marks(min(seen), max(seen))
    figure = go.Figure(
        go.Heatmap(
            x=[str(block) for block in blocks],
            y=[str(expert) for expert in numbers_],
            z=[rounded([math.log10(count) if count else None for count in row]) for row in table],
            text=[["" if count is None else f"{count:,} tokens" for count in row] for row in table],
            hovertemplate="expert %{y}, block %{x}<br>%{text}<extra></extra>",
            colorscale=SCALE,
            xgap=1,
            ygap=1,
            colorbar={
                "title": {"text": "tokens", "side": "top"},
                "tickvals": [math.log10(tick) for tick in ticks],
                "ticktext": [f"{tick:,.0f}" for tick in ticks],
                "outlinewidth": 0,
                "thickness": 12,
            },
        )
    )
    figure.update_layout(template=TEMPLATE, height=min(max(8 * len(numbers_), 200), 1000) + 90)
    figure.update_xaxes(title_text="block", type="category", showgrid=False)
    figure.update_yaxes(title_text="expert", type="category", autorange="reversed", showgrid=False)
    return figure


def _expert(layer: str) -> tuple[int, int]:
    """Block and expert of a layer."""
    block, expert, *_ = [*numbers(layer), 0, 0]
    return block, expert
