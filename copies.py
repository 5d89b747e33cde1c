"""Quantised copies of a model: what one is called, and how its weights Q (d_out, d_in) are known again.

A basis of the error `E = W - Q` belongs to that Q. Equal hashes tell it. Elsewhere scales are rounded in other ways (on
another device, or repacked for it): then probes `s^T Q t` for random signs s and t tell how far another Q' is from it,
since the mean square of `s^T (Q' - Q) t` is `||Q' - Q||_F^2`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .linear import dtype_name, weight_hash

PROBES = 16  # the distance is then known to a fifth of itself
FAR = 0.1  # of ||W - Q||_F: nested scales show 0.04 to 0.06, another rounding of W 0.17, another quantiser more than 1
_FLOOR = 0.01  # of ||Q||_F: where there is next to no error, as in layers that are not quantised


def record_of(E: Tensor, Q: Tensor) -> dict[str, Any]:
    """What a basis of E = W - Q says of Q: its `hash` and `dtype`, `probes` of it, and `error`, which is ||E||_F."""
    probes = probed(Q, PROBES).tolist()
    return {"hash": weight_hash(Q), "dtype": dtype_name(Q.dtype), "probes": probes, "error": float(E.norm())}


def is_sound(record: Mapping[str, Any]) -> bool:
    """Whether a record that may be a stranger's has some probes, not very many, and finite numbers."""
    return 1 <= len(record["probes"]) <= 1000 and all(map(math.isfinite, (*record["probes"], record["error"])))


def probed(Q: Tensor, count: int) -> Tensor:
    """s_i^T Q t_i (count,) in float64 for the signs of `signs`; in float32 on devices."""
    s, t = signs((Q.shape[0], Q.shape[1]), count)
    dtype = torch.float64 if Q.device.type == "cpu" else torch.float32
    return ((s.to(Q.device, dtype) @ Q.to(dtype)) * t.to(Q.device, dtype)).sum(1).double().cpu()


def signs(shape: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    """s (count, d_out) and t (count, d_in) of +-1, the same everywhere: the first ones do not depend on `count`."""
    d_out, d_in = shape
    drawn = np.random.RandomState(0).randint(0, 2, (count, d_out + d_in)) * 2.0 - 1.0  # a stream that stays as it is
    return torch.from_numpy(drawn[:, :d_out]), torch.from_numpy(drawn[:, d_out:])


def distance(probes: Tensor, record: Mapping[str, Any]) -> float:
    """||Q' - Q||_F / ||W - Q||_F, estimated from `probes` (n,) of Q' and the record of Q."""
    known = torch.tensor(record["probes"], dtype=torch.float64)
    scale = max(record["error"], _FLOOR * float(known.square().mean().sqrt()), torch.finfo(torch.float64).tiny)
    return float((probes - known).square().mean().sqrt()) / scale


def label_of(model: nn.Module) -> str | None:
    """What a module calls its quantisation: that of its configuration, or of its first packed weight; None if neither.

    `nf4`, `fp4` and `int8` for bitsandbytes, else the method, such as `gptq`.
    """
    said = label(quantisation(getattr(model, "config", None)))
    kinds = {"Params4bit": "nf4", "Int8Params": "int8"}
    weights = (parameter for parameter in model.parameters() if type(parameter).__name__ in kinds)
    packed = next(weights, None) if said is None else None
    return said if packed is None else getattr(packed, "quant_type", kinds[type(packed).__name__])


def label(settings: Mapping[str, Any] | None) -> str | None:
    """The same from a configuration's `quantization_config`."""
    if not settings:
        return None
    method = str(settings.get("quant_method", "quantised"))
    if method.startswith("bitsandbytes"):
        eight = settings.get("load_in_8bit") or settings.get("_load_in_8bit")
        method = "int8" if eight else str(settings.get("bnb_4bit_quant_type", "fp4"))
    return re.sub(r"[^\w.-]", "-", method)


def quantisation(config: Any) -> dict[str, Any] | None:
    """A configuration's `quantization_config` as plain values for JSON; None where there is none."""
    settings: Any = getattr(config, "quantization_config", None)
    if hasattr(settings, "to_dict"):
        settings = settings.to_dict()
    return settings and json.loads(json.dumps(settings, default=str))


def named(repair: Mapping[str, Any] | None) -> str | None:
    """The copy that a basis repairs, in short: its recipe, its id, or `a module`; None for a basis of W."""
    if repair is None or repair["source"] == "recipe":
        return None if repair is None else str(repair["name"])
    if repair["source"] == "module":
        return "a module" if repair["name"] == "module" else f"a module ({repair['name']})"
    return f"{repair['id']}@{repair['revision']}" if repair.get("revision") else str(repair["id"])
