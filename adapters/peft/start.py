"""`prep.peft.get_model`: PEFT LoRA from stored bases, at its start exactly the base model (see inits.py)."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...commands import OF_INPUTS, repair_name
from ...copies import label_of
from ...errors import PrepError, did_you_mean
from ...linear import is_plain
from ...store import Basis, BasisSet, Store, open_store
from ...store.factors import size, size_rows, sizes_by_kind
from ...store.info import aligned
from ...store.ranks import as_pattern, choice
from ..attach import find_layers, refuse_adapted
from ..drift import by_hash, check_copy, check_verify, check_weight, tensors_of
from . import eva
from .inits import INITS, KEPT, mica_variant, open_basis, split_of, start_eva, start_mica, start_repair, start_residual
from .lora import check_stored, check_whole, require_peft

_NO_BUDGET = {  # init -> why its ranks are not chosen by what directions keep of the output
    "eva": "redistributes its ranks itself",
    "lora": "has no basis to choose ranks by",
    "lora_null": "has a basis of one rank",
    "mica": "starts from none of the output",
}


def get_model(
    model: nn.Module,
    store: str | Path | Store,
    init: str,
    r: int | str = 8,
    lora_alpha: float = 8,
    *,
    basis: str | None = None,
    split: str | None = None,
    verify: bool | str = True,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    quiet: bool = False,
    **lora_config: Any,
) -> Any:
    """The model as a PEFT `PeftModel` whose LoRA weights start from the store; the model itself is changed, as by PEFT.

    store: its path, URL, or the opened store. r, lora_alpha, adapter_name, autocast_adapter_dtype: as in PEFT. As r, a
    budget such as "2M" or "95%" chooses a rank for each layer of a residual init, as `ranks` does.
    init: a row of INITS. basis: another basis of the store than the init's own. split: how S is shared between A and B,
    "even", "A" or "B" (see store/factors.py), by default as the init's authors do. verify: check that the basis was
    made from this model's weights. quiet: do not print, by kind of layer, what a learning rate sees of the start: the
    root mean squares of A, of B, and of the update of W by a step of Adam, per learning rate (see store/factors.py).
    lora_config: the other fields of PEFT's LoraConfig; without `target_modules`, the layers of the basis. `save` writes
    what PEFT loads; a plain `save_pretrained` of a residual init lacks the residual, and PEFT refuses to load it.

    PrepError or StoreError before anything is changed: unknown init, missing basis, a layer or rank that is not
    stored, a budget that cannot be met, a quantised base under a residual init, options that change what A and B mean.
    """
    peft = require_peft()
    _check_model(model, init, lora_config)
    _check_budget(r, init, lora_config)
    if init == "mica":
        mica_variant()
    check_verify(verify)
    split = split_of(init, split)
    opened = store if isinstance(store, Store) else open_store(store)
    if init == "repair" and basis is None:
        basis = _repair_of(model)
    bases = None if init == "lora" else open_basis(opened, init, basis)
    if init == "eva":
        lora_config.setdefault("eva_config", peft.EvaConfig())
    start = "eva" if init == "eva" else True
    rank = 1 if isinstance(r, str) else r  # of a budget, until the layers are known
    config = peft.LoraConfig(r=rank, lora_alpha=lora_alpha, init_lora_weights=start, **lora_config)
    ranks = _targets(model, config, _layers(opened, bases))
    adapt = partial(peft.get_peft_model, model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
    if bases is None:
        return _told(adapt(), init, adapter_name, quiet)
    _check_options(config, init)
    check_stored(bases, ranks)
    if init == "lora_null":
        check_whole(bases, ranks)
    if isinstance(r, str):
        ranks = choice(opened, bases, r, list(ranks)).ranks
        config.r, config.rank_pattern = max(ranks.values()), as_pattern(ranks)
    modules = find_layers(model, {layer: bases.layers[layer].shape for layer in ranks})
    asked = _Asked(init, split, bases, ranks, modules, config, adapter_name, verify, adapt)
    adapted = _of_components(opened, asked) if init == "eva" else _of_factors(asked)
    return _told(adapted, init, adapter_name, quiet)


def _told(adapted: Any, init: str, adapter: str, quiet: bool) -> Any:
    """The PEFT model, once a table on stderr has said how large its A, B and updates are; of several processes one."""
    ranks = torch.distributed
    if quiet or (ranks.is_available() and ranks.is_initialized() and ranks.get_rank() > 0):
        return adapted
    sizes = {}
    for name, module in adapted.named_modules():
        if adapter in getattr(module, "lora_A", ()):
            pair = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            sizes[name.removeprefix("base_model.model.")] = size(*pair, module.scaling[adapter])
    for line in aligned(size_rows("rms of A / B / update per rate", {init: sizes_by_kind(sizes)})):
        print(line, file=sys.stderr)
    return adapted


@dataclass(frozen=True)
class _Asked:
    """A start, once all but the base has been checked. ranks, modules: by layer; adapt: makes the PEFT model."""

    init: str
    split: str
    bases: BasisSet
    ranks: dict[str, int]
    modules: dict[str, nn.Module]
    config: Any
    adapter: str
    verify: bool | str
    adapt: partial


def _of_components(store: Store, asked: _Asked) -> Any:
    """The PEFT model with the rows of A from the components of EVA."""
    config = asked.config
    A = eva.components(store, asked.bases, asked.ranks, config.eva_config.rho, config.eva_config.whiten)
    if asked.verify:
        plain = _plain(asked.modules)
        _check_weights(plain, asked.bases, asked.bases.read(plain, 1), asked.verify)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lora with eva initialization")
        adapted = asked.adapt()
    start_eva(adapted, asked.adapter, A, asked.adapt.keywords["autocast_adapter_dtype"])
    return adapted


def _of_factors(asked: _Asked) -> Any:
    """The PEFT model with A and B of every layer from U, S and P."""
    init, modules = asked.init, asked.modules
    if init not in KEPT:
        _check_residual(asked.adapt.args[0], modules, init)
    elif asked.config.use_dora:
        _check_dora(modules)
    read = asked.bases.read(asked.ranks, asked.ranks)
    if asked.verify:
        _check_weights(_plain(modules) if init == "mica" else modules, asked.bases, read, asked.verify)
    adapted = asked.adapt()
    if init == "mica":
        start_mica(adapted, asked.adapter, read)
    elif init == "repair":
        start_repair(adapted, asked.adapter, read, asked.split)
    else:
        start_residual(adapted, asked.adapter, read, init, asked.split)
    return adapted


def _plain(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers whose weights are not packed: a start that leaves the base as it is does not depend on the packing."""
    return {layer: module for layer, module in modules.items() if is_plain(module)}


def _repair_of(model: nn.Module) -> str:
    """The usual name of the basis that repairs a quantised model."""
    label = label_of(model)
    if label is None:
        raise PrepError("the model does not say how it is quantised: name the basis that repairs it, basis=")
    return repair_name(label, {"metric": "full"})


def _check_model(model: nn.Module, init: str, lora_config: Mapping[str, Any]) -> None:
    """Refuse an unknown init, a model that has adapters, and options that the init decides."""
    if init not in INITS:
        raise PrepError(f"no init {init!r}: choose from {', '.join(INITS)}{did_you_mean(init, INITS)}")
    refuse_adapted(model)
    if hasattr(model, "peft_config"):
        raise PrepError("the model has PEFT adapters already: give the base model")
    if "init_lora_weights" in lora_config:
        raise PrepError(f"init_lora_weights is chosen by init={init!r}: leave it out")


def _check_budget(r: int | str, init: str, lora_config: Mapping[str, Any]) -> None:
    """PrepError where ranks are not chosen by a budget."""
    if not isinstance(r, str):
        return
    if init in _NO_BUDGET:
        why = _NO_BUDGET[init]
        raise PrepError(f"r={r!r} is a budget, and init {init!r} {why}: give r as a number, or ranks as rank_pattern")
    if lora_config.get("rank_pattern"):
        raise PrepError(f"r={r!r} chooses the rank of every layer: leave out rank_pattern")


def _layers(store: Store, bases: BasisSet | None) -> list[str]:
    """The layers of the basis, for init lora those of the store."""
    if bases is not None:
        return list(bases.layers)
    return list(store.moments) if store.corpus is not None else [x for b in store.bases.values() for x in b.layers]


def _targets(model: nn.Module, config: Any, layers: list[str]) -> dict[str, int]:
    """The layers that PEFT will adapt with their ranks; without target_modules, those of `layers` that it would."""
    tuners, other = importlib.import_module("peft.tuners.tuners_utils"), importlib.import_module("peft.utils.other")
    names = [name for name, _ in model.named_modules() if name]
    given = config.target_modules
    resolved = copy.copy(config)
    if given is None:
        resolved.target_modules = {layer.rsplit(".", 1)[-1] for layer in layers}
    tuners._maybe_include_all_linear_layers(resolved, model)
    targets = [name for name in names if tuners.check_target_module_exists(resolved, name)]
    if given is None:
        targets = [name for name in targets if name in set(layers)]
        config.target_modules = set(targets)
    if not targets:
        ends = dict.fromkeys(layer.rpartition(".")[2] for layer in layers)
        meant = did_you_mean(given, ends) if isinstance(given, str) else "".join(did_you_mean(x, ends) for x in given)
        raise PrepError(f"target_modules={given!r} matches no layer of the model, such as {layers[0]}{meant}")
    keys = config.rank_pattern.keys()
    return {name: config.rank_pattern.get(other.get_pattern_key(keys, name), config.r) for name in targets}


def _check_options(config: Any, init: str) -> None:
    """Refuse what gives A and B another meaning than `s B A x`, and a scaling that cannot be divided by."""
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    variants += ["layer_replication", "target_parameters", "megatron_config"]
    for option in variants:
        if (option != "use_dora" or init == "mica") and getattr(config, option, None):
            raise PrepError(f"{option} cannot be combined with init {init!r}: leave it out, or take init 'lora'")
    if min([config.lora_alpha, *config.alpha_pattern.values()]) <= 0:
        raise PrepError("lora_alpha and alpha_pattern must be above 0")


def _check_residual(model: nn.Module, modules: Mapping[str, nn.Module], init: str) -> None:
    """PrepError where the base cannot keep the residual: packed weights, or one weight in two places."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for layer, module in modules.items():
        if not is_plain(module):
            kind = type(module.weight).__name__
            raise PrepError(
                f"{layer} is quantised ({kind}) and cannot keep the residual of init {init!r}: quantise the base that "
                "prep.peft.save(..., as_='residual') writes, or take init 'repair' or 'eva'"
            )
        shared = [name for name in users[id(module.weight)] if name != f"{layer}.weight"]
        if shared:
            raise PrepError(f"{layer} shares its weight with {shared[0]}: leave it out of target_modules")


def _check_dora(modules: Mapping[str, nn.Module]) -> None:
    """PrepError where PEFT takes other norms than the base layer's: bitsandbytes repacks weights on a CPU."""
    for layer, module in modules.items():
        kind = type(getattr(module, "weight", None)).__name__
        if kind in ("Params4bit", "Int8Params") and tensors_of(module)[0].device.type == "cpu":
            raise PrepError(
                f"{layer} ({kind}) is on a CPU, where PEFT does not find the norms that use_dora needs: move the model "
                "to a GPU, or leave out use_dora"
            )


def _check_weights(
    modules: Mapping[str, nn.Module], bases: BasisSet, read: Mapping[str, Basis], verify: bool | str
) -> None:
    """PrepError if the basis was made from, or repairs, other weights than the modules'."""
    identity = bases.method["metric"] not in OF_INPUTS
    for layer, module in modules.items():
        if (known := bases.layers[layer].repaired) is not None:
            check_copy(layer, module, known, verify)
            continue
        U, S, P, record = read[layer].U, read[layer].S, read[layer].P, bases.layers[layer]
        made_from = record.weight_hash, record.weight_dtype
        check_weight(layer, module, U, S, P, made_from, identity, by_hash(module, verify))
