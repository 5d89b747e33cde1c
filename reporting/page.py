"""The page: the sections of a store in page.html, with plotly's script in its head."""

from __future__ import annotations

from pathlib import Path

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from .. import __version__
from ..store import Store
from .gather import Facts, gather
from .sections import sections
from .style import CONFIG

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
)


def page(store: Store, mark: str) -> str:
    """A store as HTML. mark: the name of the generator in its head."""
    facts = gather(store)
    name = facts.info["model"]["id"] or "a module"
    return _TEMPLATES.get_template("page.html").render(
        mark=f"{mark} {__version__}",
        title=f"{Path(name).name if name.startswith(('/', '.', '~')) else name}: prep report",
        summary=_summary(facts),
        advice=facts.info["advice"],
        sections=sections(facts),
        plotly=Markup(get_plotlyjs()),
        drawn=drawn,
    )


def drawn(figure: go.Figure, id: str) -> Markup:
    """A figure as HTML, drawn by the script that is in the page; plotly escapes what ends a script."""
    return Markup(figure.to_html(CONFIG, include_plotlyjs=False, full_html=False, div_id=id, default_height="auto"))


def _summary(facts: Facts) -> str:
    """A store in one line."""
    tokens = f"{facts.tokens:,} tokens" if facts.tokens else "not calibrated"
    count = len(facts.places.of)
    bases = len(facts.info["bases"])
    return f"{tokens}, {count:,} layers, {bases} {'basis' if bases == 1 else 'bases'}"
