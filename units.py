"""Sizes, durations and block numbers as people write them."""

import re
from collections.abc import Iterable

from .errors import PrepError

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


def parse_size(size: int | float | str) -> int:
    """Bytes from "8GB" (10^9), "8GiB" (2^30) or "1e9", or from a number. PrepError for anything else.

    A bare number below 1000 is refused: nobody means 8 bytes.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:e\+?\d+)?)\s*([kmgt]?)(i?)b?\s*", str(size).lower())
    try:
        base = 1024 if match and match[3] else 1000
        number = int(float(match[1]) * base ** " kmgt".index(match[2] or " ")) if match else 0
    except ValueError:
        number = 0
    if number <= 0 or (isinstance(size, str) and size.strip().isdigit() and number < 1000):
        raise PrepError(f"{size!r} is not a size: write it like 8GB, 8GiB or 500MB")
    return number


def parse_seconds(time: float | str) -> float:
    """Seconds from "60s", "5m", "1h" or a number. PrepError for anything else."""
    if isinstance(time, int | float):
        return float(time)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", time.lower())
    if not match:
        raise PrepError(f"{time!r} is not a time: write it like 60s or 5m")
    return float(match[1]) * _SECONDS[match[2]]


def parse_share(share: float | str) -> float:
    """A share between 0 and 1 from "2%", "0.02" or a number. PrepError for anything else."""
    match = re.fullmatch(r"\s*(\d*\.?\d+(?:e-?\d+)?)\s*(%?)\s*", str(share).lower())
    value = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < value < 1:
        raise PrepError(f"{share!r} is not a share between 0 and 1: write it like 2% or 0.02")
    return value


def parse_blocks(text: str | Iterable[int]) -> tuple[int, ...]:
    """Block numbers, ascending, from "0-3,8" or numbers. PrepError for anything else."""
    if not isinstance(text, str):
        text = ",".join(map(str, text))
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise PrepError(f"--layers {text!r} is not a list of block numbers: write it like 0-3,8")
        numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(numbers))


def blocks_as_text(numbers: Iterable[int]) -> str:
    """The one spelling of block numbers: "0-3,8" for 0, 1, 2, 3, 8."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
