"""`prep push` and `prep pull`: a complete store from one place to another, file by file, verified where it arrives.

At a path the copy is built beside what is there and put in place when it is whole. At a URL, which knows no renames,
the old root's zarr.json goes first and the new one last, so that a copy that was cut short is no store. Files are asked
for by name.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

from zarr.abc.store import Store as ZarrStore

from ..errors import StoreError
from .artifact import Store, create_store, open_store
from .format import schema
from .format.documents import MAX_DOCUMENT, Layout
from .format.files import at_once, fetch, fetch_async
from .format.zarr_core import sync, to_buffer
from .integrity import verify_store
from .lock import writer_lock
from .manifest import files, manifest
from .staging import check_replaceable, occupied, overlap, replacement

_ROOT = "zarr.json"


def push(store: str | Path, url: str, *, overwrite: bool = False, break_lock: bool = False) -> Store:
    """Copy a store to `url` (any fsspec file system that can be written to) and read it back to verify it.

    The source is verified before anything is touched. overwrite: replace a store at `url`. break_lock: take a writer's
    lock that another machine has left behind, where `url` is a path.

    Raises StoreError where it is damaged or not complete, or `url` holds one already and not `overwrite`.
    """
    if "://" not in str(url):
        raise StoreError(f"{url} is no URL: write it like s3://bucket/prep.zarr")
    source, entries = _source(store, url)
    if not schema.is_url(url):
        return _to_path(source, entries, url, "URL", overwrite, break_lock)
    verified(store, str(store))
    target = schema.zarr_store(url, read_only=False)
    if fetch(target, _ROOT, 1) is not None:
        if not overwrite:
            raise StoreError(f"{url} holds something already: name another URL, or replace it with --overwrite")
        open_store(url)  # refuses to remove what is not a store
        with _writing(url):
            if _shows(source.root.store, target):
                raise StoreError(f"{url} is the store that is to be copied: name another URL")
            sync(target.delete(_ROOT))
            sync(target.clear())
    try:
        with _writing(url):
            _copy(source, target, entries)
        return verified(url, "the copy")
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            sync(target.delete(_ROOT))
        raise


def pull(
    url: str | Path, store: str | Path = "prep.zarr", *, overwrite: bool = False, break_lock: bool = False
) -> Store:
    """Copy the store at `url` to the path `store` and verify it; it appears there whole or not at all.

    overwrite: replace the store at `store`. break_lock: take a writer's lock that another machine has left behind.

    Raises StoreError where the source is damaged or not complete, the disk full, or `store` exists and not `overwrite`.
    """
    if schema.is_url(store):
        raise StoreError(f"--store {store} is a URL: pull into a path, and copy that with `prep push`")
    return _to_path(*_source(url, store), store, "--store", overwrite, break_lock)


def verified(location: str | Path, name: str) -> Store:
    """The store at a location, of which every byte was read and found right. StoreError, by that name, otherwise."""
    source = open_store(location)
    findings = verify_store(source, numerics=False).findings
    if findings:
        first, more = findings[0], f" ({len(findings)} such findings)" if len(findings) > 1 else ""
        raise StoreError(f"{name} is damaged: {first.where}: {first.problem}{more}")
    return source


def _source(location: str | Path, target: str | Path) -> tuple[Store, dict[str, Layout | None]]:
    """The store to copy and what it consists of. StoreError where the target is in it, or the other way round."""
    if overlap(location, target):
        raise StoreError(f"{target} and {location} are one place, or one lies in the other: name another target")
    source = open_store(location)
    return source, manifest(source)


def _to_path(
    source: Store, entries: dict[str, Layout | None], location: str | Path, what: str, overwrite: bool, break_lock: bool
) -> Store:
    """Copy a store to a path, where it appears whole or not at all. what: the location's name on the command line."""
    _check_free(location, what, overwrite)
    with schema.disk_guard(location, _bytes(entries)), writer_lock(location, break_lock):
        _check_free(location, what, overwrite)  # another process may have been faster
        with replacement(location) as built:
            # known as a store from the start, so that what a killed process leaves of it may be removed
            create_store(built, {**source.attrs, "status": "incomplete"})
            with _writing(location):
                _copy(source, schema.zarr_store(built, read_only=False), entries)
            verified(built, "the copy")
    return open_store(location)


def _check_free(location: str | Path, what: str, overwrite: bool) -> None:
    if occupied(location):
        if not overwrite:
            raise StoreError(f"{location} exists already: name another {what}, or replace it with --overwrite")
        check_replaceable(location)


def _copy(source: Store, target: ZarrStore, entries: dict[str, Layout | None]) -> None:
    """All files of a store, the root's metadata, as it was before the others were read, after all of them."""
    sizes = {path: max(map(layout.chunk_bytes, layout.dtypes)) for path, layout in entries.items() if layout}
    files_of = source.root.store
    root = fetch(files_of, _ROOT, MAX_DOCUMENT + 1)

    async def put(key: str, raw: bytes | None) -> None:
        if raw is None:
            raise StoreError(f"{source.location}/{key} is missing: restore the store from a copy")
        await target.set(key, to_buffer(raw))

    async def one(key: str) -> None:
        array, mark, _ = key.rpartition("/c/")
        await put(key, await fetch_async(files_of, key, sizes[array] + 1 if mark else MAX_DOCUMENT + 1))

    at_once(one, [key for key in files(entries) if key != _ROOT])
    sync(put(_ROOT, root))


def _shows(source: ZarrStore, target: ZarrStore) -> bool:
    """Whether what is written to the target is seen in the source: two spellings of one place."""
    key, mark = "push.partial", uuid.uuid4().bytes
    sync(target.set(key, to_buffer(mark)))
    try:
        return fetch(source, key, len(mark)) == mark
    finally:
        sync(target.delete(key))


@contextlib.contextmanager
def _writing(location: str | Path) -> Iterator[None]:
    """Turn errors of the target's file system into one line; `disk_guard` does so for a full disk."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:  # each file system has its own kinds
        if isinstance(error, OSError) and error.errno in schema.DISK_FULL:
            raise
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise StoreError(f"cannot write to {location} ({said}): check the address and your permissions") from error


def _bytes(entries: dict[str, Layout | None]) -> int:
    """What the chunks take at least."""
    layouts = [layout for layout in entries.values() if layout is not None]
    return sum(len(list(layout.chunk_keys())) * min(map(layout.chunk_bytes, layout.dtypes)) for layout in layouts)
