"""`prep covariance --until 2%`: twice as many sequences, until bases of them are near enough to the best ones.

How near is the median excess of the whitened basis over `SAMPLE` layers of each kind, from the two parts of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from ...errors import PrepError
from ...store import Store, open_store
from ...store.excess import median_excess, percent
from ...store.staging import occupied
from ..decomposition.crossing import to_cross
from ..decomposition.workers import Jobs, decomposed
from ..distributed import World
from ..model.experts import expert_layers
from ..numerics.methods import Method
from ..options import CovarianceOptions
from ..progress import say

SAMPLE = 3  # layers of each kind
BATCHES = 2  # of the first stage: as many as have two parts


def first_size(options: CovarianceOptions) -> int:
    """The sequences to begin with: those that the store has or was begun with, two batches where there is none."""
    known = None
    if not options.overwrite and occupied(options.store):
        known = (open_store(options.store).corpus or {}).get("num_sequences")
    return min(known or BATCHES * options.batch_size, options.num_sequences)


def grown(
    options: CovarianceOptions, world: World, load: Callable[[], nn.Module], calibrate: Callable[..., Store | None]
) -> Store | None:
    """Calibrate on twice as many sequences until the excess is below the target or `num_sequences` are in.

    calibrate: (options, module) -> the store on the first process.
    """
    module, size = load(), world.on_rank_zero(first_size, options)
    stage = replace(options, until=None, rank=None)
    while True:
        store = calibrate(replace(stage, num_sequences=size), module)
        excess = world.on_rank_zero(_excess, options, module)
        enough, all_in = excess < options.share, size >= options.num_sequences
        if world.rank == 0:
            lose = f"{size} sequences: rank-{options.at_rank} bases lose {percent(excess)} more output than they need"
            target = f"--until {percent(options.share)}"
            end = f"{target} is reached" if enough else f"all are in before {target}" if all_in else "twice as many"
            say(f"{lose}: {end}", options.quiet)
        if enough or all_in:
            return store
        # what was asked to be replaced has been
        stage, size = replace(stage, overwrite=False), min(2 * size, options.num_sequences)


def _excess(options: CovarianceOptions, module: nn.Module) -> float:
    """The median excess of the store's whitened basis, of which nothing is stored."""
    moments = open_store(Path(options.store)).moments
    layers = {layer: moments[layer] for layer in moments}
    method = Method(rank=options.at_rank)
    chosen = to_cross(layers, method, SAMPLE)
    modules = {**dict(module.named_modules()), **expert_layers(module)}
    jobs = Jobs({"": method}, {layer: [""] for layer in moments if layer in chosen}, (), {"": chosen})
    found = [done.crossed for _, done in decomposed(moments, modules, jobs)]
    value = median_excess([crossed for crossed in found if crossed], options.at_rank)
    if value is None:
        raise PrepError(
            f"{options.store} does not tell the excess at rank {options.at_rank}: --until needs two batches or more, "
            "with their halves, and a --rank below that of the layers"
        )
    return value
