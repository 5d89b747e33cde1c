"""PEFT LoRA from stored bases: `W x = (W - s B A) x + s B A x`, at the start of training exactly the base model.

    residual inits   B = U diag(S/s)^(1/2), A = diag(S/s)^(1/2) P, s = lora_alpha / r; the base keeps W - s B A
    eva              A = components of the centred second moment, B = 0; the base is left as it is
    lora             PEFT's own start, on the same layers

pissa (arXiv 2404.02948), milora (2406.09044), corda_ipm and corda_kpm (2406.05223), whitened (2403.07378) and asvd
(2312.05821) differ in the basis only. The residual is formed from A and B as they are after casting.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PrepError, did_you_mean
from ...files import readable
from ...linear import is_plain, weight_matrix
from ...precision import exact
from ...store import Basis, BasisSet, Store, open_store
from ...store.ranks import as_pattern, choice
from ..attach import find_layers, refuse_adapted
from ..drift import by_hash, check_verify, check_weight
from . import eva
from .lora import check_stored, describe, factors

INITS = {
    "pissa": "identity",
    "milora": "identity-bottom",
    "corda_ipm": "full-p1",
    "corda_kpm": "full-p1-bottom",
    "whitened": "full",
    "asvd": "diagonal",
    "eva": "eva",
    "lora": "",
}
_FORMS = ("lora", "residual")
_WEIGHTS = "*model*.safetensors"  # as PEFT and transformers call them


@dataclass(frozen=True)
class Start:
    """Where training began: the init, its adapter, and layer -> (A (r, d_in), B (d_out, r)) of a residual init."""

    init: str
    adapter: str
    factors: dict[str, tuple[Tensor, Tensor]]


def get_model(
    model: nn.Module,
    store: str | Path | Store,
    init: str,
    r: int | str = 8,
    lora_alpha: float = 8,
    *,
    basis: str | None = None,
    verify: bool | str = True,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    **lora_config: Any,
) -> Any:
    """The model as a PEFT `PeftModel` whose LoRA weights start from the store; the model itself is changed, as by PEFT.

    store: its path, URL, or the opened store. r, lora_alpha, adapter_name, autocast_adapter_dtype: as in PEFT. As r, a
    budget such as "2M" or "95%" chooses a rank for each layer of a residual init, as `ranks` does.
    init: a row of INITS. basis: another basis of the store than the init's own. verify: check that the basis was made
    from this model's weights. lora_config: the other fields of PEFT's LoraConfig; without `target_modules`, the layers
    of the basis. `save` writes what PEFT loads; a plain `save_pretrained` of a residual init lacks the residual, and
    PEFT refuses to load it.

    PrepError or StoreError before anything is changed: unknown init, missing basis, a layer or rank that is not
    stored, a budget that cannot be met, a quantised base under a residual init, options that change what A and B mean.
    """
    peft = require_peft()
    _check_model(model, init, lora_config)
    _check_budget(r, init, lora_config)
    check_verify(verify)
    opened = store if isinstance(store, Store) else open_store(store)
    bases = None if init == "lora" else open_basis(opened, init, basis)
    if init == "eva":
        lora_config.setdefault("eva_config", peft.EvaConfig())
    start = "eva" if init == "eva" else True
    rank = 1 if isinstance(r, str) else r  # of a budget, until the layers are known
    config = peft.LoraConfig(r=rank, lora_alpha=lora_alpha, init_lora_weights=start, **lora_config)
    ranks = _targets(model, config, _layers(opened, bases))
    adapt = partial(peft.get_peft_model, model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
    if bases is None:
        return adapt()
    _check_options(config, init)
    check_stored(bases, ranks)
    if isinstance(r, str):
        ranks = choice(opened, bases, r, list(ranks)).ranks
        config.r, config.rank_pattern = max(ranks.values()), as_pattern(ranks)
    modules = find_layers(model, {layer: bases.layers[layer].shape for layer in ranks})
    if init == "eva":
        A = eva.components(opened, bases, ranks, config.eva_config.rho, config.eva_config.whiten)
        if verify:  # the components do not depend on how the weights are packed
            plain = {layer: module for layer, module in modules.items() if is_plain(module)}
            _check_weights(plain, bases, bases.read(plain, 1), verify)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "lora with eva initialization")
            adapted = adapt()
        _start_eva(adapted, adapter_name, A, autocast_adapter_dtype)
        return adapted
    _check_residual(model, modules, init)
    read = bases.read(ranks, ranks)
    if verify:
        _check_weights(modules, bases, read, verify)
    adapted = adapt()
    _start_residual(adapted, adapter_name, {layer: read.pop(layer) for layer in ranks}, init)
    return adapted


def save(model: Any, path: str | Path, as_: str = "lora") -> None:
    """Write an adapter directory that `PeftModel.from_pretrained` loads where prep is not installed.

    as_ "lora": for the original base, as plain LoRA of rank 2r, `A' = [A; A0]`, `B' = [B, -B0]` with the start A0, B0;
    the scaling is kept per layer, DoRA magnitudes are kept. "residual": for the base in `path/base`, of rank r. An eva
    or lora adapter is written as it is. PrepError if the model is not from `get_model` or is merged.
    """
    if as_ not in _FORMS:
        raise PrepError(f"no form as_={as_!r}: choose from {', '.join(_FORMS)}")
    if not hasattr(model, "peft_config"):
        raise PrepError("this is not a PEFT model: give the one that prep.peft.get_model returned")
    if Path(path).is_file():
        raise PrepError(f"{path} is a file: name a directory")
    start: Start | None = vars(model).get("_prep_start")
    if start is None:
        if as_ == "residual":
            raise PrepError("the base has no residual under this init: save with as_='lora'")
        model.save_pretrained(path)
        readable(Path(path), _WEIGHTS)
        return
    layers = {layer: model.get_submodule(f"base_model.model.{layer}") for layer in start.factors}
    if any(module.merged for module in layers.values()):
        raise PrepError("the adapter is merged into the base: call model.unmerge_adapter() before saving")
    state, config = model.state_dict(), model.peft_config[start.adapter]
    saved = copy.copy(config)
    saved.init_lora_weights = True
    if as_ == "residual":
        base = Path(path) / "base"
        _save_base(model.get_base_model(), base)
        saved.base_model_name_or_path = str(base)
    else:
        scaling = {layer: module.scaling[start.adapter] for layer, module in layers.items()}
        describe(saved, {layer: 2 * len(A) for layer, (A, _) in start.factors.items()}, scaling)
        for layer, (A0, B0) in start.factors.items():
            key = f"base_model.model.{layer}.lora_%s.{start.adapter}.weight"
            A, B = state[key % "A"], state[key % "B"]
            state[key % "A"] = torch.cat([A, A0.to(A)])
            state[key % "B"] = torch.cat([B, -B0.to(B)], dim=1)
    model.peft_config[start.adapter] = saved
    try:
        model.save_pretrained(path, selected_adapters=[start.adapter], state_dict=state)
    finally:
        model.peft_config[start.adapter] = config
    readable(Path(path), _WEIGHTS)


def open_basis(store: Store, init: str, basis: str | None = None) -> BasisSet:
    """The basis an init needs, or the one named instead. PrepError if that is of another sort."""
    bases = store.bases[basis or INITS[init]]
    if (bases.method.get("metric") == "components") != (init == "eva"):
        raise PrepError(f"basis {bases.name!r} does not serve init {init!r}: leave out basis= to take {INITS[init]!r}")
    return bases


def require_peft() -> Any:
    """The PEFT library. PrepError if it is not installed."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise PrepError('PEFT is not installed: pip install "prep-bases[peft]"') from error


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
    if init in ("eva", "lora"):
        why = "redistributes its ranks itself" if init == "eva" else "has no basis to choose ranks by"
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
        if option != "use_dora" and getattr(config, option, None):
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
                "prep.peft.save(..., as_='residual') writes, or take init 'eva'"
            )
        shared = [name for name in users[id(module.weight)] if name != f"{layer}.weight"]
        if shared:
            raise PrepError(f"{layer} shares its weight with {shared[0]}: leave it out of target_modules")


def _check_weights(
    modules: Mapping[str, nn.Module], bases: BasisSet, read: Mapping[str, Basis], verify: bool | str
) -> None:
    """PrepError if the basis was made from other weights than the modules'."""
    identity = bases.method["metric"] != "components"
    for layer, module in modules.items():
        U, S, P, record = read[layer].U, read[layer].S, read[layer].P, bases.layers[layer]
        made_from = record.weight_hash, record.weight_dtype
        check_weight(layer, module, U, S, P, made_from, identity, by_hash(module, verify))


def _start_eva(adapted: Any, adapter: str, A: Mapping[str, Tensor], autocast_adapter_dtype: bool) -> None:
    """Set every A to the components of its layer; B stays 0."""
    state = {f"base_model.model.{layer}": rows for layer, rows in A.items()}
    require_peft().initialize_lora_eva_weights(adapted, eva_state_dict=state, adapter_name=adapter)
    # layers whose rank has changed were built again in the base's dtype
    adapted.base_model._cast_adapter_dtype(adapter, autocast_adapter_dtype)


def _start_residual(adapted: Any, adapter: str, read: dict[str, Basis], init: str) -> None:
    """Set A, B and the base of every layer, and note where they started; `read` is used up."""
    start = {}
    for layer in list(read):
        start[layer] = _start_layer(adapted.get_submodule(f"base_model.model.{layer}"), adapter, read.pop(layer))
    vars(adapted)["_prep_start"] = Start(init, adapter, start)
    # PEFT raises this string on loading a file that it would otherwise add to a base without the residual
    message = f"prep {init}: not written by prep.peft.save, so the base lacks its residual"
    adapted.peft_config[adapter].init_lora_weights = message


@torch.no_grad()
def _start_layer(module: Any, adapter: str, basis: Basis) -> tuple[Tensor, Tensor]:
    """Set A, B and the base of one PEFT layer; a copy of A and B on the CPU."""
    A, B, s = module.lora_A[adapter].weight, module.lora_B[adapter].weight, module.scaling[adapter]
    for parameter, value in zip((A, B), factors(basis, len(A), s), strict=True):
        parameter.copy_(value)
        if not torch.isfinite(parameter).all():
            raise PrepError(
                f"the start has entries up to {float(value.abs().max()):.0e}, for which {parameter.dtype} has no room: "
                "load the model again and leave autocast_adapter_dtype at True"
            )
    base = module.get_base_layer()
    W = weight_matrix(base)
    wide = torch.promote_types(W.dtype, torch.float32)
    with exact():
        W.copy_(torch.addmm(W.to(wide), B.to(wide), A.to(wide), alpha=-s))
    if adapter in module.lora_magnitude_vector:  # DoRA: the norms of W, as the forward will compute them
        magnitude: Any = module.lora_magnitude_vector[adapter]
        magnitude.update_layer(base_layer=base, lora_A=A, lora_B=B, scaling=s)
    return A.detach().to("cpu", copy=True), B.detach().to("cpu", copy=True)


def _save_base(base: nn.Module, path: Path) -> None:
    """Write a base model that PEFT has wrapped, under the names it had before."""
    if not hasattr(base, "save_pretrained"):
        raise PrepError(f"{type(base).__name__} has no save_pretrained: save with as_='lora'")
    state = {}
    for key, value in base.state_dict().items():
        if not any(part in key for part in (".lora_", ".modules_to_save.", ".trainable_tokens_")):
            for wrapper in (".base_layer.", ".original_module.", ".token_adapter."):
                key = key.replace(wrapper, ".")
            state[key] = value
    base.save_pretrained(path, state_dict=state)  # type: ignore[operator]
    readable(path, _WEIGHTS)
