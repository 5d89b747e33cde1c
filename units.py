"""Sizes and durations as people write them."""

import re

from .errors import PrepError

_BYTES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


def parse_size(size: int | float | str) -> int:
    """Bytes from "8GB", "500 MB" or "1e9" (decimal units), or from a number. PrepError for anything else."""
    match = re.fullmatch(r"\s*([\d.]+(?:e\+?\d+)?)\s*([kmgt]?)i?b?\s*", str(size).lower())
    try:
        found = int(float(match[1]) * _BYTES[match[2]]) if match else 0
    except ValueError:
        found = 0
    if found <= 0:
        raise PrepError(f"{size!r} is not a size: write it like 8GB or 500MB")
    return found


def parse_seconds(time: float | str) -> float:
    """Seconds from "60s", "5m", "1h" or a number. PrepError for anything else."""
    if isinstance(time, int | float):
        return float(time)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", time.lower())
    if not match:
        raise PrepError(f"{time!r} is not a time: write it like 60s or 5m")
    return float(match[1]) * _SECONDS[match[2]]
