"""Ranks under budgets: those of the parameters that equal ranks of a basis cost."""

from __future__ import annotations

from dataclasses import dataclass

from ..commands import OF_INPUTS
from ..store import BasisSet
from ..store.budget import Directions

LAYERS = 2000  # the ranks of more are not chosen here: `prep ranks` does that for one budget


@dataclass(frozen=True)
class Budget:
    """The parameters of an `equal` rank, what that keeps of the outputs (mean of the layers), and what the `ranks` by
    layer keep that cost no more. role: `unseen` tokens, or those of which bases `kept` that.
    """

    equal: int
    parameters: int
    kept_equal: float
    kept: float
    ranks: dict[str, int]
    role: str


def budgets(basis: BasisSet, ranks: list[int]) -> list[Budget]:
    """A budget for each of `ranks`, by what directions keep of tokens that the basis has not seen, if that is known.

    Empty where the basis does not say what it keeps of the output of all its layers, or has very many.
    """
    if len(basis) > LAYERS or basis.method["metric"] in OF_INPUTS:
        return []
    role, known = "unseen", basis.shares("unseen")
    if len(known) < len(basis):
        role, known = "kept", basis.shares("kept")
    if len(known) < len(basis):
        return []
    kept = {layer: shares.numpy() for layer, shares in known.items()}
    directions = Directions(kept, {layer: sum(record.shape) for layer, record in basis.layers.items()})
    return [_budget(directions, rank, role) for rank in ranks]


def _budget(directions: Directions, rank: int, role: str) -> Budget:
    equal = directions.equal(rank)
    parameters = directions.parameters(equal)
    found = directions.within(parameters)
    return Budget(rank, parameters, directions.share(equal), directions.share(found), found, role)
