"""How busy the machine was with other work while something was timed (Linux)."""

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LIMIT = 0.05  # of the machine; a sample taken under more other load is dropped


@dataclass
class Sample:
    """Seconds of one run and the share of all cores that other processes used meanwhile."""

    seconds: float
    other: float


def timed(work: Callable[[], object]) -> Sample:
    """Run `work` once."""
    busy, own, begun = _busy(), _own(), time.perf_counter()
    work()
    seconds = time.perf_counter() - begun
    other = max(0.0, (_busy() - busy) - (_own() - own))
    return Sample(seconds, other / (seconds * (os.cpu_count() or 1)))


def kept(samples: list[Sample]) -> list[float]:
    """Seconds of the samples under the limit; all of them, so that there is a figure, where none is."""
    quiet = [sample.seconds for sample in samples if sample.other <= LIMIT]
    return quiet or [sample.seconds for sample in samples]


def forget_peak() -> None:
    """Begin the peak anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def rss() -> int:
    """Resident size of this process now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _busy() -> float:
    user, nice, system = (int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
