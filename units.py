"""Sizes, durations, mixtures and block numbers as people write them."""

import math
import os
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction

from .errors import PrepError

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


def parse_size(size: int | float | str) -> int:
    """Bytes from "8GB" (10^9), "8GiB" (2^30) or "1e9", or from a number. PrepError for anything else.

    A bare number below 1000, as text or not, is refused: nobody means 8 bytes.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:e\+?\d+)?)\s*([kmgt]?)(i?)b?\s*", str(size).lower())
    try:
        base = 1024 if match and match[3] else 1000
        number = int(float(match[1]) * base ** " kmgt".index(match[2] or " ")) if match else 0
    except ValueError:
        number = 0
    if number <= 0 or (number < 1000 and re.fullmatch(r"[\s\d.]+", str(size))):
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


def parse_mixture(data: str | Iterable[str] | Mapping[str, float]) -> tuple[tuple[str, int], ...]:
    """(name, weight) of every source, from "a", ["a=2", "b"] or {"a": 2, "b": 1}; what exists is a name as it is.

    Weights are given in lowest whole numbers, to six decimal digits. PrepError for one that is no positive number.
    """
    if isinstance(data, Mapping):
        given = [(str(name), weight) for name, weight in data.items()]
    else:
        given = [_weighted(str(one)) for one in ([data] if isinstance(data, (str, os.PathLike)) else data)]
    if not given:
        raise PrepError("--data names nothing to read: give a file, a glob or a hub id")
    parts = []
    for name, weight in given:
        try:
            parts.append(round(Fraction(str(weight)) * 10**6))
        except (ValueError, ZeroDivisionError):
            parts.append(0)
        if parts[-1] <= 0:
            raise PrepError(f"--data {name} has the weight {weight}: give a number above 0, as in {name}=2")
    common = math.gcd(*parts)
    return tuple((name, part // common) for (name, _), part in zip(given, parts, strict=True))


def _weighted(text: str) -> tuple[str, float | str]:
    name, mark, weight = text.rpartition("=")
    number = re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?|nan|inf", weight.lower())
    return (name, weight) if mark and name and number and not os.path.exists(text) else (text, 1)


def parse_share(share: float | str) -> float:
    """A share between 0 and 1 from "2%", "0.02" or a number. PrepError for anything else."""
    match = re.fullmatch(r"\s*(\d*\.?\d+(?:e-?\d+)?)\s*(%?)\s*", str(share).lower())
    value = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < value < 1:
        raise PrepError(f"{share!r} is not a share between 0 and 1: write it like 2% or 0.02")
    return value


def parse_budget(budget: int | str) -> int | float:
    """A number of parameters from "2M" (10^6; K, B), "1.5e6" or a whole number, or a share, a float, from "95%".

    PrepError for anything else, also for a bare number below 1000 as text: nobody means 64 parameters.
    """
    text = str(budget).strip().lower()
    match = re.fullmatch(r"(\d*\.?\d+(?:e\+?\d+)?)\s*([kmb%]?)", text)
    value = float(match[1]) if match else 0.0
    if match and match[2] == "%" and 0 < value <= 100:
        return value / 100
    number = value * {"k": 1e3, "m": 1e6, "b": 1e9}.get(match[2] if match else "", 1)
    bare = isinstance(budget, str) and number < 1000 and text.replace(".", "").isdigit()
    if match is None or match[2] == "%" or isinstance(budget, (bool, float)) or bare or not 1 <= number < math.inf:
        raise PrepError(f"{budget!r} is not a budget: write parameters like 2M, or the share to keep like 95%")
    return round(number)


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
