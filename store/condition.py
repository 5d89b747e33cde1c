"""What is wrong with a basis as far as its metadata and the sizes of its files show: `prep verify` reads them, too."""

from __future__ import annotations

import os
from pathlib import Path

from zarr.storage import LocalStore

from ..errors import StoreError
from .bases import Bases
from .basis import BasisSet
from .basis_places import is_left
from .manifest import basis_entries


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
    wrong = sum(not right for right in _files_right(basis, store.root))
    return f"damaged, {wrong:,} of its files are missing or of another size" if wrong else None


def _files_right(basis: BasisSet, root: Path) -> list[bool]:
    """For every file that a basis must consist of, whether it is there at its size; any size will do for metadata."""
    at, top = basis.place, f"bases/{basis.name}"
    right = []
    for path, layout in basis_entries(basis).items():
        folder = f"{root}/{at}{path.removeprefix(top)}"
        right.append(_size(f"{folder}/zarr.json") > 0)
        if layout is not None:
            # every array of a basis has one dtype that is its own, or that of the basis
            dtype = layout.dtypes[0]
            right += [_size(f"{folder}/{key}") == layout.file_bytes(dtype) for key in layout.file_keys()]
    return right


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
