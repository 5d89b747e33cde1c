"""The loss of a model whose layers are replaced by `U S P` of as many parameters, their ranks chosen in several ways.

    python benchmarks/budgets.py --model .cache/smollm2 --data gsm8k_train.jsonl --test gsm8k_test.jsonl --work /tmp/b

Calibrates on the data, decomposes at `--rank` with every layer cross-fitted, and prints a line for each budget (a share
of the weights of all layers) and way: the loss on the rows of the test, and what the layers lose of their outputs.

    equal        one rank for all layers
    eva          EVA's redistribution as PEFT does it: the largest explained variance ratios of the layers' inputs
    prep ranks   by what each direction keeps of its layer's output, per parameter
    energy       the same, of the outputs as they are: layers of large outputs count more
    squared      by the squares of what layers lose, each as a share of what its first direction leaves
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prep
from prep.adapters.peft.eva import redistribute
from prep.store import Store
from prep.store.budget import Directions
from prep.store.ranks import choose

TEMPLATE = r"{question}\n{answer}"
BATCH = 8


def main() -> None:
    """Calibrate, decompose, choose, replace, compare."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--model", required=True)
    asked.add_argument("--data", required=True)
    asked.add_argument("--test", required=True)
    asked.add_argument("--template", default=TEMPLATE)
    asked.add_argument("--work", type=Path, required=True, help="where the store is kept")
    asked.add_argument("--sequences", type=int, default=64)
    asked.add_argument("--seq-len", type=int, default=512)
    asked.add_argument("--rank", type=int, default=512)
    asked.add_argument("--rows", type=int, default=64)
    asked.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.8])
    options = asked.parse_args()
    store = made(options)
    replaced = Replaced(options.model, store)
    test = texts(Path(options.test), options.template, options.rows)
    of = choose(store, "1%").directions
    print(f"the model as it is: loss {replaced.loss({}, test):.3f}\n", flush=True)
    print("| budget | ranks | loss | lost of the outputs |\n|---|---|---|---|")
    for share in options.shares:
        budget = round(share * replaced.parameters)
        for name, ranks in ways(store, of, budget).items():
            assert of.parameters(ranks) <= budget
            loss, lost = replaced.loss(ranks, test), 1 - of.share(ranks)
            print(f"| {share:.0%}, {of.parameters(ranks):,} | {name} | {loss:.3f} | {lost:.2%} |", flush=True)


def made(options: argparse.Namespace) -> Store:
    """The store with the bases `full` and `eva`, whose layers are all cross-fitted; what is there is used."""
    store = options.work / "store.zarr"
    settings = {"num_sequences": options.sequences, "seq_len": options.seq_len, "batch_size": 4, "quiet": True}
    prep.covariance(options.model, options.data, template=options.template, store=store, **settings)
    prep.decompose(store, for_=["whitened", "eva"], rank=options.rank, sample=0, quiet=True)
    return prep.open_store(store)


def texts(path: Path, template: str, count: int) -> list[str]:
    """The first rows of a .jsonl file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[:count]]
    return [template.replace(r"\n", "\n").format(**row) for row in rows]


class Replaced:
    """A model, some layers of which are replaced by their bases for as long as a loss is computed."""

    def __init__(self, model: str, store: Store):
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        self._bases = store.bases["full"]
        self._own = {layer: self._model.get_submodule(layer).weight.data for layer in self._bases}
        self.parameters = sum(weight.numel() for weight in self._own.values())

    @torch.inference_mode()
    def loss(self, ranks: Mapping[str, int], rows: list[str]) -> float:
        """The mean loss of a token of the rows with `U S P` of those ranks in place of the layers' weights."""
        for layer, basis in self._bases.read(ranks, ranks).items():
            self._model.get_submodule(layer).weight.data = (basis.U * basis.S.float()) @ basis.P
        total, count = 0.0, 0
        for first in range(0, len(rows), BATCH):
            inputs = self._tokenizer(rows[first : first + BATCH], return_tensors="pt", padding=True)
            labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
            here = int((labels[:, 1:] >= 0).sum())
            total, count = total + float(self._model(**inputs, labels=labels).loss) * here, count + here
        for layer in ranks:
            self._model.get_submodule(layer).weight.data = self._own[layer]
        return total / count


def ways(store: Store, of: Directions, budget: int) -> dict[str, dict[str, int]]:
    """The ranks of every layer for at most as many parameters, by the name of how they were chosen."""
    full = store.bases["full"]
    energies = {layer: float((basis.spectrum**2).sum()) for layer, basis in full.read(rank=1).items()}
    return {
        "equal": of.equal(of.equal_within(budget)),
        "eva": eva_ranks(store, of, budget),
        "prep ranks": choose(store, budget).ranks,
        "energy": weighted(of, energies).within(budget),
        "squared": squared(of).within(budget),
    }


def weighted(of: Directions, weights: Mapping[str, float]) -> Directions:
    """What the directions keep, times a weight of their layer."""
    return Directions({layer: t * weights[layer] for layer, t in of.kept.items()}, of.costs)


def squared(of: Directions) -> Directions:
    """By what each direction takes off `((1 - F(r)) / (1 - F(1)))^2` of its layer: a constant output is left out."""
    kept = {}
    for layer, t in of.kept.items():
        lost = np.clip(1 - np.concatenate([[0.0], np.cumsum(t)]), 0, None)
        kept[layer] = -np.diff((lost / max(lost[1], 1e-4)) ** 2)
    return Directions(kept, of.costs)


def eva_ranks(store: Store, of: Directions, budget: int) -> dict[str, int]:
    """Of all explained variance ratios, at most twice the mean rank of each layer, as many as the budget has room for.

    Every layer has at least rank 1, and at most what its basis holds.
    """
    read = store.bases["eva"].read(rank=1)
    ratios = {layer: basis.spectrum**2 / (basis.spectrum**2).sum() for layer, basis in read.items()}

    def ranks(count: int) -> dict[str, int]:
        limit = round(2 * count / len(ratios))
        found = redistribute({layer: ratio[:limit] for layer, ratio in ratios.items()}, count)
        return {layer: min(max(found[layer], 1), len(of.kept[layer])) for layer in of.kept}

    low, high = 0, sum(map(len, of.kept.values()))
    while low < high:
        count = (low + high + 1) // 2
        low, high = (count, high) if of.parameters(ranks(count)) <= budget else (low, count - 1)
    return ranks(low)


if __name__ == "__main__":
    main()
