"""Which start trains best: every init and core of one store, each at its own best learning rate.

    python benchmarks/sweep.py --model MODEL --data gsm8k_train.jsonl --evaluation gsm8k_test.jsonl --work /tmp/sweep
    python benchmarks/sweep.py ... --methods gain:full,rotation:full:U,rotation:full:both --ranks 256 --seeds 0,1,2
    python benchmarks/sweep.py ... --base nf4 --methods lora,loftq,repair --ranks 16 --seeds 0,1,2 --every 10

A method is an init of prep.peft, `dora` (lora with use_dora), `loftq` (the plain SVD of a quantised base's error, where
`repair` takes the whitened one), or CORE:BASIS[:ROTATE] of prep.attach. Every run is one line of JSON in
WORK/runs.jsonl, written when it ends: the same command goes on with what is missing, and another grid adds to it. Each
method begins with three learning rates around a usual one, and gets further ones until its best has a worse one on
either side; later seeds run the best rate and, unless --no-beside, its neighbours. benchmarks/evidence.py makes tables
of it.

The first rows of the data are for calibration, its others for training, those of --evaluation are held out, and it is
checked that no question is in two of these. LoRA's alpha is the rank everywhere. On CPUs durations are processor
seconds, which other work on the machine hardly changes.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from outcomes import Run, best_rate, curve, read_lines
from runs import (
    OTHER_LENGTH,
    Options,
    Parts,
    calibrated,
    counted,
    deal,
    decomposed,
    described,
    evaluated,
    loaded,
    seconds,
    workers,
)

import prep

INITS = ["lora", "dora", *(init for init in prep.peft.INITS if init not in ("lora", "repair"))]
USUAL = {"lora": 2e-3, "dora": 2e-3, "eva": 2e-3, "milora": 2e-3, "corda_kpm": 2e-3, "gain": 2e-2, "rotation": 5e-3}
USUAL |= {"ablation": 1e-2, "loftq": 2e-3, "repair": 2e-3}  # where a method's learning rates begin; all others:
OTHERWISE = 1e-3


@dataclass(frozen=True)
class Grid:
    """What the sweep goes through. growth: the most learning rates that a method gets beyond its first three; beside:
    whether later seeds run the neighbours of the best one, too.
    """

    methods: Sequence[str]
    ranks: Sequence[int]
    seeds: Sequence[int]
    factor: float
    growth: int
    beside: bool = True

    def rate(self, method: str, place: int) -> float:
        """The learning rate so many factors from the method's usual one."""
        usual = USUAL.get(method.split(":")[0], OTHERWISE)
        return float(f"{usual * self.factor**place:.3g}")

    def place(self, method: str, rate: float | None, otherwise: int) -> int:
        """Inverse of `rate`; `otherwise` where no rate is known."""
        return otherwise if rate is None else round(math.log(rate / self.rate(method, 0), self.factor))

    def around(self, rank: int, places: dict[str, int], seeds: Sequence[int], beside: bool = True) -> list[Run]:
        """Each method at its place and at those beside it."""
        return [
            Run(method, rank, self.rate(method, place + side), seed)
            for seed in seeds
            for side in ((0, 1, -1) if beside else (0,))
            for method, place in places.items()
        ]

    def grown(self, rank: int, best: dict[str, int], lines: list[dict[str, Any]]) -> Iterator[Run]:
        """One more rate for each method whose best is the smallest or the largest that was tried."""
        for method, place in best.items():
            tried = curve(lines, method, rank)
            for end, side in ((max, 1), (min, -1)):
                if self.rate(method, place) == end(tried) and len(tried) < 3 + self.growth:
                    yield Run(method, rank, self.rate(method, place + side), self.seeds[0])


@click.command(context_settings={"show_default": True}, help=__doc__.splitlines()[0])
@click.option("--model", required=True, help="Path or hub id.")
@click.option("--data", required=True, help="A .jsonl file or hub id with the columns question and answer.")
@click.option("--subset", help="Configuration of a hub data set.")
@click.option("--evaluation", help="A .jsonl file of held-out rows.  [default: the last rows of the data]")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Directory of the store and the lines.")
@click.option("--methods", default=",".join(INITS))
@click.option("--ranks", default="8,32")
@click.option("--seeds", default="0,1")
@click.option("--factor", default=3.0, help="Between one learning rate and the next.")
@click.option("--growth", default=4, help="Most learning rates of a method beyond its first three.")
@click.option("--beside/--no-beside", default=True, help="Whether later seeds run the neighbours of the best rate.")
@click.option("--minutes", default=1e9, help="No run begins after that many.")
@click.option("--processes", default=1, help="Runs side by side.")
@click.option("--threads", default=1, help="Of each process.")
@click.option("--calibration-rows", default=200, help="First rows of the data that only the calibration sees.")
@click.option("--calibration-sequences", default=32)
@click.option("--calibration-length", default=512)
@click.option("--evaluation-rows", default=96)
@click.option("--other-sequences", default=16, help=f"Sequences of {OTHER_LENGTH} tokens from Python's help texts.")
@click.option("--steps", default=40)
@click.option("--batch-size", default=4)
@click.option("--max-length", default=192, help="Rows with more tokens are left out.")
@click.option("--accuracy", default=0, help="Held-out questions that every run answers.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option(
    "--base", type=click.Choice(["float", "nf4", "fp4"]), default="float", help="What bitsandbytes makes of it."
)
@click.option("--every", default=0, help="Steps between losses on the held-out rows; 0 for those after training only.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
def main(
    methods: str,
    ranks: str,
    seeds: str,
    factor: float,
    growth: int,
    beside: bool,
    minutes: float,
    processes: int,
    **common: Any,
) -> None:
    """Make the store, then run what is missing."""
    begun = time.monotonic()
    options = Options(**common)
    numbers = ([int(number) for number in text.split(",")] for text in (ranks, seeds))
    grid = Grid(methods.split(","), *numbers, factor, growth, beside)
    parts = prepare(options, grid)
    tokens, end = sum(counted(parts)["tokens"]), begun + 60 * minutes
    with workers(options, parts, processes) as run_all:
        while wave := missing(grid, read_lines(options.lines)):
            for line in run_all(wave, end):
                write(options, line)
                print(f"{line['method']:16} r {line['rank']:<3} lr {line['rate']:<8g} seed {line['seed']}  ", end="")
                print(f"loss {sum(line['losses']) / tokens:.4f}  {line['wall']:.0f} s", flush=True)
            if time.monotonic() > end:
                print(f"stopped after {minutes:g} minutes: the same command goes on")
                return


# The design


def missing(grid: Grid, lines: list[dict[str, Any]]) -> list[Run]:
    """The runs of the first stage that is not complete: a stop at any time leaves the methods alike.

    For each rank: three rates with the first seed; further rates with it, where the best has no worse one on a side;
    the best rate and its neighbours with the other seeds. A rank begins where the one before had its best.
    """
    done = {Run.of(line) for line in lines if line["kind"] == "run"}
    first = {method: 0 for method in grid.methods}
    for rank in grid.ranks:
        best = {method: grid.place(method, best_rate(lines, method, rank), first[method]) for method in first}
        for stage in (
            grid.around(rank, first, grid.seeds[:1]),
            grid.grown(rank, best, lines),
            [
                run
                for run in grid.around(rank, best, grid.seeds[1:], grid.beside)
                if run.rate in curve(lines, run.method, rank)
            ],
        ):
            if todo := [run for run in stage if run not in done]:
                return todo
        first = best
    return []


def prepare(options: Options, grid: Grid) -> Parts:
    """The rows, the store with its bases; then what the first lines say: the setting and the base model."""
    options.work.mkdir(parents=True, exist_ok=True)
    parts = deal(options)
    file = options.work / "calibration.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in parts.calibration))
    new, times = not options.store.exists(), options.work / "store.json"
    calibrate, _ = seconds("cpu", lambda: calibrated(options, file))
    decompose, _ = seconds("cpu", lambda: decomposed(options, grid.methods, max(grid.ranks)))
    if new:
        times.write_text(json.dumps({"calibrate": calibrate, "decompose": decompose}))
    corpus = prep.open_store(options.store).corpus
    assert corpus is not None
    setting = {
        "kind": "setting",
        "model": Path(options.model).name,
        "calibration": {"rows": len(parts.calibration), "tokens": corpus["tokens"], "hash": corpus["hash"]},
        **{name: described(rows) for name, rows in parts.encoded.items()},
        **{key: getattr(options, key) for key in ("steps", "batch_size", "max_length", "accuracy", "dtype")},
        "device": torch.device(options.device).type,
        **({} if options.base == "float" else {"base": options.base}),
    }
    lines = read_lines(options.lines)
    if lines and lines[0] != setting:
        changed = [key for key in setting if lines[0].get(key) != setting[key]]
        raise SystemExit(f"{options.work} holds runs with another {', '.join(changed)}: take another --work")
    if not lines:
        write(options, setting)
        write(options, {"kind": "store", **json.loads(times.read_text())})
        write(options, {"kind": "base", **counted(parts), **evaluated(loaded(options), parts, options)})
        if options.base != "float":
            write(options, {"kind": "float", **evaluated(loaded(options, "float"), parts, options)})
    return parts


def write(options: Options, line: dict[str, Any]) -> None:
    """Append the line; it is on disk when this returns."""
    with (options.lines).open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main(standalone_mode=False)
