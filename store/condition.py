"""What is wrong with bases and moments as far as metadata and sizes of files show: `prep verify` reads them, too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import zarr
from zarr.storage import LocalStore

from ..errors import StoreError
from .bases import Bases
from .basis_places import is_left
from .format.layout import Layout
from .manifest import basis_entries, moment_entries
from .moments import Moments


def fault(bases: Bases, name: str) -> str | None:
    """Why a listed basis cannot be read, in words that follow "it is"; None where nothing is seen to be wrong.

    Of complete ones in local stores, the presence and sizes of all files are looked at.
    """
    store = bases.root.store
    try:
        basis = bases.open(name)
    except StoreError:
        gone = isinstance(store, LocalStore) and not is_left(bases.root, name)
        return "missing, its folder is gone" if gone else "damaged, its zarr.json cannot be read"
    if not isinstance(store, LocalStore) or basis.status != "complete":
        return None
    at, top = basis.place, f"bases/{basis.name}"
    entries = {f"{at}{path.removeprefix(top)}": layout for path, layout in basis_entries(basis).items()}
    wrong = sum(not right for right in _files_right(entries, store.root))
    return f"damaged, {wrong:,} of its files are missing or of another size" if wrong else None


def check_moments(moments: Moments, root: zarr.Group) -> None:
    """StoreError where a local store lacks files of the moments, or some have another size."""
    if not isinstance(root.store, LocalStore):
        return
    entries = moment_entries(moments[layers[0]] for layers in moments.sites.values())
    if wrong := _files_right(entries, root.store.root).count(False):
        raise StoreError(f"{wrong:,} of their files are missing or of another size: restore the store from a copy")


def _files_right(entries: Mapping[str, Layout | None], root: Path) -> list[bool]:
    """For every file of a manifest, whether it is there at a size that it may have; any will do for metadata."""
    right = []
    for path, layout in entries.items():
        right.append(_size(f"{root}/{path}/zarr.json") > 0)
        if layout is not None:
            sizes = {layout.file_bytes(dtype) for dtype in layout.dtypes}
            right += [_size(f"{root}/{path}/{key}") in sizes for key in layout.file_keys()]
    return right


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
