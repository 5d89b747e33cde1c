"""The files of a store by name: bounded reads and atomic writes; nothing is listed.

Local files are read and written as such, regular ones only: a pipe or device in their place would never end. At URLs
`AT_ONCE` files are under way, on the event loop of zarr.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, TypeVar

from zarr.abc.store import Store as ZarrStore
from zarr.storage import LocalStore

from ...errors import StoreError, first_line
from .remote import get
from .zarr_core import sync, to_buffer

AT_ONCE = 16

Item = TypeVar("Item")


def shown(store: ZarrStore, path: str = "") -> str:
    """A place in a store as messages name it: a path, or a URL as far as its file system tells."""
    other: Any = store
    if isinstance(store, LocalStore):
        root = str(store.root)
    elif hasattr(store, "address"):
        root = str(other.address)
    else:
        root = str(other.fs.unstrip_protocol(other.path)) if hasattr(other, "fs") else str(store)
    return f"{root}/{path}" if path else root


def fetch(store: ZarrStore, key: str, limit: int, start: int = 0) -> bytes | None:
    """Bytes start to start + limit of a file, fewer where it ends before, None where there is none."""
    if not isinstance(store, LocalStore):
        return sync(fetch_async(store, key, limit, start))
    parts = _fetch_local(store, key, [(start, start + limit)])
    return None if parts is None else parts[0]


def _fetch_local(store: LocalStore, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
    """Ranges of bytes of a file, each shorter where it ends before, None where there is none."""
    try:
        with open(f"{store.root}/{key}", "rb", opener=_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError("no regular file")
            parts = []
            for start, end in ranges:
                file.seek(start)
                parts.append(file.read(max(min(end, status.st_size) - start, 0)))  # no memory for what is not there
            return parts
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise unreadable(store, key, error) from error


def _at_once(path: str, flags: int) -> int:
    """Open a file without waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


async def fetch_async(store: ZarrStore, key: str, limit: int, start: int = 0) -> bytes | None:
    """`fetch` for use inside an event loop."""
    if isinstance(store, LocalStore):
        return await asyncio.to_thread(fetch, store, key, limit, start)
    try:
        return await get(store, key, start, start + limit)
    except Exception as error:  # each file system has its own kinds
        raise unreadable(store, key, error) from error


def fetch_each(store: ZarrStore, limits: Mapping[str, int], use: Callable[[str, bytes | None], None]) -> None:
    """Call `use(key, bytes)` for the file of every key, as `fetch` gives it with the key's limit."""
    ranges = {key: [(0, limit)] for key, limit in limits.items()}
    fetch_runs(store, ranges, lambda key, parts: use(key, None if parts is None else parts[0]))


def fetch_runs(
    store: ZarrStore,
    ranges: Mapping[str, Sequence[tuple[int, int]]],
    use: Callable[[str, list[bytes] | None], None],
) -> None:
    """Call `use(key, parts)` with the ranges of bytes, start to end, of the file of every key, each shorter where the
    file ends before; None where there is no file.
    """
    if isinstance(store, LocalStore):
        for key, wanted in ranges.items():
            use(key, _fetch_local(store, key, wanted))
        return
    found: dict[str, list[bytes | None]] = {key: [None] * len(wanted) for key, wanted in ranges.items()}
    left = {key: len(wanted) for key, wanted in ranges.items()}

    async def one(item: tuple[str, int]) -> None:
        key, number = item
        start, end = ranges[key][number]
        found[key][number] = await fetch_async(store, key, end - start, start)
        left[key] -= 1
        if not left[key]:
            parts = found.pop(key)
            there = [part for part in parts if part is not None]
            use(key, there if len(there) == len(parts) else None)

    at_once(one, [(key, number) for key, wanted in ranges.items() for number in range(len(wanted))])


def put_each(store: ZarrStore, contents: Mapping[str, Item], encode: Callable[[Item], bytes]) -> None:
    """Write the encoded contents to files by key; each is there whole or not at all."""
    if isinstance(store, LocalStore):
        for key, content in contents.items():
            _put_local(f"{store.root}/{key}", encode(content))
        return

    async def one(key: str) -> None:
        await store.set(key, to_buffer(encode(contents[key])))

    at_once(one, contents)


def at_once(work: Callable[[Item], Awaitable[None]], items: Iterable[Item]) -> None:
    """Do `work` for every item, `AT_ONCE` at a time; after a failure or an interrupt no other begins.

    What has begun is waited for: a write to a disk goes on in its thread when its task is cancelled, and would bring
    back a folder that was removed meanwhile.
    """
    left, ended = deque(items), threading.Event()
    try:
        sync(_all_at_once(work, left, ended))
    finally:
        left.clear()
        ended.wait()


async def _all_at_once(work: Callable[[Item], Awaitable[None]], left: deque[Item], ended: threading.Event) -> None:
    try:
        ends = await asyncio.gather(*(_one_by_one(work, left) for _ in range(AT_ONCE)), return_exceptions=True)
    finally:
        ended.set()
    for error in filter(None, ends):
        raise error


async def _one_by_one(work: Callable[[Item], Awaitable[None]], left: deque[Item]) -> None:
    try:
        while left:
            await work(left.popleft())
    except BaseException:
        left.clear()
        raise


def _put_local(path: str, content: bytes) -> None:
    with _partial(path) as file:
        file.write(content)


@contextlib.contextmanager
def _partial(path: str) -> Iterator[BinaryIO]:
    """Inside, a file is written that then takes the place of the one at `path`, or goes after an error."""
    partial = f"{path}.partial"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


@contextlib.contextmanager
def put_stream(store: ZarrStore, key: str) -> Iterator[Callable[[bytes | memoryview], object]]:
    """Inside, what the yielded function is given is written to a file, which is there whole at the end or not at all.

    On a disk at once; a file at a URL is kept in memory until it is whole.
    """
    if isinstance(store, LocalStore):
        with _partial(f"{store.root}/{key}") as file:
            yield file.write
        return
    parts: list[bytes | memoryview] = []
    yield parts.append
    sync(store.set(key, to_buffer(b"".join(parts))))


def unreadable(store: ZarrStore, key: str, error: Exception) -> StoreError:
    """What is said of a file that is there, as far as can be told, and was not read."""
    said = first_line(error)
    return StoreError(f"{shown(store, key)} cannot be read ({said}): check path, permission and connection")
