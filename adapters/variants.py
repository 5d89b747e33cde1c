"""The published adapters as arguments of `attach`: a core, a basis and their defaults.

AntiPaSTO: arXiv 2601.07473; LoRA-XS: arXiv 2405.17604. Change one with `{**VARIANTS[name], "rank": 64}`.
"""

from typing import Any

_ANTIPASTO = {"basis": "identity-activation", "rank": 256}

VARIANTS: dict[str, dict[str, Any]] = {
    "antipasto": {"core": "gain", **_ANTIPASTO, "suppress_only": False},
    "antipasto_corda": {"core": "gain", "basis": "full", "rank": 256, "suppress_only": False},
    "antipasto_asvd": {"core": "gain", "basis": "diagonal", "rank": 256, "suppress_only": False},
    "antipasto_rot": {"core": "rotation", **_ANTIPASTO, "rotate": "V", "block": 4, "angle": 0.5},
    "antipasto_ablate": {"core": "ablation", **_ANTIPASTO, "k": 1, "alpha": 0.05},
    "antipasto_dplr": {"core": "dplr", **_ANTIPASTO, "k": 8, "suppress_only": False},
    "antipasto_arrow": {"core": "arrow", **_ANTIPASTO, "block": 8, "suppress_only": False},
    "lora_xs": {"core": "dense", "basis": "identity", "rank": 64},
}
