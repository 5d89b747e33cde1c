"""What a decomposition is asked for, checked against the store: method, name, layers, the model's modules for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ...errors import PrepError, StoreError
from ...linear import layer_shape, weight_hash, weight_matrix
from ...store import Bases, BasisSet, LayerMoment, Moments, Store, open_store
from ...store.format.schema import check_writable_name, is_url
from ...store.staging import interrupted, occupied
from ..model import loading
from ..model.experts import expert_layers
from ..model.sites import target_layers
from ..numerics.methods import Method, basis_name, check, method_for
from ..options import DecomposeOptions


@dataclass(frozen=True)
class Request:
    """store: None where none is there and none is needed; layers: those that have moments, None where there are none.

    model_id: path or hub id of the model to load, None for a module.
    """

    options: DecomposeOptions
    method: Method
    name: str
    store: Store | None
    layers: dict[str, LayerMoment] | None
    model_id: str | None

    @property
    def moments(self) -> Moments | None:
        """The moments that the method needs, None where it needs none."""
        return None if self.store is None or check(None, self.method) is None else self.store.moments

    @property
    def calibrated_model(self) -> bool:
        """Whether the model should be the one that the store was calibrated on, rather than one named by --model."""
        return self.store is not None and self.store.corpus is not None and self.model_id == self.store.model["id"]


def open_request(options: DecomposeOptions) -> Request:
    """The request, after checking that the store can serve it. PrepError or StoreError where it cannot."""
    asked = ("metric", "power", "damping", "epsilon", "center", "rank", "select", "solver")
    method = method_for(options.for_, **{name: getattr(options, name) for name in asked})
    name = options.name or basis_name(method)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == "zarr.json":
        raise PrepError(f"--name {name!r} cannot name a basis: use letters, digits, dots and dashes")
    check_writable_name(name, "basis")
    store = _open(options, method)
    layers = _checked_layers(store, method) if store is not None else None
    model_id = None if isinstance(options.model, nn.Module) else calibrated_id(options.model, store)
    return Request(options, method, name, store, layers, model_id)


def same_basis(request: Request) -> BasisSet | None:
    """The basis that is there and was made with the same options, complete or not; None where one is to be begun.

    The store is looked at anew. An unfinished replacement counts where a basis is to be overwritten, a complete one
    does not. StoreError where another basis has the name.
    """
    if request.store is None:
        return None
    bases, name = open_store(request.options.store).bases, request.name
    if name not in bases:
        return None
    if request.options.overwrite and _is_damaged(bases, name):
        return None
    basis = bases.open(name)
    differences = _differences(request, basis)
    if request.options.overwrite:
        if not differences and basis.status != "complete":
            return basis
        pending = bases.pending(name)
        return pending if pending is not None and not _differences(request, pending) else None
    if _covers(basis, request, differences):
        return basis
    if differences:
        raise StoreError(
            f"{request.options.store} holds a basis {name!r} with other options ({'; '.join(differences)}): "
            "give this one another --name, or replace it with --overwrite"
        )
    return basis


def _is_damaged(bases: Bases, name: str) -> bool:
    try:
        bases.open(name)
    except StoreError:
        return True
    return False


def _covers(basis: BasisSet, request: Request, differences: list[str]) -> bool:
    """Whether a complete basis is the requested one with more directions: a slice of it will do."""
    only_rank = len(differences) == 1 and differences[0].startswith("rank:")
    return basis.status == "complete" and only_rank and basis.method["rank"] > request.method.rank


def made_already(request: Request) -> str:
    """The line for a basis that is there already."""
    basis = open_store(request.options.store).bases[request.name]
    rank = basis.method["rank"]
    if rank > request.method.rank:
        return f"basis {request.name!r} is there already at rank {rank}: any rank up to {rank} is a slice of it"
    return f"basis {request.name!r} is complete and was made with the same options: nothing to do"


def is_made(request: Request) -> bool:
    """Whether the basis is there, complete and of the same options, from weights that have not been touched since."""
    basis = same_basis(request)
    if basis is None or basis.status != "complete" or request.options.overwrite:
        return False
    assert request.store is not None
    if request.model_id is None:
        modules = dict(request.options.model.named_modules())  # type: ignore[union-attr]
        return all(layer in modules and _is_of(basis, layer, modules[layer]) for layer in basis.layers)
    if request.model_id != request.store.model["id"]:
        return False
    stamp = loading.checkpoint_stamp(request.model_id, None)
    return stamp is not None and stamp == (request.store.attrs.get("run") or {}).get("files")


def check_same_weights(request: Request, basis: BasisSet, modules: Mapping[str, nn.Module]) -> None:
    """StoreError if a complete basis was made from other weights than the modules have."""
    for layer in basis.layers:
        if layer not in modules or not _is_of(basis, layer, modules[layer]):
            raise StoreError(
                f"basis {request.name!r} was made from other weights of {layer} than the model has now: "
                "give this one another --name, or replace it with --overwrite"
            )


def load_layers(request: Request) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The model, and its module for every layer to decompose, checked for shape and for the weights calibrated on."""
    options, store = request.options, request.store
    if isinstance(options.model, nn.Module):
        net = options.model
    else:
        net = loading.load_model(
            str(request.model_id),
            revision=options.revision if options.model or store is None else store.model.get("revision"),
            dtype=store.model["dtype"] if store is not None else "float32",
            device="cpu",
            trust_remote_code=options.trust_remote_code,
        )
    modules = _matching_modules(request, net)
    for layer, module in modules.items():
        try:
            finite = torch.isfinite(weight_matrix(module)).all()
        except PrepError as error:
            raise PrepError(f"{layer}: {error}") from error
        if not finite:
            raise PrepError(f"{layer}: the weight holds NaN or Inf: check the checkpoint")
    return net, modules


def _is_of(basis: BasisSet, layer: str, module: nn.Module) -> bool:
    return basis.layers[layer].weight_hash == weight_hash(weight_matrix(module))


def _differences(request: Request, basis: BasisSet) -> list[str]:
    """How the way a basis was made differs from the request."""
    if request.model_id is None:
        of_basis, asked = basis.model.get("config_hash"), loading.model_hash(request.options.model)  # type: ignore[arg-type]
    else:
        of_basis, asked = basis.model.get("id"), request.model_id
    have: dict[str, Any] = {**basis.method, "dtype": basis.dtype, "model": of_basis}
    wanted: dict[str, Any] = {**asdict(request.method), "dtype": request.options.dtype, "model": asked}
    return [
        f"{key}: {have.get(key)!r} there, {wanted[key]!r} asked for" for key in wanted if have.get(key) != wanted[key]
    ]


def calibrated_id(model: Any, store: Store | None) -> str:
    """Where the model is loaded from: `model`, or what the store was calibrated on."""
    if model:
        return loading.absolute_if_local(model)
    known: dict[str, Any] = store.model if store is not None else {}
    if not known.get("id"):
        where = store.location if store is not None else "the store"
        raise StoreError(
            f"{where} was calibrated on a module, {known.get('class')}, which it cannot load: "
            "pass it in Python, prep.decompose(store, model=module)"
        )
    return str(known["id"])


def _open(options: DecomposeOptions, method: Method) -> Store | None:
    """The store, or None where none is there and none is needed."""
    location = options.store
    needed = method.metric != "identity" or method.select == "activation" or options.model is None
    absent = not is_url(location) and not occupied(location) and interrupted(location) is None
    if not needed and absent:
        return None
    if absent:
        hint = "run `prep covariance --model X --data Y` first"
        if method.metric == "identity" and method.select != "activation":
            hint += ", or name the --model (metric identity needs no covariance)"
        raise StoreError(f"no store at {location}: {hint}")
    return open_store(location)


def _checked_layers(store: Store, method: Method) -> dict[str, LayerMoment] | None:
    """The layers to decompose with their moments, after checking that these can serve the method."""
    if store.corpus is None:
        reason = check(None, method)
        if reason:
            raise StoreError(f"{store.location} holds no moments: {reason}")
        return None
    moments = store.moments
    layers: dict[str, LayerMoment] = {}
    for site in moments.sites.values():
        for layer in site:
            layers[layer] = moments[layer]
            reason = check(layers[layer].kind, method)
            if reason:
                raise StoreError(f"{layer}: {reason} into another --store, or with --overwrite")
    return layers


def _matching_modules(request: Request, net: nn.Module) -> dict[str, nn.Module]:
    """The model's modules for the store's layers."""
    store, layers = request.store, request.layers
    if layers is None:
        if store is not None and store.model.get("config_hash") not in (None, loading.model_hash(net)):
            raise PrepError(f"{store.location} is of another model ({store.model['id']}): name another --store")
        return target_layers(net)
    modules: dict[str, nn.Module] = {**dict(net.named_modules()), **expert_layers(net)}
    for layer, moment in layers.items():
        if layer not in modules:
            raise PrepError(f"the model has no layer {layer}, which the store was calibrated on: give its --model")
        shape = layer_shape(modules[layer])
        if shape != moment.shape:
            raise PrepError(
                f"{layer} is {shape[0]} x {shape[1]} in the model and {moment.shape[0]} x {moment.shape[1]} in the "
                "store: give the --model that was calibrated"
            )
    for layer, moment in layers.items():
        _check_calibrated(layer, modules[layer], moment, request.calibrated_model)
    return {layer: modules[layer] for layer in layers}


def _check_calibrated(layer: str, module: nn.Module, moment: LayerMoment, same_weights: bool) -> None:
    """PrepError where a module lacks the weights that were calibrated. same_weights: it is meant to have them."""
    if moment.kind != "output" and not same_weights:
        return
    if weight_hash(weight_matrix(module)) == moment.weight_hash:
        return
    if moment.kind == "output":
        raise PrepError(
            f"{layer} has an output moment of other weights than this model's: give the --model that was calibrated"
        )
    raise PrepError(
        f"{layer} has other weights than the store was calibrated on: run `prep covariance --overwrite` with its "
        "options, or give the --model that was calibrated"
    )
