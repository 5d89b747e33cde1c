"""The bases of a store: found by name, and written layer by layer.

A layer that counts as done survives an interruption. U and P go to the store as they come. S and spectra of many layers
share a chunk, so they are kept in memory and written by `flush`, before the attributes that call their layers done.

A complete basis is replaced when its successor is complete, which is built in `bases/.<name>.new`; between two renames
the old one is `bases/.<name>.old`. At URLs, which know no renames, it goes when its successor is begun.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import zarr
from torch import Tensor
from zarr.storage import LocalStore

from ..commands import decompose_command, missing_basis
from ..errors import StoreError
from .basis import SHARES, BasisSet, LayerRecord, Place, checksums, group_arrays, group_key, row_checksums
from .display import html_table
from .format import schema
from .staging import one_line, remove_all, swap

_COLUMNS = ("basis", "status", "metric", "power", "select", "rank", "layers")
_OPTIONAL = ("crossed", "shares", "repaired")  # of a record
FLUSH_SECONDS = 1.0
FLUSH_SHARE = 0.1  # of the time may go into flushes: those of very many layers are rarer


class Bases(Mapping[str, BasisSet]):
    """The named bases of a store. Asking for one that is missing or not complete is an error that says what to run."""

    def __init__(self, root: zarr.Group):
        self.root = root
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
            raise StoreError(missing_basis(name, self.names, schema.place_of(self.root)))
        try:
            try:
                group = schema.child(self.root, f"bases/{name}")
            except KeyError:  # a process died between the two renames of a replacement
                group = schema.child(self.root, f"bases/{_old(name)}")
            return BasisSet(name, group)
        except (KeyError, TypeError, ValueError) as error:
            again = decompose_command(name, overwrite=True, store=schema.place_of(self.root))
            raise StoreError(f"basis {name!r} is missing or damaged: make it anew with {again}") from error

    def pending(self, name: str) -> BasisSet | None:
        """What is there of a replacement of the basis `name` that is not in place; None where nothing is.

        It may be complete. For the holder of the writer's lock.
        """
        _recover(self.root, name)
        if isinstance(self.root.store, LocalStore):
            with contextlib.suppress(KeyError, TypeError, ValueError, StoreError):
                return BasisSet(name, schema.child(self.root, f"bases/{_new(name)}"))
        return None

    def __repr__(self) -> str:
        return f"Bases({', '.join(self.names) or 'none'})"

    def _repr_html_(self) -> str:
        """For notebooks: the method of every basis."""
        return html_table(f"{len(self.names)} bases", _COLUMNS, (self._row(name) for name in self.names), len(self))

    def _row(self, name: str) -> list[object]:
        try:
            basis = self.open(name)
        except StoreError as error:
            return [name, str(error)]
        method = basis.method
        return [name, basis.status, method["metric"], *(method.get(key, "") for key in _COLUMNS[3:6]), len(basis)]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


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
        self._arrays = basis.open_arrays(basis.shapes, ("U", "P", "S", "spectrum", *SHARES))
        # the rows of layers to come are NaN, as the fill value
        self._rows = {
            place: torch.full(array.layout.shape, torch.nan, dtype=torch.float64)
            for place, array in self._arrays.items()
            if place[1] not in ("U", "P")
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
        attrs = {"status": "incomplete", "method": method, "dtype": dtype, "model": model, "layers": {}}
        attrs |= {"repair": repair} if repair is not None else {}
        attrs |= {} if files is None else {"files": files}
        attrs["groups"] = {group_key(shape): dict(group) for shape, group in groups.items()}
        _recover(root, name)
        _remove_pending(root, name)
        replaces = isinstance(root.store, LocalStore) and _is_complete(root, name)
        if not replaces:
            _list(root, name, False)
        path = f"bases/{_new(name) if replaces else name}"
        group = root.create_group(path, overwrite=True, attributes=schema.sealed({}))
        for shape, members in groups.items():
            stack = group.create_group(group_key(shape))
            for role, layout in group_arrays(shape, members, dtype).items():
                schema.create_array(stack, role, layout)
        # what has attributes, or is listed, has its arrays, so that it can be resumed
        schema.put_attributes(group, attrs)
        if not replaces:
            _list(root, name, True)
        return cls.resume(root, name)

    @classmethod
    def resume(cls, root: zarr.Group, name: str) -> BasisWriter:
        """Go on with the replacement of a basis if there is one, else with the basis.

        Raises StoreError where what it holds is damaged.
        """
        pending = Bases(schema.reread(root)).pending(name)
        group = schema.child(root, f"bases/{name if pending is None else _new(name)}")
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
        row = (slice(record.index, record.index + 1),)
        arrays = [self._arrays[record.shape, role] for role in "UP"]
        stored = [schema.write(array, row, x[None]) for array, x in zip(arrays, (U.T, P), strict=True)]
        rows = {"S": S, "spectrum": spectrum}
        rows |= {role: (shares or {})[role] for role in SHARES if (record.shape, role) in self._arrays}
        rows = {role: values.detach().to("cpu", torch.float64) for role, values in rows.items()}
        own, more = list(rows.values())[:2], list(rows.values())[2:]
        content = schema.content_hash([*stored, *(values.numpy() for values in own)])
        parts = checksums(arrays, row, stored, own)
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
        if isinstance(store, LocalStore) and self._group.basename == _new(self._name):
            _put_in_place(store.root, self._name)


def goes_at_once(root: zarr.Group, name: str) -> bool:
    """Whether `BasisWriter.create` removes what is there of a basis before there is a new one."""
    known = Bases(schema.reread(root))
    if known.pending(name) is not None:
        return True
    return name in known and not (isinstance(root.store, LocalStore) and _is_complete(root, name))


def take_back(root: zarr.Group, name: str) -> None:
    """Remove a basis that was begun in a local store, or a replacement; what was to be replaced stays."""
    if not isinstance(root.store, LocalStore):
        return
    if os.path.lexists(_folder(root, _new(name))):
        _remove_pending(root, name)
    else:
        forget_basis(root, name)


def forget_basis(root: zarr.Group, name: str) -> None:
    """Take a basis off a local store's list, and then remove its files. For the holder of the writer's lock."""
    _recover(root, name)
    _list(root, name, False)
    _remove_pending(root, name)
    folder = _folder(root, name)
    if not schema.reread(root).attrs["bases"]:  # the last one: the group of all goes with it
        folder = folder.parent
    if os.path.lexists(folder):
        with one_line(folder):
            remove_all(folder)


def is_left(root: zarr.Group, name: str) -> bool:
    """Whether a local store has a folder of a basis, listed or not; no folder has a name that a store cannot keep."""
    try:
        schema.check_writable_name(name, "basis")
    except StoreError:
        return False
    return any(os.path.lexists(_folder(root, place)) for place in (name, _new(name), _old(name)))


def _folder(root: zarr.Group, place: str) -> Path:
    schema.check_name(place, "basis")
    assert isinstance(root.store, LocalStore)
    return root.store.root / "bases" / place


def _new(name: str) -> str:
    return f".{name}.new"


def _old(name: str) -> str:
    return f".{name}.old"


def _list(root: zarr.Group, name: str, there: bool) -> None:
    """Add a basis to the root's list, or take it off: the list as it is on disk, of which `root` may know less."""
    kept = schema.attributes(schema.reread(root), {"bases": list})
    others = [other for other in kept["bases"] if other != name]
    schema.put_attributes(root, {**kept, "bases": [*others, name] if there else others})


def _is_complete(root: zarr.Group, name: str) -> bool:
    try:
        return Bases(schema.reread(root)).open(name).status == "complete"
    except StoreError:
        return False


def _remove_pending(root: zarr.Group, name: str) -> None:
    """Remove an unwanted replacement, its attributes first, so that a half-removed one is never resumed."""
    if isinstance(root.store, LocalStore):
        new = root.store.root / "bases" / _new(name)
        if os.path.lexists(new):
            with one_line(new):
                (new / "zarr.json").unlink(missing_ok=True)
                remove_all(new)


def _put_in_place(store: Path, name: str) -> None:
    """Replace the basis `name` by its finished successor."""
    at, new, old = (store / "bases" / place for place in (name, _new(name), _old(name)))
    swap(new, at, old)
    if os.path.lexists(old):
        with one_line(old):
            remove_all(old)


def _recover(root: zarr.Group, name: str) -> None:
    """Tidy up where a process died in `_put_in_place`: put the old basis back, or finish its removal."""
    schema.check_name(name, "basis")
    if not isinstance(root.store, LocalStore) or root.store.read_only:
        return
    at, old = (root.store.root / "bases" / place for place in (name, _old(name)))
    if os.path.lexists(old):
        with one_line(at), contextlib.suppress(FileNotFoundError):  # the ranks of a job do this together
            if os.path.lexists(at):
                remove_all(old)
            else:
                os.rename(old, at)
