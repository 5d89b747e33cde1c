"""The layers of a model through whitening.py on worker threads with one BLAS thread each, most expensive first.

One thread per layer beats many threads per matrix at these sizes; a site's second moment is read once for its layers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from ...errors import PrepError
from ...linear import dtype_name, layer_shape
from ...store import Moments
from ..memory import free_memory
from ..model.quantised import Copy
from ..numerics.evaluation import output_energy, own_energy
from ..numerics.methods import Method, check
from ..numerics.metric import InputStatistics
from ..numerics.whitening import WhitenedSVD, whitened_svd
from .crossing import Parts, cross, noted, of_error, parts_of, statistics_of
from .weights import Weigh, weighed


@dataclass(frozen=True)
class Jobs:
    """What is to be done. methods: by the name of their basis; wanted: layer -> names of the bases it is decomposed
    for; scored: names of the bases whose directions are scored, which the moments of all layers allow; crossed: name ->
    layers that are cross-fitted, whose moments have a half. weigh: reads and checks a weight. repair: the copy Q whose
    error W - Q is decomposed in place of W.
    """

    methods: Mapping[str, Method]
    wanted: Mapping[str, Sequence[str]]
    scored: Collection[str]
    crossed: Mapping[str, Collection[str]]
    weigh: Weigh = weighed
    repair: Copy | None = None

    def sampled(self, layers: Iterable[str]) -> bool:
        """Whether any basis of the layers is made with the sample of their tokens."""
        return any(self.methods[name].pooling != "rms" for layer in layers for name in self.wanted[layer])

    def crosses(self, layer: str) -> bool:
        """Whether a layer is cross-fitted for any basis."""
        return any(layer in self.crossed.get(name, ()) for name in self.wanted[layer])


@dataclass(frozen=True)
class Decomposed:
    """A layer, with the hash and dtype of its weight.

    crossed: its errors between the parts of its tokens, if looked at. shares: `kept` and `unseen` of its directions
    (r,), as far as they were looked at. repaired: what is known of the copy whose error was decomposed in place of W.
    """

    layer: str
    weight_hash: str
    weight_dtype: str
    result: WhitenedSVD
    crossed: dict[str, Any] | None
    shares: dict[str, np.ndarray]
    repaired: dict[str, Any] | None


def decomposed(
    moments: Moments | None, modules: Mapping[str, nn.Module], jobs: Jobs, processes: int = 1
) -> Iterator[tuple[str, Decomposed]]:
    """(name of the basis, layer) as they are done; at most two sites per worker are held in memory.

    moments: of the layers' inputs, None where nothing needs them. processes: how many share the machine's cores.
    PrepError names the layer that failed.
    """
    team = crew(moments, modules, jobs, processes)
    queue = iter(team.sites)
    running: set[Future] = set()
    with threadpool_limits(team.threads), ThreadPoolExecutor(team.workers) as pool:
        try:
            while True:
                while len(running) < 2 * team.workers and (site := next(queue, None)) is not None:
                    running.add(pool.submit(_decompose_site, moments, site, modules, jobs))
                if not running:
                    return
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield from future.result()
        finally:
            for future in running:
                future.cancel()


@dataclass(frozen=True)
class Crew:
    """How the work is done. sites: groups of layers, in order; threads: of a worker; memory: bytes, at most, of all."""

    sites: list[list[str]]
    workers: int
    threads: int
    memory: int


def crew(moments: Moments | None, modules: Mapping[str, nn.Module], jobs: Jobs, processes: int = 1) -> Crew:
    """As many workers as there are cores, sites, and room for the sites that take most memory."""
    sites = _by_site(moments, modules, jobs.wanted)
    sizes = sorted((_memory(moments, site, modules, jobs) for site in sites), reverse=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // processes)
    room = free_memory() // processes // max(sizes, default=1)
    workers = max(1, min(cores, len(sites), room))
    return Crew(sites, workers, max(1, cores // workers), sum(sizes[:workers]))


def _by_site(
    moments: Moments | None, modules: Mapping[str, nn.Module], wanted: Mapping[str, Sequence[str]]
) -> list[list[str]]:
    """Layers grouped by the moment they share, the most expensive first, so that the threads end together."""
    if moments is None:
        groups = [[layer] for layer in wanted]
    else:
        groups = [[layer for layer in site if layer in wanted] for site in moments.sites.values()]

    def work(layers: list[str]) -> int:
        return sum(cost(layer_shape(modules[layer])) * len(wanted[layer]) for layer in layers)

    return sorted((group for group in groups if group), key=work, reverse=True)


def _memory(moments: Moments | None, layers: list[str], modules: Mapping[str, nn.Module], jobs: Jobs) -> int:
    """Bytes that a worker takes for a site: its moment and a copy, of the largest layer W, P and their products, and
    the bases of all layers beyond the first of each. Layers that are cross-fitted take the moments of two parts, too.
    """
    shapes = [layer_shape(modules[layer]) for layer in layers]
    d_in, full = shapes[0][1], moments is not None and moments[layers[0]].kind == "full"
    copies = 4 if any(map(jobs.crosses, layers)) else 2
    work = copies * full * d_in * d_in + max(4 * d_out * d_in + 4 * min(d_out, d_in) ** 2 for d_out, _ in shapes)
    more = sum(
        min(jobs.methods[name].rank, *shape) * sum(shape)
        for layer, shape in zip(layers, shapes, strict=True)
        for name in jobs.wanted[layer][1:]
    )
    tokens = moments[layers[0]].sampled * d_in // 2 if moments is not None and jobs.sampled(layers) else 0
    return 8 * (work + more + tokens)


def cost(shape: tuple[int, int]) -> int:
    """Predicted work of a layer (d_out, d_in): the product with its second moment, and the eigenvectors."""
    d_out, d_in = shape
    return d_in * d_in * d_out + min(shape) ** 3 * 10


def _decompose_site(
    moments: Moments | None, layers: list[str], modules: Mapping[str, nn.Module], jobs: Jobs
) -> list[tuple[str, Decomposed]]:
    """All bases of all layers of one site, the second moment read once, when it is first needed."""
    shared: InputStatistics | None = None
    parts: Parts | None = None
    results = []
    for layer in layers:
        if shared is not None and shared.kind == "output":  # of one layer only
            shared = parts = None
        weight = jobs.weigh(layer, modules[layer])
        known, dtype = weight.hash, dtype_name(weight.W.dtype)
        dense, repaired = matrix_of(layer, weight.W, jobs.repair)
        del weight  # the largest arrays are not kept twice
        total: Callable[[], float] | None = None
        for name in jobs.wanted[layer]:
            method, said, shares = jobs.methods[name], None, {}
            crosses = layer in jobs.crossed.get(name, ())
            needed = moments is not None and check(None, method) is not None
            if shared is None and (needed or crosses or name in jobs.scored):
                shared = statistics_of(moments[layer], jobs.sampled(layers))  # type: ignore[index]
                shared = shared if jobs.repair is None else of_error(shared)
            try:
                result = whitened_svd(dense, shared if needed else None, method)
                if shared is not None and (crosses or name in jobs.scored):
                    total = total or cache(partial(output_energy, dense, shared))
                    energy = own_energy(dense, result, shared, method, total)
                    shares["kept"] = energy.shares
                    if crosses:
                        parts = parts or parts_of(moments[layer], shared)  # type: ignore[index]
                        found = cross(dense, parts, method)
                        said, shares["unseen"] = noted(found, energy), found.kept
            except PrepError as error:
                raise PrepError(f"{layer}: {error}") from error
            results.append((name, Decomposed(layer, known, dtype, result, said, shares, repaired)))
    return results


def matrix_of(layer: str, W: Tensor, repair: Copy | None) -> tuple[np.ndarray, dict[str, Any] | None]:
    """What is decomposed, float64: W (d_out, d_in), or the error W - Q of a copy with what its record says of Q."""
    return (W.to("cpu", torch.float64).numpy(), None) if repair is None else repair.error(layer, W)
