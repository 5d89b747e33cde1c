"""Tables and figures of docs/evidence.md from the lines of benchmarks/sweep.py: equal lines, equal bytes.

    python benchmarks/evidence.py docs/evidence.jsonl --page docs/evidence.md

What stands in the page between its two marks is replaced, and a figure of the lines' name is written beside it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from figures import BOTTOM, COLORS, LEFT, RIGHT, TOP, sheet
from outcomes import REFERENCE, Line, at_best, curve, only, read_lines, results

BEGIN, END = "<!-- begin: made by benchmarks/evidence.py -->", "<!-- end -->"


# The page


def page(lines: list[Line], figure: str) -> str:
    """The part of the page between its marks."""
    ranks = sorted({line["rank"] for line in lines if line["kind"] == "run"})
    blocks = [*setting(lines), f"![curves and differences]({figure})"]
    for rank in ranks:
        blocks += [f"### Rank {rank}", *tables(lines, rank)]
    return "\n\n".join(blocks)


def setting(lines: list[Line]) -> list[str]:
    """What was run and how long it took."""
    given, store, base = (only(lines, kind) for kind in ("setting", "store", "base"))
    runs = [line for line in lines if line["kind"] == "run"]
    clock = "processor seconds" if given["device"] == "cpu" else "seconds"
    loss = math.fsum(base["losses"]) / sum(base["tokens"])
    other = math.fsum(base["other_losses"]) / sum(base["other_tokens"])
    hours = sum(run["wall"] for run in runs) / 3600
    calibration, training, held, text = (given[part] for part in ("calibration", "training", "evaluation", "other"))
    packed = ""
    if "base" in given:
        whole = math.fsum(only(lines, "float")["losses"]) / sum(base["tokens"])
        packed = f" packed as {given['base']} (loss {whole:.4f} unpacked)"
    return [
        f"{given['model']} in {given['dtype']}{packed}, calibrated on {calibration['tokens']:,} tokens of "
        f"{calibration['rows']} rows ({store['calibrate']:.0f} {clock}, all bases {store['decompose']:.0f}). "
        f"{len(runs)} runs of {given['steps']} steps of {given['batch_size']} rows, drawn from {training['rows']:,} of "
        f"at most {given['max_length']} tokens; {hours:.1f} hours of runs in all. Held out: {held['rows']} rows with "
        f"{sum(base['tokens']):,} answer tokens. Other text: {text['rows']} sequences of Python's help texts, "
        f"{sum(base['other_tokens']):,} tokens. Before training the loss is {loss:.4f}, on the other text {other:.4f}."
    ]


def tables(lines: list[Line], rank: int) -> list[str]:
    """Methods at their best rates, then all rates."""
    found = results(lines, rank)
    asked = [result.line.get("asked") for result in found]
    head = ["method", "learning rate", "seeds", "loss", "minus `lora`'s", "", "other text, change", "trainable"]
    head += ["multiply-adds per token", "start-up (s)", "step (s)", *(["accuracy"] if any(asked) else [])]
    rows = []
    for result in found:
        line = result.line
        rate = f"{result.rate:g}" if result.interior else f"{result.rate:g} (edge)"
        against = [str(result.against), result.against.verdict] if result.against else ["", ""]
        row = [f"`{result.method}`", rate, str(result.seeds), f"{result.loss:.4f}", *against, str(result.other)]
        row += [
            f"{line['trainable']:,}",
            f"{line['multiply_adds'] / 1e6:.2f} M",
            f"{line['start']:.2f}",
            f"{line['step']:.2f}",
        ]
        rows.append([*row, *([f"{line['right']} of {line['asked']}"] if any(asked) else [])])
    rates = sorted({rate for result in found for rate in curve(lines, result.method, rank)})
    losses = []
    for result in found:
        tried = curve(lines, result.method, rank)
        cells = [f"{statistics.fmean(tried[rate]):.4f}" if rate in tried else "" for rate in rates]
        losses.append([f"`{result.method}`", *cells])
    blocks = [
        markdown(head, rows),
        "Loss at every learning rate:",
        markdown(["method", *(f"{rate:g}" for rate in rates)], losses),
    ]
    if gone := courses(lines, rank):
        steps = list(next(iter(gone.values())))
        rows = [[f"`{method}`", *(f"{losses[step]:.4f}" for step in steps)] for method, losses in gone.items()]
        blocks += ["Loss after so many steps, at the best rates:", markdown(["method", *map(str, steps)], rows)]
    return blocks


def courses(lines: list[Line], rank: int) -> dict[str, dict[int, float]]:
    """Method -> steps -> held-out loss per answer token at its best rate, the mean of its seeds, where it was taken."""
    end, tokens = only(lines, "setting")["steps"], sum(only(lines, "base")["tokens"])
    found: dict[str, dict[int, float]] = {}
    for result in results(lines, rank):
        runs = at_best(lines, result.method, rank).values()
        taken = [run["course"] | {str(end): math.fsum(run["losses"])} for run in runs if "course" in run]
        if taken:
            found[result.method] = {
                int(step): statistics.fmean(one[step] for one in taken) / tokens for step in taken[0]
            }
    return found


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


# Figures


def drawing(lines: list[Line]) -> str:
    """For each rank the curves over learning rates, and the differences from the reference with two standard errors."""
    charts = []
    for rank in sorted({line["rank"] for line in lines if line["kind"] == "run"}):
        found = {result.method: curve(lines, result.method, rank) for result in results(lines, rank)}
        rates = {name: {rate: statistics.fmean(of) for rate, of in losses.items()} for name, losses in found.items()}
        charts.append(curves(lines, f"Held-out loss, rank {rank}", "learning rate", rates, math.log))
        if gone := courses(lines, rank):
            charts.append(curves(lines, f"Held-out loss at the best rates, rank {rank}", "steps", gone, float))
        charts.append(differences(lines, rank))
    return sheet(charts)


def curves(
    lines: list[Line], title: str, label: str, means: Mapping[str, Mapping[Any, float]], scale: Callable[[Any], float]
) -> list[str]:
    """Losses over x, a line for each method; a loss above the chart is drawn hollow at its top."""
    base = only(lines, "base")
    xs = sorted({x for losses in means.values() for x in losses})
    low = math.floor(20 * min(min(losses.values()) for losses in means.values())) / 20
    high = math.ceil(20 * math.fsum(base["losses"]) / sum(base["tokens"])) / 20
    stretch = (RIGHT - LEFT - 20) / (scale(xs[-1]) - scale(xs[0]) or 1)

    def across(x: float) -> str:
        return f"{LEFT + 10 + stretch * (scale(x) - scale(xs[0])):.1f}"

    def up(loss: float) -> str:
        return f"{BOTTOM - (BOTTOM - TOP) * (min(loss, high) - low) / (high - low):.1f}"

    drawn = frame(title, label)
    drawn += [line for tick in ticks(low, high) for line in grid_line(up(tick), f"{tick:.2f}")]
    marks: Iterable[float] = xs
    if scale is math.log:
        decades = range(math.floor(math.log10(xs[0])), math.ceil(math.log10(xs[-1])) + 1)
        marks = (digit * 10.0**power for power in decades for digit in (1, 3))
    for mark in marks:
        if xs[0] * 0.99 <= mark <= xs[-1] * 1.01:
            drawn.append(f'<text x="{across(mark)}" y="{BOTTOM + 17}" text-anchor="middle">{mark:g}</text>')
    for number, (method, losses) in enumerate(means.items()):
        color = shade(number)
        at = [(across(x), up(loss), loss > high) for x, loss in losses.items()]
        drawn += [
            f'<path d="M{x1} {y1}L{x2} {y2}" stroke="{color}" stroke-width="1.5"{dash(number)}/>'
            for (x1, y1, _), (x2, y2, _) in itertools.pairwise(at)
        ]
        drawn += [
            f'<circle cx="{x}" cy="{y}" r="3" fill="{"white" if above else color}" stroke="{color}"/>'
            for x, y, above in at
        ]
        y = TOP + 6 + 16 * number
        drawn.append(f'<path d="M{RIGHT + 12} {y - 4}h18" stroke="{color}" stroke-width="3"{dash(number)}/>')
        drawn.append(f'<text x="{RIGHT + 36}" y="{y}">{method}</text>')
    return drawn


def differences(lines: list[Line], rank: int) -> list[str]:
    """A bar of two standard errors on either side of each method's difference from the reference."""
    found = [result for result in results(lines, rank) if result.against]
    drawn = frame(
        f"Loss minus that of {REFERENCE}, each at its best rate, rank {rank}", "two standard errors on either side"
    )
    if not found:
        return drawn
    reach = max(abs(of.against.value) + 2 * of.against.error for of in found if of.against) or 1.0
    half = (RIGHT - LEFT) / 2

    def across(value: float) -> str:
        return f"{LEFT + half + (half - 6) * value / reach:.1f}"

    drawn.append(f'<path d="M{across(0)} {TOP}V{BOTTOM}" stroke="#999"/>')
    step = next(value for value in ticks(0, reach) if value > 0)
    for tick in (-step, 0.0, step):
        drawn.append(f'<text x="{across(tick)}" y="{BOTTOM + 17}" text-anchor="middle">{tick:+.3g}</text>')
    for number, of in enumerate(found):
        assert of.against is not None
        y = TOP + (BOTTOM - TOP) * (number + 0.5) / len(found)
        ends = [across(of.against.value + side * of.against.error) for side in (-2, 2)]
        drawn.append(f'<path d="M{ends[0]} {y:.1f}H{ends[1]}" stroke="#333"/>')
        drawn.append(f'<circle cx="{across(of.against.value)}" cy="{y:.1f}" r="3" fill="#333"/>')
        drawn.append(f'<text x="{RIGHT + 8}" y="{y + 4:.1f}">{of.method}</text>')
    return drawn


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers between the two."""
    raw = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * digit for digit in (1, 2, 5, 10) if size * digit >= raw)
    return [step * count for count in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def frame(title: str, label: str) -> list[str]:
    return [
        f'<text x="{LEFT}" y="18" font-size="13" font-weight="bold">{title}</text>',
        f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 34}" text-anchor="middle">{label}</text>',
        f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#333"/>',
    ]


def grid_line(y: str, label: str) -> list[str]:
    return [
        f'<path d="M{LEFT} {y}H{RIGHT}" stroke="#ddd"/>',
        f'<text x="{LEFT - 5}" y="{y}" dy="4" text-anchor="end">{label}</text>',
    ]


def shade(number: int) -> str:
    return COLORS[number % len(COLORS)]


def dash(number: int) -> str:
    return ' stroke-dasharray="5 3"' if number >= len(COLORS) else ""


def main() -> None:
    """Write the page and its figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lines", type=Path)
    parser.add_argument("--page", type=Path, required=True)
    options = parser.parse_args()
    lines = read_lines(options.lines)
    before, _, rest = options.page.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{options.page} lacks the lines {BEGIN} and {END}, between which the tables go")
    figure = f"{options.lines.stem}.svg"
    options.page.write_text(f"{before}{BEGIN}\n\n{page(lines, figure)}\n\n{END}{after}")
    (options.page.parent / figure).write_text(drawing(lines))


if __name__ == "__main__":
    main()
