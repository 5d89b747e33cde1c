"""Where stores of format version 1, which are read and no longer written, have what lies elsewhere in those of now.

A basis of layout 1 keeps U and P in an array each, in which every slab of 64 directions is a file.
"""

from __future__ import annotations

from .format import schema


def factor_arrays(shape: tuple[int, int], n: int, rank: int, dtype: str) -> dict[str, schema.Layout]:
    """The arrays of U and P of n stacked layers of one shape."""
    slab = min(rank, schema.SLAB)
    widths = dict(zip("UP", shape, strict=True))
    return {role: schema.Layout((n, rank, d), (1, slab, d), (dtype,)) for role, d in widths.items()}


def factor_places() -> dict[str, tuple[str, slice]]:
    """Array and columns of U and of P."""
    return {role: (role, slice(None)) for role in "UP"}
