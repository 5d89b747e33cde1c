"""`prep decompose`: the whitened SVD of every layer of a store.

Moments are read once per site, the numerics are whitening.py's; this file moves the data and keeps the records.
"""

from __future__ import annotations

import contextlib
import platform
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import PrepError, StoreError
from ..linear import dtype_name, layer_shape, weight_hash, weight_matrix
from ..store import BasisSet, BasisWriter, LayerMoment, LayerRecord, Moments, Store, create_store, open_store
from ..store.bases import LayerDone
from ..store.format.schema import content_hash, disk_guard, is_url
from ..store.lock import writer_lock
from .decomposition.workers import cost, decomposed
from .distributed import Ranks, dealt, joined
from .model import loading as models
from .model.experts import expert_layers
from .model.sites import target_layers
from .numerics.methods import Method, basis_name, check, method_for, one_of
from .numerics.whitening import WhitenedSVD, spectrum_size
from .progress import Progress, say

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def decompose(
    store: str | Path = "prep.zarr",
    *,
    for_: str | None = None,
    name: str | None = None,
    metric: str | None = None,
    power: float | None = None,
    damping: float | None = None,
    epsilon: float | None = None,
    center: bool | None = None,
    rank: int = 256,
    select: str | None = None,
    solver: str = "auto",
    dtype: str = "float32",
    model: str | nn.Module | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    break_lock: bool = False,
    trust_remote_code: bool = False,
    quiet: bool = False,
    distributed: bool = False,
) -> BasisSet | None:
    """Decompose every layer of the store into the basis `name` and return it; the options are the command's.

    for_: a published method (a row of PUBLISHED); metric, power, select and center override its choices. model: a path,
    hub id or module; by default the store's, which it has if it was calibrated by path or hub id. With metric
    identity and `model`, no store need exist. A basis that is there with the same options is returned, an incomplete
    one resumed, another one refused unless `overwrite`.

    distributed: every process of a torchrun job, or of an initialised torch.distributed, calls it alike, sees the store
    and takes some of the layers; rank 0 returns the basis, the others None.

    Raises PrepError for bad input and StoreError where the store cannot serve it.
    """
    method = method_for(
        for_,
        metric=metric,
        power=power,
        damping=damping,
        epsilon=epsilon,
        center=center,
        rank=rank,
        select=select,
        solver=solver,
    )
    name = name or basis_name(method)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == "zarr.json":
        raise PrepError(f"--name {name!r} cannot name a basis: use letters, digits, dots and dashes")
    one_of("--dtype", dtype, tuple(DTYPE_BYTES))
    with joined(distributed) as ranks:
        quiet = quiet or ranks.rank > 0
        done = None
        with ranks.together():
            found = _open(store, method, model)
            layers = _checked_layers(found, method) if found is not None else None
            if found is not None and name in found.bases:
                done = _existing(found, name, method, dtype, model, overwrite, quiet)
        if ranks.first(lambda: done is not None and done.status == "complete"):
            return done

        with ranks.together():
            if model is None and found is not None:
                revision = found.model.get("revision")
            if isinstance(model, nn.Module):
                net, source = model, None
            else:
                source = _source(model, found)
                net = models.load_model(
                    source,
                    revision=revision,
                    dtype=found.model["dtype"] if found is not None else "float32",
                    device="cpu",
                    trust_remote_code=trust_remote_code,
                )
            modules = _matching_modules(net, layers, found)
            for layer, module in modules.items():
                if not torch.isfinite(weight_matrix(module)).all():
                    raise PrepError(f"{layer}: the weight holds NaN or Inf: check the checkpoint")
        shapes = {layer: layer_shape(module) for layer, module in modules.items()}
        groups = _groups(shapes, method)
        with contextlib.ExitStack() as held, disk_guard(store, _bytes(groups, dtype) if ranks.rank == 0 else 0):

            def begin() -> list[str]:
                """Take the lock, begin or find the basis, and list the layers to do."""
                held.enter_context(writer_lock(store, break_lock))
                if found is None:
                    _store_without_moments(store, net, source, revision)
                root = open_store(store, "r+").root
                if done is None:
                    described = models.describe(net, source, revision)
                    BasisWriter.create(root, name, method=asdict(method), dtype=dtype, model=described, groups=groups)
                    return list(modules)
                return [
                    layer
                    for layer, module in modules.items()
                    if layer not in done.layers or done.layers[layer].weight_hash != weight_hash(weight_matrix(module))
                ]

            todo = ranks.first(begin)
            writer = BasisWriter.resume(open_store(store, "r+").root, name)
            moments = None if found is None or check(None, method) is None else found.moments
            own = _share(todo, moments, shapes, ranks)

            def results() -> Iterator[LayerDone]:
                mine = {layer: modules[layer] for layer in own}
                for layer, weight, result in decomposed(moments, mine, method, ranks.local_size):
                    group = groups[shapes[layer]]
                    record = _record(result, shapes[layer], group["layers"].index(layer), weight)
                    U, S, P, spectrum = map(torch.from_numpy, (result.U, result.S, result.P, result.spectrum))
                    yield writer.put(layer, U, S, P, spectrum[: group["spectrum"]], record)

            try:
                with Progress(f"decompose {name}", len(todo), "layers", quiet) as progress:
                    for layer_done in ranks.brought_together(results()):
                        writer.note(layer_done)
                        progress.advance(1)
            finally:
                if ranks.rank == 0:
                    writer.flush()  # an interruption loses no layer
            ranks.first(writer.finish)
        return open_store(store).bases[name] if ranks.rank == 0 else None


def _share(todo: list[str], moments: Moments | None, shapes: Mapping[str, tuple[int, int]], ranks: Ranks) -> list[str]:
    """The layers of this rank: whole sites, so that each moment is read once, and about the same work for all."""
    sites = moments.sites if moments is not None else {layer: [layer] for layer in todo}
    site = {layer: name for name, layers in sites.items() for layer in layers}
    work: dict[str, int] = {}
    for layer in todo:
        work[site[layer]] = work.get(site[layer], 0) + cost(shapes[layer])
    rank = dealt(work, ranks.size)
    return [layer for layer in todo if rank[site[layer]] == ranks.rank]


def _source(model: str | None, found: Store | None) -> str:
    """Where the model is loaded from: `model`, or what the store was calibrated on."""
    if model:
        return models.absolute_if_local(model)
    known: dict[str, Any] = found.model if found is not None else {}
    if not known.get("id"):
        where = found.location if found is not None else "the store"
        raise StoreError(
            f"{where} was calibrated on a module, {known.get('class')}, which it cannot load: "
            "pass it in Python, prep.decompose(store, model=module)"
        )
    return str(known["id"])


def _open(location: str | Path, method: Method, model: str | nn.Module | None) -> Store | None:
    """The store, or None where none is there and none is needed."""
    needed = method.metric != "identity" or method.select == "activation" or model is None
    absent = not is_url(location) and not Path(location).exists()
    if not needed and absent:
        return None
    if absent:
        hint = "run `prep covariance --model X --data Y` first"
        if method.metric == "identity" and method.select != "activation":
            hint += ", or name the --model (metric identity needs no covariance)"
        raise StoreError(f"no store at {location}: {hint}")
    return open_store(location)


def _checked_layers(found: Store, method: Method) -> dict[str, LayerMoment] | None:
    """The layers to decompose with their moments, after checking that these can serve the method."""
    if found.corpus is None:
        reason = check(None, method)
        if reason:
            raise StoreError(f"{found.location} holds no moments: {reason}")
        return None
    moments = found.moments
    layers: dict[str, LayerMoment] = {}
    for site in moments.sites.values():
        for layer in site:
            layers[layer] = moments[layer]
            reason = check(layers[layer].kind, method)
            if reason:
                raise StoreError(f"{layer}: {reason} into another --store, or with --overwrite")
    return layers


def _existing(
    found: Store, name: str, method: Method, dtype: str, model: str | nn.Module | None, overwrite: bool, quiet: bool
) -> BasisSet | None:
    """The basis of that name if it was made with the same options, complete or not."""
    if overwrite:
        return None
    basis = found.bases.open(name)
    if isinstance(model, nn.Module):  # it has no id
        of_basis, asked = basis.model.get("config_hash"), models.model_hash(model)
    else:
        of_basis, asked = basis.model.get("id"), models.absolute_if_local(model) if model else found.model["id"]
    have: dict[str, Any] = {**basis.method, "dtype": basis.dtype, "model": of_basis}
    wanted: dict[str, Any] = {**asdict(method), "dtype": dtype, "model": asked}
    differences = [
        f"{key}: {have.get(key)!r} there, {wanted[key]!r} asked for" for key in wanted if have.get(key) != wanted[key]
    ]
    if differences:
        raise StoreError(
            f"{found.location} holds a basis {name!r} with other options ({'; '.join(differences)}): "
            "give this one another --name, or replace it with --overwrite"
        )
    if basis.status == "complete":
        say(f"basis {name!r} is complete and was made with the same options: nothing to do", quiet)
    else:
        say(f"basis {name!r}: resumed after {len(basis.layers)} of {len(basis.expected)} layers", quiet)
    return basis


def _matching_modules(
    net: nn.Module, layers: dict[str, LayerMoment] | None, found: Store | None
) -> dict[str, nn.Module]:
    """The model's modules for the store's layers, checked for shape and, for output moments, for their weights."""
    if layers is None:
        if found is not None and found.model.get("config_hash") not in (None, models.model_hash(net)):
            raise PrepError(f"{found.location} is of another model ({found.model['id']}): name another --store")
        return target_layers(net)
    modules: dict[str, nn.Module] = {**dict(net.named_modules()), **expert_layers(net)}
    for layer, moment in layers.items():
        if layer not in modules:
            raise PrepError(f"the model has no layer {layer}, which the store was calibrated on: give its --model")
        shape = layer_shape(modules[layer])
        if shape != moment.shape:
            raise PrepError(
                f"{layer} is {shape[0]} x {shape[1]}"
                f" in the model and {moment.shape[0]} x {moment.shape[1]} in the store: "
                "give the --model that was calibrated"
            )
        if moment.kind == "output" and weight_hash(weight_matrix(modules[layer])) != moment.weight_hash:
            raise PrepError(
                f"{layer} has an output moment of other weights than this model's: give the --model that was calibrated"
            )
    return {layer: modules[layer] for layer in layers}


def _groups(shapes: dict[str, tuple[int, int]], method: Method) -> dict[tuple[int, int], dict[str, Any]]:
    """Layers by shape, with the rank and the length of the spectrum that all of one shape have."""
    groups: dict[tuple[int, int], dict[str, Any]] = {}
    for layer, shape in shapes.items():
        rank = min(method.rank, *shape)
        entry = groups.setdefault(shape, {"layers": [], "rank": rank, "spectrum": spectrum_size(shape, method)})
        entry["layers"].append(layer)
    return groups


def _bytes(groups: dict[tuple[int, int], dict[str, Any]], dtype: str) -> int:
    return sum(
        len(g["layers"]) * (g["rank"] * (d_out + d_in) * DTYPE_BYTES[dtype] + 8 * (g["rank"] + g["spectrum"]))
        for (d_out, d_in), g in groups.items()
    )


def _record(result: WhitenedSVD, shape: tuple[int, int], index: int, W: Tensor) -> LayerRecord:
    return LayerRecord(
        shape=shape,
        index=index,
        rank=len(result.S),
        energy=float(result.energy),
        tail=float(result.tail),
        numerical_rank=int(result.numerical_rank),
        solver=result.solver,
        bound=float(result.bound),
        weight_hash=weight_hash(W),
        weight_dtype=dtype_name(W.dtype),
    )


def _store_without_moments(location: str | Path, net: nn.Module, source: str | None, revision: str | None) -> Store:
    """A store that holds bases only, for metric identity."""
    model = models.describe(net, source, revision)
    return create_store(
        location,
        {
            "model": model,
            "corpus": None,
            "options": None,
            "prep_version": __version__,
            "id": content_hash([str(sorted(model.items(), key=str))]),
            "status": "complete",
            "run": {"host": platform.node(), "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())},
        },
    )
