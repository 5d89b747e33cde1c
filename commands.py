"""The commands that errors advise, in their shortest form; the default names of bases and their methods."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import did_you_mean

DEFAULT_STORE = "prep.zarr"
# published method -> the default name of its basis; of several with one basis the first is the one that is advised
BASIS_OF = {
    "pissa": "identity",
    "milora": "identity-bottom",
    "corda_ipm": "full-p1",
    "corda_kpm": "full-p1-bottom",
    "whitened": "full",
    "antipasto_corda": "full",
    "asvd": "diagonal",
    "antipasto_asvd": "diagonal",
    "eva": "eva",
    "antipasto": "identity-activation",
    "antipasto_rot": "identity-activation",
    "antipasto_ablate": "identity-activation",
    "antipasto_dplr": "identity-activation",
    "antipasto_arrow": "identity-activation",
    "lora_xs": "identity",
}
_METHOD_OF = {basis: method for method, basis in reversed(BASIS_OF.items())}
_DEFAULTS = {
    "metric": "full",
    "power": 0.5,
    "center": False,
    "select": "top",
    "pooling": "rms",
    "damping": 1e-3,
    "epsilon": None,
}
_NUMBERS = ("power", "damping", "epsilon")


def default_name(method: Mapping[str, Any]) -> str:
    """`full`, `full-p1-bottom`, `full-centered`, `identity-activation`, `eva` ..., from a method's fields."""
    if method["metric"] == "components":
        return "eva"
    plain = method["metric"] == "identity" or method.get("power", 0.5) == 0.5
    power = "" if plain else f"-p{method['power']:g}"
    centered = "-centered" if method.get("center") else ""
    select = "" if method.get("select", "top") == "top" else f"-{method['select']}"
    pooling = "" if method.get("pooling", "rms") == "rms" else f"-{method['pooling']}"
    return f"{method['metric']}{power}{centered}{select}{pooling}"


def decompose_command(
    name: str,
    method: Mapping[str, Any] | None = None,
    rank: int | None = None,
    overwrite: bool = False,
    store: str | Path = DEFAULT_STORE,
) -> str:
    """The shortest command for a basis of that name: by its method or, without one, by what a default name says."""
    method = _said_by(name) if method is None else method
    words = ["prep", "decompose"]
    if method is None or default_name(method) != name:
        words += ["--name", shlex.quote(name)]
    if method is not None:
        words += _options(method)
    words += [] if rank is None else ["--rank", str(rank)]
    words += ["--overwrite"] if overwrite else []
    return f"`{' '.join(words)}{store_option(store)}`"


def store_option(store: str | Path) -> str:
    """` --store PATH`, or nothing where commands take that store anyway."""
    default, given = os.environ.get("PREP_STORE") or DEFAULT_STORE, str(store)
    if given in ("", default) or ("://" not in given and os.path.realpath(given) == os.path.realpath(default)):
        return ""
    inside = given.startswith(os.getcwd() + os.sep)
    return f" --store {shlex.quote(os.path.relpath(given) if inside else given)}"


def missing_basis(name: str, there: Sequence[str], store: str | Path) -> str:
    """What to say of a basis that a store does not have: the one that was meant, or the command that makes it."""
    said = f"the store has no basis {name!r} (it has: {', '.join(there) or 'none'})"
    basis = BASIS_OF.get(name, name)
    if basis != name:
        made = "" if basis in there else f", made with {decompose_command(basis, store=store)}"
        return f"{said}: the basis of {name} is called {basis!r}{made}"
    meant = "" if _said_by(name) else did_you_mean(name, dict.fromkeys([*there, *_METHOD_OF]))
    return f"{said}{meant or ': make it with ' + decompose_command(name, store=store)}"


def _options(method: Mapping[str, Any]) -> list[str]:
    """The options of a method that are not the defaults: those of a published one by its name."""
    published = _METHOD_OF.get(default_name(method))
    words = [] if published in (None, "whitened") else ["--for", str(published)]
    for option, default in _DEFAULTS.items():
        value = method.get(option, default)
        if value == default or (published and option not in ("damping", "epsilon")):
            continue
        if option == "power" and method["metric"] == "identity":
            continue
        words += (
            [f"--{option}"] if option == "center" else [f"--{option}", f"{value:g}" if option in _NUMBERS else value]
        )
    return words


def _said_by(name: str) -> dict[str, Any] | None:
    """The method that has this default name; None if no method has it."""
    if name == "eva":
        return {"metric": "components"}
    metric, *rest = name.split("-")
    method: dict[str, Any] = {"metric": metric}
    for part in rest:
        if part in ("bottom", "activation"):
            method["select"] = part
        elif part == "mean_abs":
            method["pooling"] = part
        elif part == "centered":
            method["center"] = True
        elif part[:1] == "p" and part[1:].replace(".", "", 1).isdigit():
            method["power"] = float(part[1:])
    return method if metric in ("full", "diagonal", "identity") and default_name(method) == name else None
