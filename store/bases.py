"""The bases of a store, found by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import zarr
from zarr.storage import LocalStore

from ..commands import decompose_command, missing_basis
from ..errors import StoreError
from .basis import BasisSet
from .basis_places import new_place, old_place, recover
from .display import html_table
from .format import schema

_COLUMNS = ("basis", "status", "metric", "power", "select", "rank", "layers")


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
                group = schema.child(self.root, f"bases/{old_place(name)}")
            return BasisSet(name, group)
        except (KeyError, TypeError, ValueError) as error:
            again = decompose_command(name, overwrite=True, store=schema.place_of(self.root))
            raise StoreError(f"basis {name!r} is missing or damaged: make it anew with {again}") from error

    def pending(self, name: str) -> BasisSet | None:
        """What is there of a replacement of the basis `name` that is not in place; None where nothing is.

        It may be complete. For the holder of the writer's lock.
        """
        recover(self.root, name)
        if isinstance(self.root.store, LocalStore):
            with contextlib.suppress(KeyError, TypeError, ValueError, StoreError):
                return BasisSet(name, schema.child(self.root, f"bases/{new_place(name)}"))
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


def is_complete(root: zarr.Group, name: str) -> bool:
    """Whether a store has a complete basis of that name."""
    try:
        return Bases(schema.reread(root)).open(name).status == "complete"
    except StoreError:
        return False


def goes_at_once(root: zarr.Group, name: str) -> bool:
    """Whether `BasisWriter.create` removes what is there of a basis before there is a new one."""
    known = Bases(schema.reread(root))
    if known.pending(name) is not None:
        return True
    return name in known and not (isinstance(root.store, LocalStore) and is_complete(root, name))
