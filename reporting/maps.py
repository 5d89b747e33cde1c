"""Heat maps: kept output and ranks by block and kind of layer, tokens by block and expert."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from ..store.excess import SHOWN
from .gather import BasisFacts, at
from .inputs import SiteFacts
from .layers import Cell, Places, numbers
from .style import NONE, SCALE, TEMPLATE, choice, marks, rounded, slider, text

BRIGHTEST = 1e-3  # of the output: where less is lost, colours do not tell it
_TICKS = (0.0, 0.5, 0.9, 0.99, 0.999)  # kept output, on the scale of what is lost


def kept_output(bases: Sequence[BasisFacts], places: Places) -> go.Figure:
    """Kept output by block and kind of layer: a basis by the menu, a rank by the slider."""
    ranks = sorted({rank for basis in bases for rank in basis.ranks})
    cells = {rank: [places.cells(at(basis.kept, rank, basis.ranks[-1])) for basis in bases] for rank in ranks}
    changes = [
        {"z": [_colours(one) for one in cells[rank]], "text": [_texts(one) for one in cells[rank]]} for rank in ranks
    ]
    first = max((i for i, rank in enumerate(ranks) if rank <= SHOWN), default=0)
    ticks = {_colour(share): f"{100 * share:g} %" for share in _TICKS}
    scale = {"zmin": 0, "zmax": _colour(1), "colorbar": _bar("kept", ticks)}
    figure = blocks_figure(places, changes[first], scale, len(bases))
    figure.update_layout(
        updatemenus=[choice([basis.name for basis in bases], _one_of(len(bases)))],
        sliders=[slider("rank", [str(rank) for rank in ranks], changes, first)],
    )
    return figure


def budget_ranks(bases: Sequence[BasisFacts], places: Places) -> go.Figure:
    """Ranks by block and kind of layer: a basis by the menu, a budget by the slider."""
    equal = sorted({one.equal for basis in bases for one in basis.budgets})
    cells = [
        [places.cells(next((one.ranks for one in basis.budgets if one.equal == rank), {})) for basis in bases]
        for rank in equal
    ]
    changes = [{"z": [_logarithms(one) for one in row], "text": [_rank_texts(one) for one in row]} for row in cells]
    most = max(max(one.ranks.values()) for basis in bases for one in basis.budgets)
    ticks = {float(i): str(2**i) for i in range(most.bit_length())}
    first = max((i for i, rank in enumerate(equal) if rank <= SHOWN), default=0)
    scale = {"zmin": 0, "zmax": math.log2(most), "colorbar": _bar("rank", ticks)}
    figure = blocks_figure(places, changes[first], scale, len(bases))
    figure.update_layout(
        updatemenus=[choice([basis.name for basis in bases], _one_of(len(bases)))],
        sliders=[slider("as many parameters as rank", [str(rank) for rank in equal], changes, first)],
    )
    return figure


def experts(sites: Sequence[SiteFacts], idle: Sequence[str]) -> go.Figure:
    """Tokens of every expert by block: of its inputs, the one that saw most; `idle` ones saw none."""
    counts: dict[tuple[int, int], int] = dict.fromkeys((_expert(layer) for layer in idle), 0)
    for site in sites:
        place = _expert(site.layers[0])
        counts[place] = max(counts.get(place, 0), site.count)
    blocks, rows = (sorted({place[i] for place in counts}) for i in (0, 1))
    table = [[counts.get((block, expert)) for block in blocks] for expert in rows]
    seen = [count for count in counts.values() if count]
    ticks = {math.log10(count): f"{count:,.0f}" for count in marks(min(seen), max(seen))}
    figure = go.Figure(
        go.Heatmap(
            x=[str(block) for block in blocks],
            y=[str(expert) for expert in rows],
            z=[rounded([math.log10(count) if count else None for count in row]) for row in table],
            text=[["" if count is None else f"{count:,} tokens" for count in row] for row in table],
            hovertemplate="expert %{y}, block %{x}<br>%{text}<extra></extra>",
            colorscale=SCALE,
            xgap=1,
            ygap=1,
            colorbar=_bar("tokens", ticks),
        )
    )
    figure.update_layout(template=TEMPLATE, height=min(max(8 * len(rows), 200), 1000) + 90)
    figure.update_xaxes(title_text="block", type="category", showgrid=False)
    figure.update_yaxes(title_text="expert", type="category", autorange="reversed", showgrid=False)
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
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, ticks="outside", tickcolor=NONE)
    return figure


def _bar(title: str, ticks: Mapping[float, str]) -> dict[str, Any]:
    """The scale beside a heat map. ticks: value -> what it says."""
    names = {"tickvals": list(ticks), "ticktext": list(ticks.values())}
    return {"title": {"text": f"{title}<br>&nbsp;", "side": "top"}, "outlinewidth": 0, "thickness": 12, **names}


def _colour(kept: float) -> float:
    """-log10 of what is lost: 90, 99 and 99.9 % of the output are equally far apart."""
    return -math.log10(max(1 - kept, BRIGHTEST))


def _colours(cells: list[list[Cell | None]]) -> list[list[float | None]]:
    return [rounded([None if one is None else _colour(one.mean) for one in row]) for row in cells]


def _texts(cells: list[list[Cell | None]]) -> list[list[str]]:
    return [["" if one is None else _kept(one) for one in row] for row in cells]


def _kept(one: Cell) -> str:
    several = f"<br>{100 * one.low:.2f} to {100 * one.high:.2f} % of {one.count} layers" if one.count > 1 else ""
    return f"{100 * one.mean:.2f} % kept{several}"


def _logarithms(cells: list[list[Cell | None]]) -> list[list[float | None]]:
    return [rounded([None if one is None else math.log2(one.mean) for one in row]) for row in cells]


def _rank_texts(cells: list[list[Cell | None]]) -> list[list[str]]:
    def said(one: Cell) -> str:
        return f"rank {one.mean:g}" if one.count == 1 else f"rank {one.low:g} to {one.high:g}, mean {one.mean:.1f}"

    return [["" if one is None else said(one) for one in row] for row in cells]


def _one_of(count: int) -> list[list[bool]]:
    return [[i == chosen for i in range(count)] for chosen in range(count)]


def _expert(layer: str) -> tuple[int, int]:
    """Block and expert of a layer."""
    block, expert, *_ = [*numbers(layer), 0, 0]
    return block, expert
