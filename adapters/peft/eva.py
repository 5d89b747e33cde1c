"""EVA (arXiv 2410.07170): the LoRA A of a layer is the leading eigenvectors of its centred second moment, B is 0.

The ranks are redistributed over the layers as PEFT does it: of all explained variance ratios `S_i^2 / sum S^2`, at most
`rho r` per layer, the `sum r` largest are kept, and a layer's rank is the number of its own among them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import PrepError
from ...store import BasisSet, Store


def components(
    store: Store, bases: BasisSet, ranks: Mapping[str, int], rho: float = 2.0, whiten: bool = False
) -> dict[str, Tensor]:
    """The rows of A (rank, d_in) of every layer in `ranks`, redistributed from the ranks given there.

    rho 1 redistributes nothing. whiten divides each row by the square root of its singular value, `S_i sqrt(count)`.
    A layer may come out with no row. PrepError where fewer components are stored than `rho r`.
    """
    limits = _limits(store, ranks, rho)
    for layer, limit in limits.items():
        record = bases.layers[layer]
        if record.rank < min(limit, *record.shape):
            raise PrepError(
                f"rank {ranks[layer]} with rho {rho:g} takes {limit} components, basis {bases.name!r} holds "
                f"{record.rank} of {layer}: {bases.command(limit)}, or a smaller rho"
            )
    read = bases.read(ranks, max(limits.values()))
    ratios = {layer: read[layer].spectrum ** 2 / (read[layer].spectrum ** 2).sum() for layer in ranks}
    shares = {layer: ratios[layer][: min(limits[layer], len(read[layer].P))] for layer in ranks}
    kept = redistribute(shares, sum(ranks.values()))
    rows = {layer: read[layer].P[: kept[layer]] for layer in ranks}
    if whiten:
        for layer, row in rows.items():
            if len(row) and not float(read[layer].S[len(row) - 1]) > 0:
                raise PrepError(
                    f"the input of {layer} varies in fewer than {len(row)} directions, and whitening divides by their "
                    "deviation: lower r, or leave out whiten"
                )
        counts = {layer: store.moments[layer].count for layer in ranks}
        rows = {
            layer: (row.double() / (read[layer].S[: len(row), None] * counts[layer] ** 0.5).sqrt()).to(row.dtype)
            for layer, row in rows.items()
        }
    return {layer: row.contiguous() for layer, row in rows.items()}


def redistribute(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many of the `budget` largest shares, over all layers, each layer has. Of equal ones the first layer's win."""
    owners = [layer for layer, share in shares.items() for _ in share]
    order = torch.argsort(torch.cat(list(shares.values())), descending=True, stable=True)[:budget]
    counts = dict.fromkeys(shares, 0)
    for index in order.tolist():
        counts[owners[index]] += 1
    return counts


def _limits(store: Store, ranks: Mapping[str, int], rho: float) -> dict[str, int]:
    """The most components a layer may get: `rho r`, the largest of those that read the same input."""
    limits = {layer: round(rank * rho) for layer, rank in ranks.items()}
    for members in store.moments.sites.values():
        here = [layer for layer in members if layer in limits]
        limits |= dict.fromkeys(here, max((limits[layer] for layer in here), default=0))
    return limits
