"""Sums of a site that are not those of this run's process alone.

Of all processes, of the first half of the tokens, and those with which a store that grows goes on.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...store import Moments, SiteData
from ...store.checkpoint import read_half
from ...store.sample import TokenSample, joined
from ..distributed import World
from ..numerics.accumulators import SiteSums, mapped
from ..numerics.device_sums import DeviceSums
from .part import Part


def whole_sums(
    part: Part, name: str, sums: SiteSums | DeviceSums, counts: dict[str, int], world: World, sampled: bool = True
) -> SiteData | None:
    """The sums of a site over all processes, on the host of the one that writes them; None on the others.

    sampled: with the sample of all tokens, where one is kept.
    """
    owner, data = part.owners[name], sums.data()
    sample = _whole_sample(data, sums.sample.size, owner, world) if sampled and sums.sample else None
    data = replace(data, count=counts[name], sample=sample)
    if part.on_devices:
        data = mapped(data, partial(world.reduce_to, owner))
        return mapped(data, Tensor.cpu) if world.rank == owner else None
    if not sums.kept:
        return None
    data = mapped(data, world.reduce)
    return data if world.writes else None


def _whole_sample(sums: SiteData, size: int, owner: int, world: World) -> TokenSample | None:
    """The sample of the tokens of all processes, on rank `owner`, to which each sends what is in it; None if empty."""
    if world.size == 1:
        return sums.sample
    own = sums.sample or TokenSample(torch.zeros(0, len(sums.mean)), torch.zeros(0, dtype=torch.float64))
    drawn = world.all_gather(own.priorities)
    ranks = torch.cat([torch.full((len(part),), rank) for rank, part in enumerate(drawn)])
    chosen = torch.cat(drawn).argsort(stable=True)[:size]
    shares = torch.bincount(ranks[chosen], minlength=world.size).tolist()  # of a process its smallest priorities
    if not any(shares):
        return None
    parts = world.gather_rows(owner, own.tokens[: shares[world.rank]], shares)
    if not parts:
        return None
    sent = zip(parts, drawn, shares, strict=True)
    return joined([TokenSample(tokens, priorities[:n]) for tokens, priorities, n in sent], size)


def with_half(root: Any, site: str, moments: SiteData, base: Moments | None) -> SiteData:
    """The moments of a site with those of its first half, where they were kept and the other half is not empty.

    base: of the store that has grown, whose own half may be nearer to a half of the tokens than what was kept since.
    """
    kept = [read_half(root, site)]
    if base is not None and site in base.sites:
        kept.append(base[base.sites[site][0]].data().half)
    halves = [half for half in kept if half is not None and half.count < moments.count]
    if not halves:
        return moments
    half = min(halves, key=lambda one: abs(one.count / moments.count - 0.5))
    return replace(moments, half=replace(half, share=half.count / moments.count))


def stored_sums(stored: Moments, site: str) -> SiteData | None:
    """The sums, float64, of which a store holds the means; None where it holds none of the site."""
    if site not in stored.sites:
        return None
    moments = stored[stored.sites[site][0]].data()
    sums = mapped(moments, lambda mean: mean.double() * moments.count)
    return replace(sums, members={}, half=None)
