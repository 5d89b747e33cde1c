"""Where layers stand in a model, by their names: their kind and their block."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..store.info import pattern


@dataclass(frozen=True)
class Cell:
    """The value of the layers of one kind in one block: of the experts of a block there are several."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Places:
    """Kind and block of every layer. kinds: short names, in the order of the layers; blocks: ascending."""

    kinds: list[str]
    blocks: list[int]
    of: dict[str, tuple[str, int]]

    def members(self, layers: Iterable[str]) -> dict[str, list[str]]:
        """The layers of every kind, without the kinds that have none."""
        groups: dict[str, list[str]] = {kind: [] for kind in self.kinds}
        for layer in layers:
            groups[self.of[layer][0]].append(layer)
        return {kind: members for kind, members in groups.items() if members}

    def cells(self, values: Mapping[str, float]) -> list[list[Cell | None]]:
        """(kinds, blocks): what `values` of layers are there, None where there is none."""
        found: dict[tuple[str, int], list[float]] = {}
        for layer, value in values.items():
            found.setdefault(self.of[layer], []).append(value)
        return [[_cell(found.get((kind, block))) for block in self.blocks] for kind in self.kinds]


def places_of(layers: Iterable[str]) -> Places:
    """The block is the first number in a name, 0 where there is none; the kind is the name without its numbers and
    without the words that all names have.
    """
    names = list(dict.fromkeys(layers))
    kinds = short_names(dict.fromkeys(pattern(name) for name in names))
    of = {name: (kinds[pattern(name)], next(iter(numbers(name)), 0)) for name in names}
    return Places(list(kinds.values()), sorted({block for _, block in of.values()}), of)


def numbers(layer: str) -> list[int]:
    """The numbers in a layer's name: its block, then its expert."""
    return [int(part) for part in layer.split(".") if part.isdecimal()]


def short_names(patterns: Iterable[str]) -> dict[str, str]:
    """Every pattern without the words that all of them have, but with its last one: `mlp.up_proj`, `encoder.wo`."""
    words = {name: name.split(".") for name in patterns}
    shared = set.intersection(*map(set, words.values())) if len(words) > 1 else {*words, "*"}
    names = {
        name: ".".join([*(word for word in own[:-1] if word not in shared), own[-1]]) for name, own in words.items()
    }
    return names if len(set(names.values())) == len(names) else {name: name for name in names}


def joined(layers: list[str]) -> str:
    """The layers of a site in one name: the first, and the last parts of the others."""
    return ", ".join([layers[0], *(layer.rpartition(".")[2] for layer in layers[1:])])


def _cell(values: list[float] | None) -> Cell | None:
    return Cell(statistics.fmean(values), min(values), max(values), len(values)) if values else None
