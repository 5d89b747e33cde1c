"""Stores at URLs: any fsspec file system. Reading asks for single files by name; nothing is listed.

Every wait has a limit. From a web server no more than the requested bytes is taken, whatever it sends, and
`PIECE` of them must come within `PREP_TIMEOUT` seconds (30); of other file systems a request for `PART` bytes may take
twice as long, one for more in proportion. What may pass (no answer, a connection that broke, a server that is busy) is
tried `PREP_RETRIES` times more (2).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

from zarr.abc.store import RangeByteRequest
from zarr.abc.store import Store as ZarrStore

from ...errors import StoreError, first_line
from .zarr_core import prototype

PIECE = 2**18
PART = 2**20
TIMEOUT = 30.0
RETRIES = 2
PAUSE = 0.25  # seconds before the first retry, twice as many before the next one
_BUSY = (408, 425, 429, 500, 502, 503, 504)  # status of an answer that may be another one later
_BROKEN = {"ClientConnectionError", "ClientPayloadError"}  # of aiohttp, whose kinds are no others' of the system


def url_store(url: str, read_only: bool = True, storage_options: dict[str, Any] | None = None) -> ZarrStore:
    """The files below `url`. StoreError where fsspec or the file system's own package is missing, or it is unknown."""
    from zarr.storage import FsspecStore

    try:
        return FsspecStore.from_url(url.rstrip("/"), storage_options, read_only)
    except ImportError as error:
        raise StoreError(f'{url} needs another package ({error}): pip install "prep-bases[remote]"') from error
    except (ValueError, OSError) as error:
        raise StoreError(f"{url} cannot be opened ({error}): write it like s3://bucket/prep.zarr") from error


async def get(store: Any, key: str, start: int, end: int) -> bytes | None:
    """Bytes start to end of a file of an fsspec store, fewer where it ends before, None where there is none."""
    seconds, retries = timeout(), _retries()
    web = "http" in store.fs.protocol and hasattr(store.fs, "set_session")
    tried = 0
    while True:
        try:
            if web:
                return await _from_web(store.fs, f"{store.path}/{key}", start, end, seconds)
            return await _in_parts(store, key, start, end, seconds)
        except Exception as error:  # each file system has its own kinds
            tried += 1
            if not _may_pass(error):
                raise
            if tried > retries:
                raise ConnectionError(_said(error, seconds, tried)) from error
            await asyncio.sleep(min(max(PAUSE * 2 ** (tried - 1), _asked_for(error)), seconds))


def _may_pass(error: Exception) -> bool:
    status = getattr(error, "status", None)
    if status is not None:
        return status in _BUSY
    kinds = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, (TimeoutError, ConnectionError)) or bool(kinds & _BROKEN)


def _said(error: Exception, seconds: float, tried: int) -> str:
    times = f", tried {tried} times" if tried > 1 else ""
    if isinstance(error, TimeoutError):
        return f"no answer in time{times}; PREP_TIMEOUT sets more than {seconds:g} seconds"
    if type(error).__name__ == "ClientPayloadError":
        return f"the answer broke off before its end{times}"
    return f"{first_line(error)}{times}"


def _asked_for(error: Exception) -> float:
    """The seconds that a busy server asks to wait; 0 where it asks for none."""
    try:
        return max(0.0, float((getattr(error, "headers", None) or {}).get("Retry-After", 0)))
    except ValueError:  # a date
        return 0.0


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
        if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise OSError("the server sent another part than was asked for")
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


def timeout() -> float:
    """The seconds that a read may go without an answer. ValueError where PREP_TIMEOUT is no such number."""
    return _setting("PREP_TIMEOUT", TIMEOUT, "number of seconds", lambda number: 0 < number < float("inf"))


def _retries() -> int:
    """How often a read is tried again. ValueError where PREP_RETRIES is no such number."""
    what = "number of retries up to 100"
    return int(_setting("PREP_RETRIES", RETRIES, what, lambda number: number in range(101)))


def _setting(name: str, default: float, what: str, fits: Callable[[float], bool]) -> float:
    """A number from the environment. ValueError, which says `what` it is to be, where it does not fit."""
    given = os.environ.get(name, "")
    try:
        number = float(given or default)
    except ValueError:
        number = float("nan")
    if not fits(number):
        raise ValueError(f"{name}={given} is no {what}")
    return number
