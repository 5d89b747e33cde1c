"""`prep covariance --dry-run`: what a calibration will take, from its plan and one batch of every pass.

Memory and disk follow from the plan; time is that of a warm batch of each pass times the number of batches, and of one
site's write times the size of the store.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import zarr
from torch import nn
from zarr.storage import MemoryStore

from ...store import write_site
from ..corpus.source import Text
from ..numerics.accumulators import site_elements
from .hooks import Forward, accumulators, run_pass, site_members
from .plan import Plan, peak_memory


@dataclass(frozen=True)
class Estimate:
    """What a calibration takes: counts, bytes and seconds.

    memory: peak of the process, of which `accumulators` are the moments under way; disk: of the finished store;
    checkpoint: what an unfinished run takes beside it.
    """

    layers: int
    sites: int
    tokens: int
    passes: int
    accumulators: int
    memory: int
    disk: int
    checkpoint: int
    seconds: float


def estimate(
    layers: Mapping[str, nn.Module],
    kinds: Mapping[str, str],
    plan: Plan,
    forward: Forward,
    stream: Text,
    moment_dtype: str,
) -> Estimate:
    """Run the first batch through every pass, twice, and extrapolate. Nothing is stored."""
    seconds = 0.0
    batches = len(stream.corpus.sequences) / stream.batch_size
    first = next(stream.read())
    for part in plan.passes:
        totals = accumulators(part, kinds)
        for attempt in range(2):  # the first one also pays for fresh memory and for the libraries' start
            begun = time.monotonic()
            run_pass(layers, part, totals, forward, [first], whole=len(plan.passes) == 1, masks=stream.masks)
            if attempt:
                seconds += (time.monotonic() - begun) * batches
        seen = [site for site in part if totals[site.name].count]  # one batch need not reach every expert
        largest = max(seen or part, key=lambda site: site_elements(kinds[site.name], site.shapes))
        begun = time.monotonic()
        members = site_members(largest, layers)
        write_site(
            zarr.open_group(MemoryStore(), zarr_format=3),
            largest.name,
            totals[largest.name].finish(members),
            moment_dtype,
        )
        written = site_elements(kinds[largest.name], largest.shapes)
        stored = sum(site_elements(kinds[site.name], site.shapes) for site in part)
        seconds += (time.monotonic() - begun) * stored / written
    sites = [site for part in plan.passes for site in part]
    return Estimate(
        layers=sum(len(site.members) for site in sites),
        sites=len(sites),
        tokens=stream.total,
        passes=len(plan.passes),
        accumulators=plan.memory,
        memory=peak_memory(),
        disk=plan.disk,
        checkpoint=plan.checkpoint,
        seconds=seconds,
    )


def lines(found: Estimate) -> list[str]:
    """What `--dry-run` prints."""
    rows: list[tuple[str, Any]] = [
        ("layers", f"{found.layers:,} in {found.sites:,} sites"),
        ("passes", f"{found.passes} over {found.tokens:,} tokens"),
        ("memory", f"{found.memory / 1e9:.2f} GB, of which {found.accumulators / 1e9:.2f} GB are accumulators"),
        ("disk", f"{found.disk / 1e9:.2f} GB, up to {found.checkpoint / 1e9:.2f} GB more while it runs"),
        ("time", f"{found.seconds:,.0f} s"),
    ]
    return [f"{name:8} {value}" for name, value in rows]
