"""Where a basis is in a store: /bases/<name>/<d_out>x<d_in>/, the n layers of one shape stacked, rank up to R.

UP (n, R, d_out + d_in)   row i: column i of the layer's U, then row i of P; a file for each layer, a chunk for 64 rows
S (n, R)                  float64
spectrum (n, k)           singular values of W M, float64, descending
kept (n, R)               share of E||W x||^2 that each direction keeps, float64 (of the input variance for EVA)
unseen (n, R)             the same on tokens that the basis has not seen; where all layers were cross-fitted
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import version1
from .format import schema
from .record import SHARES

LAYOUT = 2  # of a basis that is written now, its attribute `layout`
Place = tuple[tuple[int, int], str]  # shape (d_out, d_in) and role of an array


def group_arrays(
    shape: tuple[int, int], group: Mapping[str, Any], dtype: str, layout: int = LAYOUT
) -> dict[str, schema.Layout]:
    """The arrays of the stacked layers of one shape. group: its `layers`, `rank`, `spectrum` and, if any, `shares`."""
    n, R, k = len(group["layers"]), group["rank"], group["spectrum"]
    rows = min(n, schema.ROWS)
    if layout == 1:
        factors = version1.factor_arrays(shape, n, R, dtype)
    else:
        width = sum(shape)
        factors = {"UP": schema.Layout((n, R, width), (1, min(R, schema.SLAB), width), (dtype,), sharded=True)}
    return {
        **factors,
        "S": schema.Layout((n, R), (rows, R), ("float64",)),
        "spectrum": schema.Layout((n, k), (rows, k), ("float64",)),
        **{role: schema.Layout((n, R), (rows, R), ("float64",)) for role in group.get("shares", ())},
    }


def factor_places(shape: tuple[int, int], layout: int = LAYOUT) -> dict[str, tuple[str, slice]]:
    """Array and columns of U and of P of the layers of one shape."""
    if layout == 1:
        return version1.factor_places()
    return {"U": ("UP", slice(0, shape[0])), "P": ("UP", slice(shape[0], None))}


def group_key(shape: tuple[int, int]) -> str:
    """Name of the group that stacks the layers of one shape."""
    return f"{shape[0]}x{shape[1]}"


def shape_of(key: str) -> tuple[int, int]:
    """The shape of a group's layers by its name. ValueError for any other name."""
    d_out, d_in = (int(size) for size in key.split("x"))
    if key != group_key((d_out, d_in)) or min(d_out, d_in) < 1:
        raise ValueError(key)
    return d_out, d_in


def checked_group(key: str, group: dict[str, Any]) -> dict[str, Any]:
    """What the attributes say of a group, if it can be that of its name. ValueError or StoreError otherwise."""
    for layer in group["layers"]:
        schema.check_name(layer, "layer")
    shape, sizes = shape_of(key), (group["rank"], group["spectrum"])
    if not group["layers"] or not all(schema.is_count(size, 1) for size in sizes):
        raise ValueError(key)
    if group["rank"] > min(shape) or group["spectrum"] > max(shape):
        raise ValueError(key)
    shares = group.get("shares", [])
    if shares != list(SHARES[: len(shares)]):
        raise ValueError(key)
    return group
