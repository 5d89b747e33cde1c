"""Memory of this machine and this process."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import torch


def free_memory() -> int:
    """Bytes of memory still available; half of all memory, or 4 GB, if the system does not tell."""
    told = _kilobytes("/proc/meminfo", "MemAvailable")
    if told:
        return 1024 * told
    if not hasattr(os, "sysconf"):  # Windows
        return 4 * 10**9
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes; 0 if the system does not tell."""
    told = _kilobytes("/proc/self/status", "VmHWM")  # ru_maxrss also counts the process that started this one
    if told:
        return 1024 * told
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _kilobytes(path: str, name: str) -> int | None:
    try:
        told = re.search(rf"{name}:\s*(\d+) kB", Path(path).read_text())
    except OSError:
        return None
    return int(told[1]) if told else None


def peak_device_memory(device: torch.device) -> int:
    """Most bytes that tensors of this process have taken on a GPU so far; 0 for other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
