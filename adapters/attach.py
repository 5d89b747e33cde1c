"""attach, detach, merge, unmerge: bases of a store -> a trainable model.

An adapted layer computes y = base(x) + core(p) @ U.T, p = x @ P.T (see layer.py, cores.py); the base is frozen.
On a basis of the error of a quantised base it adds the repair: y = base(x) + (core(p) + p * S) @ U.T.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import PrepError, did_you_mean
from ..linear import is_conv1d, is_plain, kept_packed, layer_shape
from ..store import BasisSet, Store, open_store
from ..store.ranks import choice, matching
from .adapter import Adapter, Origin, find_adapter
from .coefficient import Coefficient
from .cores import CORES, Core
from .drift import by_hash, check_copy, check_verify, check_weight, tensors_of
from .layer import AdaptedLinear

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule")


def attach(
    model: nn.Module,
    store: str | Path | Store,
    *,
    core: str | type[Core] | Core = "gain",
    basis: str = "full",
    rank: int | str | Mapping[str, int] | None = None,
    layers: str | None = None,
    verify: bool | str = True,
    **options: Any,
) -> Adapter:
    """Adapt the model's layers with a core on a stored basis; only the core's parameters are left trainable.

    store: its path, URL, or the opened store. core: gain, rotation, ablation, dplr, arrow or dense, or your own Core
    class, with its `options` beside it; or an instance. basis: its name in the store. rank: a slice of the stored one,
    clipped per layer; all of it by default. A budget, such as "2M" or "95%", chooses a rank for each layer as `ranks`
    does: it counts `r (d_in + d_out)`, the size of U and P that are loaded, whatever the core trains of them. Ranks by
    layer are taken as they are, and other layers left alone. layers: a regular expression searched in layer names.
    verify: check that the basis was made from this model's weights, on a GPU by a probe; "hash" compares hashes there,
    too. Call it before DDP or `fully_shard`. `**VARIANTS[name]` gives the arguments of a published adapter.

    A basis made with --repair belongs to the quantised model, whose dequantised weights are compared; its repair is
    added beside the core, so that the start, and the coefficient 0, is the repaired model.

    All or nothing: PrepError or StoreError leaves the model as it was. Nothing is decomposed here.
    """
    refuse_adapted(model)
    check_verify(verify)
    prototype = make_core(core, options)
    opened = store if isinstance(store, Store) else open_store(store)
    bases = opened.bases[basis]
    if isinstance(rank, int) and not 1 <= rank <= bases.method["rank"]:
        instead = "take one of these" if rank < 1 else f"make it with {bases.command(rank)}"
        raise PrepError(f"rank {rank} asked for, basis {basis!r} holds 1 to {bases.method['rank']}: {instead}")
    names = matching(bases, layers)
    if isinstance(rank, str):
        rank = choice(opened, bases, rank, names).ranks
    elif isinstance(rank, Mapping):
        rank = _ranks_of(bases, rank, names)
        names = list(rank)
    modules = find_layers(model, {name: bases.layers[name].shape for name in names})
    origin = Origin(
        store=opened.id,
        basis=basis,
        hash=bases.hash,
        metric=bases.method["metric"],
        weights={name: (bases.layers[name].weight_hash, bases.layers[name].weight_dtype) for name in names},
        repaired={name: known for name in names if (known := bases.layers[name].repaired) is not None},
    )
    parts = {name: (part.U, part.S, part.P) for name, part in bases.read(names, rank).items()}
    return install(model, modules, parts, prototype, origin, verify)


def _ranks_of(bases: BasisSet, ranks: Mapping[str, int], names: list[str]) -> dict[str, int]:
    """The ranks of those of the layers that have one. PrepError for a layer or rank that the basis does not hold."""
    for layer in bases.checked(ranks):
        rank, held = ranks[layer], bases.layers[layer].rank
        if not 1 <= rank <= held:
            raise PrepError(
                f"rank {rank} of {layer} asked for, basis {bases.name!r} holds 1 to {held}: take one of these"
            )
    chosen = {name: ranks[name] for name in names if name in ranks}
    if not chosen:
        raise PrepError("rank= names no layer to adapt: give ranks by layer, as `prep ranks` writes them")
    return chosen


def make_core(core: str | type[Core] | Core, options: dict[str, Any]) -> Core:
    """The core by name or class with its options, or the instance that was given."""
    if isinstance(core, Core):
        if options:
            raise PrepError(f"options belong to the instance: core={type(core).__name__}({', '.join(options)}=...)")
        return core
    cls = CORES.get(core) if isinstance(core, str) else core
    if not (isinstance(cls, type) and issubclass(cls, Core)):
        meant = did_you_mean(core, CORES) if isinstance(core, str) else ""
        raise PrepError(f"no core {core!r}: choose from {', '.join(CORES)}, or give a Core of your own{meant}")
    return cls(**options)


def refuse_adapted(model: nn.Module) -> None:
    """PrepError if the model has an adapter already or is wrapped or sharded for distributed training."""
    for module in model.modules():
        if "_prep_adapter" in vars(module):
            raise PrepError("the model has an adapter already: call prep.detach(model) first")
        kinds = {cls.__name__ for cls in type(module).__mro__}
        if kinds.intersection(_WRAPPERS):
            raise PrepError(
                f"the model is already wrapped by {kinds.intersection(_WRAPPERS).pop()}: adapt it before, "
                "otherwise the gradients of the cores are not reduced"
            )
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise PrepError(f"{name} is already sharded: adapt the model before fully_shard")


def find_layers(model: nn.Module, shapes: dict[str, tuple[int, int]]) -> dict[str, nn.Module]:
    """The model's linear layers by name, checked against the shapes (d_out, d_in) of their bases."""
    modules = dict(model.named_modules())
    for name, shape in shapes.items():
        module = modules.get(name)
        if module is None:
            raise PrepError(_missing(name, modules))
        if not (is_conv1d(module) or (hasattr(module, "in_features") and hasattr(module, "out_features"))):
            raise PrepError(f"{name} is a {type(module).__name__}, not a linear layer: leave it out with layers=")
        if layer_shape(module) != tuple(shape):
            here, there = (f"{a} x {b}" for a, b in (layer_shape(module), shape))
            raise PrepError(f"{name} is {here} in the model and {there} in the basis: give the model it was made from")
        if any(tensor.device.type == "meta" for tensor in tensors_of(module)):
            raise PrepError(f"the weight of {name} is not in memory (meta device): load or offload the model otherwise")
    return {name: modules[name] for name in shapes}


def _missing(name: str, modules: dict[str, nn.Module]) -> str:
    """Why a layer of the basis is no module: it is one of several experts in one weight, or of another model."""
    expert, _, weight = name.rpartition(".")
    parent = expert.rpartition(".")[0]
    owner = modules.get(parent)
    if getattr(getattr(owner, weight, None), "ndim", 0) == 3:
        others = rf"layers=r'^(?!.*\.{parent.rpartition('.')[2]}\.)'"
        return f"{name} is in one weight with the other experts of {type(owner).__name__}: leave them out with {others}"
    return f"the model has no layer {name}, which the basis holds: give the model it was made from"


def install(
    model: nn.Module,
    modules: dict[str, nn.Module],
    parts: dict[str, tuple[Tensor, Tensor, Tensor]],
    core: Core,
    origin: Origin,
    verify: bool | str = True,
    states: dict[str, dict[str, Tensor]] | None = None,
) -> Adapter:
    """Put a core on U (d_out, r), S (r,), P (r, d_in) around each module, with the `states` of its parameters if given.

    The model changes only when all layers are built.
    """
    if verify:
        _check_weights(modules, parts, origin, verify)
    coefficient = Coefficient()
    layers = {}
    for name, module in modules.items():
        U, S, P = parts[name]
        weight = tensors_of(module)[0]
        dtype = weight.dtype if is_plain(module) else U.dtype
        U, P, S = (part.to(weight.device) for part in (U, P, S))
        layers[name] = AdaptedLinear(module, U, P, core.on(S, coefficient), dtype, name in origin.repaired)
        if states is not None:
            _fill(name, layers[name], states[name])
    adapter = Adapter(layers, core, origin, coefficient)
    adapter.requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    _insert(model, adapter)
    vars(model)["_prep_adapter"] = adapter
    return adapter


def detach(model: nn.Module) -> None:
    """Remove the adapter of `model`, merged or not: modules, weights and `requires_grad` are as before `attach`."""
    owner, adapter = find_adapter(model)
    if adapter.originals:
        unmerge(model)
    _remove(owner, adapter)
    del vars(owner)["_prep_adapter"]
    for name, parameter in owner.named_parameters():
        parameter.requires_grad_(adapter.requires_grad.get(name, parameter.requires_grad))


def merge(model: nn.Module) -> None:
    """Fold the adapter into the weights at its present coefficient: W + U @ core(I).T @ P, rounded to W's dtype.

    The model is then a plain one, to be saved with `save_pretrained` or run without overhead. The original weights
    are kept for `unmerge`, which costs their memory. PrepError for quantised or sharded weights.
    """
    owner, adapter = find_adapter(model)
    if adapter.originals:
        raise PrepError("the adapter is merged already")
    for name, layer in adapter.layers.items():
        kind = type(layer.base_layer).__name__
        if not is_plain(layer.base_layer):
            raise PrepError(
                f"{name}, a {kind}, is quantised, sharded or sparse: only whole floating-point weights are merged"
            )
        if "weight" not in layer.base_layer._parameters:  # weight_norm, spectral_norm and the like
            raise PrepError(f"{name}, a {kind}, computes its weight from others: remove its parametrization first")
    merged = {}
    for name, layer in adapter.layers.items():
        delta = layer.matrix().T if is_conv1d(layer.base_layer) else layer.matrix()
        merged[name] = (layer.weight.detach().to(delta.dtype) + delta).to(layer.weight.dtype)
    _remove(owner, adapter)
    for name, layer in adapter.layers.items():
        adapter.originals[name] = layer.weight
        layer.base_layer.weight = nn.Parameter(merged[name], requires_grad=False)


def unmerge(model: nn.Module) -> None:
    """Undo `merge(model)`: the original weights, bitwise, and the adapter beside them. PrepError if not merged."""
    owner, adapter = find_adapter(model)
    if not adapter.originals:
        raise PrepError("the adapter is not merged")
    for name, layer in adapter.layers.items():
        device = layer.weight.device
        layer.base_layer.weight = adapter.originals.pop(name)
        layer.to(device)  # the model may have been moved without it
    _insert(owner, adapter)


def _check_weights(
    modules: dict[str, nn.Module], parts: dict[str, tuple[Tensor, Tensor, Tensor]], origin: Origin, verify: bool | str
) -> None:
    """`check_weight` of every layer, or `check_copy` of one whose quantisation is repaired."""
    for name, module in modules.items():
        if name in origin.repaired:
            check_copy(name, module, origin.repaired[name], verify)
            continue
        check_weight(name, module, *parts[name], origin.weights[name], origin.identity, by_hash(module, verify))


def _fill(name: str, layer: AdaptedLinear, state: dict[str, Tensor]) -> None:
    """Load a core's state; PrepError unless names and shapes agree."""
    takes = {key: tuple(value.shape) for key, value in layer.core.state().items()}
    given = {key: tuple(value.shape) for key, value in state.items()}
    if takes != given:
        raise PrepError(f"{name}: the core {type(layer.core).__name__} takes {takes}, not {given}")
    layer.core.load_state_dict(state, strict=False)  # S is not in it


def _insert(model: nn.Module, adapter: Adapter) -> None:
    """Put the adapted layers into the model and tell those who save or synchronise it what is theirs."""
    for layer in adapter.layers.values():
        layer.train(layer.base_layer.training)
    _replace(model, {layer.base_layer: layer for layer in adapter.layers.values()})
    trained = {f"{name}.core.{key}" for name, layer in adapter.layers.items() for key in layer.core.state()}
    present = vars(model)
    changes: dict[str, Any] = {
        # DDP would give every rank the coefficient of rank 0, before each forward
        "_ddp_params_and_buffers_to_ignore": [
            *present.get("_ddp_params_and_buffers_to_ignore", ()),
            *(f"{name}.core.coeff" for name in adapter.layers),
        ]
    }
    if hasattr(model, "_keys_to_ignore_on_save"):  # a Trainer's checkpoints then hold the cores only
        with kept_packed(model):
            changes["_keys_to_ignore_on_save"] = {key for key in model.state_dict() if key not in trained}
    if hasattr(model, "save_pretrained"):
        changes["save_pretrained"] = functools.partial(_save_pretrained, model.save_pretrained)  # type: ignore[arg-type]
    adapter.attributes = {"present": {key: present[key] for key in changes if key in present}, "new": list(changes)}
    present.update(changes)


def _remove(model: nn.Module, adapter: Adapter) -> None:
    """Undo `_insert`."""
    _replace(model, {layer: layer.base_layer for layer in adapter.layers.values()})
    for key in adapter.attributes["new"]:
        del vars(model)[key]
    vars(model).update(adapter.attributes["present"])


def _replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Replace child modules wherever they are used: a layer that several parents share stays shared."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in new:
                parent._modules[key] = new[child]  # type: ignore[index]


def _save_pretrained(save_pretrained: Callable, *args: Any, **kwargs: Any) -> Any:
    if "state_dict" not in kwargs:  # a Trainer's checkpoint passes one
        warnings.warn(
            "save_pretrained of an adapted model writes the cores only, not a model that can be loaded: "
            "use prep.save, or prep.merge before it for a plain model",
            stacklevel=2,
        )
    return save_pretrained(*args, **kwargs)
