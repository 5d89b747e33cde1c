"""Stores at URLs: any fsspec file system. Reading asks for single files by name; nothing is listed.

Every wait has a limit. From a web server no more than the requested bytes is taken, whatever it sends, and
`PIECE` of them must come within `PREP_TIMEOUT` seconds (30); of other file systems a request for `PART` bytes may take
twice as long, one for more in proportion.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

from zarr.abc.store import RangeByteRequest
from zarr.abc.store import Store as ZarrStore

from ...errors import StoreError
from .zarr_core import prototype

PIECE = 2**18
PART = 2**20
TIMEOUT = 30.0


def url_store(url: str, read_only: bool = True) -> ZarrStore:
    """The files below `url`. StoreError where fsspec or the file system's own package is missing, or it is unknown."""
    from zarr.storage import FsspecStore

    try:
        return FsspecStore.from_url(url.rstrip("/"), read_only=read_only)
    except ImportError as error:
        raise StoreError(f'{url} needs another package ({error}): pip install "prep-bases[remote]"') from error
    except (ValueError, OSError) as error:
        raise StoreError(f"{url} cannot be opened ({error}): write it like s3://bucket/prep.zarr") from error


async def get(store: Any, key: str, start: int, end: int) -> bytes | None:
    """Bytes start to end of a file of an fsspec store, fewer where it ends before, None where there is none."""
    seconds = _seconds()
    try:
        if "http" in store.fs.protocol and hasattr(store.fs, "set_session"):
            return await _from_web(store.fs, f"{store.path}/{key}", start, end, seconds)
        return await _in_parts(store, key, start, end, seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer in time; PREP_TIMEOUT sets more than {seconds:g} seconds") from None


async def _in_parts(store: Any, key: str, start: int, end: int, seconds: float) -> bytes | None:
    """`get` with a time limit for each request, the first of which is for `PART` bytes and the next ones for more."""
    received = b""
    while (size := min(max(PART, len(received)), end - start - len(received))) > 0:
        begin = start + len(received)
        try:
            async with asyncio.timeout(seconds * (1 + size / PART)):
                part = await store.get(key, prototype(), RangeByteRequest(begin, begin + size))
        except FileNotFoundError:
            part = None
        if part is None:
            return None
        received += part.to_bytes()
        if len(part) < size:
            break
    return received


async def _from_web(fs: Any, url: str, start: int, end: int, seconds: float) -> bytes | None:
    """`get` from a web server, which may ignore the range and send the file from its beginning, or without an end."""
    from aiohttp import ClientTimeout

    headers = {**fs.kwargs.get("headers", {}), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    options = {**fs.kwargs, "headers": headers, "timeout": ClientTimeout(total=None)}
    async with asyncio.timeout(seconds):
        response = await (await fs.set_session()).get(fs.encode_url(url), **options)
    try:
        if response.status in (404, 416):  # none, or one that ends before `start`
            return None if response.status == 404 else b""
        response.raise_for_status()
        position, pieces = start if response.status == 206 else 0, []
        async for piece in _pieces(response.content, end - position, seconds):
            pieces.append(piece[max(start - position, 0) :])
            position += len(piece)
        return b"".join(pieces)
    finally:
        response.release()  # closes a connection whose response is not read to its end


async def _pieces(content: Any, size: int, seconds: float) -> AsyncIterator[bytes]:
    """The first `size` bytes of a response in pieces of `PIECE`; TimeoutError where one is not there in time."""
    while size > 0:
        piece = bytearray()
        async with asyncio.timeout(seconds):
            while len(piece) < min(PIECE, size) and (some := await content.read(min(PIECE, size) - len(piece))):
                piece += some
        size -= len(piece) if len(piece) == PIECE else size
        yield bytes(piece)


def _seconds() -> float:
    given = os.environ.get("PREP_TIMEOUT", "")
    try:
        seconds = float(given or TIMEOUT)
    except ValueError:
        seconds = 0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"PREP_TIMEOUT={given} is no number of seconds")
    return seconds
