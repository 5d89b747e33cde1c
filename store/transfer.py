"""`prep push` and `prep pull`: a complete store from one place to another, file by file, verified where it arrives.

At a path the copy is built beside what is there and put in place when it is whole. At a URL, which knows no renames,
the old root's zarr.json goes first and the new one last, so that a copy that was cut short is no store. Files are asked
for by name. To and from the hub a copy goes as hub.py says, in few commits and through its cache.
"""

from __future__ import annotations

import contextlib
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from zarr.abc.store import Store as ZarrStore
from zarr.storage import LocalStore

from ..errors import StoreError, first_line
from .artifact import Store, create_store, open_store
from .format import schema
from .format.documents import MAX_DOCUMENT
from .format.files import at_once, fetch, fetch_async, put_stream
from .format.hub import Repository, repository
from .format.layout import Layout
from .format.zarr_core import sync, to_buffer
from .hub import Snapshot, target, upload, withdraw
from .integrity import verify_store
from .lock import writer_lock
from .manifest import CARD, files, manifest
from .staging import check_replaceable, occupied, overlap, replacement

MAX_DOCUMENTS = 400_000_000  # bytes of all zarr.json of a store on the hub
PIECE = 2**26  # bytes: larger files are copied one by one, in such pieces
_ROOT = "zarr.json"


class Damaged(StoreError):
    """What was to be copied, or the copy, is not whole."""


def push(store: str | Path, url: str, *, overwrite: bool = False, break_lock: bool = False) -> Store:
    """Copy a store to `url` (any fsspec file system that can be written to) and read it back to verify it.

    `hf://owner/name` is a repository of the hub, made as a private one where there is none. The store goes there in few
    commits with a card, README.md; what an interrupted push has sent is not sent again.

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
    at = repository(url)
    if at is not None:
        return _to_hub(source, entries, at, overwrite)
    there = schema.zarr_store(url, read_only=False)
    if fetch(there, _ROOT, 1) is not None:
        if not overwrite:
            raise StoreError(f"{url} holds something already: name another URL, or replace it with --overwrite")
        open_store(url)  # refuses to remove what is not a store
        with _writing(url):
            if _shows(source.root.store, there):
                raise StoreError(f"{url} is the store that is to be copied: name another URL")
            sync(there.delete(_ROOT))
            sync(there.clear())
    try:
        with _writing(url):
            _copy(source, there, entries)
        return verified(url, "the copy")
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            sync(there.delete(_ROOT))
        raise


def pull(
    url: str | Path, store: str | Path = "prep.zarr", *, overwrite: bool = False, break_lock: bool = False
) -> Store:
    """Copy the store at `url` to the path `store` and verify it; it appears there whole or not at all.

    `hf://owner/name[@revision]` comes through the hub's cache, where it stays: what an interrupted pull has fetched is
    not fetched again, unless it is found to be damaged there.

    overwrite: replace the store at `store`. break_lock: take a writer's lock that another machine has left behind.

    Raises StoreError where the source is damaged or not complete, the disk full, or `store` exists and not `overwrite`.
    """
    if schema.is_url(store):
        raise StoreError(f"--store {store} is a URL: pull into a path, and copy that with `prep push`")
    at = repository(url)
    if at is not None:
        _check_free(store, "--store", overwrite)  # before anything is fetched
        shot = Snapshot(at)
        try:
            return _to_path(*_from_hub(shot), store, "--store", overwrite, break_lock)
        except Damaged:
            if not shot.mended():  # the repository is what is damaged
                raise
        return _to_path(*_from_hub(shot), store, "--store", overwrite, break_lock)
    return _to_path(*_source(url, store), store, "--store", overwrite, break_lock)


def verified(location: str | Path, name: str) -> Store:
    """The store at a location, of which every byte was read and found right. StoreError, by that name, otherwise."""
    source = open_store(location)
    findings = verify_store(source, numerics=False).findings
    if findings:
        first, more = findings[0], f" ({len(findings)} such findings)" if len(findings) > 1 else ""
        raise Damaged(f"{name} is damaged: {first.where}: {first.problem}{more}")
    return source


def _source(location: str | Path, target: str | Path) -> tuple[Store, dict[str, Layout | None]]:
    """The store to copy and what it consists of. StoreError where the target is in it, or the other way round."""
    if overlap(location, target):
        raise StoreError(f"{target} and {location} are one place, or one lies in the other: name another target")
    source = open_store(location)
    return source, manifest(source)


def _to_hub(source: Store, entries: dict[str, Layout | None], at: Repository, overwrite: bool) -> Store:
    """Copy a store to a repository. What else is in it, and metadata of its card that is not prep's, stays."""
    from .card import card, is_ours

    with _writing(at.url):
        to = target(at)
    if to.occupied:
        if not overwrite:
            raise StoreError(f"{at.url} holds something already: name another URL, or replace it with --overwrite")
        open_store(at.url)  # refuses to remove what is not a store
    if not (overwrite or is_ours(to.card)):
        raise StoreError(f"{at.url} has a {CARD} of its own: name another URL, or replace it with --overwrite")
    keys = list(files(entries))
    gone = frozenset(filter(_is_file_of_store, to.names - set(keys))) if overwrite else frozenset[str]()
    with _at_path(source, entries) as folder:
        root = fetch(schema.zarr_store(folder, True), _ROOT, MAX_DOCUMENT + 1) or b""
        last = {CARD: card(source, at.url, to.card).encode(), _ROOT: root}
        with _writing(at.url):
            upload(to, {key: folder / key for key in keys if key != _ROOT}, last, gone)
    try:
        return verified(at.url, "the copy")
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            withdraw(at)
        raise


def _is_file_of_store(name: str) -> bool:
    return name.startswith(("moments/", "bases/")) and (name.endswith("/zarr.json") or "/c/" in name)


@contextlib.contextmanager
def _at_path(source: Store, entries: dict[str, Layout | None]) -> Iterator[Path]:
    """Where the files of a store are on a disk: their own place, or that of a copy which is removed afterwards."""
    if isinstance(source.root.store, LocalStore):
        yield source.root.store.root
        return
    with tempfile.TemporaryDirectory() as folder, schema.disk_guard(folder, _bytes(entries)):
        _copy(source, schema.zarr_store(folder, read_only=False), entries)
        yield Path(folder)


def _from_hub(shot: Snapshot) -> tuple[Store, dict[str, Layout | None]]:
    """The store of a repository in the hub's cache, and what it consists of; no more than that is fetched."""
    at = shot.at
    if _ROOT not in shot.sizes:
        open_store(at.url)  # says so
    documents = [name for name in filter(_is_file_of_store, shot.sizes) if name.endswith("zarr.json")] + [_ROOT]
    if sum(shot.sizes[name] for name in documents) > MAX_DOCUMENTS:
        raise StoreError(f"{at.url} has more than {MAX_DOCUMENTS / 1e6:.0f} MB of metadata: the store is damaged")
    folder = shot.download(dict.fromkeys(documents, MAX_DOCUMENT), "*zarr.json")
    try:
        entries = manifest(open_store(folder))
    except StoreError as error:
        raise Damaged(str(error)) from error
    return open_store(shot.download(_limits(entries))), entries


def _limits(entries: dict[str, Layout | None]) -> dict[str, int]:
    """The most bytes that every file of a store may have, by key."""
    sizes = {path: max(map(layout.file_bytes, layout.dtypes)) for path, layout in entries.items() if layout}
    return {
        key: MAX_DOCUMENT if key.endswith("zarr.json") else sizes[key.rpartition("/c/")[0]] for key in files(entries)
    }


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


def _copy(source: Store, place: ZarrStore, entries: dict[str, Layout | None]) -> None:
    """All files of a store, the root's metadata, as it was before the others were read, after all of them."""
    files_of, limits = source.root.store, _limits(entries)
    root = fetch(files_of, _ROOT, MAX_DOCUMENT + 1)

    async def put(key: str, raw: bytes | None) -> None:
        if raw is None:
            raise _missing(source, key)
        await place.set(key, to_buffer(raw))

    async def one(key: str) -> None:
        await put(key, await fetch_async(files_of, key, limits[key] + 1))

    at_once(one, [key for key in limits if key != _ROOT and limits[key] <= PIECE])
    for key in (key for key in limits if limits[key] > PIECE):
        _copy_in_pieces(source, place, key, limits[key])
    sync(put(_ROOT, root))


def _copy_in_pieces(source: Store, place: ZarrStore, key: str, limit: int) -> None:
    """A file that is too large to be in memory beside others, and a byte more than it may have."""
    with put_stream(place, key) as put:
        for start in range(0, limit + 1, PIECE):
            raw = fetch(source.root.store, key, min(PIECE, limit + 1 - start), start)
            if raw is None:
                raise _missing(source, key)
            put(raw)
            if len(raw) < PIECE:
                break


def _missing(source: Store, key: str) -> StoreError:
    return StoreError(f"{source.location}/{key} is missing: restore the store from a copy")


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
        said = first_line(error)
        raise StoreError(f"cannot write to {location} ({said}): check the address and your permissions") from error


def _bytes(entries: dict[str, Layout | None]) -> int:
    """What the chunks take at least."""
    layouts = [layout for layout in entries.values() if layout is not None]
    return sum(len(list(layout.file_keys())) * min(map(layout.file_bytes, layout.dtypes)) for layout in layouts)
