"""`prep decompose --dry-run`: what a decomposition will read, hold and store, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..memory import peak_memory
from ..model.checkpoint import checkpoint_of
from .job import jobs_of, moments_of
from .request import Request, load_layers
from .target import Target
from .weights import weigher
from .workers import crew

_SOURCES = {
    "checkpoint": "layer by layer from the checkpoint",
    "model": "with the whole model, which was loaded",
    "module": "the module is in memory",
}


@dataclass(frozen=True)
class Estimate:
    """What a decomposition takes: counts and bytes.

    bases: the names of those to be made or resumed; layers: how many are left to do, of `total`; source: "checkpoint"
    where weights are read layer by layer, "model" where it is loaded whole, "module" where it was given; read: of it;
    memory: peak of the process, at most, with so many `workers`; disk: of what is left to store.
    """

    bases: tuple[str, ...]
    layers: int
    total: int
    source: str
    read: int
    workers: int
    memory: int
    disk: int


def estimate(requests: Sequence[Request], quiet: bool) -> Estimate:
    """What is left to do for the requests. Nothing is stored, and no weight read where that is done layer by layer."""
    if not requests:
        return Estimate((), 0, 0, "module", 0, 0, peak_memory(), 0)
    net, modules = load_layers(requests, quiet)
    weigh = weigher(requests[0])
    targets = {request.name: Target(request, net, modules, weigh) for request in requests}
    todo = {name: target.left() for name, target in targets.items()}
    jobs = jobs_of(targets, todo, weigh)
    team = crew(moments_of(targets), modules, jobs)
    source, read = _source(requests[0], net, {layer: modules[layer] for layer in jobs.wanted})
    return Estimate(
        bases=tuple(name for name, layers in todo.items() if layers),
        layers=len(jobs.wanted),
        total=len(modules),
        source=source,
        read=read,
        workers=team.workers,
        memory=peak_memory() + team.memory,
        disk=sum(targets[name].bytes_of(layers) for name, layers in todo.items()),
    )


def _source(request: Request, net: nn.Module, layers: dict[str, nn.Module]) -> tuple[str, int]:
    """Where the weights of layers come from, and the bytes that are read for them."""
    if request.model_id is None:
        return "module", 0
    checkpoint = checkpoint_of(net)
    if checkpoint is None:
        return "model", sum(parameter.nbytes for parameter in net.parameters())
    return "checkpoint", checkpoint.bytes_of(layers)


def lines(needed: Estimate, store: str | Path) -> list[str]:
    """What `--dry-run` prints."""
    if not needed.layers:
        return [f"{store}: nothing is left to do"]
    threads = f"{needed.workers} worker{'s' if needed.workers > 1 else ''}"
    rows = [
        ("bases", ", ".join(needed.bases)),
        ("layers", f"{needed.layers:,} of {needed.total:,}"),
        ("read", f"{needed.read / 1e9:.2f} GB, {_SOURCES[needed.source]}"),
        ("memory", f"up to {needed.memory / 1e9:.2f} GB with {threads}"),
        ("disk", f"{needed.disk / 1e9:.2f} GB"),
    ]
    return [f"{name:8} {value}" for name, value in rows]
