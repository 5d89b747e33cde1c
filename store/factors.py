"""A basis as a LoRA pair A (r, d_in), B (d_out, r): how S is shared between the two.

    even    B = U diag(S/s)^(1/2)    A = diag(S/s)^(1/2) P     as PiSSA, MiLoRA, CorDA and LoRA-Null do
    A       B = U                    A = diag(S/s) P           as Astra does, where s is 1
    B       B = U diag(S/s)          A = P

s is the scaling, lora_alpha / r, so that `s B A = U diag(S) P` always.

What a learning rate sees of such a pair: a step of Adam at the rate h changes every entry of A and B by about h, signs
apart, and hence the weight by `s (dB A + B dA)`, whose entries have the root mean square `h s sqrt(r (a^2 + b^2))` for
entries of A and B with the root mean squares a and b.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..commands import BASIS_OF
from ..errors import PrepError, did_you_mean
from .basis import Basis, BasisSet

SPLITS = ("even", "A", "B")
SPLIT_OF = {"astra": "A"}  # method -> how its authors share S, where that is not evenly
SIZE_RANK = 16  # at which `sizes_of` takes a basis, or what it has
_SAMPLE = 2  # layers of each kind that it looks at


@dataclass(frozen=True)
class Size:
    """Root mean squares: A and B of their entries, update of the change of W by a step, per learning rate."""

    A: float
    B: float
    update: float

    def __str__(self) -> str:
        return f"{self.A:.2g} / {self.B:.2g} / {self.update:.2g}"


def check_split(split: str) -> None:
    """PrepError for a word that is no way to share S."""
    if split not in SPLITS:
        raise PrepError(f"no split {split!r}: choose from {', '.join(SPLITS)}{did_you_mean(split, SPLITS)}")


def factors(basis: Basis, rank: int, scaling: float, split: str = "even") -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r) with `scaling B A = U diag(S) P`, from the first r directions."""
    U, P, S = basis.U[:, :rank], basis.P[:rank], basis.S[:rank] / scaling
    of_A, of_B = {"even": (S.sqrt(), S.sqrt()), "A": (S, S.new_ones(())), "B": (S.new_ones(()), S)}[split]
    return of_A[..., None] * P, U * of_B


def size(A: Tensor, B: Tensor, scaling: float) -> Size:
    """What a learning rate sees of A (r, d_in) and B (d_out, r)."""
    a, b = (float(factor.detach().double().square().mean()) for factor in (A, B))
    return Size(a**0.5, b**0.5, scaling * (len(A) * (a + b)) ** 0.5)


def sizes_by_kind(sizes: Mapping[str, Size]) -> dict[str, Size]:
    """The medians over the layers of each kind, such as `self_attn.q_proj`, from the size of each layer."""
    kinds: dict[str, list[Size]] = {}
    for layer, one in sizes.items():
        kinds.setdefault(kind_of(layer), []).append(one)
    return {
        kind: Size(*(statistics.median(getattr(one, name) for one in found) for name in ("A", "B", "update")))
        for kind, found in kinds.items()
    }


def sizes_of(bases: BasisSet) -> dict[str, Size]:
    """By kind of layer, a LoRA pair of rank `SIZE_RANK` and scaling 1 from a complete basis, of some layers of each."""
    kinds: dict[str, list[str]] = {}
    for layer in bases.layers:
        kinds.setdefault(kind_of(layer), []).append(layer)
    chosen = [layer for found in kinds.values() for layer in {found[(len(found) - 1) // _SAMPLE], found[-1]}]
    components, split = bases.method["metric"] == "components", usual_split(bases.name)
    rank = bases.rank if bases.method["metric"] == "null" else SIZE_RANK
    sizes = {}
    for layer, basis in bases.read(sorted(chosen), rank).items():
        A, B = (basis.P, basis.U * 0) if components else factors(basis, rank, 1.0, split)
        sizes[layer] = size(A, B, 1.0)
    found = sizes_by_kind(sizes)
    return {kind: found[kind] for kind in kinds}


def usual_split(basis: str) -> str:
    """How S of a basis is shared unless one is told: as the authors of the method do that it is made for."""
    return next((split for method, split in SPLIT_OF.items() if BASIS_OF[method] == basis), "even")


def kind_of(layer: str) -> str:
    """What follows the last number in a layer's name: `self_attn.q_proj`."""
    parts = layer.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)


def size_rows(title: str, columns: Mapping[str, Mapping[str, Size]]) -> list[list[str]]:
    """A table: a row for every kind of layer, a column for each of `columns`."""
    kinds: Iterable[str] = dict.fromkeys(kind for sizes in columns.values() for kind in sizes)
    return [
        [title, *columns],
        *([kind, *(str(sizes[kind]) if kind in sizes else "" for sizes in columns.values())] for kind in kinds),
    ]
