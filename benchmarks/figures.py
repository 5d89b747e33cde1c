"""Figures of a scaling benchmark: stages timed in turn, a table with exponents, and log-log charts as a small SVG."""

import itertools
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from load import LIMIT, Sample, kept, timed

Stages = dict[str, Callable[[], Any]]

SHORTEST = 0.25  # seconds of a sample: what is shorter is repeated, as other load is counted in ticks of 0.01 s
COLORS = ("#6b6b6b", "#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#009e73", "#cc79a7")
WIDTH, HEIGHT = 490, 250  # of one chart, and the box of its axes:
LEFT, RIGHT, TOP, BOTTOM = 54, 310, 30, 205


@dataclass(frozen=True)
class Figure:
    """Median seconds of one stage at size x; other: median share of the machine that other processes used."""

    x: int
    stage: str
    seconds: float
    samples: int = 0
    dropped: int = 0
    other: float = 0.0
    extrapolated: bool = False


def measure(x: int, stages: Stages, rounds: int, seconds: float) -> list[Figure]:
    """All stages in turn, `rounds` times after a first one that warms up, or as often as fits in `seconds`.

    The first round counts only where it is the only one.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in stages}
    repeats = dict.fromkeys(stages, 1)
    spent = 0.0
    for number in range(rounds + 1):
        if number and spent * (number + 1) / number > seconds:
            break
        for name, stage in stages.items():
            sample = timed(lambda stage=stage, times=repeats[name]: [stage() for _ in range(times)])
            samples[name].append(Sample(sample.seconds / repeats[name], sample.other))
            repeats[name] = math.ceil(SHORTEST / samples[name][-1].seconds)
            spent += sample.seconds
        print(f"at {x}: round {number + 1}, {spent:.1f} s", file=sys.stderr, flush=True)
    figures = []
    for name, found in samples.items():
        warm = found[1:] or found
        dropped = sum(sample.other > LIMIT for sample in warm)
        other = statistics.median(sample.other for sample in warm)
        figures.append(Figure(x, name, statistics.median(kept(warm)), len(warm), dropped, other))
    return figures


def slope(figures: list[Figure]) -> float:
    """p of seconds ~ x^p, by least squares of the logarithms."""
    return float(np.polyfit(np.log([f.x for f in figures]), np.log([f.seconds for f in figures]), 1)[0])


def by_stage(figures: list[Figure]) -> dict[str, list[Figure]]:
    return {stage: [f for f in figures if f.stage == stage] for stage in dict.fromkeys(f.stage for f in figures)}


def table(title: str, figures: list[Figure]) -> list[str]:
    """A row per size and a column per stage; below, the exponent over all sizes and over the last two."""
    of = by_stage(figures)
    run = [[figure for figure in found if not figure.extrapolated] for found in of.values()]
    lines = [f"{title:>12}" + "".join(f"{stage:>21}" for stage in of)]
    for row in zip(*of.values(), strict=True):
        cells = (f"{'~' if figure.extrapolated else ''}{figure.seconds:.4f} s" for figure in row)
        lines.append(f"{row[0].x:12}" + "".join(f"{cell:>21}" for cell in cells))
    lines.append(f"{'exponent':>12}" + "".join(f"{slope(found):19.2f}  " for found in run))
    lines.append(f"{'of last two':>12}" + "".join(f"{slope(found[-2:]):19.2f}  " for found in run))
    dropped, samples = sum(f.dropped for f in figures), sum(f.samples for f in figures)
    other = max(figure.other for figure in figures)
    return [*lines, f"{dropped} of {samples} samples under load; other processes used up to {other:.0%} of the machine"]


def svg(charts: list[tuple[str, str, list[Figure]]]) -> str:
    """Charts (title, x label, figures): a line per stage, hollow and dashed where it is extrapolated."""
    return sheet([_chart(*chart) for chart in charts])


def sheet(charts: list[list[str]]) -> str:
    """Drawn charts of WIDTH by HEIGHT, two in a row, as an SVG file."""
    size = f'viewBox="0 0 {2 * WIDTH} {HEIGHT * math.ceil(len(charts) / 2)}"'
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, chart in enumerate(charts):
        row, column = divmod(number, 2)
        drawn += [f'<g transform="translate({column * WIDTH} {row * HEIGHT})">', *chart, "</g>"]
    return "\n".join([*drawn, "</svg>"]) + "\n"


def _chart(title: str, label: str, figures: list[Figure]) -> list[str]:
    ticks = sorted({figure.x for figure in figures})
    low = math.floor(math.log10(min(figure.seconds for figure in figures)))
    high = max(low + 1, math.ceil(math.log10(max(figure.seconds for figure in figures))))
    stretch = (RIGHT - LEFT - 20) / (math.log(ticks[-1] / ticks[0]) or 1)

    def across(x: float) -> str:
        return f"{LEFT + 10 + stretch * math.log(x / ticks[0]):.1f}"

    def up(seconds: float) -> str:
        return f"{BOTTOM - (BOTTOM - TOP) * (math.log10(seconds) - low) / (high - low):.1f}"

    drawn = [
        f'<text x="{LEFT}" y="18" font-size="13" font-weight="bold">{title}</text>',
        f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 34}" text-anchor="middle">{label}</text>',
        f'<text transform="translate(12 {(TOP + BOTTOM) / 2}) rotate(-90)" text-anchor="middle">seconds</text>',
    ]
    for power in range(low, high + 1):
        y = up(10.0**power)
        drawn.append(f'<path d="M{LEFT} {y}H{RIGHT}" stroke="#ddd"/>')
        drawn.append(f'<text x="{LEFT - 5}" y="{y}" dy="4" text-anchor="end">{10.0**power:g}</text>')
    drawn += [f'<text x="{across(x)}" y="{BOTTOM + 17}" text-anchor="middle">{x}</text>' for x in ticks]
    marks = [f"M{across(x)} {BOTTOM}v4" for x in ticks]
    marks += [f"M{LEFT} {up(digit * 10.0**power)}h4" for power in range(low, high) for digit in range(2, 10)]
    drawn.append(f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}{"".join(marks)}" fill="none" stroke="#333"/>')
    for number, (stage, found) in enumerate(by_stage(figures).items()):
        color, y = COLORS[number % len(COLORS)], TOP + 10 + 18 * number
        at = [(across(figure.x), up(figure.seconds), figure.extrapolated) for figure in found]
        for (x1, y1, _), (x2, y2, extrapolated) in itertools.pairwise(at):
            dashes = ' stroke-dasharray="4 3"' if extrapolated else ""
            drawn.append(f'<path d="M{x1} {y1}L{x2} {y2}" stroke="{color}" stroke-width="1.5"{dashes}/>')
        for cx, cy, extrapolated in at:
            fill = "white" if extrapolated else color
            drawn.append(f'<circle cx="{cx}" cy="{cy}" r="3" fill="{fill}" stroke="{color}"/>')
        drawn.append(f'<path d="M{RIGHT + 12} {y - 4}h18" stroke="{color}" stroke-width="3"/>')
        drawn.append(f'<text x="{RIGHT + 36}" y="{y}">{stage}</text>')
    return drawn
