"""The zarr v3 conventions of a store: format, chunk grids, groups, hashes. docs/store-format.md is the prose.

Arrays are uncompressed little-endian bytes followed by a crc32c. The fill value is NaN and no array holds a NaN, so a
chunk that is gone shows itself on reading. bfloat16 is kept as uint16 with the attribute `dtype: bfloat16`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import xxhash
import zarr
from zarr.abc.store import Store as ZarrStore
from zarr.storage import LocalStore, StorePath

from ...errors import StoreError
from .arrays import Array, as_stored, create_array, open_array, open_arrays, put_group, read, read_each, write
from .documents import DTYPES, attributes, check_name, check_shape, document, is_count, put_attributes, sealed
from .files import fetch, shown
from .layout import Layout
from .zarr_core import group_of, sync

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
    "check_writable_name",
    "create_array",
    "create_group",
    "fetch",
    "is_count",
    "is_url",
    "local_path",
    "open_array",
    "open_arrays",
    "put_attributes",
    "put_group",
    "read",
    "read_each",
    "sealed",
    "write",
]

FORMAT = "prep"
FORMAT_VERSION = 2
SLAB = 64  # ranks per chunk of a basis
ROWS = 64  # layers per chunk of S and the spectrum
SAMPLE_ROWS = 1024  # tokens per chunk
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NAME_BYTES = 200  # of a name that is written: file systems keep 255, of which suffixes take some
# files on their way to their names, as `put_each` and zarr call them
_PARTIAL = re.compile(r"(zarr\.json|zarr\.[0-9a-f]{32}|\d+(\.[0-9a-f]{32})?)\.partial")
_FILE_URL = re.compile(r"(file|local)://", re.IGNORECASE)
_ADVICE = {
    "basis": "give another --name",
    "layer": "leave it out with --exclude",
    "site": "leave it out with --exclude",
}


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


def rows(n: int, d: int, *dtypes: str) -> Layout:
    """An array (n, d) in chunks of whole rows."""
    return Layout((n, d), (min(n, SAMPLE_ROWS), d), dtypes)


def symmetric(d: int, *dtypes: str) -> Layout:
    """A (d, d) symmetric matrix: the chunks on and below the diagonal."""
    return Layout((d, d), (panel_edge(d), panel_edge(d)), dtypes, lower=True)


def open_group(
    location: str | Path | ZarrStore, mode: str = "r", attributes: dict[str, Any] | None = None
) -> zarr.Group:
    """The root group at a path, URL or zarr store, new with `attributes`; FileNotFoundError where there is none.

    One file is read: no v2 probe, no listing, and consolidated metadata, which may be stale, is not looked at.
    Raises ValueError if that file does not describe a group.
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


def place_of(group: zarr.Group) -> str:
    """Where the store of a group is: a path, or a URL."""
    return shown(group.store)


def name_of(group: zarr.Group) -> str:
    """A group as messages name it: its store's place and its path in it."""
    return shown(group.store, group.path)


def zarr_store(location: str | Path, read_only: bool) -> ZarrStore:
    """The files at a path or fsspec URL. StoreError where the URL's file system is not installed or not known."""
    if not is_url(location):
        return LocalStore(local_path(location), read_only=read_only)
    from .hub import hub_store, repository
    from .remote import url_store

    at = repository(location)
    return url_store(str(location), read_only) if at is None else hub_store(at, read_only)


def is_url(location: str | Path) -> bool:
    """True for `s3://...` and the like, not for `file://...`, which is a path."""
    return "://" in str(location) and not _FILE_URL.match(str(location))


def local_path(location: str | Path) -> Path:
    """The path of a location that is no URL, or a `file:///...`. StoreError where that names another host."""
    if not _FILE_URL.match(str(location)):
        return Path(location)
    parts = urlsplit(str(location))
    if parts.netloc not in ("", "localhost"):
        raise StoreError(f"{location} names the host {parts.netloc!r}: write it like file:///path/prep.zarr")
    return Path(url2pathname(parts.path))


def child(group: zarr.Group, name: str) -> zarr.Group:
    """A subgroup for reading and writing; KeyError where there is none, ValueError where it is damaged."""
    try:
        return _group(group.store_path / name)
    except FileNotFoundError as error:
        raise KeyError(name) from error


def create_group(group: zarr.Group, path: str, attributes: dict[str, Any] | None = None) -> zarr.Group:
    """A new group at `path`, in place of what was there; the groups above it are made where there are none.

    One file after the other, so that no write is under way when one has failed, as on a disk that is full.
    """
    at, above = group.store_path / path, path.split("/")[:-1]
    for parent in ("/".join(above[:count]) for count in range(1, len(above) + 1)):
        if not sync(at.store.exists(f"{(group.store_path / parent).path}/zarr.json")):
            put_group(group, parent)
    sync(at.store.delete_dir(at.path))
    put_group(group, path, attributes)
    return group_of(at, attributes or {})


def reread(group: zarr.Group) -> zarr.Group:
    """The same group with the attributes that it has now: those of `group` are as they were when it was opened."""
    return _group(group.store_path)


def _group(path: StorePath) -> zarr.Group:
    attrs = document(path.store, path.path, "group").get("attributes", {})
    return group_of(path, attrs)


def stored_shape(group: zarr.Group, path: str) -> tuple[int, ...]:
    """The shape an array claims; StoreError where it is missing or damaged."""
    at = group.store_path / path
    try:
        shape = document(at.store, at.path, "array")["shape"]
        return tuple(int(size) for size in shape)
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{shown(at.store, at.path)} is missing or its metadata is damaged: restore the store from a copy"
        ) from error


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
        for folder, _, names in os.walk(store.root):
            for name in filter(is_partial, names):
                Path(folder, name).unlink()


def is_partial(name: str) -> bool:
    """Whether a name is one that a writer gives to a file until it is whole."""
    return _PARTIAL.fullmatch(name) is not None


def check_writable_name(name: str, what: str) -> str:
    """A name that a store can keep for a "layer", "site" or "basis" on any file system. StoreError for any other."""
    reason = ""
    if len(name.encode(errors="replace")) > NAME_BYTES:
        reason = f"it is longer than {NAME_BYTES} bytes"
    elif name.startswith(".") or name.endswith(".partial"):
        reason = "such names are those of unfinished files"
    else:
        try:
            check_name(name, what)
        except StoreError:
            reason = "it is no single path component"
    if reason:
        raise StoreError(f"{str(name)[:80]!r} cannot name a {what} in a store, {reason}: {_ADVICE[what]}")
    return name


@contextlib.contextmanager
def disk_guard(location: str | Path, needed: int = 0) -> Iterator[None]:
    """Refuse to begin where `needed` bytes are not free, and turn a full disk into one line. Local paths only."""
    if is_url(location):
        yield
        return
    path = local_path(location)
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    free = shutil.disk_usage(path).free
    if needed > free:
        raise StoreError(f"{location} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free: make room or move it")
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise StoreError(f"the disk of {location} is full: make room and run the same command again") from error
