"""What a quantised base loses, what its repairs give back, and what they cost to make.

    python benchmarks/repair.py --model .cache/smollm2 --train gsm8k_train.jsonl --test gsm8k_test.jsonl --work /tmp/r

Moments of the train text; for every recipe and rank the loss on the test text of the model, of the quantised copy, and
of the copy with the repair of each metric, and the output error left by kind of layer. Then the seconds of our
decomposition of all layers and, for the layers of some blocks, those of the published route beside ours: a root of C
once for a site (SciPy's sqrtm as in QERA, or eigenvectors as in EoRA), its inverse, and a full SVD of E C^(1/2) for
each layer, in float64. benchmarks/sweep.py --base nf4 trains from these starts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import prep
from prep.preprocess.decomposition.workers import Jobs, decomposed
from prep.preprocess.model.quantised import Copy
from prep.preprocess.numerics.methods import Method
from prep.store.info import aligned, pattern

TEMPLATE = r"{question}\n{answer}"
METRICS = {"identity": "plain SVD", "diagonal": "diagonal", "full": "whitened"}


def main() -> None:
    """Calibrate, decompose, score, time."""
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    store = options.work / "repair.zarr"
    prep.covariance(
        options.model,
        str(options.train),
        template=options.template,
        num_sequences=options.sequences,
        seq_len=options.seq_len,
        store=store,
        quiet=True,
    )
    print(f"{prep.open_store(store).corpus['tokens']:,} tokens of {options.train}")
    for recipe in options.recipes:
        for metric in METRICS:
            prep.decompose(store, repair=recipe, metric=metric, rank=max(options.ranks), quiet=True)
    if options.rows:
        losses(options, store)
    left(options, store)
    seconds(options, store)


def arguments() -> argparse.Namespace:
    """The command line."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--model", required=True)
    asked.add_argument("--train", type=Path, required=True)
    asked.add_argument("--test", type=Path, required=True)
    asked.add_argument("--work", type=Path, required=True, help="where the store is kept")
    asked.add_argument("--template", default=TEMPLATE)
    asked.add_argument("--sequences", type=int, default=64)
    asked.add_argument("--seq-len", type=int, default=512)
    asked.add_argument("--recipes", nargs="+", default=["nf4", "int4", "int3"])
    asked.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    asked.add_argument("--rows", type=int, default=128, help="of the test text; 0 for no losses")
    asked.add_argument("--blocks", default=".14.", help="of the layers that the published route is timed on, a part")
    return asked.parse_args()


# Loss


def texts(options: argparse.Namespace, file: Path, count: int) -> list[Tensor]:
    """Token ids (1, T) of the first rows of a file, as the calibration reads them."""
    tokenizer, template = AutoTokenizer.from_pretrained(options.model), options.template.replace(r"\n", "\n")
    documents = [template.format(**json.loads(line)) for line in file.read_text().splitlines()[:count]]
    return [tokenizer(text, return_tensors="pt")["input_ids"][:, : options.seq_len] for text in documents]


@torch.no_grad()
def loss(model: nn.Module, rows: list[Tensor]) -> float:
    """The mean over all tokens."""
    total = count = 0.0
    for ids in rows:
        n = ids.shape[1] - 1
        total, count = total + n * float(model(input_ids=ids, labels=ids).loss), count + n
    return total / count


def losses(options: argparse.Namespace, store: Path) -> None:
    """A table of losses, with the share of the damage that each repair takes back."""
    rows = texts(options, options.test, options.rows)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    base = loss(model, rows)
    print(f"\nloss on {len(rows)} rows of {options.test}, {sum(x.numel() for x in rows):,} tokens: {base:.4f}")
    table = [["copy", "rank", "loss", *METRICS.values()]]
    weights = {layer: model.get_submodule(layer).weight for layer in prep.open_store(store).moments}
    kept = {layer: weight.detach().clone() for layer, weight in weights.items()}
    for recipe in options.recipes:
        copy = Copy(recipe)
        with torch.no_grad():
            for layer, W in kept.items():
                weights[layer].copy_(copy.weight(layer, W))
        quantised = loss(model, rows)
        for rank in options.ranks:
            cells = []
            for metric in METRICS:
                prep.attach(model, store, basis=name_of(recipe, metric), rank=rank)  # its start is the repaired model
                repaired = loss(model, rows)
                cells.append(f"{repaired:.4f} ({(quantised - repaired) / (quantised - base):.0%})")
                prep.detach(model)
            table.append([recipe, str(rank), f"{quantised:.4f}", *cells])
            print(" ".join(table[-1]), flush=True)
    print("loss, in brackets the share of the damage that is repaired", *aligned(table), sep="\n")


def name_of(recipe: str, metric: str) -> str:
    """The basis that repairs a recipe in a metric."""
    return f"repair-{recipe}" + ("" if metric == "full" else f"-{metric}")


# Output error


def left(options: argparse.Namespace, store: Path) -> None:
    """A table of the output error left by kind of layer, E||(E - B A) x||^2 / E||E x||^2; where the order differs."""
    names = [name_of(recipe, metric) for recipe in options.recipes for metric in METRICS]
    rows = prep.evaluate(store, bases=names, ranks=options.ranks)
    lost = {(row.basis, row.layer, row.rank): row.lost for row in rows}
    layers = dict.fromkeys(row.layer for row in rows)
    table = [["layers", "copy", *(f"{shown}, {rank}" for rank in options.ranks for shown in METRICS.values())]]
    wrong: dict[str, int] = {"whitened > diagonal": 0, "diagonal > plain SVD": 0}
    for recipe in options.recipes:
        names = [name_of(recipe, metric) for metric in METRICS]
        for kind in [*dict.fromkeys(map(pattern, layers)), "all"]:
            members = [layer for layer in layers if kind in ("all", pattern(layer))]
            means = [
                statistics.fmean(lost[name, layer, rank] for layer in members)
                for rank in options.ranks
                for name in names
            ]
            table.append([kind.removeprefix("model.layers.*."), recipe, *(f"{mean:.3f}" for mean in means)])
        for layer in layers:
            for rank in options.ranks:
                plain, diagonal, whitened = (lost[name, layer, rank] for name in names)
                wrong["whitened > diagonal"] += whitened > diagonal
                wrong["diagonal > plain SVD"] += diagonal > plain
    cases = len(layers) * len(options.ranks) * len(options.recipes)
    print("\noutput error left on the calibration tokens, mean of the layers", *aligned(table), sep="\n")
    print(f"of {cases} cases:", ", ".join(f"{what} in {count}" for what, count in wrong.items()))


# Seconds


def seconds(options: argparse.Namespace, store: Path) -> None:
    """Ours for all layers; ours and the published routes, in turns, for those of some blocks."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    recipe, rank = options.recipes[0], max(options.ranks)
    every = {layer: model.get_submodule(layer) for layer in prep.open_store(store).moments}
    some = {layer: module for layer, module in every.items() if options.blocks in layer} or every
    print(f"\nseconds of {recipe}, rank {rank}: all {len(every)} layers {ours(store, every, recipe, rank):.1f}")
    times: dict[str, list[float]] = {}
    for _ in range(2):
        times.setdefault("ours", []).append(ours(store, some, recipe, rank))
        for name, root in {"eigenvectors": root_of_eigenvectors, "sqrtm": scipy_root}.items():
            times.setdefault(name, []).append(published(store, some, recipe, rank, root))
    least = {name: min(values) for name, values in times.items()}
    for name, value in least.items():
        print(f"{len(some)} layers, {name}: {value:.2f}, {value / least['ours']:.1f} times ours")


def ours(store: Path, modules: dict[str, nn.Module], recipe: str, rank: int) -> float:
    """Seconds of `decompose` without writing: moments are read, layers quantised, worker threads as usual."""
    begun = time.perf_counter()
    jobs = Jobs({"repair": Method(rank=rank)}, {layer: ["repair"] for layer in modules}, [], {}, repair=Copy(recipe))
    assert len(list(decomposed(prep.open_store(store).moments, modules, jobs))) == len(modules)
    return time.perf_counter() - begun


def published(
    store: Path, modules: dict[str, nn.Module], recipe: str, rank: int, root_of: Callable[[Tensor], Tensor]
) -> float:
    """Seconds of the root of C, its inverse, the SVD and the factors, on all cores; checked against our basis."""
    begun, copy, moments = time.perf_counter(), Copy(recipe), prep.open_store(store).moments
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for members in moments.sites.values():
        wanted = [layer for layer in members if layer in modules]
        if not wanted:
            continue
        C = moments[wanted[0]].second_moment.double()
        C.diagonal().add_(1e-3 * C.diagonal().mean())
        R = root_of(C)
        inverse = torch.linalg.inv(R)
        for layer in wanted:
            W = modules[layer].weight.detach()
            U, S, V = torch.linalg.svd((W.double() - copy.weight(layer, W)) @ R, full_matrices=False)
            made[layer] = U[:, :rank] * S[:rank], V[:rank] @ inverse
    elapsed = time.perf_counter() - begun
    for layer, one in prep.open_store(store).bases[name_of(recipe, "full")].read(made, rank).items():
        B, A = made[layer]
        product = (one.U.double() * one.S) @ one.P.double()
        assert (product - B @ A).norm() < 1e-4 * product.norm(), layer
    return elapsed


def scipy_root(C: Tensor) -> Tensor:
    """C^(1/2) as QERA takes it."""
    return torch.from_numpy(np.ascontiguousarray(scipy.linalg.sqrtm(C.numpy()).real))


def root_of_eigenvectors(C: Tensor) -> Tensor:
    """C^(1/2) by its eigenvectors."""
    values, V = torch.linalg.eigh(C)
    return (V * values.clamp(min=0).sqrt()) @ V.T


if __name__ == "__main__":
    main()
