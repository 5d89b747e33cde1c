"""The starts of LoRA from a basis: which basis, what A and B are, what becomes of the base.

    residual inits   s B A = U diag(S) P, shared between A and B as `split` says; the base keeps W - s B A
    repair           the same A and B of the error of a quantised base, which is left as it is: Q x + s B A x
    eva              A = components of the centred second moment, B = 0; the base is left as it is
    mica             A = 0, B = U of the smallest directions, which is not trained; the base is left as it is
    lora             PEFT's own start, on the same layers

pissa (arXiv 2404.02948), milora (2406.09044), corda_ipm and corda_kpm (2406.05223), whitened (2403.07378), asvd
(2312.05821), astra (2602.19111) and lora_null (2503.02659) differ in basis and split only; mica is 2604.01694. The
residual is formed from A and B as they are after casting.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import PrepError
from ...linear import weight_matrix
from ...precision import exact
from ...store import Basis, BasisSet, Store
from ...store.factors import SPLIT_OF, check_split, factors
from .lora import require_peft

INITS = {
    "pissa": "identity",
    "milora": "identity-bottom",
    "corda_ipm": "full-p1",
    "corda_kpm": "full-p1-bottom",
    "whitened": "full",
    "asvd": "diagonal",
    "astra": "full-undamped",
    "lora_null": "null",
    "eva": "eva",
    "mica": "identity-bottom",
    "repair": "repair-*",  # what the model calls its quantisation, such as repair-nf4
    "lora": "",
}
KEPT = ("eva", "mica", "repair", "lora")  # inits that leave the base as it is
UNSPLIT = ("eva", "mica", "lora")  # of which one factor is zero
_METRIC_OF = {"eva": "components", "lora_null": "null"}  # inits that take bases of that metric, which no other takes


@dataclass(frozen=True)
class Start:
    """Where training began: the init, its adapter, and layer -> (A (r, d_in), B (d_out, r)) of a residual init."""

    init: str
    adapter: str
    factors: dict[str, tuple[Tensor, Tensor]]


def split_of(init: str, split: str | None) -> str:
    """How an init shares S between A and B. PrepError for a split of an init that has none."""
    if split is None:
        return SPLIT_OF.get(init, "even")
    check_split(split)
    if init in UNSPLIT:
        raise PrepError(f"init {init!r} has no S to share between A and B: leave out split")
    return split


def open_basis(store: Store, init: str, basis: str | None = None) -> BasisSet:
    """The basis an init needs, or the one named instead. PrepError if that is of another sort."""
    bases = store.bases[basis or INITS[init]]
    metric = bases.method.get("metric")
    taken = metric if metric in _METRIC_OF.values() else None
    if taken != _METRIC_OF.get(init) or (init == "repair") != (bases.repair is not None):
        advice = "name one made with --repair" if init == "repair" else f"leave out basis= to take {INITS[init]!r}"
        raise PrepError(f"basis {bases.name!r} does not serve init {init!r}: {advice}")
    return bases


def start_eva(adapted: Any, adapter: str, A: Mapping[str, Tensor], autocast_adapter_dtype: bool) -> None:
    """Set every A to the components of its layer; B stays 0."""
    state = {f"base_model.model.{layer}": rows for layer, rows in A.items()}
    require_peft().initialize_lora_eva_weights(adapted, eva_state_dict=state, adapter_name=adapter)
    # layers whose rank has changed were built again in the base's dtype
    adapted.base_model._cast_adapter_dtype(adapter, autocast_adapter_dtype)


def start_residual(adapted: Any, adapter: str, read: dict[str, Basis], init: str, split: str) -> None:
    """Set A, B and the base of every layer, and note where they started; `read` is used up."""
    start = {}
    for layer in list(read):
        module = adapted.get_submodule(f"base_model.model.{layer}")
        start[layer] = _start_layer(module, adapter, read.pop(layer), split)
    vars(adapted)["_prep_start"] = Start(init, adapter, start)
    # PEFT raises this string on loading a file that it would otherwise add to a base without the residual
    message = f"prep {init}: not written by prep.peft.save, so the base lacks its residual"
    adapted.peft_config[adapter].init_lora_weights = message


@torch.no_grad()
def _start_layer(module: Any, adapter: str, basis: Basis, split: str) -> tuple[Tensor, Tensor]:
    """Set A, B and the base of one PEFT layer; a copy of A and B on the CPU."""
    A, B, s = _set_factors(module, adapter, basis, split)
    W = weight_matrix(module.get_base_layer())
    wide = torch.promote_types(W.dtype, torch.float32)
    with exact():
        W.copy_(torch.addmm(W.to(wide), B.to(wide), A.to(wide), alpha=-s))
    _set_magnitude(module, adapter)
    return A.detach().to("cpu", copy=True), B.detach().to("cpu", copy=True)


@torch.no_grad()
def start_repair(adapted: Any, adapter: str, read: dict[str, Basis], split: str) -> None:
    """Set A and B of every layer, `s B A = U diag(S) P`; the base stays as it is. `read` is used up."""
    for layer in list(read):
        module = adapted.get_submodule(f"base_model.model.{layer}")
        _set_factors(module, adapter, read.pop(layer), split)
        _set_magnitude(module, adapter)


@torch.no_grad()
def start_mica(adapted: Any, adapter: str, read: dict[str, Basis]) -> None:
    """Set B to U and A to 0 in every layer, with B frozen as PEFT's own MiCA freezes it; `read` is used up."""
    frozen = mica_variant()
    for layer in list(read):
        module, basis = adapted.get_submodule(f"base_model.model.{layer}"), read.pop(layer)
        module.lora_A[adapter].weight.zero_()
        module.lora_B[adapter].weight.copy_(basis.U)
        frozen.init(module, adapter_name=adapter)
    adapted.peft_config[adapter].init_lora_weights = "mica"  # by which PEFT freezes B where it loads the adapter


def mica_variant() -> Any:
    """PEFT's LoRA variant with a frozen B. PrepError where the PEFT that is installed has none."""
    require_peft()
    variant = getattr(importlib.import_module("peft.tuners.lora.variants"), "MiCALinearVariant", None)
    if variant is None:
        raise PrepError("init 'mica' needs PEFT 0.21 or newer: pip install \"peft>=0.21\"")
    return variant


def _set_factors(module: Any, adapter: str, basis: Basis, split: str) -> tuple[Tensor, Tensor, float]:
    """A, B and the scaling of one PEFT layer, once A and B are those of its basis."""
    A, B, s = module.lora_A[adapter].weight, module.lora_B[adapter].weight, module.scaling[adapter]
    for parameter, value in zip((A, B), factors(basis, len(A), s, split), strict=True):
        parameter.copy_(value)
        if not torch.isfinite(parameter).all():
            raise PrepError(
                f"the start has entries up to {float(value.abs().max()):.0e}, for which {parameter.dtype} has no room: "
                "load the model again and leave autocast_adapter_dtype at True"
            )
    return A, B, s


def _set_magnitude(module: Any, adapter: str) -> None:
    """Under DoRA: the norms of the adapted weight, as the forward will compute them."""
    if adapter in module.lora_magnitude_vector:
        A, B, s = module.lora_A[adapter].weight, module.lora_B[adapter].weight, module.scaling[adapter]
        magnitude: Any = module.lora_magnitude_vector[adapter]
        magnitude.update_layer(base_layer=module.get_base_layer(), lora_A=A, lora_B=B, scaling=s)
