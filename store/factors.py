"""A basis as a LoRA pair A (r, d_in), B (d_out, r): how S is shared between the two.

    even    B = U diag(S/s)^(1/2)    A = diag(S/s)^(1/2) P     as PiSSA, MiLoRA, CorDA and LoRA-Null do
    A       B = U                    A = diag(S/s) P           as Astra does, where s is 1
    B       B = U diag(S/s)          A = P

s is the scaling, lora_alpha / r, so that `s B A = U diag(S) P` always.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import PrepError, did_you_mean
from .basis import Basis

SPLITS = ("even", "A", "B")


def check_split(split: str) -> None:
    """PrepError for a word that is no way to share S."""
    if split not in SPLITS:
        raise PrepError(f"no split {split!r}: choose from {', '.join(SPLITS)}{did_you_mean(split, SPLITS)}")


def factors(basis: Basis, rank: int, scaling: float, split: str = "even") -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r) with `scaling B A = U diag(S) P`, from the first r directions."""
    U, P, S = basis.U[:, :rank], basis.P[:rank], basis.S[:rank] / scaling
    of_A, of_B = {"even": (S.sqrt(), S.sqrt()), "A": (S, S.new_ones(())), "B": (S.new_ones(()), S)}[split]
    return of_A[..., None] * P, U * of_B
