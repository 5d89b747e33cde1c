"""What prep costs against tokens, width, depth and rank: random weights, CPU, float32, all cores.

python benchmarks/scaling.py --plot scaling.svg
python benchmarks/scaling.py --only wide --wide          with one layer of 4096 x 14336: minutes, and 7 GB

tokens  forward and calibration pass (moments full, auto) of 4 blocks, hidden 512
width   one block (hidden h, ffn 3.5 h): forward, passes, `prep decompose` from full moments and back, by solver
depth   the same against the number of blocks, hidden 256
rank    the four 1024 x 1024 attention layers of a block: decompose by solver; attach together with detach
wide    one layer W (d_out, d_in = 3.5 d_out), rank 256: `whitened_svd` in float64, from C and from E[y y^T], against
        the published form in float32, from the same C: eigh(C), C^(1/2) and C^(-1/2), SVD of W C^(1/2)

The models are Llamas whose weights have columns of scale i^-1/2, so that spectra decay; the wide layer's inputs are
mixtures of factors of that scale. Before the wide ratios are printed, E||(W - U S P) x||^2 is compared with its least
value, from a float64 SVD of W L, C = L L^T. The stages of a size run in turn for --rounds, or as often as fits in
--seconds; medians of the rounds after the first, which warms up and counts only where it is the only one.
"""

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from figures import Figure, Stages, measure, slope, svg, table
from threadpoolctl import threadpool_limits
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import prep
from prep.preprocess.memory import peak_memory
from prep.preprocess.model.forward import text_forward
from prep.preprocess.model.sites import find_sites, target_layers
from prep.preprocess.numerics.methods import Method
from prep.preprocess.numerics.whitening import InputStatistics, WhitenedSVD, whitened_svd
from preprocess import Bench

DAMPING = 1e-3
Found = tuple[list[Figure], list[str]]  # and the lines to print below their table


class RandomBench(Bench):
    """The stages of preprocess.py on a Llama with random weights and random tokens."""

    def __init__(self, folder: str, hidden: int, blocks: int, tokens: int, targets: str = "."):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=hidden * 7 // 2,
            num_hidden_layers=blocks,
            num_attention_heads=max(1, hidden // 64),
            vocab_size=1024,
        )
        self.options = argparse.Namespace(model=None, rank=64)
        self.net = LlamaForCausalLM(config).eval()
        self.layers = target_layers(self.net, [targets], exclude=["lm_head"])
        for module in self.layers.values():
            scale = torch.arange(1, module.in_features + 1) ** -0.5
            module.weight.data.mul_(scale / scale.square().mean().sqrt())
        self.forward = text_forward(self.net, self.layers)
        ids = torch.randint(0, config.vocab_size, (tokens,)).view(-1, min(tokens, 256))
        self.text = [{"input_ids": part} for part in ids.split(4)]
        self.sites, _ = find_sites(self.layers, lambda: self.forward({"input_ids": ids[:1, :8]}))
        self.moments = {}
        self.folder = Path(tempfile.mkdtemp(dir=folder))

    def batches(self):
        return self.text

    def passes(self) -> Stages:
        return {
            "forward": self.run_forward,
            "pass full": lambda: self.run_prep("full"),
            "pass auto": lambda: self.run_prep("auto"),
        }

    def decompositions(self, *solvers: str) -> Stages:
        return {f"decompose {solver}": lambda solver=solver: self.run_decompose("full", solver) for solver in solvers}

    def check(self, *solvers: str) -> None:
        """No basis is worse than its certificate says, measured by the exact ones."""
        bases = prep.open_store(self.store_of("full")).bases
        for name, exact in bases["full-exact"].layers.items():
            for solver in solvers:
                found = bases[f"full-{solver}"].layers[name]
                assert found.tail**2 <= found.bound * (1 + 1e-6) * exact.tail**2, f"{name}: {solver} is not certified"


def tokens(options: argparse.Namespace, folder: str) -> Found:
    """Against the length of the corpus."""
    figures = []
    counts = [count // options.shrink for count in (1024, 2048, 4096, 8192)]
    for count in counts:
        bench = RandomBench(folder, 512 // options.shrink, 4, count)
        figures += measure(count, bench.passes(), options.rounds, options.seconds)
    return figures, [per("1,000 tokens", count, figures, 1000) for count in counts]


def per(what: str, x: int, figures: list[Figure], unit: int) -> str:
    """Seconds of every stage at size x, per `unit`."""
    found = (f"{figure.stage} {figure.seconds * unit / x:.4f}" for figure in figures if figure.x == x)
    return f"seconds per {what} at {x}: {', '.join(found)}"


def width(options: argparse.Namespace, folder: str) -> Found:
    """Against the hidden width of one block."""
    sizes = [hidden // options.shrink for hidden in (256, 512, 1024, 2048)]
    return [figure for hidden in sizes for figure in of_blocks(hidden, hidden, 1, options, folder)], []


def depth(options: argparse.Namespace, folder: str) -> Found:
    """Against the number of blocks."""
    hidden = 256 // options.shrink
    figures = [figure for blocks in (2, 4, 8, 16) for figure in of_blocks(blocks, hidden, blocks, options, folder)]
    return figures, [per("block", blocks, figures, 1) for blocks in (2, 16)]


def of_blocks(x: int, hidden: int, blocks: int, options: argparse.Namespace, folder: str) -> list[Figure]:
    """Passes and decompositions of a model, at size x."""
    bench = RandomBench(folder, hidden, blocks, 2048 // options.shrink)
    figures = measure(x, bench.passes(), options.rounds, options.seconds)
    bench.store_of("full")  # written before `prep decompose` is timed
    figures += measure(x, bench.decompositions("exact", "auto"), options.rounds, options.seconds)
    bench.check("auto")
    return figures


def rank(options: argparse.Namespace, folder: str) -> Found:
    """Against the rank of the basis."""
    bench = RandomBench(folder, 1024 // options.shrink, 1, 2048 // options.shrink, targets="self_attn")
    bench.run_prep("full")
    store = bench.store_of("full")

    def attach() -> None:
        prep.attach(bench.net, store, core="gain", basis="full-exact")
        prep.detach(bench.net)

    figures = []
    for size in sorted({max(1, size // options.shrink) for size in (16, 32, 64, 128, 256, 512)}):
        bench.options.rank = size
        stages = bench.decompositions("exact", "randomized", "auto") | {"attach": attach}
        figures += measure(size, stages, options.rounds, options.seconds)
        bench.check("randomized", "auto")
    return figures, []


def wide(options: argparse.Namespace, folder: str) -> Found:
    """Against the width of one layer. The published form is extrapolated to the third one, which --wide adds."""
    figures, notes = [], []
    published: list[Figure] = []
    for d_out in (1024 // options.shrink, 2048 // options.shrink):
        found, line = _wide_layer(d_out, True, options)
        published.append(found[-1])
        figures += found
        notes += [line, _ratios(found)]
    if options.wide:
        found, line = _wide_layer(4096 // options.shrink, False, options)
        power, x = slope(published), found[0].x
        seconds = published[-1].seconds * (x / published[-1].x) ** power
        found.append(Figure(x, "published", seconds, extrapolated=True))
        figures += found
        notes += [line, _ratios(found), f"  there published is extrapolated: exponent {power:.2f} of the two others"]
    return figures, notes


def _ratios(found: list[Figure]) -> str:
    ratios = (f"{figure.stage} {found[-1].seconds / figure.seconds:.1f}" for figure in found[:-1])
    return f"  seconds of published / seconds of prep: {', '.join(ratios)}"


def _wide_layer(d_out: int, run_published: bool, options: argparse.Namespace) -> tuple[list[Figure], str]:
    """Figures, published last, and how far the squared output error of each result is above the least one."""
    d_in, r = d_out * 7 // 2, max(1, 256 // options.shrink)
    W, C, Y = wide_moments(d_out, d_in)
    moments = {
        "full": InputStatistics("full", second_moment=C.numpy()),
        "output": InputStatistics("output", output=Y.numpy(), diagonal=C.diagonal().numpy()),
    }
    results: dict[str, WhitenedSVD] = {}
    factors: dict[str, tuple[Tensor, ...]] = {}

    def run_prep(kind: str, solver: str) -> None:
        method = Method("full", rank=r, damping=DAMPING, solver=solver)
        results[f"{kind} {solver}"] = whitened_svd(W.double().numpy(), moments[kind], method)

    stages: Stages = {
        f"{kind} {solver}": lambda kind=kind, solver=solver: run_prep(kind, solver)
        for kind in moments
        for solver in ("exact", "auto")
    }
    if run_published:
        single = C.float()
        stages["published"] = lambda: factors.update(published=published_svd(W, single, r))
    figures = measure(d_in, stages, options.rounds, options.seconds)

    factors |= {name: tuple(map(torch.from_numpy, (found.U, found.S, found.P))) for name, found in results.items()}
    C.diagonal().add_(DAMPING * C.diagonal().mean())
    W = W.double()
    least = torch.linalg.svdvals(W @ torch.linalg.cholesky(C))[r:].square().sum()
    shown = []
    for name, (U, S, P) in factors.items():
        E = W - (U.double() * S) @ P.double()
        excess = (((E @ C) * E).sum() / least - 1).item()
        route, bound = (results[name].solver, results[name].bound) if name in results else ("float32", 1.001)
        assert excess <= bound - 1 + 1e-6, f"{name} of {d_out} x {d_in}: {excess:.1e} over the least error"
        shown.append(f"{name} {max(excess, 0):.0e} ({route})")
    return figures, f"{d_out} x {d_in}, rank {r}: squared error over the least one: {', '.join(shown)}"


def wide_moments(d_out: int, d_in: int) -> tuple[Tensor, Tensor, Tensor]:
    """W (d_out, d_in) float32, C and E[y y^T] float64, from d_in tokens."""
    torch.manual_seed(0)
    W = torch.randn(d_out, d_in) / d_in**0.5
    mixing = torch.randn(d_in // 2, d_in) * torch.arange(1, d_in // 2 + 1)[:, None] ** -0.5
    C, Y = (torch.zeros(d, d, dtype=torch.float64) for d in (d_in, d_out))
    for start in range(0, d_in, 2048):
        n = min(2048, d_in - start)
        x = torch.randn(n, d_in // 2) @ mixing + 0.1 * torch.randn(n, d_in)
        y = x @ W.T
        C += x.T @ x
        Y += y.T @ y
    return W, C.div_(d_in), Y.div_(d_in)


def published_svd(W: Tensor, C: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and P in float32, with a root and an inverse."""
    values, vectors = torch.linalg.eigh(C + DAMPING * C.diagonal().mean() * torch.eye(len(C)))
    root = (vectors * values.clamp(min=1e-12).sqrt()) @ vectors.T
    inverse = (vectors * values.clamp(min=1e-12).rsqrt()) @ vectors.T
    U, S, Vt = torch.linalg.svd(W @ root, full_matrices=False)
    return U[:, :r], S[:r], Vt[:r] @ inverse


SECTIONS = {  # what to run; title and x axis of the chart
    "tokens": (tokens, "Calibration, hidden 512, 4 blocks", "tokens"),
    "width": (width, "One block, 2,048 tokens, rank 64", "hidden width"),
    "depth": (depth, "Blocks of hidden 256, 2,048 tokens, rank 64", "blocks"),
    "rank": (rank, "Four layers of 1024 x 1024", "rank"),
    "wide": (wide, "One layer, d_out = d_in / 3.5, rank 256", "d_in"),
}


def main() -> None:
    """Run the chosen sections, print a table of each, write the chart."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, such as tokens,rank")
    parser.add_argument("--wide", action="store_true", help="add the layer of 4096 x 14336 to section wide")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10, help="for the rounds of one size; one is always run")
    parser.add_argument("--shrink", type=int, default=1, help="divide widths, tokens and ranks by this: a trial run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="an SVG file")
    parser.add_argument("--threads", type=int, default=cores, help="all cores by default")
    options = parser.parse_args()
    sections = options.only.split(",")
    if unknown := set(sections) - SECTIONS.keys():
        parser.error(f"--only {','.join(sorted(unknown))}: the sections are {', '.join(SECTIONS)}")
    torch.set_num_threads(options.threads)
    found: dict[str, Found] = {}
    with threadpool_limits(options.threads):
        for section in sections:
            with tempfile.TemporaryDirectory() as folder:
                found[section] = SECTIONS[section][0](options, folder)
            print("\n".join([*table(section, found[section][0]), *found[section][1], ""]), flush=True)
    machine = {"torch": torch.__version__, "numpy": np.__version__, "peak_bytes": peak_memory()}
    print(", ".join(f"{name} {value}" for name, value in machine.items()) + f", {options.threads} threads")
    if options.json:
        asked = {name: value for name, value in vars(options).items() if name not in ("json", "plot")}
        figures = {section: [asdict(figure) for figure in figures] for section, (figures, _) in found.items()}
        notes = {section: lines for section, (_, lines) in found.items()}
        report = machine | {"options": asked, "figures": figures, "notes": notes}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.plot:
        options.plot.write_text(svg([(*SECTIONS[section][1:], figures) for section, (figures, _) in found.items()]))


if __name__ == "__main__":
    main()
