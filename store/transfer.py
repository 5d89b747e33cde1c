"""`prep push` and `prep pull`: a complete store from one place to another, file by file, verified where it arrives.

The root's zarr.json goes last, so that a copy that was cut short is no store. Files are asked for by name.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from ..errors import StoreError
from .artifact import Store, open_store
from .format import schema
from .format.documents import MAX_DOCUMENT, Layout
from .format.files import at_once, fetch, fetch_async
from .integrity import verify_store
from .lock import writer_lock
from .manifest import files, manifest


def push(store: str | Path, url: str, *, overwrite: bool = False) -> Store:
    """Copy a local store to `url` (any fsspec file system that can be written to) and read it back to verify it.

    Raises StoreError where the store is damaged or not complete, or `url` holds one already and not `overwrite`.
    """
    if not schema.is_url(url):
        raise StoreError(f"{url} is no URL: write it like s3://bucket/prep.zarr")
    found = open_store(store)
    target = schema.zarr_store(url, read_only=False)
    if fetch(target, "zarr.json", 1) is not None:
        if not overwrite:
            raise StoreError(f"{url} holds something already: name another URL, or replace it with --overwrite")
        open_store(url)  # refuses to remove what is not a store
        sync(target.clear())
    _copy(found, target, manifest(found))
    return _verified(url)


def pull(url: str | Path, store: str | Path = "prep.zarr", *, overwrite: bool = False) -> Store:
    """Copy the store at `url` to the path `store` and verify it; it appears there whole or not at all.

    Raises StoreError where the source is damaged or not complete, the disk full, or `store` exists and not `overwrite`.
    """
    path = Path(store)
    found = open_store(url)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not overwrite:
            raise StoreError(f"{path} exists already: name another --store, or replace it with --overwrite")
        open_store(path)  # refuses to remove what is not a store
    entries = manifest(found)
    part = path.with_name(f"{path.name}.partial")
    with schema.disk_guard(path, _bytes(entries)), writer_lock(path):
        shutil.rmtree(part, ignore_errors=True)
        try:
            _copy(found, schema.zarr_store(part, read_only=False), entries)
            _verified(part)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        if path.exists():
            shutil.rmtree(path)
        os.replace(part, path)
    return open_store(path)


def _verified(location: str | Path) -> Store:
    found = open_store(location)
    findings = verify_store(found, numerics=False).findings
    if findings:
        first, more = findings[0], f" ({len(findings)} such findings)" if len(findings) > 1 else ""
        raise StoreError(f"the copy is damaged: {first.where}: {first.problem}{more}")
    return found


def _copy(found: Store, target: ZarrStore, entries: dict[str, Layout | None]) -> None:
    """All files of a store, the root's metadata after all others."""
    *others, root = files(entries)
    sizes = {path: max(map(layout.chunk_bytes, layout.dtypes)) for path, layout in entries.items() if layout}
    source = found.root.store

    async def one(key: str) -> None:
        array, mark, _ = key.rpartition("/c/")
        raw = await fetch_async(source, key, sizes[array] + 1 if mark else MAX_DOCUMENT + 1)
        if raw is None:
            raise StoreError(f"{found.location}/{key} is missing: restore the store from a copy")
        await target.set(key, default_buffer_prototype().buffer.from_bytes(raw))

    try:
        at_once(one, others)
        at_once(one, [root])
    except (StoreError, OSError):
        raise
    except Exception as error:  # each file system has its own kinds
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise StoreError(f"cannot write to {target} ({said}): check the address and your permissions") from error


def _bytes(entries: dict[str, Layout | None]) -> int:
    """What the chunks take at least."""
    layouts = [layout for layout in entries.values() if layout is not None]
    return sum(len(list(layout.chunk_keys())) * min(map(layout.chunk_bytes, layout.dtypes)) for layout in layouts)
