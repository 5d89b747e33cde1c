"""How a calibration is cut into passes whose accumulators fit the memory budget, and what they need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import PrepError
from ..corpus.source import Source
from ..model.network import Network
from ..model.sites import Site
from ..numerics.accumulators import site_elements
from ..options import CovarianceOptions


@dataclass(frozen=True)
class Plan:
    """Passes in order, each a list of sites in call order; bytes of the largest pass's accumulators, with the tokens
    that it keeps, and of the store.

    checkpoint: bytes that the state of an unfinished run takes beside the moments, in two slots.
    """

    passes: tuple[tuple[Site, ...], ...]
    memory: int
    disk: int
    checkpoint: int


def make_plan(
    sites: Sequence[Site],
    kinds: Mapping[str, str],
    budget: int,
    moment_dtype: str,
    under_way: Collection[str] = (),
    devices: Mapping[str, Any] | None = None,
    halves: bool = False,
    sampled: int = 0,
    samples: int = 1,
    blocks: Mapping[str, int] | None = None,
) -> Plan:
    """Cut `sites` into as few passes as the budget (bytes) allows, filling each in call order.

    devices: site name -> the device that keeps its sums; each has the budget. All on the host by default.

    under_way: names of sites of which an interrupted pass has left sums. They make up the first pass, as many as fit;
    the others begin anew. halves: the moments of the first half are kept too, in float32. sampled: tokens that are kept
    of every site, by as many processes as there are `samples`. blocks: site name -> number of a block; a pass is of one
    of them. PrepError if one site alone is over the budget.
    """
    sums = sum(8 * site_elements(kinds[site.name], site.shapes) for site in sites)
    tokens = sum(sample_bytes(site, sampled) for site in sites)
    sizes = {site.name: site_bytes(site, kinds[site.name], samples * sampled) for site in sites}
    places = devices or dict.fromkeys(sizes, "host")
    fewer = ", or fewer --keep-tokens" if sampled else ""
    first = _filled([site for site in sites if site.name in under_way], sizes, budget, places, fewer, blocks)[:1]
    rest = [site for site in sites if not first or site not in first[0]]
    passes = [*first, *_filled(rest, sizes, budget, places, fewer, blocks)]
    memory = max((sum(sizes[site.name] for site in part) for part in passes), default=0)
    stored = sums // (1 if moment_dtype == "float64" else 2)
    half = sums // 2 if halves else 0
    return Plan(tuple(map(tuple, passes)), memory, stored + half + tokens, 2 * memory + half)


def site_bytes(site: Site, kind: str, sampled: int) -> int:
    """What a site's accumulators take, with a sample of so many tokens."""
    return 8 * site_elements(kind, site.shapes) + sample_bytes(site, sampled)


def sample_bytes(site: Site, sampled: int) -> int:
    """What so many tokens of a site take, in float32, with their priorities."""
    return sampled * (4 * site.d_in + 8)


def tokens_kept(options: CovarianceOptions, source: Source) -> int:
    """How many tokens of a site are kept: what was asked for, fewer where the text is shorter."""
    return min(options.keep_tokens, source.tokens if source.tokens is not None else options.keep_tokens)


def _filled(
    sites: Sequence[Site],
    sizes: Mapping[str, int],
    budget: int,
    places: Mapping[str, Any],
    fewer: str,
    blocks: Mapping[str, int] | None,
) -> list[list[Site]]:
    """The sites in order, a new pass begun where the next one is of another block or over the budget of its place.

    fewer: what else to advise where one is over it alone.
    """
    passes: list[list[Site]] = []
    used: Counter[Any] = Counter()
    for site in sites:
        size = sizes[site.name]
        if size > budget:
            raise PrepError(
                f"{site.name} needs {size / 1e9:.3g} GB of accumulators, the --memory-budget is {budget / 1e9:.3g} GB: "
                f"raise it, or take --moment auto or diagonal{fewer}"
            )
        place = places[site.name]
        other_block = blocks and passes and blocks[site.name] != blocks[passes[-1][-1].name]
        if not passes or other_block or used[place] + size > budget:
            passes.append([])
            used.clear()
        passes[-1].append(site)
        used[place] += size
    return passes


def too_few_tokens(network: Network, counts: Mapping[str, int]) -> str:
    """A line about the sites with fewer tokens, by `counts`, than their second moment is wide; "" if there are none."""
    few = [
        (counts[site.name], width, site.name)
        for site in network.sites
        if 0 < counts.get(site.name, 0) < (width := _width(site, network.kinds[site.name]))
    ]
    if not few:
        return ""
    tokens, width, name = min(few)
    return (
        f"warning: {len(few)} of {len(network.sites)} sites saw fewer tokens than they are wide, such as {name} "
        f"({tokens:,} for {width:,}), and know nothing of the other directions: --num-sequences and --seq-len for "
        f"{max(width for _, width, _ in few):,} tokens or more"
    )


def _width(site: Site, kind: str) -> int:
    """The tokens without which a second moment of that kind is singular; 0 for a diagonal."""
    if kind == "output":
        return max(d_out for d_out, _ in site.shapes)
    return site.d_in if kind == "full" else 0
