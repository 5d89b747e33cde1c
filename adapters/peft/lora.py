"""What every LoRA made of a basis needs: its configuration, and that the basis holds its layers and ranks."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...errors import PrepError
from ...store import BasisSet


def require_peft() -> Any:
    """The PEFT library. PrepError if it is not installed."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise PrepError('PEFT is not installed: pip install "prep-bases[peft]"') from error


def describe(config: Any, ranks: Mapping[str, int], scaling: Mapping[str, float]) -> None:
    """Make a LoraConfig describe plain LoRA of the given rank and scaling per layer, without rsLoRA."""
    alphas = {layer: _as_int(rank * scaling[layer]) for layer, rank in ranks.items()}
    config.use_rslora, config.init_lora_weights = False, True
    config.r, config.lora_alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    config.rank_pattern = {layer: rank for layer, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {layer: alpha for layer, alpha in alphas.items() if alpha != config.lora_alpha}


def check_stored(bases: BasisSet, ranks: Mapping[str, int]) -> None:
    """PrepError for a targeted layer or a rank that the basis does not hold."""
    missing = [layer for layer in ranks if layer not in bases.layers]
    if missing:
        raise PrepError(
            f"basis {bases.name!r} lacks {len(missing)} of the {len(ranks)} targeted layers, such as {missing[0]}: "
            "narrow target_modules, or calibrate them too (`prep covariance --targets`)"
        )
    for layer, rank in ranks.items():
        record = bases.layers[layer]
        if rank < 1 or rank > min(record.shape):
            raise PrepError(
                f"rank {rank} does not fit {layer}, which has 1 to {min(record.shape)}: lower it or set rank_pattern"
            )
        if rank > record.rank:
            raise PrepError(
                f"rank {rank} asked for, basis {bases.name!r} holds {record.rank} of {layer}: {bases.command(rank)}"
            )


def check_whole(bases: BasisSet, ranks: Mapping[str, int]) -> None:
    """PrepError for a rank that is not the stored one: bases of metric null are those of a number of eigenvectors."""
    for layer, rank in ranks.items():
        if rank != bases.layers[layer].rank:
            raise PrepError(
                f"rank {rank} asked for, basis {bases.name!r} is made of {bases.layers[layer].rank} eigenvectors of "
                f"{layer}, and a slice of it is another start: {bases.command(rank)}"
            )


def _as_int(value: float) -> float:
    """The number, as an int where it is one up to rounding."""
    return round(value) if abs(value - round(value)) < 1e-9 else value
