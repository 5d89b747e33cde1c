"""Decompositions in a store: /bases/<name>/<d_out>x<d_in>/, the layers of one shape stacked (n of them, rank up to R).

U (n, R, d_out)   orthonormal rows: the transpose of each layer's U, so that a rank slice is contiguous
S (n, R)          float64
P (n, R, d_in)    the oblique input projector, S^-1 U^T W
spectrum (n, k)   singular values of W M, float64, descending
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import zarr
from torch import Tensor

from ..errors import StoreError
from .format import schema


@dataclass(frozen=True)
class LayerRecord:
    """What is known of one layer's basis without reading its arrays.

    rank: stored directions; energy: their share of sum S^2; tail: sqrt of the sum of S_i^2 of all others, which is
    ||(W - U S P) M||_F; bound: certified factor of tail^2 over its optimum (1 where the solver is exact).
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


Place = tuple[tuple[int, int], str]  # shape (d_out, d_in) and role of an array
_RECORD_TYPES = {"int": (int,), "float": (int, float), "str": (str,)}


def _record(layer: str, found: dict[str, Any], layers: list[str], rank: int) -> LayerRecord:
    """One record as the attributes give it, checked against its group's layers and rank."""
    record = LayerRecord(**{**found, "shape": schema.check_shape(found["shape"], layer)})
    for field in fields(LayerRecord):
        kinds = _RECORD_TYPES.get(str(field.type))
        if kinds and type(getattr(record, field.name)) not in kinds:
            raise ValueError(field.name)
    if layers[record.index] != layer or record.index < 0 or not 1 <= record.rank <= rank:
        raise ValueError(layer)
    return record


def group_arrays(shape: tuple[int, int], n: int, R: int, k: int, dtype: str) -> dict[str, schema.Layout]:
    """The arrays of n stacked layers of one shape, R directions and k singular values each."""
    d_out, d_in = shape
    slab, rows = min(R, schema.SLAB), min(n, schema.ROWS)
    return {
        "U": schema.Layout((n, R, d_out), (1, slab, d_out), (dtype,)),
        "P": schema.Layout((n, R, d_in), (1, slab, d_in), (dtype,)),
        "S": schema.Layout((n, R), (rows, R), ("float64",)),
        "spectrum": schema.Layout((n, k), (rows, k), ("float64",)),
    }


@dataclass(frozen=True)
class Basis:
    """The basis of one layer: U (d_out, r), S (r,), P (r, d_in)."""

    U: Tensor
    S: Tensor
    P: Tensor
    record: LayerRecord
    _spectrum: Callable[[], Tensor]

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
        required = {"status": str, "method": dict, "dtype": str, "groups": dict, "layers": dict, "model": dict}
        attrs = schema.attributes(group, required)
        self.name, self._group = name, group
        self.status = str(attrs["status"])
        self.method: dict[str, Any] = attrs["method"]
        self.dtype = str(attrs["dtype"])
        self.model: dict[str, Any] = attrs["model"]
        self.hash = str(attrs.get("hash", ""))
        try:
            self._groups = {_shape_of(key): _checked_group(key, group) for key, group in attrs["groups"].items()}
            self.layers = {
                layer: _record(layer, record, *_group_of(self._groups, record))
                for layer, record in attrs["layers"].items()
            }
            if self.dtype not in schema.DTYPES:
                raise ValueError(self.dtype)
        except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
            raise StoreError(f"the attributes of basis {name!r} are damaged: restore the store from a copy") from error
        self._opened: dict[Place, schema.Array] = {}
        self.expected = [layer for group in self._groups.values() for layer in group["layers"]]

    def __repr__(self) -> str:
        return f"BasisSet({self.name!r}, {len(self.layers)} layers, {self.method})"

    def __getitem__(self, layer: str) -> Basis:
        return self.read([layer])[layer]

    def __contains__(self, layer: object) -> bool:
        return layer in self.layers

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def read(self, layers: Iterable[str] | None = None, rank: int | None = None) -> dict[str, Basis]:
        """The bases of `layers` (all by default), sliced to the first `rank` directions.

        A layer whose stored rank is below `rank` comes with all it has. StoreError for an unknown layer.
        """
        wanted = list(self.layers) if layers is None else list(layers)
        for layer in wanted:
            if layer not in self.layers:
                raise StoreError(f"basis {self.name!r} does not hold the layer {layer}; `prep info` lists its layers")
        arrays = self.open_arrays({self.layers[layer].shape for layer in wanted}, ("U", "S", "P"))
        regions = []
        for layer in wanted:
            record = self.layers[layer]
            row, directions = slice(record.index, record.index + 1), slice(0, rank)
            regions += [(arrays[record.shape, role], (row, directions)) for role in "USP"]
        values = iter(schema.read_each(regions))
        out = {}
        for layer in wanted:
            U, S, P = (next(values)[0] for _ in "USP")
            out[layer] = Basis(U.T, S, P, self.layers[layer], partial(self._read_spectrum, layer))
        return out

    def command(self, rank: int) -> str:
        """The `prep decompose` command that makes this basis anew with another rank."""
        options = ["--for eva"] if self.method["metric"] == "components" else []
        if not options:
            options = [f"--{key} {self.method[key]}" for key in ("metric", "power", "select")]
            options += ["--center"] if self.method.get("center") else []
            damping = "damping" if self.method.get("epsilon") is None else "epsilon"
            options += [f"--{damping} {self.method[damping]}"] if damping in self.method else []
        return f"`prep decompose --name {self.name} {' '.join(options)} --rank {rank} --overwrite`"

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The shapes (d_out, d_in) of its layers."""
        return list(self._groups)

    def arrays(self, shape: tuple[int, int]) -> dict[str, schema.Layout]:
        """The arrays of the layers of one shape, by role."""
        group = self._groups[shape]
        return group_arrays(shape, len(group["layers"]), group["rank"], group["spectrum"], self.dtype)

    def open_arrays(self, shapes: Iterable[tuple[int, int]], roles: Iterable[str]) -> dict[Place, schema.Array]:
        """The arrays by shape and role, checked against their layouts when they are first asked for."""
        wanted = {(shape, role): f"{group_key(shape)}/{role}" for shape in sorted(shapes) for role in roles}
        new = {place: self.arrays(place[0])[place[1]] for place in wanted if place not in self._opened}
        found = schema.open_arrays(self._group, {wanted[place]: layout for place, layout in new.items()})
        self._opened |= {place: found[wanted[place]] for place in new}
        return self._opened

    def _read_spectrum(self, layer: str) -> Tensor:
        record = self.layers[layer]
        array = self.open_arrays([record.shape], ["spectrum"])[record.shape, "spectrum"]
        return schema.read(array, (slice(record.index, record.index + 1),))[0]


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
    return group


def _group_of(groups: dict[tuple[int, int], dict[str, Any]], record: dict[str, Any]) -> tuple[list[str], int]:
    group = groups[tuple(record["shape"])]  # type: ignore[index]
    return group["layers"], group["rank"]
