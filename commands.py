"""The commands that errors advise, in their shortest form; the default names of bases and their methods."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import did_you_mean

DEFAULT_STORE = "prep.zarr"
# metrics whose P is made of eigenvectors of C, so that U^T W is not diag(S) P -> the default name of their bases
OF_INPUTS = {"components": "eva", "null": "null"}
OF_WEIGHTS = ("full", "diagonal", "identity")  # all others, which can be asked for by name
METRICS = (*OF_WEIGHTS, *OF_INPUTS)
# published method -> the default name of its basis; of several with one basis the first is the one that is advised
BASIS_OF = {
    "pissa": "identity",
    "milora": "identity-bottom",
    "mica": "identity-bottom",
    "corda_ipm": "full-p1",
    "corda_kpm": "full-p1-bottom",
    "whitened": "full",
    "antipasto_corda": "full",
    "asvd": "diagonal",
    "antipasto_asvd": "diagonal",
    "astra": "full-undamped",
    "eva": "eva",
    "lora_null": "null",
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
RECIPE = re.compile(r"nf4|fp4|int8|int[234](-g[1-9][0-9]{0,5})?")  # of a quantised copy that is made where it is needed


def default_name(method: Mapping[str, Any]) -> str:
    """`full`, `full-p1-bottom`, `full-undamped`, `identity-activation`, `eva` ..., from a method's fields."""
    if method["metric"] in OF_INPUTS:
        return OF_INPUTS[method["metric"]]
    plain = method["metric"] == "identity" or method.get("power", 0.5) == 0.5
    power = "" if plain else f"-p{method['power']:g}"
    centered = "-centered" if method.get("center") else ""
    bare = method["metric"] != "identity" and method.get("damping") == 0 and method.get("epsilon") is None
    undamped = "-undamped" if bare else ""
    select = "" if method.get("select", "top") == "top" else f"-{method['select']}"
    pooling = "" if method.get("pooling", "rms") == "rms" else f"-{method['pooling']}"
    return f"{method['metric']}{power}{centered}{undamped}{select}{pooling}"


def repair_name(label: str, method: Mapping[str, Any]) -> str:
    """`repair-nf4`, `repair-nf4-diagonal` ..., from what a quantised copy is called and a method's fields."""
    suffix = default_name(method)
    return f"repair-{label}{'' if suffix == 'full' else f'-{suffix}'}"


def decompose_command(
    name: str,
    method: Mapping[str, Any] | None = None,
    rank: int | None = None,
    overwrite: bool = False,
    store: str | Path = DEFAULT_STORE,
    repair: Mapping[str, Any] | None = None,
) -> str:
    """The shortest command for a basis of that name: by its method or, without one, by what a default name says.

    repair: what a basis says of the quantised copy that it repairs; of a module's basis it is a call in Python.
    """
    if method is None:
        method, repair = _said_by(name), repair or _repair_said_by(name)
    usual = "" if method is None else default_name(method) if repair is None else repair_name(repair["name"], method)
    if repair is not None and repair["source"] == "module":
        options = {key: value for key, value in (method or {}).items() if value != _DEFAULTS.get(key, value)}
        options |= {} if usual == name else {"name": name}
        options |= {} if rank is None else {"rank": rank}
        options |= {"overwrite": True} if overwrite else {}
        said = "".join(f", {key}={value!r}" for key, value in options.items())
        return f"`prep.decompose({str(store)!r}, repair=module{said})`"
    words = ["prep", "decompose"]
    if repair is not None:
        words += ["--repair", shlex.quote(repair["id"] if repair["source"] == "checkpoint" else repair["name"])]
    if usual != name:
        words += ["--name", shlex.quote(name)]
    if method is not None:
        words += _options(method, _METHOD_OF.get(usual))
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


def _options(method: Mapping[str, Any], published: str | None) -> list[str]:
    """The options of a method that are not the defaults: those of a published one by its name."""
    words = [] if published in (None, "whitened") else ["--for", str(published)]
    said = (_said_by(BASIS_OF[published]) or {}) if published else {}
    for option, default in _DEFAULTS.items():
        value = method.get(option, default)
        if value in (default, said.get(option)) or (published and option not in ("damping", "epsilon")):
            continue
        if option == "power" and method["metric"] == "identity":
            continue
        words += (
            [f"--{option}"] if option == "center" else [f"--{option}", f"{value:g}" if option in _NUMBERS else value]
        )
    return words


def _repair_said_by(name: str) -> dict[str, Any] | None:
    """The copy that a basis of this default name repairs; None for a name of another sort."""
    said = re.fullmatch(rf"repair-(?:({RECIPE.pattern})(-.*)?|.+)", name)
    if said is None:
        return None
    return {"source": "recipe", "name": said[1]} if said[1] else {"source": "checkpoint", "name": "", "id": "COPY"}


def _said_by(name: str) -> dict[str, Any] | None:
    """The method that has this default name; None if no method has it."""
    if (metric := {usual: metric for metric, usual in OF_INPUTS.items()}.get(name)) is not None:
        return {"metric": metric}
    if (repair := re.fullmatch(rf"repair-(?:{RECIPE.pattern})(?:-(.*))?", name)) is not None:
        return _said_by(repair[2] or "full")
    metric, *rest = name.split("-")
    method: dict[str, Any] = {"metric": metric}
    for part in rest:
        if part in ("bottom", "activation"):
            method["select"] = part
        elif part == "mean_abs":
            method["pooling"] = part
        elif part == "centered":
            method["center"] = True
        elif part == "undamped":
            method["damping"] = 0.0
        elif part[:1] == "p" and part[1:].replace(".", "", 1).isdigit():
            method["power"] = float(part[1:])
    return method if metric in OF_WEIGHTS and default_name(method) == name else None
