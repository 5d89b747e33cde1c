"""The zarr v3 conventions of a store: format, chunk grids, groups, hashes. docs/store-format.md is the prose.

Arrays are uncompressed little-endian bytes followed by a crc32c. The fill value is NaN and no array holds a NaN, so a
chunk that is gone shows itself on reading. bfloat16 is kept as uint16 with the attribute `dtype: bfloat16`.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zarr
from zarr.abc.store import Store as ZarrStore
from zarr.core.group import AsyncGroup
from zarr.storage import LocalStore, StorePath

from ...errors import StoreError
from .arrays import Array, as_stored, create_array, open_array, open_arrays, read, read_each, write
from .documents import DTYPES, Layout, attributes, check_name, check_shape, document, is_count, put_attributes, sealed
from .files import fetch

__all__ = [
    "DTYPES",
    "FORMAT",
    "FORMAT_VERSION",
    "ROWS",
    "SLAB",
    "Array",
    "Layout",
    "as_stored",
    "attributes",
    "check_name",
    "check_shape",
    "create_array",
    "fetch",
    "is_count",
    "open_array",
    "open_arrays",
    "put_attributes",
    "read",
    "read_each",
    "sealed",
    "write",
]

FORMAT = "prep"
FORMAT_VERSION = 1
SLAB = 64  # ranks per chunk of U and P
ROWS = 64  # layers per chunk of S and the spectrum


def panels(d: int) -> list[tuple[int, int]]:
    """Row ranges of the block-triangular form of a symmetric (d, d) matrix: panel i is `C[a:b, :b]`.

    The same blocks are the zarr chunks and the products of the accumulator, so a panel is written without a copy of C.
    """
    edge = panel_edge(d)
    return [(a, min(a + edge, d)) for a in range(0, d, edge)]


def panel_edge(d: int) -> int:
    """Edge of the square chunks of a (d, d) second moment: at most 8 panels, none below 256 rows unless d is."""
    count = max(1, min(8, d // 256))
    return -(-d // count)


def vector(d: int, *dtypes: str) -> Layout:
    """An array (d,) in one chunk."""
    return Layout((d,), (d,), dtypes)


def symmetric(d: int, *dtypes: str) -> Layout:
    """A (d, d) symmetric matrix: the chunks on and below the diagonal."""
    return Layout((d, d), (panel_edge(d), panel_edge(d)), dtypes, lower=True)


def open_group(
    location: str | Path | ZarrStore, mode: str = "r", attributes: dict[str, Any] | None = None
) -> zarr.Group:
    """The root group at a path, URL or zarr store, new with `attributes`; FileNotFoundError where there is none.

    One file is read: no v2 probe, no listing, and consolidated metadata, which may be stale, is not looked at.
    Raises ValueError where that file is no group's.
    """
    store = zarr_store(location, mode == "r") if isinstance(location, (str, Path)) else location
    if mode in ("r", "r+"):
        return _group(StorePath(store))
    return zarr.open_group(
        store=store,
        mode=mode,  # type: ignore[arg-type]
        zarr_format=3,
        attributes=sealed(attributes or {}),
    )


def zarr_store(location: str | Path, read_only: bool) -> ZarrStore:
    """The files at a path or fsspec URL. StoreError where the URL's file system is not installed or not known."""
    if not is_url(location):
        return LocalStore(Path(location), read_only=read_only)
    from .remote import url_store

    return url_store(str(location), read_only)


def is_url(location: str | Path) -> bool:
    """True for `s3://...` and the like."""
    return "://" in str(location)


def child(group: zarr.Group, name: str) -> zarr.Group:
    """A subgroup for reading and writing; KeyError where there is none, ValueError where it is damaged."""
    try:
        return _group(group.store_path / name)
    except FileNotFoundError as error:
        raise KeyError(name) from error


def _group(path: StorePath) -> zarr.Group:
    attrs = document(path.store, path.path, "group").get("attributes", {})
    return zarr.Group(AsyncGroup.from_dict(path, {"zarr_format": 3, "node_type": "group", "attributes": attrs}))


def stored_shape(group: zarr.Group, path: str) -> tuple[int, ...]:
    """The shape an array claims; StoreError where it is missing or damaged."""
    at = group.store_path / path
    try:
        shape = document(at.store, at.path, "array")["shape"]
        return tuple(int(size) for size in shape)
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{at} is missing or its metadata is damaged: restore the store from a copy") from error


def content_hash(parts: Iterable[np.ndarray | str]) -> str:
    """xxh3-128 over strings and the bytes of arrays, in order. 32 hex digits."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part).data)
    return digest.hexdigest()


def remove_partial(root: zarr.Group) -> None:
    """Remove the files that a killed process had begun to write. For the holder of the writer's lock."""
    store = root.store
    if isinstance(store, LocalStore):
        for file in store.root.rglob("*.partial"):
            file.unlink()


@contextlib.contextmanager
def disk_guard(location: str | Path, needed: int = 0) -> Iterator[None]:
    """Refuse to begin where `needed` bytes are not free, and turn a full disk into one line. Local paths only."""
    if is_url(location):
        yield
        return
    path = Path(location)
    while not path.exists() and path != path.parent:
        path = path.parent
    free = shutil.disk_usage(path).free
    if needed > free:
        raise StoreError(f"{location} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free: make room or move it")
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreError(f"the disk of {location} is full: make room and run the same command again") from error
