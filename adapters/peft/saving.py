"""`prep.peft.save`: what `get_model` started, as files that plain PEFT loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import PrepError
from ...files import readable
from ...linear import kept_packed
from .inits import Start
from .lora import describe

_FORMS = ("lora", "residual")
_WEIGHTS = "*model*.safetensors"  # as PEFT and transformers call them


def save(model: Any, path: str | Path, as_: str = "lora") -> None:
    """Write an adapter directory that `PeftModel.from_pretrained` loads where prep is not installed.

    as_ "lora": for the original base, as plain LoRA of rank 2r, `A' = [A; A0]`, `B' = [B, -B0]` with the start A0, B0;
    the scaling is kept per layer, DoRA magnitudes are kept. "residual": for the base in `path/base`, of rank r.
    Adapters of other inits (KEPT) are written as they are. PrepError if the model is not from `get_model` or is merged.
    """
    if as_ not in _FORMS:
        raise PrepError(f"no form as_={as_!r}: choose from {', '.join(_FORMS)}")
    if not hasattr(model, "peft_config"):
        raise PrepError("this is not a PEFT model: give the one that prep.peft.get_model returned")
    if Path(path).is_file():
        raise PrepError(f"{path} is a file: name a directory")
    with kept_packed(model):
        _save(model, path, as_)


def _save(model: Any, path: str | Path, as_: str) -> None:
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
