"""`prep export`: bases and moments of a store as the files that others read.

    peft-corda             {layer.eigens.S_WC (r,), .U_WC (d_out, r), .V_WC (d_in, r)}: CordaConfig(cache_file=...)
    peft-corda-covariance  {layer: C (d_in, d_in)}: CordaConfig(covariance_file=...)
    peft-eva               {base_model.model.layer: P (rank, d_in)}: initialize_lora_eva_weights(eva_state_dict=...)
    peft-lora              an adapter directory: PeftModel.from_pretrained(base, path, is_trainable=True)
    safetensors            layer.U (d_out, r), layer.S (r,), layer.P (r, d_in)
    imatrix, hessian       moments for quantisers, see adapters/moments.py

V_WC is P.T. The two CorDA files are `torch.save` dictionaries of float32 tensors, the only thing that PEFT takes there;
the others are safetensors. peft-lora is for the unmodified base and starts as it: rank 2r, `A = [A0; A0]`,
`B = [B0, -B0]`; with an eva basis rank r and B = 0. With a basis of the error of a quantised base it repairs that base:
rank r, `s B A = U diag(S) P`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...errors import PrepError, did_you_mean
from ...store import BasisSet, Store, open_store
from ...store.factors import check_split, factors, usual_split
from ..moments import hessians, imatrix, put
from . import eva
from .lora import check_stored, check_whole, describe, require_peft

BASES = {  # form -> the basis it takes unless another one is named
    "peft-corda": "full-p1",
    "peft-corda-covariance": "",
    "peft-eva": "eva",
    "peft-lora": "full",
    "safetensors": "full",
    "imatrix": "",
    "hessian": "",
}
_DIRECTORIES = ("peft-lora", "hessian")


def export(
    store: str | Path | Store,
    to: str,
    path: str | Path,
    *,
    basis: str | None = None,
    rank: int | None = None,
    lora_alpha: float | None = None,
    split: str | None = None,
    rho: float = 2.0,
    overwrite: bool = False,
) -> Path:
    """Write what `to` names (a row of BASES) to `path`: a directory for peft-lora and hessian, a file otherwise.

    store: its path, URL, or the opened store. basis: its name, by default that of the form.
    rank: the r of the LoraConfig that will read it, needed for peft-corda, peft-eva and peft-lora; for safetensors all
    that is stored by default. lora_alpha: of peft-lora, the rank by default; split: how it shares S between A and B,
    "even", "A" or "B" (see store/factors.py), by default as the authors of the method that the basis is made for. rho:
    of EVA's redistribution of ranks, 1 for none. overwrite: replace what is at `path`.

    PrepError or StoreError before anything is written: unknown form, a path that is taken, a missing basis or one of
    the wrong sort, a rank that is not stored, layers without a full second moment (peft-corda-covariance, hessian), or
    without a name in llama.cpp (imatrix).
    """
    if to not in BASES:
        raise PrepError(f"nothing is called --to {to!r}: choose from {', '.join(BASES)}{did_you_mean(to, BASES)}")
    target = Path(path)
    if target.exists() and (not overwrite or target.is_dir() != (to in _DIRECTORIES)):
        raise PrepError(f"{target} is there already: name another path, or replace a {to} with --overwrite")
    opened = store if isinstance(store, Store) else open_store(store)
    if to == "peft-corda-covariance":
        return _write(target, _covariances(opened), torch.save)
    if to in ("imatrix", "hessian"):
        return imatrix(opened, target) if to == "imatrix" else hessians(opened, target)
    bases = opened.bases[basis or BASES[to]]
    _check(bases, to, rank)
    split = usual_split(bases.name) if split is None else split
    check_split(split)
    if to == "safetensors":
        return _write(target, _triples(bases, rank), _safetensors(opened, bases))
    assert rank is not None
    if to == "peft-corda":
        return _write(target, _corda(bases, rank), torch.save)
    if to == "peft-eva":
        rows = eva.components(opened, bases, dict.fromkeys(bases.layers, rank), rho)
        tensors = {f"base_model.model.{layer}": row.float() for layer, row in rows.items()}
        return _write(target, tensors, _safetensors(opened, bases))
    config, tensors = _lora(opened, bases, rank, lora_alpha or rank, split, rho)
    _write(target / "adapter_model.safetensors", tensors, _safetensors(opened, bases))
    config.save_pretrained(target)
    return target


def _check(bases: BasisSet, to: str, rank: int | None) -> None:
    """PrepError where the basis is of the wrong sort for the form, or lacks the rank."""
    components = bases.method["metric"] == "components"
    if (to == "peft-corda" and components) or (to == "peft-eva" and not components):
        raise PrepError(f"basis {bases.name!r} does not serve --to {to}: take {BASES[to]!r}")
    if bases.repair is not None and to not in ("peft-lora", "safetensors"):
        raise PrepError(f"basis {bases.name!r} repairs a quantised model and does not serve --to {to}: take peft-lora")
    if rank is None and to != "safetensors":
        raise PrepError(f"--to {to} needs a --rank: the r of the LoraConfig that will read it")
    if rank is not None:
        check_stored(bases, dict.fromkeys(bases.layers, rank))
        if bases.method["metric"] == "null" and to == "peft-lora":
            check_whole(bases, dict.fromkeys(bases.layers, rank))


def _covariances(store: Store) -> dict[str, Tensor]:
    """C of every layer; the layers of one site share a tensor, which is written once."""
    moments = store.moments
    out: dict[str, Tensor] = {}
    for members in moments.sites.values():
        out |= dict.fromkeys(members, moments[members[0]].second_moment.float())
    return out


def _corda(bases: BasisSet, rank: int) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for layer, basis in bases.read(rank=rank).items():
        parts = {"S_WC": basis.S, "U_WC": basis.U, "V_WC": basis.P.T}
        out |= {f"{layer}.eigens.{part}": _own(value.float()) for part, value in parts.items()}
    return out


def _triples(bases: BasisSet, rank: int | None) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for layer, basis in bases.read(rank=rank).items():
        out |= {f"{layer}.U": _own(basis.U), f"{layer}.S": _own(basis.S), f"{layer}.P": _own(basis.P)}
    return out


def _lora(
    store: Store, bases: BasisSet, rank: int, alpha: float, split: str, rho: float
) -> tuple[Any, dict[str, Tensor]]:
    """LoraConfig and weights of an adapter that leaves the base's outputs as they are at its start, or repairs them."""
    peft = require_peft()
    pairs = {}
    if bases.method["metric"] == "components":
        for layer, A in eva.components(store, bases, dict.fromkeys(bases.layers, rank), rho).items():
            if len(A):
                pairs[layer] = A, torch.zeros(bases.layers[layer].shape[0], len(A))
    else:
        for layer, basis in bases.read(rank=rank).items():
            A, B = factors(basis, rank, alpha / rank, split)
            pairs[layer] = (A, B) if bases.repair else (torch.cat([A, A]), torch.cat([B, -B], dim=1))
    of = bases.repair if bases.repair and bases.repair["source"] == "checkpoint" else store.model
    config = peft.LoraConfig(target_modules=list(pairs), base_model_name_or_path=of["id"])
    config.revision = of.get("revision")
    if str(store.model.get("class", "")).endswith("ForCausalLM"):
        config.task_type = "CAUSAL_LM"
    describe(config, {layer: len(A) for layer, (A, _) in pairs.items()}, dict.fromkeys(pairs, alpha / rank))
    tensors: dict[str, Tensor] = {}
    for layer, (A, B) in pairs.items():
        key = f"base_model.model.{layer}.lora_%s.weight"
        tensors |= {key % "A": _own(A.float()), key % "B": _own(B.float())}
    return config, tensors


def _own(value: Tensor) -> Tensor:
    """A contiguous copy: files hold whole memories, and the bases of one shape share theirs."""
    return value.clone(memory_format=torch.contiguous_format)


def _safetensors(store: Store, bases: BasisSet) -> Callable[[dict[str, Tensor], Path], None]:
    """A writer of safetensors that says where the tensors come from."""
    origin = {"store": store.id, "model": store.model, "basis": bases.name, "hash": bases.hash, "method": bases.method}
    origin |= {"repair": bases.repair} if bases.repair else {}
    metadata = {"format": "pt", "prep": json.dumps(origin)}
    return lambda tensors, path: save_file(tensors, path, metadata)


def _write(target: Path, tensors: dict[str, Tensor], writer: Callable[[Any, Path], object]) -> Path:
    """Write beside the target and rename, so that a file is whole or not there."""
    size = sum(nbytes for nbytes in {value.data_ptr(): value.nbytes for value in tensors.values()}.values())
    return put(target, size, lambda partial: writer(tensors, partial))
