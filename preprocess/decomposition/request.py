"""What a decomposition is asked for, checked against the store: method, name, layers, the model's modules for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ...commands import OF_INPUTS, repair_name
from ...errors import PrepError, StoreError
from ...linear import layer_shape
from ...store import LayerMoment, Moments, Store, open_store
from ...store.format.schema import check_writable_name, is_url
from ...store.staging import interrupted, occupied
from ..hub import absolute_if_local
from ..model import loading
from ..model.checkpoint import Unserved, open_model
from ..model.experts import expert_layers
from ..model.quantised import Copy
from ..model.sites import target_layers
from ..numerics.methods import Method, basis_name, check, check_tokens, method_for
from ..options import DecomposeOptions
from ..progress import say


@dataclass(frozen=True)
class Request:
    """store: None where none is there and none is needed; layers: those that have moments, None where there are none.

    model_id: path or hub id of the model to load, None for a module. repair: the copy whose error is decomposed.
    """

    options: DecomposeOptions
    method: Method
    name: str
    store: Store | None
    layers: dict[str, LayerMoment] | None
    model_id: str | None
    repair: Copy | None = None

    @property
    def moments(self) -> Moments | None:
        """The moments that the method needs, None where it needs none."""
        return None if self.store is None or check(None, self.method) is None else self.store.moments

    @property
    def revision(self) -> str | None:
        """Of the model to load: the store's, or the one asked for with a model."""
        if self.options.model is None and self.store is not None:
            return self.store.model.get("revision")
        return self.options.revision

    def stamp(self, net: nn.Module) -> str | None:
        """What identifies the files of the model to load, once it is (`checkpoint_stamp`); None for a module."""
        return None if self.model_id is None else loading.checkpoint_stamp(self.model_id, getattr(net, "config", None))

    @property
    def calibrated_model(self) -> bool:
        """Whether the model should be the one that the store was calibrated on, rather than one named by --model."""
        return self.store is not None and self.store.corpus is not None and self.model_id == self.store.model["id"]


def open_requests(options: DecomposeOptions) -> list[Request]:
    """A request for every basis, after checking that the store can serve it; methods of one basis make one.

    PrepError or StoreError where it cannot.
    """
    repair = None if options.repair is None else Copy(options.repair, options.trust_remote_code)
    methods = {_name(options, method, repair): method for method in _methods(options)}
    store = _open(options, list(methods.values()))
    layers = _checked_layers(store, list(methods.values()), repair) if store is not None else None
    model_id = None if isinstance(options.model, nn.Module) else calibrated_id(options.model, store)
    return [Request(options, method, name, store, layers, model_id, repair) for name, method in methods.items()]


def basis_names(options: DecomposeOptions, repair: Copy | None) -> list[str]:
    """The name of the basis of every method that was asked for."""
    return [_name(options, method, repair) for method in _methods(options)]


def _methods(options: DecomposeOptions) -> list[Method]:
    asked = ("metric", "power", "damping", "epsilon", "center", "rank", "select", "pooling", "solver")
    given = {name: getattr(options, name) for name in asked}
    methods = [method_for(published, **given) for published in options.methods]
    for method in methods if options.repair is not None else ():
        if method.metric in OF_INPUTS or method.select != "top":
            said = f"metric {method.metric}" if method.metric in OF_INPUTS else f"select {method.select}"
            raise PrepError(f"--repair takes the top of the error, not {said}: leave out --for and --select")
    return methods


def _name(options: DecomposeOptions, method: Method, repair: Copy | None) -> str:
    usual = basis_name(method) if repair is None else repair_name(repair.said["name"], asdict(method))
    name = options.name or usual
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == "zarr.json":
        raise PrepError(f"--name {name!r} cannot name a basis: use letters, digits, dots and dashes")
    return check_writable_name(name, "basis")


def load_layers(requests: Sequence[Request], quiet: bool = True) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The model, and its module for every layer to decompose, checked for shape; weights are read when they are asked
    for (`weigher`), layer by layer from the checkpoint where that is possible.

    requests: of one store, model and set of layers.
    """
    request = requests[0]
    options, store = request.options, request.store
    if isinstance(options.model, nn.Module):
        net = options.model
    else:
        net = _read_from_checkpoint(request, store.model["dtype"] if store is not None else "float32", quiet)
    modules = _matching_modules(request, net)
    if request.repair is not None:
        request.repair.check(modules)
    return net, modules


def _read_from_checkpoint(request: Request, dtype: str, quiet: bool) -> nn.Module:
    """The model that a request names: without its weights, or loaded whole, which a line says."""
    model, trust = str(request.model_id), request.options.trust_remote_code
    try:
        return open_model(model, request.revision, loading.DTYPES.get(dtype, torch.float32), trust)
    except Unserved as reason:
        say(f"{model} is loaded whole: {reason}", quiet)
    return loading.load_model(model, revision=request.revision, dtype=dtype, device="cpu", trust_remote_code=trust)


def calibrated_id(model: Any, store: Store | None) -> str:
    """Where the model is loaded from: `model`, or what the store was calibrated on."""
    if model:
        return absolute_if_local(model)
    known: dict[str, Any] = store.model if store is not None else {}
    if not known.get("id"):
        where = store.location if store is not None else "the store"
        raise StoreError(
            f"{where} was calibrated on a module, {known.get('class')}, which it cannot load: "
            "pass it in Python, prep.decompose(store, model=module)"
        )
    return str(known["id"])


def _open(options: DecomposeOptions, methods: Sequence[Method]) -> Store | None:
    """The store, or None where none is there and none is needed."""
    location = options.store
    of_moments = any(check(None, method) is not None for method in methods)
    needed = of_moments or options.model is None
    absent = not is_url(location) and not occupied(location) and interrupted(location) is None
    if not needed and absent:
        return None
    if absent:
        hint = "run `prep covariance --model X --data Y` first"
        if not of_moments:
            hint += ", or name the --model (metric identity needs no covariance)"
        raise StoreError(f"no store at {location}: {hint}")
    return open_store(location)


def _checked_layers(
    store: Store, methods: Sequence[Method], repair: Copy | None = None
) -> dict[str, LayerMoment] | None:
    """The layers to decompose with their moments, after checking that these can serve all methods."""
    if store.corpus is None:
        reason = next(filter(None, (check(None, method) for method in methods)), None)
        if reason:
            raise StoreError(f"{store.location} holds no moments: {reason}")
        return None
    moments = store.moments
    layers: dict[str, LayerMoment] = {}
    for site in moments.sites.values():
        for layer in site:
            layers[layer] = moments[layer]
            kind = layers[layer].kind
            reason = next(filter(None, (check(kind, method) for method in methods)), None)
            if repair is not None and kind == "output" and any(method.metric == "full" for method in methods):
                reason = (
                    "the moment of its output tells W C W^T, not E C E^T: take --metric diagonal, or run "
                    "`prep covariance --moment full`"
                )
            if reason:
                raise StoreError(f"{layer}: {reason} into another --store, or with --overwrite")
            sampled = layers[layer].sampled > 0
            reason = next(filter(None, (check_tokens(sampled, method) for method in methods)), None)
            if reason:
                raise StoreError(f"{layer}: {reason}: {_keep_tokens(store)}")
    return layers


def _keep_tokens(store: Store) -> str:
    """What brings a store a sample of tokens."""
    corpus = store.corpus or {}
    if "parts" in corpus:
        return "calibrate the parts of this pool with `--keep-tokens 4096` and pool them again"
    if corpus.get("source") == "batches":
        return "calibrate again with overwrite=True, keep_tokens=4096"
    return "run its `prep covariance` command again with `--overwrite --keep-tokens 4096`"


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
    return {layer: modules[layer] for layer in layers}
