"""The layers of a model through whitening.py on worker threads with one BLAS thread each, most expensive first.

One thread per layer beats many threads per matrix at these sizes; a site's second moment is read once for its layers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from ...errors import PrepError
from ...linear import layer_shape, weight_matrix
from ...store import LayerMoment, Moments
from ..memory import free_memory
from ..numerics.methods import Method
from ..numerics.whitening import InputStatistics, WhitenedSVD, whitened_svd


def decomposed(
    moments: Moments | None, modules: Mapping[str, nn.Module], method: Method, processes: int = 1
) -> Iterator[tuple[str, Tensor, WhitenedSVD]]:
    """(layer, W (d_out, d_in), result) as they are done; at most two sites per worker are held in memory.

    moments: of the layers' inputs, None where the method needs none. processes: how many share the machine's cores.
    PrepError names the layer that failed.
    """
    sites = _by_site(moments, modules)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // processes)
    room = free_memory() // processes // max((_memory(moments, site, modules) for site in sites), default=1)
    workers = max(1, min(cores, len(sites), room))
    queue = iter(sites)
    running: set[Future] = set()
    with threadpool_limits(max(1, cores // workers)), ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                while len(running) < 2 * workers and (site := next(queue, None)) is not None:
                    running.add(pool.submit(_decompose_site, moments, site, modules, method))
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


def _memory(moments: Moments | None, layers: list[str], modules: Mapping[str, nn.Module]) -> int:
    """Bytes that a worker takes for a site: its moment and a copy, and of the largest layer W, P and their products."""
    shapes = [layer_shape(modules[layer]) for layer in layers]
    d_in, full = shapes[0][1], moments is not None and moments[layers[0]].kind == "full"
    return 8 * (2 * full * d_in * d_in + max(4 * d_out * d_in + 4 * min(d_out, d_in) ** 2 for d_out, _ in shapes))


def cost(shape: tuple[int, int]) -> int:
    """Predicted work of a layer (d_out, d_in): the product with its second moment, and the eigenvectors."""
    d_out, d_in = shape
    return d_in * d_in * d_out + min(shape) ** 3 * 10


def _decompose_site(
    moments: Moments | None, layers: list[str], modules: Mapping[str, nn.Module], method: Method
) -> list[tuple[str, Tensor, WhitenedSVD]]:
    """All layers of one site, the second moment read once."""
    shared: InputStatistics | None = None
    results = []
    for layer in layers:
        stored = moments[layer] if moments is not None else None
        if stored is not None and (shared is None or stored.kind == "output"):
            shared = statistics_of(stored)
        W = weight_matrix(modules[layer])
        try:
            results.append((layer, W, whitened_svd(W.to("cpu", torch.float64).numpy(), shared, method)))
        except PrepError as error:
            raise PrepError(f"{layer}: {error}") from error
    return results


def statistics_of(stored: LayerMoment) -> InputStatistics:
    """A stored moment as float64 arrays."""

    def array(x: Tensor) -> np.ndarray:
        return x.to(torch.float64).numpy()

    return InputStatistics(
        kind=stored.kind,
        second_moment=array(stored.second_moment) if stored.kind == "full" else None,
        diagonal=array(stored.diagonal) if stored.kind != "full" else None,
        output=array(stored.output) if stored.kind == "output" else None,
        mean=array(stored.mean),
    )
