"""The `prep decompose` command that makes a basis, as errors print it; the default names of bases."""

import shlex
from collections.abc import Mapping
from typing import Any

_DEFAULTS = {"metric": "full", "power": 0.5, "center": False, "select": "top", "damping": 1e-3, "epsilon": None}


def default_name(method: Mapping[str, Any]) -> str:
    """`full`, `full-p1-bottom`, `full-centered`, `identity-activation`, `eva` ..., from a method's fields."""
    if method["metric"] == "components":
        return "eva"
    plain = method["metric"] == "identity" or method.get("power", 0.5) == 0.5
    power = "" if plain else f"-p{method['power']:g}"
    centered = "-centered" if method.get("center") else ""
    select = "" if method.get("select", "top") == "top" else f"-{method['select']}"
    return f"{method['metric']}{power}{centered}{select}"


def decompose_command(
    name: str, method: Mapping[str, Any] | None = None, rank: int | None = None, overwrite: bool = False
) -> str:
    """The shortest command for a basis of that name: by its method or, without one, by what a default name says."""
    method = _said_by(name) if method is None else method
    words = ["prep", "decompose"]
    if method is None or default_name(method) != name:
        words += ["--name", shlex.quote(name)]
    if method is not None and method["metric"] == "components":
        words += ["--for", "eva"]
    elif method is not None:
        words += _options(method)
    words += [] if rank is None else ["--rank", str(rank)]
    words += ["--overwrite"] if overwrite else []
    return f"`{' '.join(words)}`"


def _options(method: Mapping[str, Any]) -> list[str]:
    """The options of a method that are not the defaults."""
    words: list[str] = []
    for option, default in _DEFAULTS.items():
        value = method.get(option, default)
        if value == default or (option == "power" and method["metric"] == "identity"):
            continue
        words += (
            [f"--{option}"] if option == "center" else [f"--{option}", f"{value:g}" if option in _NUMBERS else value]
        )
    return words


_NUMBERS = ("power", "damping", "epsilon")


def _said_by(name: str) -> dict[str, Any] | None:
    """The method that has this default name; None if no method has it."""
    if name == "eva":
        return {"metric": "components"}
    metric, *rest = name.split("-")
    method: dict[str, Any] = {"metric": metric}
    for part in rest:
        if part in ("bottom", "activation"):
            method["select"] = part
        elif part == "centered":
            method["center"] = True
        elif part[:1] == "p" and part[1:].replace(".", "", 1).isdigit():
            method["power"] = float(part[1:])
    return method if metric in ("full", "diagonal", "identity") and default_name(method) == name else None
