"""`prep covariance --dry-run`: what a calibration will take, from its plan and one batch of every pass.

Memory and disk follow from the plan and from a full batch; time is that of loading, of a warm batch of each pass times
the number of batches, and of one site's write times the size of the store.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import zarr
from torch import Tensor
from zarr.storage import MemoryStore

from ...precision import exact
from ...store.site_group import write_site
from ..corpus.source import Text
from ..distributed import ALONE
from ..memory import peak_device_memory, peak_memory
from ..model.forward import Inputs, evaluating
from ..model.network import Network
from ..model.sites import Site
from ..model.stack import Stack
from ..numerics.accumulators import mapped, moments_of, site_elements
from ..options import CovarianceOptions
from ..progress import say
from .blocks import hidden_bytes, scratch_bytes
from .devices import Placed, place_sums
from .part import Batch, Part
from .plan import Plan, make_plan, tokens_kept


@dataclass(frozen=True)
class Estimate:
    """What a calibration takes: counts, bytes and seconds.

    tokens: that are read; first: sequences before them, whose moments a smaller store has. memory: peak of the process;
    device_memory: peak of one GPU, 0 where the sums are on the host; accumulators: the moments and tokens under way on
    either; disk: of the finished store; checkpoint: what an unfinished run takes beside it. blocks: of a model that is
    loaded block by block, 0 for others; hidden: what all batches leave between two blocks, in memory, or in files that
    take `scratch` while it runs.
    """

    layers: int
    sites: int
    tokens: int
    first: int
    passes: int
    accumulators: int
    memory: int
    device_memory: int
    disk: int
    checkpoint: int
    seconds: float
    blocks: int = 0
    hidden: int = 0
    scratch: int = 0


def announce(options: CovarianceOptions, source: Text, by_block: bool) -> None:
    """Say, before it takes its time, what a dry run does. by_block: the model is not loaded whole."""
    of, sample = source.sequences, source.batch_size + 1
    runs = f"runs a sample, {sample:,} of {of:,} sequences a pass" if sample < of else "runs one batch"
    does = "loads the largest block and runs one batch through it" if by_block else f"loads the model and {runs}"
    say(f"dry run: {does}; nothing is stored", options.quiet)


def estimate(options: CovarianceOptions, network: Network, source: Text, loading: float) -> Estimate:
    """Run a sequence and then the first batch through every pass, and extrapolate. loading: seconds until now."""
    devices, limit = place_sums(network, source, options, ALONE)
    plan = make_plan(
        network.sites,
        network.kinds,
        limit if devices else options.budget,
        options.moment_dtype,
        devices=devices,
        halves=options.halves and (source.half > 0 or source.first > 0),
        sampled=tokens_kept(options, source),
        blocks=network.blocks,
    )
    with evaluating(network.module), exact():
        if network.stack is None:
            seconds = loading + sum(_seconds(options, network, source, plan, sites, devices) for sites in plan.passes)
        else:
            seconds = loading + _seconds_of_blocks(options, network, network.stack, source, plan)
    blocks, hidden, scratch = 0, 0, 0
    if network.stack is not None:
        blocks, scratch = len(network.stack.names), scratch_bytes(plan, network, source, options)
        hidden = 0 if scratch else hidden_bytes(network, source)
    return Estimate(
        layers=sum(len(site.members) for site in network.sites),
        sites=len(network.sites),
        tokens=source.total,
        first=source.first,
        passes=len(plan.passes),
        accumulators=plan.memory,
        memory=peak_memory() + hidden,
        device_memory=max(map(peak_device_memory, set(devices.values())), default=0),
        disk=plan.disk,
        checkpoint=plan.checkpoint,
        seconds=seconds,
        blocks=blocks,
        hidden=hidden,
        scratch=scratch,
    )


def _seconds(
    options: CovarianceOptions, network: Network, source: Text, plan: Plan, sites: Sequence[Site], devices: Placed
) -> float:
    """Of one pass, its moments written."""
    part = Part(
        network,
        sites,
        whole=len(plan.passes) == 1,
        devices=devices,
        exact=options.products == "exact",
        sampled=options.keep_tokens,
    )
    inputs = next(source.read())
    small = 1 if network.stack is None else source.batch_size  # hidden states of a block before are of a whole batch
    seconds = _seconds_per_batch(part, inputs, source, small) * source.sequences / source.batch_size
    return seconds + _seconds_to_write(part, network, options.moment_dtype)


def _seconds_of_blocks(options: CovarianceOptions, network: Network, stack: Stack, source: Text, plan: Plan) -> float:
    """Of all blocks, from the largest one that has sites, on the hidden states that the first one gives."""
    block = max(set(network.blocks.values()), key=stack.bytes)
    with stack.resident():
        if block:
            with stack.loaded(0), torch.no_grad():
                network.forward(next(source.read()))
                made = stack.made
        begun = time.monotonic()
        with stack.loaded(block):
            network.weigh(stack.names[block])
            seconds = time.monotonic() - begun
            if block:
                stack.given = made
            own = [sites for sites in plan.passes if network.blocks[sites[0].name] == block]
            seconds += sum(_seconds(options, network, source, plan, sites, {}) for sites in own)
    return seconds * len(stack.names)


def _seconds_per_batch(part: Part, inputs: Inputs, source: Text, small: int) -> float:
    """Of the first batch, once its first sequences have paid for fresh memory and for the libraries' start."""
    one = {name: value[:small] for name, value in inputs.items()}
    with part.hooked():
        part.add(Batch(0, one, source.masks(one), source.keys(0)[:small], source.labels(one)))
        begun = time.monotonic()
        part.add(Batch(0, inputs, source.masks(inputs), source.keys(0), source.labels(inputs)))  # waits for the devices
        return time.monotonic() - begun


def _seconds_to_write(part: Part, network: Network, dtype: str) -> float:
    """Time to write all moments of the part, extrapolated from the largest site that the batch reached."""
    sizes = {site.name: site_elements(network.kinds[site.name], site.shapes) for site in part.sites}
    seen = [site for site in part.sites if part.sums[site.name].count]  # one batch need not reach every expert
    largest = max(seen or part.sites, key=lambda site: sizes[site.name])
    begun = time.monotonic()
    members = {name: network.weights[name] for name in largest.members}
    moments = moments_of(largest.name, mapped(part.sums[largest.name].data(), Tensor.cpu), members)
    write_site(zarr.open_group(MemoryStore(), zarr_format=3), largest.name, moments, dtype)
    return (time.monotonic() - begun) * sum(sizes.values()) / sizes[largest.name]


def lines(needed: Estimate) -> list[str]:
    """What `--dry-run` prints."""
    sums = f", of which {needed.accumulators / 1e9:.2f} GB are accumulators"
    hidden = f" and {needed.hidden / 1e9:.2f} GB hidden states" if needed.hidden else ""
    on_device = needed.device_memory > 0
    after = f", after the {needed.first} sequences that are there" if needed.first else ""
    rows = [
        ("layers", f"{needed.layers:,} in {needed.sites:,} sites"),
        ("passes", f"{needed.passes} over {needed.tokens:,} tokens{after}"),
        *([("blocks", f"{needed.blocks}, loaded one at a time")] if needed.blocks else []),
        ("memory", f"{needed.memory / 1e9:.2f} GB{'' if on_device else sums}{hidden}"),
        *([("gpu", f"{needed.device_memory / 1e9:.2f} GB{sums}")] if on_device else []),
        ("disk", f"{needed.disk / 1e9:.2f} GB, up to {needed.checkpoint / 1e9:.2f} GB more while it runs"),
        *([("scratch", f"{needed.scratch / 1e9:.2f} GB of hidden states while it runs")] if needed.scratch else []),
        ("time", f"{needed.seconds:,.0f} s"),
    ]
    return [f"{name:8} {value}" for name, value in rows]
