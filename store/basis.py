"""Decompositions in a store: /bases/<name>/<d_out>x<d_in>/, the layers of one shape stacked (n of them, rank up to R).

U (n, R, d_out)   orthonormal rows: the transpose of each layer's U, so that a rank slice is contiguous
S (n, R)          float64
P (n, R, d_in)    the oblique input projector, S^-1 U^T W
spectrum (n, k)   singular values of W M, float64, descending
kept (n, R)       share of E||W x||^2 that each direction keeps, float64 (of the input variance for EVA); not everywhere
unseen (n, R)     the same on tokens that the basis has not seen; where all layers were cross-fitted
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import zarr
from torch import Tensor

from ..commands import decompose_command
from ..copies import is_sound
from ..errors import StoreError, did_you_mean
from .display import html_table
from .format import schema
from .format.arrays import OTHER_VERSION, Region, checksum, chunk_checksums
from .format.documents import check_size
from .format.untrusted import BASIS


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
Place = tuple[tuple[int, int], str]  # shape (d_out, d_in) and role of an array
_FIELDS = {field.name for field in fields(LayerRecord)}
_DIGITS = 8  # of a checksum


def _record(layer: str, fields: dict[str, Any], group: dict[str, Any]) -> LayerRecord:
    """One record as the attributes give it, checked against its group's layers, rank and shares."""
    layers, rank = group["layers"], group["rank"]
    given = {name: value for name, value in fields.items() if name in _FIELDS}
    record = LayerRecord(**{**given, "shape": schema.check_shape(fields["shape"], layer)})
    if not 0 <= record.index < len(layers) or layers[record.index] != layer or not 1 <= record.rank <= rank:
        raise ValueError(layer)
    digits = _DIGITS * 2 * (_slabs(rank) + 1)
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


def _slabs(rank: int) -> int:
    """Chunks of a layer's U or P."""
    return -(-rank // schema.SLAB)


def checksums(arrays: Sequence[schema.Array], row: Region, stored: Sequence[np.ndarray], rows: Sequence[Tensor]) -> str:
    """`checksums` of a record: crc32c of the chunks of U, then of P, as they were written to `row` of their arrays,
    then of S (r,) and the spectrum (k,), 8 hexadecimal digits each.
    """
    checksums = [crc for array, part in zip(arrays, stored, strict=True) for crc in chunk_checksums(array, row, part)]
    return "".join(f"{crc:0{_DIGITS}x}" for crc in checksums) + row_checksums(rows)


def row_checksums(rows: Iterable[Tensor]) -> str:
    """crc32c of each row (k,), 8 hexadecimal digits each."""
    return "".join(f"{checksum(row.contiguous().numpy()):0{_DIGITS}x}" for row in rows)


def group_arrays(shape: tuple[int, int], group: Mapping[str, Any], dtype: str) -> dict[str, schema.Layout]:
    """The arrays of the stacked layers of one shape. group: its `layers`, `rank`, `spectrum` and, if any, `shares`."""
    d_out, d_in = shape
    n, R, k = len(group["layers"]), group["rank"], group["spectrum"]
    slab, rows = min(R, schema.SLAB), min(n, schema.ROWS)
    return {
        "U": schema.Layout((n, R, d_out), (1, slab, d_out), (dtype,)),
        "P": schema.Layout((n, R, d_in), (1, slab, d_in), (dtype,)),
        "S": schema.Layout((n, R), (rows, R), ("float64",)),
        "spectrum": schema.Layout((n, k), (rows, k), ("float64",)),
        **{role: schema.Layout((n, R), (rows, R), ("float64",)) for role in group.get("shares", ())},
    }


@dataclass(frozen=True, repr=False)
class Basis:
    """The basis of one layer: U (d_out, r), S (r,), P (r, d_in)."""

    U: Tensor
    S: Tensor
    P: Tensor
    record: LayerRecord
    _spectrum: Callable[[], Tensor]

    def __repr__(self) -> str:
        d_out, d_in = self.record.shape
        return f"Basis({d_out} x {d_in}, rank {len(self.S)}, energy {self.energy:.3f} at rank {self.record.rank})"

    @property
    def spectrum(self) -> Tensor:
        """The singular values of W M (k,), read when asked for: training does not need them."""
        return self._spectrum()

    @property
    def energy(self) -> float:
        """Share of the squared spectrum that all stored directions capture."""
        return self.record.energy


class BasisSet(Mapping[str, Basis]):
    """One named basis of a store: layer name -> Basis. Opening it reads attributes only."""

    def __init__(self, name: str, group: zarr.Group):
        attrs = schema.attributes(group, BASIS)
        self.name, self._group = name, group
        self.status = str(attrs["status"])
        self.method: dict[str, Any] = attrs["method"]
        self.dtype = str(attrs["dtype"])
        self.model: dict[str, Any] = attrs["model"]
        self.repair: dict[str, Any] | None = attrs.get("repair")  # the copy whose error was decomposed (copies.py)
        self.hash = str(attrs.get("hash", ""))
        self.files: str | None = attrs.get("files")
        try:
            self._groups = {_shape_of(key): _checked_group(key, group) for key, group in attrs["groups"].items()}
            self._check_sizes()
            self.layers = {
                layer: _record(layer, record, self._groups[tuple(record["shape"])])  # type: ignore[index]
                for layer, record in attrs["layers"].items()
            }
            if any((record.repaired is None) != (self.repair is None) for record in self.layers.values()):
                raise ValueError(name)
        except (KeyError, ValueError) as error:
            raise StoreError(f"the attributes of basis {name!r} are damaged: restore the store from a copy") from error
        self._opened: dict[Place, schema.Array] = {}
        self.expected = [layer for group in self._groups.values() for layer in group["layers"]]
        if self.status == "complete":
            self._check_complete()

    def _check_sizes(self) -> None:
        """StoreError if an array is too large to be credible."""
        for shape in self._groups:
            for role, layout in self.arrays(shape).items():
                check_size(layout, self.dtype, f"{schema.name_of(self._group)}/{group_key(shape)}/{role}")

    def _check_complete(self) -> None:
        """StoreError unless the records are those of all layers, and those that the basis was finished with."""
        if sorted(self.layers) != sorted(self.expected):
            raise StoreError(f"the records of basis {self.name!r} are not those of its groups' layers: it is damaged")
        if self.hash != schema.content_hash(f"{layer} {self.layers[layer].hash}" for layer in sorted(self.layers)):
            raise StoreError(
                f"the hash of basis {self.name!r} is not that of its records: restore the store from a copy"
            )

    def __repr__(self) -> str:
        method = ", ".join(f"{key}={value!r}" for key, value in self.method.items() if value is not None)
        return f"BasisSet({self.name!r}, {self.status}, {len(self.layers)} layers, {method}, dtype={self.dtype!r})"

    def _repr_html_(self) -> str:
        """For notebooks: shape, rank and kept energy of every layer."""
        rows = ((name, "{} x {}".format(*x.shape), x.rank, f"{x.energy:.3f}") for name, x in self.layers.items())
        return html_table(repr(self), ("layer", "shape", "rank", "energy"), rows, len(self))

    def __getitem__(self, layer: str) -> Basis:
        return self.read([layer])[layer]

    def __contains__(self, layer: object) -> bool:
        return layer in self.layers

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def read(
        self, layers: Iterable[str] | None = None, rank: int | Mapping[str, int] | None = None
    ) -> dict[str, Basis]:
        """The bases of `layers` (all by default), sliced to the first `rank` directions, or to those of each layer.

        A layer whose stored rank is below `rank` comes with all it has. StoreError for an unknown layer.
        """
        wanted = self.checked(layers)
        arrays = self.open_arrays({self.layers[layer].shape for layer in wanted}, ("U", "P", "S"))
        regions: list[tuple[schema.Array, Region]] = []
        known: dict[str, int] = {}
        ranks = {layer: rank[layer] if isinstance(rank, Mapping) else rank for layer in wanted}
        for layer in wanted:
            record, first = self.layers[layer], slice(0, ranks[layer])
            row, own = slice(record.index, record.index + 1), [arrays[record.shape, role] for role in "UPS"]
            # S comes whole, as its chunk does: its checksum is that of all directions
            regions += zip(own, ((row, first), (row, first), (row,)), strict=True)
            known |= _chunks_of(record, own[:2])
        values = iter(schema.read_each(regions, known))
        out = {}
        for layer in wanted:
            U, P, S = (next(values)[0] for _ in "UPS")
            self._check_row(layer, "S", S)
            out[layer] = Basis(U.T, S[: ranks[layer]], P, self.layers[layer], partial(self._read_spectrum, layer))
        return out

    def checked(self, layers: Iterable[str] | None) -> list[str]:
        """The layers, all by default. StoreError for an unknown one."""
        wanted = list(self.layers) if layers is None else list(layers)
        for layer in wanted:
            if layer not in self.layers:
                meant = did_you_mean(layer, self.layers) or "; `prep info` lists its layers"
                raise StoreError(f"basis {self.name!r} does not hold the layer {layer}{meant}")
        return wanted

    @property
    def rank(self) -> int:
        """Directions of the layers that have most: what was asked for, clipped at their shapes."""
        return max((group["rank"] for group in self._groups.values()), default=0)

    @property
    def place(self) -> str:
        """The path of its group in the store: `bases/<name>`, unless a replacement was cut short."""
        return self._group.path

    def command(self, rank: int) -> str:
        """The `prep decompose` command that makes this basis anew with another rank."""
        return decompose_command(self.name, self.method, rank, True, schema.place_of(self._group), self.repair)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The shapes (d_out, d_in) of its layers."""
        return list(self._groups)

    def arrays(self, shape: tuple[int, int]) -> dict[str, schema.Layout]:
        """The arrays of the layers of one shape, by role."""
        return group_arrays(shape, self._groups[shape], self.dtype)

    def kept(self, layer: str) -> Tensor | None:
        """Share of E||W x||^2 that each stored direction keeps, (r,) float64, on the tokens the basis was made of.

        Of the input variance for metric components (EVA). None where the store does not know it.
        """
        return self.shares("kept", [layer]).get(layer)

    def unseen(self, layer: str) -> Tensor | None:
        """`kept` on tokens that the basis has not seen: the mean over bases of two parts, each on the other part.

        None where not all layers were cross-fitted.
        """
        return self.shares("unseen", [layer]).get(layer)

    def shares(self, role: str, layers: Iterable[str] | None = None) -> dict[str, Tensor]:
        """`kept` or `unseen` of the layers (all by default) that have it, each chunk read once."""
        records = {layer: self.layers[layer] for layer in self.checked(layers)}
        records = {layer: one for layer, one in records.items() if role in self.arrays(one.shape)}
        arrays = self.open_arrays({one.shape for one in records.values()}, [role])
        rows = [(arrays[one.shape, role], (slice(one.index, one.index + 1),)) for one in records.values()]
        out = {}
        for (layer, record), values in zip(records.items(), schema.read_each(rows), strict=True):
            self._check_row(layer, role, values[0])
            out[layer] = values[0][: record.rank]
        return out

    def open_arrays(self, shapes: Iterable[tuple[int, int]], roles: Collection[str]) -> dict[Place, schema.Array]:
        """The arrays by shape and role, those that are there, checked against their layouts when first asked for."""
        layouts = {(shape, role): layout for shape in sorted(shapes) for role, layout in self.arrays(shape).items()}
        wanted = {place: f"{group_key(place[0])}/{place[1]}" for place in layouts if place[1] in roles}
        new = {place: layouts[place] for place in wanted if place not in self._opened}
        opened = schema.open_arrays(self._group, {wanted[place]: layout for place, layout in new.items()})
        self._opened |= {place: opened[wanted[place]] for place in new}
        return self._opened

    def spectra(self) -> Iterator[tuple[str, Tensor]]:
        """Every layer with its spectrum (k,), each chunk read once."""
        for shape, group in self._groups.items():
            array = self.open_arrays([shape], ["spectrum"])[shape, "spectrum"]
            for first in range(0, len(group["layers"]), schema.ROWS):
                names = group["layers"][first : first + schema.ROWS]
                rows = schema.read(array, (slice(first, first + len(names)),))
                for layer, spectrum in zip(names, rows, strict=True):
                    self._check_row(layer, "spectrum", spectrum)
                    yield layer, spectrum

    def _read_spectrum(self, layer: str) -> Tensor:
        record = self.layers[layer]
        array = self.open_arrays([record.shape], ["spectrum"])[record.shape, "spectrum"]
        spectrum = schema.read(array, (slice(record.index, record.index + 1),))[0]
        self._check_row(layer, "spectrum", spectrum)
        return spectrum

    def _check_row(self, layer: str, role: str, row: Tensor) -> None:
        """StoreError if a layer's row of S, of the spectrum or of shares is not the one that its record knows."""
        record = self.layers[layer]
        if role in SHARES:
            known = record.shares[_DIGITS * SHARES.index(role) :][:_DIGITS]
        else:
            known = record.checksums[-_DIGITS:] if role == "spectrum" else record.checksums[-2 * _DIGITS : -_DIGITS]
        if known and checksum(row.numpy()) != int(known, 16):
            where = f"{schema.name_of(self._group)}/{group_key(record.shape)}/{role}"
            raise StoreError(f"{where} (row {record.index}, {layer}) is {OTHER_VERSION}: restore the store from a copy")


def _chunks_of(record: LayerRecord, arrays: Sequence[schema.Array]) -> dict[str, int]:
    """The checksums of a layer's chunks of U and P, by their files, as far as its record has them."""
    if not record.checksums:
        return {}
    slabs = _slabs(arrays[0].layout.shape[1])
    files = [f"{array.path}/c/{record.index}/{i}/0" for array in arrays for i in range(slabs)]
    return {file: int(record.checksums[_DIGITS * i : _DIGITS * (i + 1)], 16) for i, file in enumerate(files)}


def group_key(shape: tuple[int, int]) -> str:
    """Name of the group that stacks the layers of one shape."""
    return f"{shape[0]}x{shape[1]}"


def _shape_of(key: str) -> tuple[int, int]:
    d_out, d_in = (int(size) for size in key.split("x"))
    if key != group_key((d_out, d_in)) or min(d_out, d_in) < 1:
        raise ValueError(key)
    return d_out, d_in


def _checked_group(key: str, group: dict[str, Any]) -> dict[str, Any]:
    for layer in group["layers"]:
        schema.check_name(layer, "layer")
    shape, sizes = _shape_of(key), (group["rank"], group["spectrum"])
    if not group["layers"] or not all(schema.is_count(size, 1) for size in sizes):
        raise ValueError(key)
    if group["rank"] > min(shape) or group["spectrum"] > max(shape):
        raise ValueError(key)
    shares = group.get("shares", [])
    if shares != list(SHARES[: len(shares)]):
        raise ValueError(key)
    return group
