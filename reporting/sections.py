"""What a report says, section by section: figures and tables with what they show, or why there are none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from ..store.info import basis_rows
from . import curves, maps
from .gather import BasisFacts, Facts
from .missing import Why, no_bases, no_budget, no_excess, no_kept
from .origin import origin
from .standing import SHOWN, findings

_NUMBER = re.compile(r"([\d.,]+(e[+-]\d+)?( %)?)?")


@dataclass(frozen=True)
class Table:
    """rows of cells; without a head the first cell of a row names it. more: rows that are left out."""

    rows: Sequence[Sequence[str]]
    head: Sequence[str] = ()
    more: int = 0

    @property
    def classes(self) -> list[str]:
        """Of every column: `name` of a row, or `number`, which stands to the right."""
        if not self.head:
            return ["name", *[""] * (len(self.rows[0]) - 1)]
        columns = [[row[i] for row in self.rows] for i in range(len(self.head))]
        return ["number" if all(map(_NUMBER.fullmatch, column)) else "" for column in columns]


@dataclass(frozen=True)
class Part:
    """A figure with its caption, or a table."""

    heading: str = ""
    note: str = ""
    table: Table | None = None
    figure: go.Figure | None = None
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """parts: what it shows, or why there is nothing and the command that would change that. lead: before the parts."""

    id: str
    title: str
    parts: list[Part] | Why
    lead: str = ""

    @property
    def shown(self) -> list[Part]:
        """The parts."""
        return self.parts if isinstance(self.parts, list) else []

    @property
    def missing(self) -> Why | None:
        """Why there are none."""
        return None if isinstance(self.parts, list) else self.parts


def sections(facts: Facts) -> list[Section]:
    """All sections in their order; the one on experts only where there are some."""
    made = [
        Section("made", "What was calibrated on what", _made(facts)),
        Section("kept", "Kept output, layer by layer", _kept(facts)),
        Section("spectra", "Spectra by kind of layer", _spectra(facts)),
        Section("data", "What more data would gain", _data(facts)),
        Section("bases", "Bases side by side", _bases(facts), _left_out(facts)),
        Section("budget", "Ranks under a budget", _budget(facts), _by(facts)),
    ]
    if any(site.expert for site in facts.sites or ()):
        made.append(Section("experts", "Tokens of the experts", _experts(facts)))
    far = any(site.dead is None for site in facts.sites or ())
    lead = "The channels of full moments were not read from afar: prep pull brings the store here." if far else ""
    return [*made, Section("standing", "Layers that stand out", _standing(facts), lead)]


def _made(facts: Facts) -> list[Part]:
    parts = [Part(table=Table(origin(facts)))]
    whole = {name: basis for name, basis in facts.info["bases"].items() if "problem" not in basis}
    if whole:
        head, *rows = basis_rows(whole)
        hashes = [basis["hash"][:12] for basis in whole.values()]
        table = Table([[*row, value] for row, value in zip(rows, hashes, strict=True)], [*head, "hash"])
        note = (
            "Energy is the share of sum S² that the stored directions hold, the median of the layers; excess is what a "
            "basis loses more of the output than it needs to, for lack of data."
        )
        parts.append(Part("Bases", note, table))
    damaged = [[name, basis["problem"]] for name, basis in facts.info["bases"].items() if "problem" in basis]
    if damaged:
        parts.append(Part("Damaged", "prep verify says more of them.", Table(damaged, ("basis", "it is"))))
    return parts


def _kept(facts: Facts) -> list[Part] | Why:
    bases = [basis for basis in facts.bases.values() if basis.kept]
    if not bases:
        return no_kept(facts)
    caption = (
        "The share of E‖W x‖² that a basis keeps at the rank of the slider, on the tokens that it was made of. Dark "
        "cells need a larger rank than the others; a rank at which all are bright is enough for most."
        + _of_errors(bases)
    )
    return [Part(figure=maps.kept_output(bases, facts.places), caption=caption)]


def _spectra(facts: Facts) -> list[Part] | Why:
    if not facts.bases:
        return no_bases(facts)
    caption = (
        "Singular values of W M, the first one being 1: the line is the median over the blocks, the band their range. "
        "Where a line falls steeply a small rank holds nearly all; where a band is wide the blocks differ, and so "
        "should their ranks."
    )
    return [Part(figure=curves.spectra(list(facts.bases.values()), facts.places), caption=caption)]


def _data(facts: Facts) -> list[Part] | Why:
    bases = [basis for basis in facts.bases.values() if max(basis.excess.values(), default=0) > 0]
    if not bases or facts.tokens < 1:
        return no_excess(facts)
    caption = (
        "How much more of the output a basis loses than the best one would, as a share of that one's loss: now (full "
        "circles) and as n^-0.8 predicts it for more tokens (open ones), the median of the layers whose records have "
        "it. Above the dashed line, 1 %, more tokens are worth reading: the same prep covariance with more "
        "--num-sequences goes on from what is there."
    )
    return [Part(figure=curves.excess(bases, facts.tokens), caption=caption)]


def _bases(facts: Facts) -> list[Part] | Why:
    bases = [basis for basis in facts.bases.values() if basis.kept]
    if not bases:
        return no_kept(facts)
    caption = (
        "The share of the output that is lost by rank, the mean over the layers of a kind. The lower line is the "
        "better approximation on these tokens; it need not be the start that trains best. Losses below 0.01 % are "
        "drawn as that." + _of_errors(bases)
    )
    return [Part(figure=curves.losses(bases, facts.places), caption=caption)]


def _of_errors(bases: Sequence[BasisFacts]) -> str:
    if all(basis.basis.repair is None for basis in bases):
        return ""
    return " What a repair keeps and loses is of the error W - Q of its copy, not of the output."


def _left_out(facts: Facts) -> str:
    left = [name for name, basis in facts.bases.items() if not basis.kept]
    if not left or len(left) == len(facts.bases):
        return ""
    return f"Not shown, since the store does not tell what they keep: {', '.join(left)}."


def _budget(facts: Facts) -> list[Part] | Why:
    bases = [basis for basis in facts.bases.values() if basis.budgets]
    if not bases:
        return no_budget(facts)
    lines = (
        "What is lost of the outputs, the mean of the layers, where all layers have one rank (dotted), and where as "
        "many parameters go to the layers in which they keep most (full lines). If the lines are far apart, take such "
        "ranks: prep ranks --budget writes them for PEFT. It is a budget of output error, not of accuracy."
    )
    ranks = (
        "The ranks that a budget gives: as many parameters as the rank of the slider costs if all layers have it. "
        "Bright cells are worth more directions than the others."
    )
    return [
        Part(figure=curves.budget_curves(bases), caption=lines),
        Part(figure=maps.budget_ranks(bases, facts.places), caption=ranks),
    ]


def _by(facts: Facts) -> str:
    """Which tokens ranks are chosen by."""
    seen = [basis.name for basis in facts.bases.values() if basis.budgets and basis.budgets[0].role == "kept"]
    if not seen:
        return ""
    return (
        f"Chosen by the tokens that the bases were made of ({', '.join(seen)}). Where these are few, prep decompose "
        "--sample 0 lets ranks be chosen by tokens that a basis has not seen."
    )


def _experts(facts: Facts) -> list[Part]:
    sites = [site for site in facts.sites or () if site.expert]
    few = sum(site.count < site.width for site in sites)
    note = f"{few:,} of {len(sites):,} inputs of experts saw fewer tokens than they are wide." if few else ""
    caption = (
        "How many tokens were routed to each expert; empty cells saw none and have no moments. An expert needs several "
        "times as many tokens as its input is wide: where the dark ones matter, read more sequences."
    )
    return [Part(note=note, figure=maps.experts(sites, facts.idle), caption=caption)]


def _standing(facts: Facts) -> list[Part] | Why:
    if facts.sites is None and not facts.bases:
        return no_bases(facts)
    found = findings(facts.sites or (), [basis.basis for basis in facts.bases.values()])
    if not found:
        return "No layer stands out by its inputs or by what its bases resolve.", ""
    return [
        Part(f"{one.title}: {one.count:,}", one.advice, Table(one.rows, one.head, max(one.count - SHOWN, 0)))
        for one in found
    ]
