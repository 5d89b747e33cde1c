"""The layers of a model through whitening.py on worker threads with one BLAS thread each, most expensive first.

One thread per layer beats many threads per matrix at these sizes; a site's second moment is read once for its layers.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from ...errors import PrepError
from ...linear import layer_shape, weight_matrix
from ...store import Moments
from ..memory import free_memory
from ..numerics.methods import Method
from ..numerics.metric import InputStatistics
from ..numerics.whitening import WhitenedSVD, whitened_svd
from .crossing import Parts, noted, parts_of, statistics_of


@dataclass(frozen=True)
class Decomposed:
    """A layer with its weight W (d_out, d_in). crossed: its errors between the parts of its tokens, if looked at."""

    layer: str
    W: Tensor
    result: WhitenedSVD
    crossed: dict[str, Any] | None


def decomposed(
    moments: Moments | None,
    modules: Mapping[str, nn.Module],
    method: Method,
    processes: int = 1,
    crossed: Collection[str] = (),
) -> Iterator[Decomposed]:
    """The layers as they are done; at most two sites per worker are held in memory.

    moments: of the layers' inputs, None where the method needs none. processes: how many share the machine's cores.
    crossed: the layers to be cross-fitted, whose moments have a half. PrepError names the layer that failed.
    """
    sites = _by_site(moments, modules)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // processes)
    needed = max((_memory(moments, site, modules, crossed) for site in sites), default=1)
    room = free_memory() // processes // needed
    workers = max(1, min(cores, len(sites), room))
    queue = iter(sites)
    running: set[Future] = set()
    with threadpool_limits(max(1, cores // workers)), ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                while len(running) < 2 * workers and (site := next(queue, None)) is not None:
                    running.add(pool.submit(_decompose_site, moments, site, modules, method, crossed))
                if not running:
                    return
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield from future.result()
        finally:
            for future in running:
                future.cancel()


def _by_site(moments: Moments | None, modules: Mapping[str, nn.Module]) -> list[list[str]]:
    """Layers grouped by the moment they share, the most expensive first, so that the threads end together."""
    if moments is None:
        groups = [[layer] for layer in modules]
    else:
        groups = [[layer for layer in site if layer in modules] for site in moments.sites.values()]

    def work(layers: list[str]) -> int:
        return sum(cost(layer_shape(modules[layer])) for layer in layers)

    return sorted((group for group in groups if group), key=work, reverse=True)


def _memory(
    moments: Moments | None, layers: list[str], modules: Mapping[str, nn.Module], crossed: Collection[str]
) -> int:
    """Bytes that a worker takes for a site: its moment and a copy, and of the largest layer W, P and their products.

    Layers that are cross-fitted take the moments of two parts besides.
    """
    shapes = [layer_shape(modules[layer]) for layer in layers]
    d_in, full = shapes[0][1], moments is not None and moments[layers[0]].kind == "full"
    copies = 4 if any(layer in crossed for layer in layers) else 2
    return 8 * (copies * full * d_in * d_in + max(4 * d_out * d_in + 4 * min(d_out, d_in) ** 2 for d_out, _ in shapes))


def cost(shape: tuple[int, int]) -> int:
    """Predicted work of a layer (d_out, d_in): the product with its second moment, and the eigenvectors."""
    d_out, d_in = shape
    return d_in * d_in * d_out + min(shape) ** 3 * 10


def _decompose_site(
    moments: Moments | None,
    layers: list[str],
    modules: Mapping[str, nn.Module],
    method: Method,
    crossed: Collection[str],
) -> list[Decomposed]:
    """All layers of one site, the second moment read once."""
    shared: InputStatistics | None = None
    parts: Parts | None = None
    results = []
    for layer in layers:
        stored = moments[layer] if moments is not None else None
        if stored is not None and (shared is None or stored.kind == "output"):
            shared, parts = statistics_of(stored), None
        W = weight_matrix(modules[layer])
        try:
            matrix = W.to("cpu", torch.float64).numpy()
            result, said = whitened_svd(matrix, shared, method), None
            if layer in crossed and stored is not None and shared is not None:
                parts = parts or parts_of(stored, shared)
                said = noted(matrix, result, parts, method)
        except PrepError as error:
            raise PrepError(f"{layer}: {error}") from error
        results.append(Decomposed(layer, W, result, said))
    return results
