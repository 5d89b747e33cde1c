"""What the lines of a sweep say: curves over learning rates, best rates, and differences with their standard errors.

Losses are summed over rows and divided by their answer tokens. The variance of a difference is that of its rows (each
averaged over seeds) plus that of its seeds, the latter pooled over the methods of a rank, as each has few seeds.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]

REFERENCE = "lora"


@dataclass(frozen=True)
class Run:
    """What tells one run of a sweep from another."""

    method: str
    rank: int
    rate: float
    seed: int

    @classmethod
    def of(cls, line: Line) -> Run:
        return cls(line["method"], line["rank"], line["rate"], line["seed"])


@dataclass(frozen=True)
class Difference:
    """A mean loss per token that is lower or higher than another's, and its standard error."""

    value: float
    error: float

    @property
    def verdict(self) -> str:
        if abs(self.value) <= 2 * self.error:
            return "equal"
        return "lower" if self.value < 0 else "higher"

    def __str__(self) -> str:
        return f"{self.value:+.4f} ± {self.error:.4f}"


def read_lines(path: Path) -> list[Line]:
    """The lines of a sweep; one that a kill cut short is taken off the file."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def only(lines: list[Line], kind: str) -> Line:
    return next(line for line in lines if line["kind"] == kind)


def runs_of(lines: list[Line], method: str, rank: int) -> list[Line]:
    return [line for line in lines if line["kind"] == "run" and (line["method"], line["rank"]) == (method, rank)]


def curve(lines: list[Line], method: str, rank: int) -> dict[float, list[float]]:
    """Learning rate, ascending -> the held-out loss per answer token of each seed; infinite where it is not finite."""
    tokens = sum(only(lines, "base")["tokens"]) if lines else 1
    found: dict[float, list[float]] = {}
    for line in sorted(runs_of(lines, method, rank), key=lambda line: (line["rate"], line["seed"])):
        loss = math.fsum(line["losses"]) / tokens
        found.setdefault(line["rate"], []).append(loss if math.isfinite(loss) else math.inf)
    return found


def best_rate(lines: list[Line], method: str, rank: int) -> float | None:
    """The learning rate of the least mean loss, of those that ran with the most seeds; None where nothing ran."""
    losses = curve(lines, method, rank)
    most = max(map(len, losses.values()), default=0)
    return min((rate for rate in losses if len(losses[rate]) == most), key=lambda rate: sum(losses[rate]), default=None)


# Statistics


def at_best(lines: list[Line], method: str, rank: int) -> dict[int, Line]:
    """Seed -> the run at the method's best rate."""
    rate = best_rate(lines, method, rank)
    return {line["seed"]: line for line in runs_of(lines, method, rank) if line["rate"] == rate}


def by_seed(one: dict[int, Line], other: dict[int, Line], key: str) -> list[list[float]]:
    """Differences of the summed losses: a list of rows for each seed that both have."""
    return [
        [a - b for a, b in zip(one[seed][key], other[seed][key], strict=True)]
        for seed in sorted(one.keys() & other.keys())
    ]


def seed_variance(differences: Sequence[list[list[float]]], tokens: int) -> float:
    """Variance over seeds of a difference per token, pooled over methods; 0 where none has two seeds."""
    several = [[math.fsum(rows) / tokens for rows in seeds] for seeds in differences if len(seeds) > 1]
    freedom = sum(len(means) - 1 for means in several)
    return math.fsum(statistics.variance(means) * (len(means) - 1) for means in several) / freedom if freedom else 0.0


def difference(seeds: list[list[float]], tokens: Sequence[int], over_seeds: float) -> Difference:
    """Mean difference per token. Its error: rows, drawn with their tokens (a ratio estimate), and seeds."""
    total, n = sum(tokens), len(tokens)
    rows = [math.fsum(row) / len(seeds) for row in zip(*seeds, strict=True)]
    value = math.fsum(rows) / total
    spread = math.fsum((row - value * count) ** 2 for row, count in zip(rows, tokens, strict=True))
    return Difference(value, math.sqrt(n / (n - 1) * spread / total**2 + over_seeds / len(seeds)))


@dataclass(frozen=True)
class Result:
    """A method of one rank at its best rate. against: loss minus the reference's; other: of other text, the base's."""

    method: str
    rate: float
    interior: bool
    seeds: int
    loss: float
    against: Difference | None
    other: Difference
    line: Line


def results(lines: list[Line], rank: int) -> list[Result]:
    """All methods of a rank in the order in which they first ran."""
    base = only(lines, "base")
    methods = list(dict.fromkeys(line["method"] for line in lines if line["kind"] == "run" and line["rank"] == rank))
    best = {method: at_best(lines, method, rank) for method in methods}
    tokens, others = base["tokens"], base["other_tokens"]
    rivals = [method for method in methods if method != REFERENCE]
    pairs = {method: by_seed(best[method], best.get(REFERENCE, {}), "losses") for method in rivals}
    changes = {method: by_seed(best[method], dict.fromkeys(best[method], base), "other_losses") for method in methods}
    over_seeds = seed_variance(list(pairs.values()), sum(tokens)), seed_variance(list(changes.values()), sum(others))
    found = []
    for method in methods:
        losses, rate = curve(lines, method, rank), best_rate(lines, method, rank)
        assert rate is not None
        against = difference(pairs[method], tokens, over_seeds[0]) if pairs.get(method) else None
        other = difference(changes[method], others, over_seeds[1])
        line = next(iter(best[method].values()))
        times = {key: statistics.median(run[key] for run in runs_of(lines, method, rank)) for key in ("start", "step")}
        interior = rate not in (min(losses), max(losses))
        loss = statistics.fmean(losses[rate])
        found.append(Result(method, rate, interior, len(losses[rate]), loss, against, other, line | times))
    return found
