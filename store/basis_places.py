"""Where the bases of a store lie, and how one is replaced or removed.

A complete basis is replaced when its successor is complete, which is built in `bases/.<name>.new`; between two renames
the old one is `bases/.<name>.old`. At URLs, which know no renames, it goes when its successor is begun.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import zarr
from zarr.storage import LocalStore

from ..errors import StoreError
from .format import schema
from .staging import one_line, remove_all, swap


def take_back(root: zarr.Group, name: str) -> None:
    """Remove a basis that was begun in a local store, or a replacement; what was to be replaced stays."""
    if not isinstance(root.store, LocalStore):
        return
    if os.path.lexists(_folder(root, new_place(name))):
        remove_pending(root, name)
    else:
        forget_basis(root, name)


def forget_basis(root: zarr.Group, name: str) -> None:
    """Take a basis off a local store's list, and then remove its files. For the holder of the writer's lock."""
    recover(root, name)
    list_basis(root, name, False)
    remove_pending(root, name)
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
    return any(os.path.lexists(_folder(root, place)) for place in (name, new_place(name), old_place(name)))


def _folder(root: zarr.Group, place: str) -> Path:
    schema.check_name(place, "basis")
    assert isinstance(root.store, LocalStore)
    return root.store.root / "bases" / place


def new_place(name: str) -> str:
    """The folder in which the successor of a basis is built."""
    return f".{name}.new"


def old_place(name: str) -> str:
    """The folder of a basis while its successor takes its place."""
    return f".{name}.old"


def list_basis(root: zarr.Group, name: str, there: bool) -> None:
    """Add a basis to the root's list, or take it off: the list as it is on disk, of which `root` may know less."""
    kept = schema.attributes(schema.reread(root), {"bases": list})
    others = [other for other in kept["bases"] if other != name]
    schema.put_attributes(root, {**kept, "bases": [*others, name] if there else others})


def raise_version(root: zarr.Group) -> None:
    """Say in a store's root that what it holds is of the format version of now."""
    kept = schema.attributes(schema.reread(root), {"format_version": int})
    if kept["format_version"] < schema.FORMAT_VERSION:
        schema.put_attributes(root, {**kept, "format_version": schema.FORMAT_VERSION})


def remove_pending(root: zarr.Group, name: str) -> None:
    """Remove an unwanted replacement, its attributes first, so that a half-removed one is never resumed."""
    if isinstance(root.store, LocalStore):
        new = root.store.root / "bases" / new_place(name)
        if os.path.lexists(new):
            with one_line(new):
                (new / "zarr.json").unlink(missing_ok=True)
                remove_all(new)


def put_in_place(store: Path, name: str) -> None:
    """Replace the basis `name` by its finished successor."""
    at, new, old = (store / "bases" / place for place in (name, new_place(name), old_place(name)))
    swap(new, at, old)
    if os.path.lexists(old):
        with one_line(old):
            remove_all(old)


def recover(root: zarr.Group, name: str) -> None:
    """Tidy up where a process died in `put_in_place`: put the old basis back, or finish its removal."""
    schema.check_name(name, "basis")
    if not isinstance(root.store, LocalStore) or root.store.read_only:
        return
    at, old = (root.store.root / "bases" / place for place in (name, old_place(name)))
    if os.path.lexists(old):
        with one_line(at), contextlib.suppress(FileNotFoundError):  # the ranks of a job do this together
            if os.path.lexists(at):
                remove_all(old)
            else:
                os.rename(old, at)
