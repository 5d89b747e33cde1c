"""The calibration pass, attach and a training step on one GPU, with the layer shapes of Llama-3-8B and random weights.

    python benchmarks/gpu.py --json gpu.json

pass       forward alone, the pass with full and auto moments, PEFT's CorDA pass, the published form; ms by CUDA events
products   TFLOP/s of X^T X as the pass makes it, and of a large matrix product of the same dtype; GB/s of the additions
error      of C against float64 at widths 4,096 and 14,336, for chunks of 512, 2,048 and 16,384 tokens
state      seconds to write a checkpoint, and the finished moments
attach     of every layer at rank 256, weights verified
step       forward and backward of every core and of PEFT's LoRA on one layer

`--device cpu --shrink 64` runs it anywhere, to see that it runs: its figures are then of no use.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import calib_cov_distribution
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import prep
from adapters import CORES, basis_of, frozen
from prep.linear import weight_hash
from prep.preprocess.calibration.part import Batch, Part
from prep.preprocess.calibration.writers import Writers
from prep.preprocess.model.forward import text_forward
from prep.preprocess.model.network import Network, weight_record
from prep.preprocess.model.sites import find_sites, target_layers
from prep.preprocess.numerics.accumulators import mapped, moment_kind, moments_of
from prep.preprocess.numerics.device_sums import DeviceGram, full_product, in_range, product_on
from prep.store import BasisWriter, LayerRecord, MomentWriter, begin_moments, create_store
from prep.store.checkpoint import begin_slot, write_sums

SECTIONS = ("pass", "products", "error", "state", "attach", "step")
WAITS = ("Synchronize", "Memcpy DtoH")  # what a profile calls the waits for the device


class Bench:
    """A stack of Llama blocks in half precision, and its batches."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        self.hidden, self.inner = 4096 // options.shrink, 14336 // options.shrink
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=options.blocks or self._blocks(),
            num_attention_heads=32 // min(options.shrink, 8),
            num_key_value_heads=8 // min(options.shrink, 8),
            max_position_embeddings=4096,
        )
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with self.device:
            self.net = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
        self.layers = target_layers(self.net)
        self.forward = text_forward(self.net, self.layers)
        self.sites, _ = find_sites(
            self.layers, lambda: self.forward({"input_ids": torch.zeros(1, 8, dtype=torch.long)})
        )

    def _blocks(self) -> int:
        """As many blocks as fit with their weights and float64 sums, or the float32 matrices of the others."""
        if self.device.type != "cuda":
            return 2
        h, f = self.hidden, self.inner
        weights = 2 * (2.5 * h * h + 3 * h * f)
        triangle = 9 / 16
        sums = 8 * triangle * (3 * h * h + f * f)
        others = 4 * (6 * h * h + f * f)
        free = torch.cuda.mem_get_info(self.device)[0] - 12 * 10**9
        return max(1, int(free // (weights + max(sums, others))))

    def part(self, moment: str) -> Part:
        kinds = {site.name: moment_kind(moment, site.shapes) for site in self.sites}
        network = Network(self.net, self.layers, tuple(self.sites), kinds, {}, self.forward, {})
        exact = self.options.products == "exact"
        return Part(network, self.sites, devices=dict.fromkeys(kinds, self.device), exact=exact)

    def batch(self, seq_len: int) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(0, 1024, (8, seq_len), generator=torch.Generator().manual_seed(seq_len))}

    def milliseconds(self, work: Callable[[], Any]) -> float:
        """Median of the rounds, after one that warms up."""
        times = []
        for _ in range(self.options.rounds + 1):
            self.wait()
            begun = time.perf_counter()
            if self.device.type == "cuda":
                first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                first.record()
                work()
                last.record()
                self.wait()
                times.append(first.elapsed_time(last))
            else:
                work()
                times.append(1e3 * (time.perf_counter() - begun))
        return statistics.median(times[1:])

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any]) -> float:
        self.wait()
        begun = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - begun


def passes(bench: Bench) -> dict[str, Any]:
    """ms of each pass over a batch, its ratio to the forward alone, peak memory, and waits for the device."""
    figures: dict[str, Any] = {}
    for seq_len in bench.options.seq_len:
        batch = bench.batch(seq_len)

        def forward(batch: dict[str, Tensor] = batch) -> None:
            with torch.no_grad():
                bench.forward(batch)

        alone = bench.milliseconds(forward)
        rows = {"forward": {"ms": alone, "ratio": 1.0}}
        for moment in ("full", "auto"):
            part = bench.part(moment)
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(bench.device)
            with part.hooked():
                took = bench.milliseconds(lambda part=part, batch=batch: part.add(Batch(0, batch, {})))
                waits = _waits(lambda part=part, batch=batch: part.add(Batch(0, batch, {})))
            rows[f"prep {moment}"] = {"ms": took, "ratio": took / alone, "waits": waits, "peak GB": _peak(bench.device)}
            del part
        for name, other in (("published", published(bench, batch)), ("peft corda", corda(bench, batch))):
            with other as run:
                took = bench.milliseconds(run)
            rows[name] = {"ms": took, "ratio": took / alone}
        figures[f"8 x {seq_len}"] = rows
    return figures


def _waits(work: Callable[[], Any]) -> int:
    with torch.profiler.profile() as profile:
        work()
    return sum(event.count for event in profile.key_averages() if any(wait in event.key for wait in WAITS))


def _peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


@contextlib.contextmanager
def published(bench: Bench, batch: dict[str, Tensor]) -> Iterator[Callable[[], None]]:
    """Every layer adds its own float32 x^T x to its own matrix on the device."""
    sums = {name: torch.zeros(m.in_features, m.in_features, device=bench.device) for name, m in bench.layers.items()}

    def add(name: str, args: tuple) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        sums[name] += x.T @ x

    handles = [
        layer.register_forward_pre_hook(lambda _layer, args, name=name: add(name, args))
        for name, layer in bench.layers.items()
    ]

    def run() -> None:
        with torch.no_grad():
            bench.forward(batch)

    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def corda(bench: Bench, batch: dict[str, Tensor]) -> Iterator[Callable[[], None]]:
    """PEFT's `preprocess_corda`, its pass: one sequence at a time, as its hook wants them."""
    settings = CordaConfig(corda_method="ipm", prune_temporary_fields=False)
    config = LoraConfig(r=16, target_modules=list(bench.layers), corda_config=settings)

    def sequences() -> None:
        for ids in batch["input_ids"]:
            bench.net(input_ids=ids[None].to(bench.device))

    def run() -> None:
        with torch.no_grad():
            calib_cov_distribution(bench.net, config, sequences, None, None)

    yield run
    for layer in bench.layers.values():
        for name in ("covariance_matrix", "sample_count", "rank", "corda_method"):
            if hasattr(layer, name):
                delattr(layer, name)


def products(bench: Bench) -> dict[str, Any]:
    """Rate of the products of X^T X, of one large product, and of the additions in float64."""
    side, figures = 8192 // bench.options.shrink, {}
    a = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
    ceiling = 2 * side**3 / bench.milliseconds(lambda: a @ a) / 1e9
    figures["ceiling TFLOP/s"] = ceiling
    product = product_on(bench.device, bench.options.products == "exact")
    for d in (bench.hidden, bench.inner):
        X = torch.randn(16384 // bench.options.shrink, d, device=bench.device, dtype=torch.bfloat16)
        total = DeviceGram(d, bench.device)
        work = sum(2 * len(X) * panel.numel() for panel in total.panels)  # of the triangle of panels
        scaled, squared = in_range(X)
        ms = bench.milliseconds(lambda total=total, x=scaled, s=squared: total.add(x, s, product))
        block = torch.zeros(total.panels[-1].shape, device=bench.device)
        adding = bench.milliseconds(lambda t=total.panels[-1], b=block, s=squared: t.add_(b.double().mul_(s)))
        rate = work / ms / 1e9
        figures[f"width {d}"] = {
            "ms": ms,
            "TFLOP/s": rate,
            "of the ceiling": rate / ceiling,
            "additions GB/s": 20 * block.numel() / adding / 1e6,
        }
    return figures


def error(bench: Bench) -> dict[str, Any]:
    """Largest |dC_ij| / sqrt(C_ii C_jj), and the Frobenius error, of products of so many tokens added in float32."""
    tokens, figures = 16384 // bench.options.shrink, {}
    for d in (bench.hidden, bench.inner):
        X = torch.randn(tokens, d, device=bench.device, dtype=torch.bfloat16)
        X[:, :4] = (X[:, :4] + 20).to(X.dtype)  # channels with a mean, as models have them
        rows = X[:, : min(d, 2048)]
        wanted = rows.double().T @ X.double()
        deviation = X.double().square().sum(0).sqrt()
        for chunk in (512, 2048, 16384):
            for name, exact in (("auto", False), ("exact", True)):
                product = product_on(bench.device, exact)
                C = sum(product(rows[i : i + chunk], X[i : i + chunk]) for i in range(0, tokens, chunk)).double()
                off = C - wanted
                scaled = (off / deviation[: len(off), None] / deviation).abs().max().item()
                figures[f"width {d}, {chunk} tokens, {name}"] = {
                    "scaled": scaled,
                    "Frobenius": (off.norm() / wanted.norm()).item(),
                }
    same = full_product(X[:64, :64], X[:64, :64]).double() - X[:64, :64].double().T @ X[:64, :64].double()
    assert same.abs().max() < 1e-2, "float32 products are not those of the values"
    return figures


def state(bench: Bench) -> dict[str, Any]:
    """Seconds to write what a checkpoint and a finished store hold, from the device to the disk."""
    part = bench.part("full")
    with part.hooked():
        part.add(Batch(0, bench.batch(min(bench.options.seq_len)), {}))
    members = {
        site.name: {name: weight_record(name, bench.layers[name]) for name in site.members} for site in part.sites
    }
    attrs = {"id": "0", "model": {"id": "m"}, "corpus": None, "options": None, "status": "incomplete"}
    root = create_store(Path(tempfile.mkdtemp()) / "s", attrs).root
    shapes = {site.name: dict(zip(site.members, site.shapes, strict=True)) for site in part.sites}
    begin_moments(root, shapes, {site.name: part.sums[site.name].data().kind for site in part.sites}, {})
    writer = MomentWriter(root, "float64")
    slot = begin_slot(root)

    def checkpoint() -> None:
        with Writers() as writers:
            for name, sums in part.sums.items():
                writers.submit(write_sums, root, slot, name, mapped(sums.data(), Tensor.cpu))

    def write(name: str, sums: Any) -> None:
        writer.note(writer.put(name, moments_of(name, sums, members[name])))

    def finish() -> None:
        with Writers() as writers:
            for name, sums in part.sums.items():
                writers.submit(write, name, mapped(sums.data(), lambda x: x.to("cpu", copy=True)))

    size = sum(panel.numel() * 8 for sums in part.sums.values() for panel in sums.data().second_moment or ())
    took = {"checkpoint": bench.seconds(checkpoint), "finish": bench.seconds(finish)}
    return {"GB": size / 1e9, **{f"{name} s": value for name, value in took.items()}}


def attach(bench: Bench) -> dict[str, Any]:
    """Seconds of `prep.attach` on all layers; the basis is the first one of each shape, made from one layer."""
    rank, groups = max(2, 256 // bench.options.shrink), {}
    for name, layer in bench.layers.items():
        groups.setdefault((layer.out_features, layer.in_features), []).append(name)
    attrs = {"id": "0", "model": {"id": "m"}, "corpus": None, "options": None, "status": "complete"}
    path = Path(tempfile.mkdtemp()) / "s"
    root = create_store(path, attrs).root
    layout = {shape: {"layers": names, "rank": rank, "spectrum": rank} for shape, names in groups.items()}
    method = {"metric": "identity", "rank": rank}
    writer = BasisWriter.create(root, "identity", method=method, dtype="float32", model={}, groups=layout)
    for shape, names in groups.items():
        for i, name in enumerate(names):
            W = bench.layers[name].weight.detach()
            U, S, P = (x.cpu() for x in directions(W, rank))
            record = LayerRecord(shape, i, rank, 1.0, 0.0, rank, "svd", 1.0, weight_hash(W.cpu()), "bfloat16")
            writer.note(writer.put(name, U, S, P, S, record))
    writer.finish()
    figures = {"layers": len(bench.layers), "rank": rank}
    for verify in (True, "hash", False):
        times = []
        for _ in range(bench.options.rounds + 1):
            times.append(bench.seconds(lambda v=verify: prep.attach(bench.net, path, basis="identity", verify=v)))
            prep.detach(bench.net)
        figures[f"attach, verify={verify} s"] = statistics.median(times[1:])
    return figures


def directions(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Some orthonormal U (d_out, r), with S and P such that U^T W = diag(S) P: all that attach looks at."""
    W = W.double()
    U = torch.linalg.qr(W[:, :rank] if W.shape[1] >= rank else W)[0]
    rows = U.T @ W
    S, order = rows.norm(dim=1).sort(descending=True)
    return U[:, order], S, rows[order] / S[:, None]


def step(bench: Bench) -> dict[str, Any]:
    """ms of forward and backward of one adapted layer, and the ratio to PEFT's LoRA."""
    d, rank, tokens = bench.hidden, max(4, 256 // bench.options.shrink), 8 * min(bench.options.seq_len)
    torch.manual_seed(0)
    base = nn.Linear(d, d, bias=False)
    store = basis_of(base, rank)
    x = torch.randn(tokens, d, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])

    def copy() -> nn.Sequential:
        net = nn.Sequential(nn.Linear(d, d, bias=False))
        net[0].weight.data.copy_(base.weight)
        return net

    nets: dict[str, nn.Module] = {"base": frozen(base), "peft lora": get_peft_model(copy(), config)}
    for core in CORES:
        nets[core] = copy()
        prep.attach(nets[core], store, core=core, basis="identity")
    took = {}
    for name, net in nets.items():
        net = net.to(bench.device, torch.bfloat16)
        took[name] = bench.milliseconds(lambda net=net: net(x).sum().backward())
    return {name: {"ms": ms, "ratio": ms / took["peft lora"]} for name, ms in took.items()}


def show(figures: dict[str, Any], indent: str = "") -> None:
    """A line per figure, those of one thing in one line."""
    for name, value in figures.items():
        if isinstance(value, dict) and not any(isinstance(inner, dict) for inner in value.values()):
            print(f"{indent}{name:34}" + "  ".join(f"{key} {number:.4g}" for key, number in value.items()))
        elif isinstance(value, dict):
            print(f"{indent}{name}")
            show(value, indent + "  ")
        else:
            print(f"{indent}{name:34}{value:.4g}")


def main() -> None:
    """Run the sections, print their figures, and keep them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=int, default=0, help="0: as many as fit")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--products", choices=("auto", "exact"), default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shrink", type=int, default=1, help="divides every width")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bench = Bench(options)
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, {len(bench.net.model.layers)} blocks, products {options.products}")
    sections = {"pass": passes, "products": products, "error": error, "state": state, "attach": attach, "step": step}
    figures = {}
    for section in options.only:
        figures[section] = sections[section](bench)
        show({section: figures[section]})
        if options.json:
            options.json.write_text(json.dumps({"device": name, **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
