"""The bases of a store: found by name, and written layer by layer.

A layer that counts as done survives an interruption. U and P go to the store as they come. S and spectra of many layers
share a chunk, so they are kept in memory and written by `flush`, before the attributes that call their layers done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import zarr
from torch import Tensor

from ..errors import StoreError
from .basis import BasisSet, LayerRecord, Place, checksums, group_arrays, group_key
from .format import schema

FLUSH_SECONDS = 1.0
FLUSH_SHARE = 0.1  # of the time may go into flushes: those of very many layers are rarer


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


@dataclass(frozen=True)
class LayerDone:
    """A layer whose U and P are in the store, with what is not: S (r,), spectrum (k,), float64."""

    layer: str
    record: LayerRecord
    S: Tensor
    spectrum: Tensor


class BasisWriter:
    """Writes one basis of a store. What is written counts as done at the next `flush`."""

    def __init__(self, group: zarr.Group, basis: BasisSet, attrs: dict[str, Any]):
        self._group, self._attrs = group, attrs
        self._arrays = basis.open_arrays(basis.shapes, ("U", "P", "S", "spectrum"))
        # the rows of layers to come are NaN, as the fill value
        self._rows = {
            place: torch.full(array.layout.shape, torch.nan, dtype=torch.float64)
            for place, array in self._arrays.items()
            if place[1] in ("S", "spectrum")
        }
        done = [((r.shape, role), r.index) for r in basis.layers.values() for role in ("S", "spectrum")]
        found = schema.read_each([(self._arrays[place], (slice(i, i + 1),)) for place, i in done])
        for (place, i), values in zip(done, found, strict=True):
            self._rows[place][i] = values[0]
        self._changed: set[tuple[Place, int]] = set()
        self._due = time.monotonic() + FLUSH_SECONDS

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
        group = root.create_group(f"bases/{name}", overwrite=True, attributes=schema.sealed(attrs))
        for shape, members in groups.items():
            stack = group.create_group(group_key(shape))
            arrays = group_arrays(shape, len(members["layers"]), members["rank"], members["spectrum"], dtype)
            for role, layout in arrays.items():
                schema.create_array(stack, role, layout)
        schema.put_attributes(root, {**kept, "bases": [*others, name]})
        return cls.resume(root, name)

    @classmethod
    def resume(cls, root: zarr.Group, name: str) -> BasisWriter:
        """Go on with a basis. StoreError where what it holds is damaged."""
        group = schema.child(root, f"bases/{name}")
        return cls(group, BasisSet(name, group), schema.attributes(group, {"layers": dict}))

    def write(self, layer: str, U: Tensor, S: Tensor, P: Tensor, spectrum: Tensor, record: LayerRecord) -> None:
        """Store one layer: U (d_out, r), S (r,), P (r, d_in), spectrum (k,)."""
        self.note(self.put(layer, U, S, P, spectrum, record))

    def put(self, layer: str, U: Tensor, S: Tensor, P: Tensor, spectrum: Tensor, record: LayerRecord) -> LayerDone:
        """The part of `write` that may be done by several processes, each its own layers: store U and P."""
        row = (slice(record.index, record.index + 1),)
        arrays = [self._arrays[record.shape, role] for role in "UP"]
        stored = [schema.write(array, row, x[None]) for array, x in zip(arrays, (U.T, P), strict=True)]
        S, spectrum = (x.detach().to("cpu", torch.float64) for x in (S, spectrum))
        content = schema.content_hash([*stored, S.numpy(), spectrum.numpy()])
        parts = checksums(arrays, row, stored, (S, spectrum))
        return LayerDone(layer, replace(record, hash=content, checksums=parts), S, spectrum)

    def note(self, done: LayerDone) -> None:
        """The other part, for the process that calls `flush` and `finish`: take over S, the spectrum and the record."""
        shape, i = done.record.shape, done.record.index
        for role, value in (("S", done.S), ("spectrum", done.spectrum)):
            self._rows[shape, role][i] = value
            self._changed.add(((shape, role), i // self._arrays[shape, role].layout.chunks[0]))
        self._attrs["layers"][done.layer] = dict(vars(done.record))
        if time.monotonic() > self._due:
            self.flush()

    def flush(self) -> None:
        """Make the layers written so far count as done."""
        begun = time.monotonic()
        for place, chunk in sorted(self._changed):
            array = self._arrays[place]
            rows = slice(chunk * array.layout.chunks[0], (chunk + 1) * array.layout.chunks[0])
            schema.write(array, (rows,), self._rows[place][rows])
        self._changed.clear()
        order = [layer for group in self._attrs["groups"].values() for layer in group["layers"]]
        done = self._attrs["layers"]
        self._attrs["layers"] = {layer: done[layer] for layer in order if layer in done}
        schema.put_attributes(self._group, self._attrs)
        now = time.monotonic()
        self._due = now + max(FLUSH_SECONDS, (now - begun) / FLUSH_SHARE)

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
