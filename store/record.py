"""What is known of one layer's basis without reading its arrays, and the checksums by which their parts are known."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor

from ..copies import is_sound
from .format import schema
from .format.arrays import Place, Region, checksum, chunk_checksums


@dataclass(frozen=True)
class LayerRecord:
    """What is known of one layer's basis without reading its arrays.

    rank: stored directions; energy: their share of sum S^2; tail: sqrt of the sum of S_i^2 of all others, which is
    ||(W - U S P) M||_F; bound: certified factor of tail^2 over its optimum (1 where the solver is exact). hash: of U,
    P, S and the spectrum, by which `verify` knows them; checksums: of their parts, by which a slice is known.
    crossed: for some layers, at `ranks`, what bases of the two parts of the tokens lose (lists `unseen`, `excess` and
    `least`, in shares of E||W x||^2, see `prep evaluate`). shares: the checksums of the rows of `kept` and `unseen`,
    which `hash` does not cover: it tells the basis, whatever is known of it. repaired: of a basis of the error
    E = W - Q, what is known of Q (see copies.py); E then takes W's place in all other fields but its hash.
    """

    shape: tuple[int, int]
    index: int
    rank: int
    energy: float
    tail: float
    numerical_rank: int
    solver: str
    bound: float
    weight_hash: str
    weight_dtype: str
    hash: str = ""
    checksums: str = ""
    crossed: dict[str, Any] | None = None
    shares: str = ""
    repaired: dict[str, Any] | None = None


SHARES = ("kept", "unseen")  # the arrays that a group may have, in the order in which it gets them
_FIELDS = {field.name for field in fields(LayerRecord)}
_DIGITS = 8  # of a checksum


def checked_record(layer: str, fields: dict[str, Any], group: dict[str, Any], chunks: int) -> LayerRecord:
    """One record as the attributes give it, checked against its group's layers, rank and shares.

    chunks: of U and P of a layer of the group. ValueError where it is not that of the layer.
    """
    layers, rank = group["layers"], group["rank"]
    given = {name: value for name, value in fields.items() if name in _FIELDS}
    record = LayerRecord(**{**given, "shape": schema.check_shape(fields["shape"], layer)})
    if not 0 <= record.index < len(layers) or layers[record.index] != layer or not 1 <= record.rank <= rank:
        raise ValueError(layer)
    digits = _DIGITS * (chunks + 2)
    if record.checksums and (len(record.checksums) != digits or not re.fullmatch("[0-9a-f]+", record.checksums)):
        raise ValueError(layer)
    if not re.fullmatch(f"[0-9a-f]{{{_DIGITS * len(group.get('shares', ()))}}}", record.shares):
        raise ValueError(layer)
    if record.crossed is not None:
        _check_crossed(record.crossed, layer)
    if record.repaired is not None and not is_sound(record.repaired):
        raise ValueError(layer)
    return record


def _check_crossed(crossed: dict[str, Any], layer: str) -> None:
    ranks = crossed["ranks"]
    lists = [crossed[name] for name in ("unseen", "excess", "least")]
    if not ranks or ranks[0] < 1 or ranks != sorted(set(ranks)) or any(len(ranks) != len(values) for values in lists):
        raise ValueError(layer)
    if not all(0 <= value < math.inf for values in lists for value in values):
        raise ValueError(layer)


def checksums(array: schema.Array, row: Region, stored: np.ndarray, rows: Iterable[Tensor]) -> str:
    """`checksums` of a record: crc32c of the chunks of U and P as they were written to `row` of their array, then of
    S (r,) and the spectrum (k,), 8 hexadecimal digits each.
    """
    return "".join(f"{crc:0{_DIGITS}x}" for crc in chunk_checksums(array, row, stored)) + row_checksums(rows)


def row_checksums(rows: Iterable[Tensor]) -> str:
    """crc32c of each row (k,), 8 hexadecimal digits each."""
    return "".join(f"{checksum(row.contiguous().numpy()):0{_DIGITS}x}" for row in rows)


def chunks_known(record: LayerRecord, arrays: Sequence[schema.Array], first: slice) -> dict[Place, int]:
    """The checksums of the chunks of U and P that hold the `first` directions of a layer in their arrays, as far as its
    record has them.
    """
    known: dict[Place, int] = {}
    for number, layout in enumerate(array.layout for array in arrays) if record.checksums else ():
        slabs = -(-layout.shape[1] // layout.chunks[1])
        region = (slice(record.index, record.index + 1), first)
        for slab, (chunk, _, _) in enumerate(layout.cover(layout.bounds(region))):
            digits = record.checksums[_DIGITS * (number * slabs + slab) :][:_DIGITS]
            known[f"{arrays[number].path}/{chunk.file}", chunk.number] = int(digits, 16)
    return known


def is_known_row(record: LayerRecord, role: str, row: Tensor) -> bool:
    """Whether a layer's row of S, of the spectrum or of shares is the one that its record knows, if it knows any."""
    if role in SHARES:
        known = record.shares[_DIGITS * SHARES.index(role) :][:_DIGITS]
    else:
        known = record.checksums[-_DIGITS:] if role == "spectrum" else record.checksums[-2 * _DIGITS : -_DIGITS]
    return not known or checksum(row.numpy()) == int(known, 16)
