"""The excess that a store predicts from its two halves, against the truth on other tokens of the same data.

    python benchmarks/excess.py --model .cache/smollm2 --data gsm8k_train.jsonl --work /tmp/excess

The rows of the data go to two files. Bases are made of 4k to 64k tokens of the first one, of a store that grows; the
truth is what they lose on 160k tokens of the second one beyond the best basis there. Prints a line for each number of
tokens and rank, and how well the line of advice foretold the excess at four times the tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import prep

SEQ_LEN = 512
TEMPLATE = r"{question}\n{answer}"


def main() -> None:
    """Calibrate, decompose, evaluate, compare."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--model", required=True)
    asked.add_argument("--data", required=True)
    asked.add_argument("--work", type=Path, required=True, help="where the files and stores are kept")
    asked.add_argument("--layers", default="0,7,14,21,28")
    asked.add_argument("--truth", type=int, default=320, help="sequences of 512 tokens")
    asked.add_argument("--sequences", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    asked.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64, 128])
    options = asked.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    known, other = split(Path(options.data), options.work)
    truth = calibrated(options, other, options.truth, options.work / "truth.zarr", 8)
    best = losses(prep.evaluate(truth, ranks=options.ranks))
    store, found = options.work / "known.zarr", {}
    print("| tokens | rank | predicted | true | median of predicted / true |")
    print("|---|---|---|---|---|")
    for count in options.sequences:
        calibrated(options, known, count, store, 4)
        predicted = {(row.layer, row.rank): row.relative for row in prep.evaluate(store, ranks=options.ranks, sample=0)}
        there = losses(prep.evaluate(store, on=truth, ranks=options.ranks))
        for rank in options.ranks:
            pairs = [
                (predicted[place], there[place] / best[place] - 1)
                for place in best
                if place[1] == rank and rank < least_side(store, place[0])
            ]
            middle = [statistics.median(values) for values in zip(*pairs, strict=True)]
            ratio = statistics.median(a / b for a, b in pairs)
            found[count, rank] = middle
            print(f"| {count * SEQ_LEN:,} | {rank} | {middle[0]:.2%} | {middle[1]:.2%} | {ratio:.2f} |", flush=True)
    print("| tokens | rank | true excess at 4 times the tokens, of what was said |\n|---|---|---|")
    for (count, rank), (said, _) in found.items():
        if (later := found.get((4 * count, rank))) is not None:
            print(f"| {count * SEQ_LEN:,} | {rank} | {later[1] / (said * 4**-0.8):.2f} |")


def split(data: Path, work: Path) -> tuple[Path, Path]:
    """Every other row to either file."""
    rows = data.read_text().splitlines(keepends=True)
    files = work / "a.jsonl", work / "b.jsonl"
    for i, file in enumerate(files):
        file.write_text("".join(rows[i::2]))
    return files


def calibrated(options: argparse.Namespace, data: Path, count: int, store: Path, batch_size: int) -> Path:
    """A store of `count` sequences with its basis; one of as many that is there is used, one of fewer grows."""
    begun = time.monotonic()
    prep.covariance(
        options.model,
        str(data),
        template=TEMPLATE,
        num_sequences=count,
        batch_size=batch_size,
        layers=options.layers,
        store=store,
        quiet=True,
    )
    prep.decompose(store, rank=max(options.ranks), quiet=True)
    print(f"{store.name}: {time.monotonic() - begun:.0f} s", flush=True)
    return store


def losses(rows: list) -> dict[tuple[str, int], float]:
    """Share lost by layer and rank."""
    return {(row.layer, row.rank): row.lost for row in rows}


def least_side(store: Path, layer: str) -> int:
    """The rank at which nothing is lost."""
    return min(prep.open_store(store).moments[layer].shape)


if __name__ == "__main__":
    main()
