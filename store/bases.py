"""Decompositions in a store: /bases/<name>/<d_out>x<d_in>/, the layers of one shape stacked (n of them, rank up to R).

U (n, R, d_out)   orthonormal rows: the transpose of each layer's U, so that a rank slice is contiguous
S (n, R)          float64
P (n, R, d_in)    the oblique input projector, S^-1 U^T W
spectrum (n, k)   singular values of W M, float64, descending
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import zarr
from torch import Tensor

from . import schema
from .errors import StoreError


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
    slab = min(R, schema.SLAB)
    return {
        "U": schema.Layout((n, R, d_out), (1, slab, d_out), (dtype,)),
        "P": schema.Layout((n, R, d_in), (1, slab, d_in), (dtype,)),
        "S": schema.Layout((n, R), (1, R), ("float64",)),
        "spectrum": schema.Layout((n, k), (1, k), ("float64",)),
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
        """The bases of `layers` (all by default), sliced to the first `rank` directions: one read per array.

        A layer whose stored rank is below `rank` comes with all it has. StoreError for an unknown layer.
        """
        wanted = list(self.layers) if layers is None else list(layers)
        for layer in wanted:
            if layer not in self.layers:
                raise StoreError(f"basis {self.name!r} does not hold the layer {layer}; `prep info` lists its layers")
        out: dict[str, Basis] = {}
        for shape in sorted({self.layers[layer].shape for layer in wanted}):
            members = [layer for layer in wanted if self.layers[layer].shape == shape]
            out.update(self._read_group(shape, members, rank))
        return {layer: out[layer] for layer in wanted}

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The shapes (d_out, d_in) of its layers."""
        return list(self._groups)

    def arrays(self, shape: tuple[int, int]) -> dict[str, schema.Layout]:
        """The arrays of the layers of one shape, by role."""
        group = self._groups[shape]
        return group_arrays(shape, len(group["layers"]), group["rank"], group["spectrum"], self.dtype)

    def _read_group(self, shape: tuple[int, int], members: list[str], rank: int | None) -> dict[str, Basis]:
        rows = [self.layers[layer].index for layer in members]
        first, last = min(rows), max(rows) + 1
        chosen = (slice(first, last), slice(0, rank))
        U, P, S = (
            schema.read(schema.open_array(self._group, f"{group_key(shape)}/{role}", layout), chosen)
            for role, layout in self.arrays(shape).items()
            if role != "spectrum"
        )
        return {
            layer: Basis(U[i].T, S[i], P[i], self.layers[layer], partial(self._read_spectrum, shape, i + first))
            for layer, i in ((layer, self.layers[layer].index - first) for layer in members)
        }

    def _read_spectrum(self, shape: tuple[int, int], row: int) -> Tensor:
        layout = self.arrays(shape)["spectrum"]
        return schema.read(schema.open_array(self._group, f"{group_key(shape)}/spectrum", layout), row)


class Bases(Mapping[str, BasisSet]):
    """The named bases of a store. Asking for one that is missing or not complete is an error that says what to run."""

    def __init__(self, root: zarr.Group):
        self._root = root
        self.names = [schema.check_name(name, "basis") for name in schema.attributes(root, {"bases": list})["bases"]]

    def __getitem__(self, name: str) -> BasisSet:
        basis = self.open(name)
        if basis.status != "complete":
            done = f"{len(basis.layers)} of {len(basis.expected)} layers"
            raise StoreError(f"basis {name!r} is not complete ({done}): run the same `prep decompose` again to resume")
        return basis

    def open(self, name: str) -> BasisSet:
        """The basis as it stands, complete or not."""
        if name not in self.names:
            has = ", ".join(self.names) or "none"
            raise StoreError(f"the store has no basis {name!r} (it has: {has}): make it with {make_command(name)}")
        try:
            return BasisSet(name, schema.child(self._root, f"bases/{name}"))
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"basis {name!r} is missing or damaged: run its `prep decompose` again") from error

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class BasisWriter:
    """Writes one basis layer by layer; what is written survives an interruption and need not be computed again."""

    def __init__(self, root: zarr.Group, name: str, attrs: dict[str, Any]):
        self._group = root.require_group(f"bases/{name}")
        self._attrs = attrs
        self._flushed = time.monotonic()
        self._arrays: dict[str, Any] = {}

    @classmethod
    def create(
        cls,
        root: zarr.Group,
        name: str,
        *,
        method: dict[str, Any],
        dtype: str,
        model: dict[str, Any],
        groups: dict[tuple[int, int], dict[str, Any]],
    ) -> BasisWriter:
        """Begin a basis, replacing one of that name. groups: shape -> {"layers": [...], "rank": R, "spectrum": k}."""
        attrs = {"status": "incomplete", "method": method, "dtype": dtype, "model": model, "layers": {}}
        attrs["groups"] = {group_key(shape): dict(group) for shape, group in groups.items()}
        kept = schema.attributes(root, {"bases": list})
        others = [other for other in kept["bases"] if other != name]
        # listed again when its arrays are there, so that a listed basis can be resumed
        schema.put_attributes(root, {**kept, "bases": others})
        root.create_group(f"bases/{name}", overwrite=True, attributes=schema.sealed(attrs))
        writer = cls(root, name, attrs)
        for shape, group in groups.items():
            arrays = group_arrays(shape, len(group["layers"]), group["rank"], group["spectrum"], dtype)
            for role, layout in arrays.items():
                path = f"{group_key(shape)}/{role}"
                schema.create_array(writer._group, path, layout.shape, layout.chunks, layout.dtypes[0])
        schema.put_attributes(root, {**kept, "bases": [*others, name]})
        return writer

    @classmethod
    def resume(cls, root: zarr.Group, name: str) -> BasisWriter:
        """Go on with an incomplete basis."""
        return cls(root, name, schema.attributes(schema.child(root, f"bases/{name}"), {"layers": dict}))

    def write(self, layer: str, U: Tensor, S: Tensor, P: Tensor, spectrum: Tensor, record: LayerRecord) -> None:
        """Store one layer: U (d_out, r), S (r,), P (r, d_in), spectrum (k,)."""
        stored = []
        for role, value in {"U": U.T, "P": P, "S": S, "spectrum": spectrum}.items():
            path = f"{group_key(record.shape)}/{role}"
            if path not in self._arrays:
                self._arrays[path] = self._group[path]
            stored.append(schema.write(self._arrays[path], record.index, value))
        content = schema.content_hash(stored)
        self._attrs["layers"][layer] = asdict(record) | {"shape": list(record.shape), "hash": content}
        if time.monotonic() - self._flushed > 1.0:
            self.flush()

    def flush(self) -> None:
        """Make the layers written so far count as done."""
        order = [layer for group in self._attrs["groups"].values() for layer in group["layers"]]
        done = self._attrs["layers"]
        self._attrs["layers"] = {layer: done[layer] for layer in order if layer in done}
        schema.put_attributes(self._group, self._attrs)
        self._flushed = time.monotonic()

    def finish(self) -> None:
        """Mark the basis complete; its hash covers the content of every layer."""
        records = self._attrs["layers"]
        self._attrs["hash"] = schema.content_hash(f"{layer} {records[layer]['hash']}" for layer in sorted(records))
        self._attrs["status"] = "complete"
        schema.remove_partial(self._group)
        self.flush()


def make_command(name: str) -> str:
    """The `prep decompose` command whose default name is `name`; metric, power and selection are read off it."""
    metric, *rest = name.split("-")
    if metric == "eva":
        return "`prep decompose --for eva`"
    if metric not in ("full", "diagonal", "identity"):
        return f"`prep decompose --name {name}`"
    options = [] if metric == "full" else [f"--metric {metric}"]
    for part in rest:
        if part in ("bottom", "activation"):
            options.append(f"--select {part}")
        elif part == "centered":
            options.append("--center")
        elif part.startswith("p"):
            options.append(f"--power {part[1:]}")
    return f"`{' '.join(['prep decompose', *options])}`"


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
