"""`prep pool`: the moments of several calibrations of one model as one, `C = sum w_i n_i C_i / sum w_i n_i`.

n_i is the number of tokens of part i and w_i its weight (1 by default): with weights 1 the result is that of the joined
corpus, with others a mixture in which each token of part i counts w_i times. The same holds for E[x], E[x_i^2] and
E[y y^T], and for the sample of tokens where all parts kept one. One site of every part is in memory at a time. The pool
is built beside what is there and put in place when it is whole.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PrepError, StoreError
from .artifact import Store, create_store, open_store
from .checkpoint import finish
from .format.schema import content_hash, disk_guard, is_url
from .lock import writer_lock
from .moment_writer import MomentWriter, begin_moments
from .sample import TokenSample, joined, weighted
from .site import SiteData
from .staging import check_replaceable, occupied, overlap, replacement
from .transfer import verified


def pool(
    parts: Sequence[str | Path],
    *,
    store: str | Path,
    weights: Sequence[float] | None = None,
    overwrite: bool = False,
    break_lock: bool = False,
) -> Store:
    """Combine the moments of `parts` (paths or URLs of two or more stores) into the path `store` and return the pool.

    weights: one positive number per part. overwrite: replace another store at `store`. break_lock: take a writer's lock
    that another machine has left behind. The parts must agree in model, weights, sites, moment kinds; their provenance
    is kept in `corpus["parts"]`. A store that holds this very pool is returned as it is.

    Raises PrepError for bad input, StoreError where the parts differ, which is named, or `store` holds something else.
    """
    weights = [1.0] * len(parts) if weights is None else [float(weight) for weight in weights]
    if len(parts) < 2:
        raise PrepError(f"{len(parts)} store to pool: name two or more")
    if len(weights) != len(parts) or not all(0 < weight < float("inf") for weight in weights):
        raise PrepError(f"--weights {','.join(f'{w:g}' for w in weights)}: give {len(parts)} positive numbers")
    if is_url(store):
        raise PrepError(f"--store {store} is a URL: pool into a path and copy it with `prep push`")
    for part in parts:
        if overlap(part, store):
            raise PrepError(f"--store {store} is one of the parts, or lies in {part}, or holds it: name a new one")
    stores = [open_store(part) for part in parts]
    for other in stores[1:]:
        _compare(stores[0], other)
    attrs = _attributes(stores, weights)
    existing = _existing(store, attrs["id"], overwrite)
    if existing is not None:
        return existing
    dtype = str(attrs["options"]["moment_dtype"])
    with disk_guard(store, _bytes(stores[0], dtype)), writer_lock(store, break_lock):
        existing = _existing(store, attrs["id"], overwrite)  # another process may have been faster
        if existing is not None:
            return existing
        with replacement(store) as built:
            _write(built, attrs, stores, weights, dtype)
            verified(built, "the pool")
    return open_store(store)


def _write(
    location: Path, attrs: dict[str, Any], stores: Sequence[Store], weights: Sequence[float], dtype: str
) -> None:
    """The pool of `stores`, with root attributes `attrs`, at a path where nothing is."""
    parts = [part.moments for part in stores]
    skipped = {layer: why for part in parts for layer, why in part.skipped.items()}
    first = {site: parts[0][layers[0]] for site, layers in parts[0].sites.items()}
    shapes = {site: {layer: tuple(one.members[layer]["shape"]) for layer in one.members} for site, one in first.items()}
    root = create_store(location, attrs).root
    begin_moments(root, shapes, {site: one.kind for site, one in first.items()}, skipped)
    writer = MomentWriter(root, dtype)
    for site, layers in parts[0].sites.items():
        read = [part[layers[0]].data() for part in parts]
        data = replace(_combined(read, weights), sample=_sample(read, weights, attrs["options"].get("keep_tokens", 0)))
        writer.note(writer.put(site, data))
    writer.flush()
    finish(root, {"status": "complete"})


def _combined(parts: list[SiteData], weights: Sequence[float]) -> SiteData:
    """The moments of one site over all parts, and those of their first halves where all have one."""
    halves = [part.half for part in parts if part.half is not None]
    data = _mixed(parts, weights)
    if len(halves) < len(parts):
        return data
    inside = [weight * part.count * half.share for weight, part, half in zip(weights, parts, halves, strict=True)]
    total = sum(weight * part.count for weight, part in zip(weights, parts, strict=True))
    # the weights by which each half has the share in the mixture that its tokens have
    own = [within / half.count for within, half in zip(inside, halves, strict=True)]
    return replace(data, half=replace(_mixed(halves, own), share=sum(inside) / total))


def _sample(parts: Sequence[SiteData], weights: Sequence[float], size: int) -> TokenSample | None:
    """The sample of one site over all parts; None where one of them kept none."""
    kept = [weighted(part.sample, w) for part, w in zip(parts, weights, strict=True) if part.sample is not None]
    return joined(kept, size) if size and len(kept) == len(parts) else None


def _mixed(parts: Sequence[SiteData], weights: Sequence[float]) -> SiteData:
    """`sum w_i n_i C_i / sum w_i n_i`; the arrays of the parts are given up."""
    total = sum(weight * part.count for part, weight in zip(parts, weights, strict=True))
    shares = [weight * part.count / total if total else 0.0 for part, weight in zip(parts, weights, strict=True)]

    def mix(values: list[Tensor]) -> Tensor:
        out = torch.zeros_like(values[0], dtype=torch.float64)
        for value, share in zip(values, shares, strict=True):
            out.add_(value.double(), alpha=share)
        return out

    def mix_panels(panels: list[list[Tensor]]) -> list[Tensor]:
        return [mix(list(rows)) for rows in zip(*panels, strict=True)]

    first = parts[0]
    return SiteData(
        kind=first.kind,
        members=first.members,
        count=sum(part.count for part in parts),
        mean=mix([part.mean for part in parts]),
        second_moment=mix_panels([part.second_moment or [] for part in parts]) if first.second_moment else None,
        diagonal=mix([_given(part.diagonal) for part in parts]) if first.diagonal is not None else None,
        outputs={layer: mix_panels([(part.outputs or {})[layer] for part in parts]) for layer in first.outputs}
        if first.outputs
        else None,
    )


def _given(value: Tensor | None) -> Tensor:
    assert value is not None  # the parts are of one kind
    return value


def _compare(one: Store, other: Store) -> None:
    """StoreError that names the first difference which keeps two stores from being pooled."""

    def refuse(what: str, a: object, b: object) -> None:
        raise StoreError(f"{one.location} and {other.location} differ in {what} ({a} and {b}): they cannot be pooled")

    for name in ("class", "config_hash", "dtype"):
        if one.model.get(name) != other.model.get(name):
            refuse(f"the model's {name}", one.model.get(name), other.model.get(name))
    first, second = one.moments, other.moments
    for layer in [*first, *second]:
        if layer not in first or layer not in second:
            refuse(f"their layers: only one has {layer}", f"{len(first)} layers", len(second))
    for site, layers in first.sites.items():
        if second.sites.get(site) != layers:
            refuse(f"the layers that share the site {site}", layers, second.sites.get(site))
        a, b = first[layers[0]], second[layers[0]]
        if a.kind != b.kind:
            refuse(f"the moment kind of {site}", a.kind, b.kind)
        for layer in layers:
            for name in ("shape", "weight_dtype", "weight_hash"):
                if a.members[layer].get(name) != b.members[layer].get(name):
                    refuse(f"the {name} of {layer}", a.members[layer].get(name), b.members[layer].get(name))


def _attributes(stores: Sequence[Store], weights: Sequence[float]) -> dict[str, Any]:
    """The root attributes of the pool: what the parts have in common, and where each comes from."""
    parts = [
        {"id": part.id, "weight": weight, "corpus": part.corpus, "options": part.options}
        for part, weight in zip(stores, weights, strict=True)
    ]
    options = [part.options or {} for part in stores]
    common = {name: value for name, value in options[0].items() if all(other.get(name) == value for other in options)}
    kept = min(other.get("keep_tokens", 0) for other in options)
    common |= {"keep_tokens": kept} if kept > 0 else {}
    rounded = all(other.get("moment_dtype") == "float32" for other in options)
    known = [[part["id"], part["weight"]] for part in parts]
    return {
        "model": stores[0].model,
        "corpus": {"parts": parts, "tokens": sum(int((part.corpus or {}).get("tokens", 0)) for part in stores)},
        "options": {**common, "moment_dtype": "float32" if rounded else "float64"},
        "prep_version": stores[0].attrs.get("prep_version"),
        "id": content_hash(["pool", json.dumps(known)]),
        "status": "incomplete",
        "run": {"host": platform.node(), "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())},
    }


def _existing(location: str | Path, wanted: str, overwrite: bool) -> Store | None:
    """The store that is there if it is this very pool; an incomplete one of it is begun anew."""
    if not occupied(location):
        return None
    if overwrite:
        check_replaceable(location)
        return None
    existing = open_store(location)
    if existing.id != wanted:
        raise StoreError(f"{location} holds something else: name another --store, or replace it with --overwrite")
    return existing if existing.status == "complete" else None


def _bytes(store: Store, dtype: str) -> int:
    """Of the pooled moments, symmetric matrices counted whole."""
    moments = store.moments
    layouts = [layout for layers in moments.sites.values() for layout in moments[layers[0]].arrays.values()]
    return sum(math.prod(layout.shape) for layout in layouts) * (8 if dtype == "float64" else 4)
