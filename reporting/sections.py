"""What a report says, section by section: figures and tables with what they show, or why there are none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from ..store.info import basis_rows, corpus_lines, skipped_lines
from . import figures
from .gather import Facts
from .missing import no_bases, no_budget, no_excess, no_kept
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
    """missing: why there is nothing to show; command: what would change that."""

    id: str
    title: str
    lead: str = ""
    parts: list[Part] = field(default_factory=list)
    missing: str = ""
    command: str = ""


def sections(facts: Facts) -> list[Section]:
    """All sections in their order; the one on experts only where there are some."""
    made = [_made(facts), _kept(facts), _spectra(facts), _excess(facts), _losses(facts), _budget(facts)]
    made += [_experts(facts)] if any(site.expert for site in facts.sites or ()) else []
    return [*made, _standing(facts)]


def _made(facts: Facts) -> Section:
    info = facts.info
    parts = [Part(table=Table(_origin(facts)))]
    whole = {name: basis for name, basis in info["bases"].items() if "problem" not in basis}
    if whole:
        head, *rows = basis_rows(whole)
        hashes = [basis["hash"][:12] for basis in whole.values()]
        table = Table([[*row, value] for row, value in zip(rows, hashes, strict=True)], [*head, "hash"])
        parts.append(Part("Bases", _BASES, table))
    damaged = [[name, basis["problem"]] for name, basis in info["bases"].items() if "problem" in basis]
    if damaged:
        parts.append(Part("Damaged", "prep verify says more of them.", Table(damaged, ("basis", "it is"))))
    return Section("made", "What was calibrated on what", parts=parts)


_BASES = (
    "energy is the share of sum S² that the stored directions hold, the median of the layers; excess is what a basis "
    "loses more of the output than it needs to, for lack of data."
)


def _origin(facts: Facts) -> list[list[str]]:
    """Names and values of what a store was made of."""
    info, model, run = facts.info, facts.info["model"], facts.info["run"] or {}
    corpus = info["corpus"] or (info["removed"] or {}).get("corpus") or {}
    revision = f" at {model['revision']}" if model.get("revision") else ""
    rows = [["model", f"{model['id'] or 'a module'}{revision}, {model.get('class', '?')} in {model.get('dtype', '?')}"]]
    rows += [["weights", model["weights"]]] if model.get("weights") else []
    rows += [["" if i else "corpus", line] for i, line in enumerate(corpus_lines(corpus) if corpus else ())]
    rows += [[name, str(corpus[name])] for name in ("template",) if corpus.get(name)]
    rows += [["corpus hash", corpus["hash"]]] if corpus.get("hash") else []
    rows += [["moments", line] for line in _moments(info)]
    if "started" in run:
        rows.append(
            ["calibrated", f"{run['started']}, in {run.get('seconds', 0):,.0f} s, by prep {info['prep_version']}"]
        )
    size = "" if info["bytes"] is None else f", {info['bytes'] / 1e6:,.0f} MB"
    return [*rows, ["store", f"{info['store']} ({info['status']}{size}), id {info['id']}"]]


def _moments(info: dict[str, Any]) -> list[str]:
    moments = info["moments"]
    if moments is None:
        return ["removed, bases of them are left"] if info["removed"] else []
    if "problem" in moments:
        return [moments["problem"]]
    kinds = ", ".join(f"{count} {kind}" for kind, count in moments["kinds"].items())
    skipped = skipped_lines(moments["skipped"])
    return [f"{moments['layers']} layers, {moments['sites']} inputs ({kinds})"] + [
        f"skipped {line}" for line in skipped
    ]


def _kept(facts: Facts) -> Section:
    section = Section("kept", "Kept output, layer by layer")
    bases = [basis for basis in facts.bases.values() if basis.kept]
    if not bases:
        return _without(section, *no_kept(facts))
    part = Part(figure=figures.kept_output(bases, facts.places), caption=_KEPT)
    return _with(section, part)


_KEPT = (
    "The share of E‖W x‖² that a basis keeps at the rank of the slider, on the tokens that it was made of. Dark cells "
    "need a larger rank than the others; a rank at which all are bright is enough for most."
)


def _spectra(facts: Facts) -> Section:
    section = Section("spectra", "Spectra by kind of layer")
    if not facts.bases:
        return _without(section, *no_bases(facts))
    part = Part(figure=figures.spectra(list(facts.bases.values()), facts.places), caption=_SPECTRA)
    return _with(section, part)


_SPECTRA = (
    "Singular values of W M, the first one being 1: the line is the median over the blocks, the band their range. Where "
    "a line falls steeply a small rank holds nearly all; a wide band says that blocks differ, and so should their ranks."
)


def _excess(facts: Facts) -> Section:
    section = Section("data", "What more data would gain")
    bases = [basis for basis in facts.bases.values() if max(basis.excess.values(), default=0) > 0]
    if not bases or not facts.tokens:
        return _without(section, *no_excess(facts))
    part = Part(figure=figures.excess(bases, facts.tokens), caption=_EXCESS)
    return _with(section, part)


_EXCESS = (
    "How much more of the output a basis loses than the best one would, as a share of that one's loss: now (full "
    "circles) and as n^-0.8 predicts it for more tokens (open ones), the median of the layers whose records have it. Above "
    "the dashed line, 1 %, more tokens are worth reading: the same prep covariance with more --num-sequences goes on from "
    "what is there."
)


def _losses(facts: Facts) -> Section:
    section = Section("bases", "Bases side by side")
    bases = [basis for basis in facts.bases.values() if basis.kept]
    if not bases:
        return _without(section, *no_kept(facts))
    left = [name for name, basis in facts.bases.items() if not basis.kept]
    lead = f"Not shown, since the store does not tell what they keep: {', '.join(left)}." if left else ""
    return _with(section, Part(figure=figures.losses(bases, facts.places), caption=_LOSSES), lead)


_LOSSES = (
    "The share of the output that is lost by rank, the mean over the layers of a kind. The lower line is the better "
    "approximation on these tokens; it need not be the start that trains best. Losses below 0.01 % are drawn as that."
)


def _budget(facts: Facts) -> Section:
    section = Section("budget", "Ranks under a budget")
    bases = [basis for basis in facts.bases.values() if basis.budgets]
    if not bases:
        return _without(section, *no_budget(facts))
    parts = [
        Part(figure=figures.budget_curves(bases), caption=_CURVES),
        Part(figure=figures.budget_ranks(bases, facts.places), caption=_RANKS),
    ]
    return _with(section, parts)


_CURVES = (
    "What is lost of the outputs, the mean of the layers, if all layers have one rank (dotted), and if as many parameters "
    "go where they keep most (full lines). Where the lines are far apart, prep ranks --budget writes such ranks as a "
    "rank_pattern. It is a budget of output error, not of accuracy."
)
_RANKS = (
    "The ranks that a budget gives, as many parameters as the rank of the slider has everywhere. Bright cells are worth "
    "more directions than the others."
)


def _experts(facts: Facts) -> Section:
    section = Section("experts", "Tokens of the experts")
    sites = [site for site in facts.sites or () if site.expert]
    few = sum(site.count < site.width for site in sites)
    lead = f"{few:,} of {len(sites):,} inputs of experts saw fewer tokens than they are wide." if few else ""
    part = Part(figure=figures.experts(sites, facts.idle), caption=_EXPERTS)
    return _with(section, part, lead)


_EXPERTS = (
    "How many tokens were routed to each expert; empty cells saw none and have no moments. An expert needs several times "
    "as many tokens as its input is wide: where the dark ones matter, read more sequences."
)


def _standing(facts: Facts) -> Section:
    section = Section("standing", "Layers that stand out")
    if facts.sites is None and not facts.bases:
        return _without(section, *no_bases(facts))
    found = findings(facts.sites or (), [basis.basis for basis in facts.bases.values()])
    far = any(site.dead is None for site in facts.sites or ())
    lead = "The channels of full moments were not read from afar: prep pull brings the store here." if far else ""
    parts = [
        Part(f"{one.title}: {one.count:,}", one.advice, Table(one.rows, one.head, max(one.count - SHOWN, 0)))
        for one in found
    ]
    if not parts:
        return _without(
            section, "No layer stands out by its inputs or by what its bases resolve." + (f" {lead}" if far else "")
        )
    return _with(section, parts, lead)


def _with(section: Section, parts: Part | list[Part], lead: str = "") -> Section:
    return Section(section.id, section.title, lead, parts if isinstance(parts, list) else [parts])


def _without(section: Section, why: str, command: str = "") -> Section:
    return Section(section.id, section.title, missing=why, command=command)
