"""Sums of a site that are not those of this process alone: of all processes, and of the first half of the tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ...store import SiteData
from ...store.checkpoint import read_half
from ..distributed import World
from ..numerics.accumulators import SiteSums, mapped
from ..numerics.device_sums import DeviceSums
from .part import Part


def whole_sums(
    part: Part, name: str, sums: SiteSums | DeviceSums, counts: dict[str, int], world: World
) -> SiteData | None:
    """The sums of a site over all processes, on the host of the one that writes them; None on the others."""
    owner = part.owners[name]
    if part.on_devices:
        data = mapped(sums.data(), partial(world.reduce_to, owner))
        return replace(mapped(data, Tensor.cpu), count=counts[name]) if world.rank == owner else None
    if not sums.kept:
        return None
    data = replace(mapped(sums.data(), world.reduce), count=counts[name])
    return data if world.writes else None


def with_half(root: Any, site: str, moments: SiteData) -> SiteData:
    """The moments of a site with those of its first half, where they were kept and the other half is not empty."""
    half = read_half(root, site)
    if half is None or half.count >= moments.count:
        return moments
    return replace(moments, half=replace(half, share=half.count / moments.count))
