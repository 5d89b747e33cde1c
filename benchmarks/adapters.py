"""What an adapter costs a training step: every core against PEFT's LoRA of the same rank, in turn, on one layer.

python benchmarks/adapters.py --d-in 576 --d-out 576 --rank 64 --tokens 2048
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import prep
from prep.linear import weight_hash
from prep.preprocess.numerics.methods import Method
from prep.preprocess.numerics.whitening import whitened_svd
from prep.store import BasisWriter, LayerRecord, create_store

CORES = ("gain", "rotation", "ablation", "dplr", "arrow", "dense")


def main() -> None:
    """Time forward, and forward with backward, of each adapted layer; medians and ratios to LoRA."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--d-out", type=int, default=576)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    base = nn.Linear(options.d_in, options.d_out, bias=False)
    x = torch.randn(options.tokens, options.d_in, requires_grad=True)

    lora = nn.Sequential(nn.Linear(options.d_in, options.d_out, bias=False))
    lora[0].weight.data.copy_(base.weight)
    config = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=["0"], lora_dropout=0.0)
    nets: dict[str, nn.Module] = {"base": frozen(base), "peft lora": get_peft_model(lora, config)}
    store = basis_of(base, options.rank)
    for core in CORES:
        net = nn.Sequential(nn.Linear(options.d_in, options.d_out, bias=False))
        net[0].weight.data.copy_(base.weight)
        prep.attach(net, store, core=core, basis="identity")
        nets[core] = net

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in nets}
    for _ in range(options.rounds):
        for name, net in nets.items():
            begun = time.perf_counter()
            with torch.no_grad():
                net(x)
            middle = time.perf_counter()
            net(x).sum().backward()
            times[name].append((middle - begun, time.perf_counter() - middle))
    medians = {
        name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in times.items()
    }
    print(
        f"{options.d_out} x {options.d_in}, rank {options.rank}, {options.tokens} tokens, float32; ms and ratio to LoRA"
    )
    for name, (forward, both) in medians.items():
        ratios = [value / against for value, against in zip((forward, both), medians["peft lora"], strict=True)]
        print(
            f"{name:10} forward {forward * 1e3:7.2f} {ratios[0]:5.2f}   + backward {both * 1e3:7.2f} {ratios[1]:5.2f}"
        )


def frozen(layer: nn.Linear) -> nn.Module:
    """The layer alone, as it is under an adapter: its weight gets no gradient."""
    return nn.Sequential(layer).requires_grad_(False)


def basis_of(layer: nn.Linear, rank: int) -> Path:
    """A store with the plain SVD of one layer."""
    W = layer.weight.detach()
    found = whitened_svd(W.double().numpy(), None, Method("identity", rank=rank))
    path = Path(tempfile.mkdtemp()) / "one.zarr"
    attrs = {"id": "one", "model": {"id": "one"}, "corpus": None, "options": None, "status": "complete"}
    shape = (layer.out_features, layer.in_features)
    group = {shape: {"layers": ["0"], "rank": len(found.S), "spectrum": len(found.spectrum)}}
    method = {"metric": "identity", "rank": rank}
    root = create_store(path, attrs).root
    writer = BasisWriter.create(root, "identity", method=method, dtype="float32", model={}, groups=group)
    record = LayerRecord(
        shape, 0, len(found.S), found.energy, found.tail, found.numerical_rank, "gram", 1.0, weight_hash(W), "float32"
    )
    writer.note(writer.put("0", *map(torch.from_numpy, (found.U, found.S, found.P, found.spectrum)), record))
    writer.finish()
    return path


if __name__ == "__main__":
    main()
