"""PEFT from a store against PEFT alone: seconds to start, and the output error of what the adapter takes over.

    python benchmarks/peft_startup.py --model MODEL --store prep.zarr            PiSSA, both ways
    python benchmarks/peft_startup.py --model MODEL --store prep.zarr --error    and CorDA

The error is E||(W - B A) x||^2 in the store's second moments: of `whitened`, and of PEFT's `preprocess_corda` run on
the tokens that the store was calibrated on, one sequence at a time as it wants them. The store needs the basis
`identity`, for `--error` also `full` and full second moments.
"""

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import prep
from prep.linear import weight_matrix
from prep.preprocess.corpus.text import CorpusOptions, load_corpus
from prep.store import Store

RANKS = (8, 32, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--store", default="prep.zarr")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--error", action="store_true", help="run PEFT's CorDA too (minutes)")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    store = prep.open_store(options.store)
    startup(model, store, options.rank)
    if options.error:
        output_error(model, store, AutoTokenizer.from_pretrained(options.model))


def startup(model: nn.Module, store: Store, rank: int) -> None:
    """PiSSA on every layer of the store: seconds, and how far apart B A is."""
    layers = list(store.bases["identity"].layers)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, init_lora_weights="pissa")
    one, other, third = (copy.deepcopy(model) for _ in range(3))
    prep.peft.get_model(third, store, "lora")  # imports
    ours, mine = seconds(lambda: prep.peft.get_model(one, store, "pissa", r=rank, lora_alpha=rank))
    theirs, pefts = seconds(lambda: get_peft_model(other, config))
    print(f"PiSSA, rank {rank}, {len(layers)} layers")
    print(f"  PEFT alone     {theirs:8.2f} s")
    print(f"  from the store {ours:8.2f} s   {theirs / ours:.1f} times faster")
    difference = {layer: apart(change(mine, layer), change(pefts, layer)) for layer in layers}
    worst = max(difference, key=lambda layer: difference[layer])
    U, S, Vt = torch.linalg.svd(weight_matrix(model.get_submodule(worst)).double(), full_matrices=False)
    exact = (U[:, :rank] * S[:rank]) @ Vt[:rank]
    print(f"  B A differs by {torch.tensor(list(difference.values())).median():.0e}, at most {difference[worst]:.0e};")
    print(f"  there PEFT is {apart(change(pefts, worst), exact):.0e} from a float64 SVD, ", end="")
    print(f"the store {apart(change(mine, worst), exact):.0e}", flush=True)


def output_error(model: nn.Module, store: Store, tokenizer: Any) -> None:
    """E||(W - B A) x||^2 of whitened and of PEFT's CorDA on every layer of the store."""
    layers = list(store.bases["full"].layers)
    modules = dict(model.named_modules())
    spent, _ = seconds(lambda: corda(model, store, tokenizer, layers, max(RANKS)))
    read = store.bases["full"].read(rank=max(RANKS))
    ratios: dict[int, list[float]] = {rank: [] for rank in RANKS}
    for members in store.moments.sites.values():
        C = store.moments[members[0]].second_moment.double()
        for layer in members:
            W, basis, eigens = weight_matrix(modules[layer]).double(), read[layer], modules[layer].eigens
            for rank in RANKS:
                ours = W - (basis.U[:, :rank].double() * basis.S[:rank]) @ basis.P[:rank].double()
                U, S, V = (part[..., :rank].double() for part in (eigens.U_WC, eigens.S_WC, eigens.V_WC))
                ratios[rank].append((error(ours, C) / error(W - (U * S) @ V.T, C)).item())
    print(f"Output error, whitened over PEFT's CorDA ({spent:.0f} s for its covariance and decomposition)")
    for rank, found in ratios.items():
        below = sum(ratio <= 1 for ratio in found)
        median = torch.tensor(found).median()
        print(f"  rank {rank:3}: median {median:.3f}, largest {max(found):.3f}, at most 1 on {below} of {len(found)}")


def corda(model: nn.Module, store: Store, tokenizer: Any, layers: list[str], rank: int) -> None:
    """PEFT's CorDA, which leaves `eigens` on every layer."""
    fields = {key: value for key, value in (store.corpus or {}).items() if key not in ("tokens", "hash")}
    corpus = load_corpus(CorpusOptions(**fields), tokenizer)
    body: Any = model.base_model
    config = LoraConfig(
        r=rank, target_modules=layers, init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm")
    )

    def run() -> None:
        for batch in corpus.batches(1):
            body(batch["input_ids"], use_cache=False)

    preprocess_corda(model, config, run)


def change(model: Any, layer: str) -> Tensor:
    """B A (d_out, d_in) with its scaling."""
    module = model.get_submodule(f"base_model.model.{layer}")
    A, B = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
    return B @ A * module.scaling["default"]


def apart(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def error(E: Tensor, C: Tensor) -> Tensor:
    """E||E x||^2 = tr(E C E^T)."""
    return ((E @ C) * E).sum()


def seconds(task: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = task()
    return time.perf_counter() - begun, result


if __name__ == "__main__":
    main()
