"""How the figures look and what their controls are made of, with colours for all eyes, on light and dark.

Text, grids and controls have no colours here: page.html gives them those of the page.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

# Paul Tol's `bright` scheme: personal.sron.nl/~pault
COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#999999")
DASHES = ("solid", "dash", "dot", "dashdot")
SCALE = "Viridis"
NONE = "rgba(0,0,0,0)"
COLUMNS = 4  # of panels
PANEL = 170  # pixels of a row of panels
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif'
CONFIG = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}

_AXIS = {"showgrid": True, "zeroline": False, "ticks": "", "automargin": True, "title": {"standoff": 8}}
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 12, "color": "#444444"},
        "colorway": COLOURS,
        "paper_bgcolor": NONE,
        "plot_bgcolor": NONE,
        "margin": {"l": 10, "r": 10, "t": 40, "b": 40},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "modebar": {"bgcolor": NONE, "color": "#999999", "activecolor": COLOURS[0]},
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "#222222", "bordercolor": "#222222", "font": {"color": "#ffffff"}, "align": "left"},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
    }
)


def text(name: str) -> str:
    """A name as it is: plotly reads labels as HTML."""
    return html.escape(name, quote=False)


def line(i: int) -> dict[str, Any]:
    """Colour and dash of the i-th of several lines."""
    return {"color": COLOURS[i % len(COLOURS)], "dash": DASHES[i // len(COLOURS) % len(DASHES)], "width": 2}


def rounded(values: Sequence[float | None]) -> list[float | None]:
    """With four digits: what is drawn needs no more."""
    return [None if value is None else float(f"{value:.4g}") for value in values]


def marks(low: float, high: float) -> list[float]:
    """Values from `low` to `high` for a logarithmic axis: of every decade one, or 1, 2 and 5 where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if high < 1000 * low else (1,)
    found = [digit * 10.0**power for power in powers for digit in digits]
    return [mark for mark in found if low <= mark <= high]


def choice(names: Sequence[str], visible: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """A menu that shows some traces for each name."""
    buttons = [
        {"label": text(name), "method": "restyle", "args": [{"visible": list(shown)}]}
        for name, shown in zip(names, visible, strict=True)
    ]
    return {
        "buttons": buttons,
        "x": 0,
        "xanchor": "left",
        "y": 1,
        "yanchor": "bottom",
        "pad": {"b": 8},
        "showactive": True,
    }


def slider(prefix: str, labels: Sequence[str], changes: Sequence[Mapping[str, Any]], active: int) -> dict[str, Any]:
    """A slider whose steps change attributes of all traces, one value for each."""
    steps = [
        {"label": label, "method": "restyle", "args": [dict(change)]}
        for label, change in zip(labels, changes, strict=True)
    ]
    shown = {"prefix": f"{prefix} ", "xanchor": "left", "font": {"size": 13}}
    return {"steps": steps, "active": active, "currentvalue": shown, "pad": {"t": 44}, "len": 1, "x": 0}


def panels(titles: Sequence[str], x: str, y: str) -> go.Figure:
    """Small figures with common axes, COLUMNS to a row. x, y: titles of the outer axes."""
    columns = min(COLUMNS, len(titles))
    rows = -(-len(titles) // columns)
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[text(title) for title in titles],
        shared_xaxes="all",
        shared_yaxes="all",
        horizontal_spacing=0.03,
        vertical_spacing=0.14 / rows,
        x_title=x,
        y_title=y,
    )
    figure.update_annotations(font_size=12)
    figure.update_layout(template=TEMPLATE, height=PANEL * rows + 110, margin={"l": 70, "r": 10, "t": 70, "b": 55})
    return figure


def cell(i: int, count: int) -> tuple[int, int]:
    """Row and column of the i-th of `count` panels, from 1."""
    columns = min(COLUMNS, count)
    return i // columns + 1, i % columns + 1
