"""Writing a basis layer by layer.

A layer that counts as done survives an interruption. U and P go to the store as they come. S and spectra of many layers
share a chunk, so they are kept in memory and written by `flush`, before the attributes that call their layers done.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import zarr
from torch import Tensor
from zarr.storage import LocalStore

from .bases import Bases, is_complete
from .basis import BasisSet
from .basis_layout import LAYOUT, Place, group_arrays, group_key
from .basis_places import list_basis, new_place, put_in_place, raise_version, recover, remove_pending
from .format import schema
from .record import SHARES, LayerRecord, checksums, row_checksums

_OPTIONAL = ("crossed", "shares", "repaired")  # of a record
FLUSH_SECONDS = 1.0
FLUSH_SHARE = 0.1  # of the time may go into flushes: those of very many layers are rarer


@dataclass(frozen=True)
class LayerDone:
    """A layer whose U and P are in the store, and the float64 rows that are not: S (r,), spectrum (k,), shares (r,)."""

    layer: str
    record: LayerRecord
    rows: dict[str, Tensor]


class BasisWriter:
    """Writes one basis of a store. What is written counts as done at the next `flush`."""

    def __init__(self, group: zarr.Group, basis: BasisSet, attrs: dict[str, Any]):
        self._name, self._group, self._attrs = basis.name, group, attrs
        self._arrays = basis.open_arrays(basis.shapes, ("UP", "S", "spectrum", *SHARES))
        # the rows of layers to come are NaN, as the fill value
        self._rows = {
            place: torch.full(array.layout.shape, torch.nan, dtype=torch.float64)
            for place, array in self._arrays.items()
            if place[1] != "UP"
        }
        done = [(place, r.index) for r in basis.layers.values() for place in self._rows if place[0] == r.shape]
        stored = schema.read_each([(self._arrays[place], (slice(i, i + 1),)) for place, i in done])
        for (place, i), values in zip(done, stored, strict=True):
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
        repair: dict[str, Any] | None = None,
        files: str | None = None,
    ) -> BasisWriter:
        """Begin a basis. groups: shape -> {"layers": [...], "rank": R, "spectrum": k}, and "shares", some of SHARES, if
        these are known of all layers; repair: see copies.py.

        files: what identifies the files that the weights are read from, for as long as it is not complete.

        A complete basis of that name stays until `finish`, except at a URL; one that is not complete goes at once.

        Raises StoreError for a name that a store cannot keep.
        """
        schema.check_writable_name(name, "basis")
        attrs = {
            "status": "incomplete",
            "layout": LAYOUT,
            "method": method,
            "dtype": dtype,
            "model": model,
            "layers": {},
        }
        attrs |= {"repair": repair} if repair is not None else {}
        attrs |= {} if files is None else {"files": files}
        attrs["groups"] = {group_key(shape): dict(group) for shape, group in groups.items()}
        recover(root, name)
        remove_pending(root, name)
        raise_version(root)
        replaces = isinstance(root.store, LocalStore) and is_complete(root, name)
        if not replaces:
            list_basis(root, name, False)
        path = f"bases/{new_place(name) if replaces else name}"
        group = schema.create_group(root, path, schema.sealed({}))
        for shape, members in groups.items():
            stack = schema.create_group(group, group_key(shape))
            for role, layout in group_arrays(shape, members, dtype).items():
                schema.create_array(stack, role, layout)
        # what has attributes, or is listed, has its arrays, so that it can be resumed
        schema.put_attributes(group, attrs)
        if not replaces:
            list_basis(root, name, True)
        return cls.resume(root, name)

    @classmethod
    def resume(cls, root: zarr.Group, name: str) -> BasisWriter:
        """Go on with the replacement of a basis if there is one, else with the basis.

        Raises StoreError where what it holds is damaged.
        """
        pending = Bases(schema.reread(root)).pending(name)
        group = schema.child(root, f"bases/{name if pending is None else new_place(name)}")
        return cls(group, BasisSet(name, group), schema.attributes(group, {"layers": dict}))

    @property
    def shares(self) -> list[str]:
        """The arrays of SHARES that every group has."""
        return [role for role in SHARES if all((shape, role) in self._arrays for shape, _ in self._arrays)]

    def put(
        self,
        layer: str,
        U: Tensor,
        S: Tensor,
        P: Tensor,
        spectrum: Tensor,
        record: LayerRecord,
        shares: Mapping[str, Tensor] | None = None,
    ) -> LayerDone:
        """The part of `write` that may be done by several processes, each its own layers: store U and P.

        shares: `kept` and `unseen` (r,), as far as the layer's group has them; others are left out.
        """
        row, array = (slice(record.index, record.index + 1),), self._arrays[record.shape, "UP"]
        stored = schema.write(array, row, torch.cat([x.detach().to("cpu") for x in (U.T, P)], 1)[None])
        d_out = record.shape[0]
        rows = {"S": S, "spectrum": spectrum}
        rows |= {role: (shares or {})[role] for role in SHARES if (record.shape, role) in self._arrays}
        rows = {role: values.detach().to("cpu", torch.float64) for role, values in rows.items()}
        own, more = list(rows.values())[:2], list(rows.values())[2:]
        factors = stored[..., :d_out], stored[..., d_out:]
        content = schema.content_hash([*factors, *(values.numpy() for values in own)])
        parts = checksums(array, row, stored, own)
        return LayerDone(layer, replace(record, hash=content, checksums=parts, shares=row_checksums(more)), rows)

    def note(self, done: LayerDone) -> None:
        """The other part, for the process that calls `flush` and `finish`: take over the rows and the record."""
        shape, i = done.record.shape, done.record.index
        for role, value in done.rows.items():
            self._rows[shape, role][i] = value
            self._changed.add(((shape, role), i // self._arrays[shape, role].layout.chunks[0]))
        said = {name: value for name, value in vars(done.record).items() if name not in _OPTIONAL or value}
        self._attrs["layers"][done.layer] = said
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
        """Mark the basis complete, and put it in place of the one that it replaces; its hash covers every layer."""
        records = self._attrs["layers"]
        self._attrs["hash"] = schema.content_hash(f"{layer} {records[layer]['hash']}" for layer in sorted(records))
        self._attrs["status"] = "complete"
        self._attrs.pop("files", None)
        schema.remove_partial(self._group)
        self.flush()
        store = self._group.store
        if isinstance(store, LocalStore) and self._group.basename == new_place(self._name):
            put_in_place(store.root, self._name)
