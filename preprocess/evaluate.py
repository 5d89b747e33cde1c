"""`prep evaluate`: what every basis of a store loses of the layers' outputs, at every rank from one product per layer.

On the tokens that it was made of, cross-fitted between their two halves, or on those of another store; the numerics are
those of numerics/evaluation.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from .evaluation.request import open_evaluation
from .evaluation.rows import Row, rows_of
from .evaluation.score import Scoring


def evaluate(
    store: str | Path = "prep.zarr",
    on: str | Path | None = None,
    bases: str | Sequence[str] | None = None,
    ranks: int | Sequence[int] | None = None,
    *,
    sample: int | None = None,
    model: str | nn.Module | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> list[Row]:
    """What `bases` (all by default) lose of `E||W x||^2` at `ranks` (8, 16, 32 ... up to the stored one), by layer.

    x are the tokens that `store` was calibrated on, or those of the store `on`, which is of the same model.
    Without `on`, and where the moments of the first half were kept, the rows of some layers also say what is lost on
    unseen tokens and the excess, what more data would gain, from bases of either half. For two layers of each kind
    `decompose` has noted them; with `sample`, or at other ranks, that many of each kind, evenly spread (0: all), are
    decomposed anew. A basis of metric components (EVA) is scored by the share of the input variance that P misses.

    model: a path, hub id or module; by default the store's. revision, trust_remote_code: of a path or hub id.

    Raises PrepError for bad input, StoreError where a store cannot serve it.
    """
    asked = open_evaluation(store, on, bases, ranks, sample, model, revision, trust_remote_code)
    return rows_of(Scoring(asked).scores(), asked.bases, asked.ranks)
