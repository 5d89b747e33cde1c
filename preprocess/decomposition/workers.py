"""The layers of a model through whitening.py on worker threads with one BLAS thread each, most expensive first.

One thread per layer beats many threads per matrix at these sizes; a site's second moment is read once for its layers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from ...errors import PrepError
from ...linear import layer_shape, weight_matrix
from ...store import LayerMoment, Moments
from ..memory import free_memory
from ..numerics.methods import Method, check
from ..numerics.whitening import InputStatistics, WhitenedSVD, whitened_svd


def decomposed(
    moments: Moments | None,
    modules: Mapping[str, nn.Module],
    methods: Mapping[str, Method],
    wanted: Mapping[str, Sequence[str]],
    processes: int = 1,
) -> Iterator[tuple[str, str, Tensor, WhitenedSVD]]:
    """(name, layer, W (d_out, d_in), result) as they are done; at most two sites per worker are held in memory.

    moments: of the layers' inputs, None where no method needs them. methods: by the name of their basis; wanted: layer
    -> names of the bases that it is decomposed for. processes: how many share the machine's cores. PrepError names the
    layer that failed.
    """
    sites = _by_site(moments, modules, wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // processes)
    room = (
        free_memory()
        // processes
        // max((_memory(moments, site, modules, methods, wanted) for site in sites), default=1)
    )
    workers = max(1, min(cores, len(sites), room))
    queue = iter(sites)
    running: set[Future] = set()
    with threadpool_limits(max(1, cores // workers)), ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                while len(running) < 2 * workers and (site := next(queue, None)) is not None:
                    running.add(pool.submit(_decompose_site, moments, site, modules, methods, wanted))
                if not running:
                    return
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield from future.result()
        finally:
            for future in running:
                future.cancel()


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


def _memory(
    moments: Moments | None,
    layers: list[str],
    modules: Mapping[str, nn.Module],
    methods: Mapping[str, Method],
    wanted: Mapping[str, Sequence[str]],
) -> int:
    """Bytes that a worker takes for a site: its moment and a copy, of the largest layer W, P and their products, and
    the bases of all layers beyond the first of each.
    """
    shapes = [layer_shape(modules[layer]) for layer in layers]
    d_in, full = shapes[0][1], moments is not None and moments[layers[0]].kind == "full"
    work = 2 * full * d_in * d_in + max(4 * d_out * d_in + 4 * min(d_out, d_in) ** 2 for d_out, _ in shapes)
    more = sum(
        min(methods[name].rank, *shape) * sum(shape)
        for layer, shape in zip(layers, shapes, strict=True)
        for name in wanted[layer][1:]
    )
    return 8 * (work + more)


def cost(shape: tuple[int, int]) -> int:
    """Predicted work of a layer (d_out, d_in): the product with its second moment, and the eigenvectors."""
    d_out, d_in = shape
    return d_in * d_in * d_out + min(shape) ** 3 * 10


def _decompose_site(
    moments: Moments | None,
    layers: list[str],
    modules: Mapping[str, nn.Module],
    methods: Mapping[str, Method],
    wanted: Mapping[str, Sequence[str]],
) -> list[tuple[str, str, Tensor, WhitenedSVD]]:
    """All bases of all layers of one site, the second moment read once, when it is first needed."""
    shared: InputStatistics | None = None
    results = []
    for layer in layers:
        if shared is not None and shared.kind == "output":  # of one layer only
            shared = None
        W = weight_matrix(modules[layer])
        dense = W.to("cpu", torch.float64).numpy()
        for name in wanted[layer]:
            method = methods[name]
            needed = moments is not None and check(None, method) is not None
            if needed and shared is None:
                shared = _moment(moments[layer])  # type: ignore[index]
            try:
                results.append((name, layer, W, whitened_svd(dense, shared if needed else None, method)))
            except PrepError as error:
                raise PrepError(f"{layer}: {error}") from error
    return results


def _moment(stored: LayerMoment) -> InputStatistics:
    def array(x: Tensor) -> np.ndarray:
        return x.to(torch.float64).numpy()

    return InputStatistics(
        kind=stored.kind,
        second_moment=array(stored.second_moment) if stored.kind == "full" else None,
        diagonal=array(stored.diagonal) if stored.kind != "full" else None,
        output=array(stored.output) if stored.kind == "output" else None,
        mean=array(stored.mean),
    )
