"""How a calibration is cut into passes whose accumulators fit the memory budget, and what they need."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import PrepError
from ..model.sites import Site
from ..numerics.accumulators import site_elements

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Plan:
    """Passes in order, each a list of sites in call order; bytes of the largest pass's accumulators and of the store.

    checkpoint: bytes that the state of an unfinished run takes beside the moments, in two slots.
    """

    passes: tuple[tuple[Site, ...], ...]
    memory: int
    disk: int
    checkpoint: int


def make_plan(sites: Sequence[Site], kinds: Mapping[str, str], budget: int, moment_dtype: str) -> Plan:
    """Cut `sites` into as few passes as the budget (bytes) allows, filling each in call order.

    PrepError if one site alone is over the budget.
    """
    sizes = {site.name: 8 * site_elements(kinds[site.name], site.shapes) for site in sites}
    passes: list[list[Site]] = [[]]
    used = 0
    for site in sites:
        size = sizes[site.name]
        if size > budget:
            raise PrepError(
                f"{site.name} needs {size / 1e9:.3g} GB of accumulators, the --memory-budget is {budget / 1e9:.3g} GB: "
                "raise it, or take --moment auto or diagonal"
            )
        if used + size > budget:
            passes.append([])
            used = 0
        passes[-1].append(site)
        used += size
    memory = max(sum(sizes[site.name] for site in part) for part in passes)
    stored = sum(sizes.values()) // (1 if moment_dtype == "float64" else 2)
    return Plan(tuple(map(tuple, passes)), memory, stored, 2 * memory)


def free_memory() -> int:
    """Bytes of memory that processes can still be given; half of all where the system does not tell."""
    told = _kilobytes("/proc/meminfo", "MemAvailable")
    return 1024 * told if told else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    told = _kilobytes("/proc/self/status", "VmHWM")  # ru_maxrss also counts the process that started this one
    return 1024 * told if told else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _kilobytes(path: str, name: str) -> int | None:
    try:
        told = re.search(rf"{name}:\s*(\d+) kB", Path(path).read_text())
    except OSError:
        return None
    return int(told[1]) if told else None


def parse_size(text: str) -> int:
    """Bytes from "8GB", "500 MB" or "1e9" (decimal units). PrepError for anything else."""
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgt]?)i?b?\s*", text.lower())
    try:
        size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    except ValueError:
        size = 0
    if size <= 0:
        raise PrepError(f"{text!r} is not a size: write it like 8GB or 500MB")
    return size


def parse_seconds(text: str) -> float:
    """Seconds from "60s", "5m", "1h" or a plain number. PrepError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text.lower())
    if not match:
        raise PrepError(f"{text!r} is not a time: write it like 60s or 5m")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
