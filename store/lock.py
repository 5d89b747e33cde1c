"""One writer at a time: `<store>.lock`, held by the operating system for as long as the process lives."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..errors import StoreError
from .format.schema import is_url


@contextlib.contextmanager
def writer_lock(location: str | Path, break_lock: bool = False) -> Iterator[None]:
    """Hold the store for writing; the lock of a process that died is free. StoreError names the owner and its age.

    break_lock takes a lock that another machine seems to have left behind. Stores at URLs are not locked.
    """
    if is_url(location):
        yield
        return
    path = Path(f"{str(location).rstrip('/')}.lock")
    if break_lock:
        path.unlink(missing_ok=True)
    with _locked(location, path) as file:
        file.truncate(0)
        json.dump({"host": platform.node(), "pid": os.getpid(), "since": time.time()}, file)
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(location: str | Path, path: Path) -> IO[str]:
    """The open lock file, locked; another one where the previous owner has just removed it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise StoreError(f"cannot write beside {location}: {error.strerror or error}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise StoreError(f"{location} is being written by {_owner(path)}: wait for it, or --break-lock") from error
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text())
        age = time.time() - owner["since"]
        return f"process {owner['pid']} on {owner['host']} for {age:,.0f} s"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
