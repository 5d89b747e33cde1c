"""Calibration and decomposition, side by side: prep, PEFT's CorDA and the published form, on the same batches.

OMP_WAIT_POLICY=passive python benchmarks/preprocess.py --model MODEL --data gsm8k_train.jsonl \\
    --template "{question}\\n{answer}"

The wait policy is the one that the command line sets.

Stages run in turn, `--rounds` times, in one process; medians, and the ratios are those of the medians. Samples taken
while other processes used more than 5 % of the machine are dropped. The peak memory of each stage is that of a child
process of its own, above the loaded model. Before any ratio is printed the results are compared.

forward          the base model without its head
prep full/auto   the calibration pass
peft covariance  `preprocess_corda`'s pass: it runs the head, too, as its users do
published pass   every layer adds its own x.T @ x to its own matrix
peft eigens      damped C, inverse, SVD of W C
published svd    eigh(C), C^(1/2) and C^(-1/2), SVD of W C^(1/2)
decompose ...    `prep decompose` from the store and back, by moments and solver
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from load import LIMIT, Sample, forget_peak, kept, rss, timed
from threadpoolctl import threadpool_info
from torch import Tensor, nn

import prep
from prep.linear import weight_matrix
from prep.preprocess.calibration.part import Batch, Part
from prep.preprocess.corpus.text import CorpusOptions, load_corpus
from prep.preprocess.decompose import decompose
from prep.preprocess.memory import peak_memory
from prep.preprocess.model import loading as models
from prep.preprocess.model.forward import text_forward
from prep.preprocess.model.network import Network, weight_record
from prep.preprocess.model.sites import find_sites, target_layers
from prep.preprocess.numerics.accumulators import moment_kind, moments_of
from prep.store import MomentWriter, begin_moments, create_store
from prep.store.checkpoint import finish
from prep.store.format.schema import panels


class Bench:
    """The model, the batches, and what the stages leave for each other."""

    def __init__(self, options: argparse.Namespace):
        corpus_options = CorpusOptions(
            options.data,
            template=options.template,
            num_sequences=options.num_sequences,
            seq_len=options.seq_len,
        )
        self.options = options
        self.corpus = load_corpus(corpus_options, models.load_tokenizer(options.model))
        self.net = models.load_model(options.model, dtype="float32")
        self.layers = target_layers(self.net, layers=options.layers)
        self.forward = text_forward(self.net, self.layers)
        example = next(iter(self.corpus.batches(1)))
        self.sites, _ = find_sites(self.layers, lambda: self.forward({k: v[:, :32] for k, v in example.items()}))
        self.moments: dict[str, dict[str, Any]] = {}
        self.covariances: dict[str, Tensor] = {}
        self.folder = Path(tempfile.mkdtemp())

    def batches(self):
        return self.corpus.batches(self.options.batch_size)

    def run_forward(self) -> None:
        with torch.no_grad():
            for batch in self.batches():
                self.forward(batch)

    def run_prep(self, moment: str) -> None:
        kinds = {site.name: moment_kind(moment, site.shapes) for site in self.sites}
        part = Part(Network(self.net, self.layers, tuple(self.sites), kinds, {}, self.forward, {}), self.sites)
        with part.hooked():
            for number, batch in enumerate(self.batches()):
                part.add(Batch(number, batch, {}))
        self.moments[moment] = {
            site.name: moments_of(
                site.name,
                part.sums[site.name].data(),
                {name: weight_record(name, self.layers[name]) for name in site.members},
            )
            for site in self.sites
        }

    def peft_config(self) -> Any:
        from peft import LoraConfig
        from peft.tuners.lora.config import CordaConfig

        corda = CordaConfig(corda_method="ipm", prune_temporary_fields=False)
        config = LoraConfig(r=self.options.rank, target_modules=list(self.layers), corda_config=corda)
        return config

    def run_peft_covariance(self) -> None:
        from peft.tuners.lora.corda import calib_cov_distribution

        def run_model() -> None:
            for sequence in self.corpus.batches(1):  # one at a time, as its hook wants them
                self.net(**sequence)

        with torch.no_grad():
            calib_cov_distribution(self.net, self.peft_config(), run_model, None, None)

    def run_peft_eigens(self) -> None:
        from peft.tuners.lora.corda import collect_eigens

        for module in self.layers.values():
            module.rank, module.corda_method = self.options.rank, "ipm"
        collect_eigens(self.net, self.peft_config(), verbose=False)

    def run_published_pass(self) -> None:
        self.covariances = {name: torch.zeros(m.in_features, m.in_features) for name, m in self.layers.items()}
        count = sum(len(sequence) for sequence in self.corpus.sequences)

        def add(name: str) -> Callable:
            def hook(_module: nn.Module, args: tuple, _output: Tensor) -> None:
                x = args[0].reshape(-1, args[0].shape[-1]).float()
                self.covariances[name] += (x.T @ x).cpu()

            return hook

        handles = [module.register_forward_hook(add(name)) for name, module in self.layers.items()]
        self.run_forward()
        for handle in handles:
            handle.remove()
        for C in self.covariances.values():
            C /= count

    def run_published_svd(self) -> None:
        for name, module in self.layers.items():
            C, W = self.covariances[name], weight_matrix(module)
            C = C + 1e-3 * C.diagonal().mean() * torch.eye(len(C))
            values, vectors = torch.linalg.eigh(C)
            root = (vectors * values.clamp(min=1e-12).sqrt()) @ vectors.T
            inverse = (vectors * values.clamp(min=1e-12).rsqrt()) @ vectors.T
            U, S, Vt = torch.linalg.svd(W @ root, full_matrices=False)
            r = self.options.rank
            module.published = (U[:, :r], S[:r], Vt[:r] @ inverse)

    def store_of(self, moment: str) -> str:
        """A store with the moments, written once outside the timing."""
        path = self.folder / f"{moment}.zarr"
        if not path.exists():
            described = models.describe(self.net, self.options.model, None)
            attrs = {"id": moment, "model": described, "corpus": {}, "options": {}, "status": "complete"}
            root, sites = create_store(path, attrs).root, self.moments[moment]
            shapes = {
                site: {name: tuple(one["shape"]) for name, one in data.members.items()} for site, data in sites.items()
            }
            begin_moments(root, shapes, {site: data.kind for site, data in sites.items()}, {})
            writer = MomentWriter(root, "float64")
            for site, data in sites.items():
                writer.note(writer.put(site, data))
            writer.flush()
            finish(root, {})
        return str(path)

    def run_decompose(self, moment: str, solver: str) -> None:
        options = {"rank": self.options.rank, "solver": solver, "name": f"{moment}-{solver}"}
        decompose(self.store_of(moment), **options, model=self.net, overwrite=True, quiet=True)

    def stages(self) -> dict[str, Callable[[], None]]:
        """Name -> what is timed, in an order in which each finds what it needs."""
        return {
            "forward": self.run_forward,
            "prep full": lambda: self.run_prep("full"),
            "prep auto": lambda: self.run_prep("auto"),
            "peft covariance": self.run_peft_covariance,
            "published pass": self.run_published_pass,
            "peft eigens": self.run_peft_eigens,
            "published svd": self.run_published_svd,
            "decompose full exact": lambda: self.run_decompose("full", "exact"),
            "decompose auto exact": lambda: self.run_decompose("auto", "exact"),
            "decompose full randomized": lambda: self.run_decompose("full", "randomized"),
            "decompose auto randomized": lambda: self.run_decompose("auto", "randomized"),
        }

    def check(self) -> None:
        """The moments agree with the published form's, and the decompositions have its singular values."""
        for site in self.sites:
            d = site.d_in
            C = torch.zeros(d, d, dtype=torch.float64)
            for (a, b), panel in zip(panels(d), self.moments["full"][site.name].second_moment, strict=True):
                C[a:b, :b] = panel
                C[:a, a:b] = panel[:, :a].T
            error = (C - self.covariances[site.name]).norm() / C.norm()
            assert error < 1e-5, f"{site.name}: the second moments differ by {error:.1e}"
        exact = prep.open_store(self.store_of("full")).bases["full-exact"]
        for name, module in self.layers.items():
            S = module.published[1].double()
            error = (exact[name].S[: len(S)] - S).abs().max() / S[0]
            assert error < 1e-3, f"{name}: the singular values differ by {error:.1e}"


NEEDS = {
    "peft eigens": ["peft covariance"],
    "published svd": ["published pass"],
    "decompose full exact": ["prep full"],
    "decompose full randomized": ["prep full"],
    "decompose auto exact": ["prep auto"],
    "decompose auto randomized": ["prep auto"],
}


def main() -> None:
    """Time all stages, or in a child process (--stage) the memory of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--template")
    parser.add_argument("--num-sequences", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--layers", help="blocks, such as 0-3: a shorter run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="leave out the child processes")
    parser.add_argument("--passes", action="store_true", help="only the forward and our passes over it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    bench = Bench(options)
    stages = bench.stages()
    if options.passes:
        stages = {name: stage for name, stage in stages.items() if name.startswith(("forward", "prep"))}
    if options.stage:
        for needed in NEEDS.get(options.stage, []):
            stages[needed]()
        before = rss()
        forget_peak()
        stages[options.stage]()
        print(json.dumps({"peak": peak_memory() - before}))
        return

    samples: dict[str, list[Sample]] = {name: [] for name in stages}
    for number in range(options.rounds):
        for name, stage in stages.items():
            samples[name].append(timed(stage))
            print(f"round {number + 1}: {name}: {samples[name][-1].seconds:.1f} s", file=sys.stderr, flush=True)
    if not options.passes:
        bench.check()
    seconds = {name: statistics.median(kept(found)) for name, found in samples.items()}
    dropped = {name: sum(sample.other > LIMIT for sample in found) for name, found in samples.items()}
    memory = {name: 0 if options.no_memory else child_peak(name) for name in stages}
    report = {"seconds": seconds, "dropped": dropped, "rounds": options.rounds, "peak_bytes": memory}
    report |= {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "blas": [f"{found['internal_api']} {found.get('architecture', '')}" for found in threadpool_info()],
        "options": vars(options) | {"json": None},
    }
    for line in table(report):
        print(line)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def child_peak(stage: str) -> int:
    """Peak memory of one stage above the loaded model, in a process of its own."""
    done = subprocess.run([*[sys.executable, *sys.argv], "--stage", stage], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def table(report: dict[str, Any]) -> list[str]:
    """Seconds, ratio to what each stage is compared with, peak memory."""
    seconds = report["seconds"]
    lines = [f"{'stage':28}{'seconds':>9}{'ratio':>8}  {'compared with':18}{'peak MB':>9}{'dropped':>9}"]
    for name, value in seconds.items():
        against = "forward" if seconds_of_pass(name) else "peft eigens"
        ratio = value / seconds["forward"] if seconds_of_pass(name) else seconds["peft eigens"] / value
        peak, drop = report["peak_bytes"][name] / 1e6, f"{report['dropped'][name]}/{report['rounds']}"
        lines.append(f"{name:28}{value:9.2f}{ratio:8.2f}  {against:18}{peak:9.0f}{drop:>9}")
    libraries = f"torch {report['torch']}, {report['threads']} threads, {', '.join(report['blas'])}"
    return [*lines, f"{libraries}, OMP_WAIT_POLICY {report['wait_policy']}"]


def seconds_of_pass(name: str) -> bool:
    """Whether a stage streams the corpus, so that the forward is its floor."""
    return name.startswith(("forward", "prep", "peft covariance", "published pass"))


if __name__ == "__main__":
    main()
