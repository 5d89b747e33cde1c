"""One writer at a time: `<store>.lock`, held by the operating system for as long as the process lives."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import lock_descriptor

from ..errors import StoreError
from .format.schema import DISK_FULL, is_url
from .staging import place, recover

_FLAGS = os.O_RDWR | os.O_CREAT
for _flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # of some systems only
    _FLAGS |= getattr(os, _flag, 0)
_MAX_OWNER = 4096  # bytes of a lock file


@contextlib.contextmanager
def writer_lock(location: str | Path, break_lock: bool = False) -> Iterator[None]:
    """Hold the store for writing, however it is spelled; the lock of a process that died is free.

    What a killed writer left beside the store is tidied up first (see staging.py). break_lock takes a lock that another
    machine seems to have left behind. Stores at URLs are not locked.

    Raises StoreError that names the owner and its age, or says why no store can be at `location`.
    """
    if is_url(location):
        yield
        return
    store = place(location)
    path = store.with_name(f"{store.name}.lock")
    try:
        held = _locked(location, path, break_lock)
    except OSError as error:
        if error.errno in DISK_FULL:  # disk_guard says it
            raise
        raise StoreError(f"cannot write beside {location}: {error.strerror or error}") from error
    try:
        os.truncate(held, 0)
        os.lseek(held, 0, os.SEEK_SET)
        os.write(held, json.dumps({"host": platform.node(), "pid": os.getpid(), "since": time.time()}).encode())
        recover(store)
        yield
    finally:
        _free(path, held)


def _locked(location: str | Path, path: Path, break_lock: bool) -> int:
    """The descriptor of the lock file, locked; of another file where the previous owner has just removed it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        held = os.open(path, _FLAGS, 0o666)
        try:
            _owner(path, held)
            if lock_descriptor(held, blocking=False):
                if _is_at(path, held):
                    return held
            elif not break_lock:
                owner = _patiently(path, held)
                raise StoreError(f"{location} is being written by {owner}: wait for it, or --break-lock")
            elif _is_at(path, held):
                path.unlink()
        except BaseException:
            os.close(held)
            raise
        os.close(held)


def _free(path: Path, held: int) -> None:
    """Remove the lock file while it is locked: whoever has opened it sees that it is gone. Windows closes it first."""
    with contextlib.suppress(OSError):
        if os.name != "nt" and _is_at(path, held):
            path.unlink()
    os.close(held)
    with contextlib.suppress(OSError):
        if os.name == "nt":  # refused where another process has opened the file
            path.unlink()


def _is_at(path: Path, held: int) -> bool:
    """Whether an open file is the one at the path: it was removed where a lock was given up or broken."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(held))
    except FileNotFoundError:
        return False


def _patiently(path: Path, held: int) -> str:
    """The owner, who signs as soon as the lock is taken."""
    for _ in range(50):
        owner = _owner(path, held)
        if owner:
            return owner
        time.sleep(0.01)
    return "another process"


def _owner(path: Path, held: int) -> str:
    """Who wrote the lock file, in words; "" if nobody did. StoreError where it is another file, to be left alone."""
    foreign = StoreError(f"{path} is not a lock of prep: move it elsewhere, or name another --store")
    if not stat.S_ISREG(os.fstat(held).st_mode):
        raise foreign
    if not os.fstat(held).st_size:
        return ""
    os.lseek(held, 1, os.SEEK_SET)  # Windows lets nobody read the first byte, which is locked
    try:
        owner = json.loads(b"{" + os.read(held, _MAX_OWNER))
        return f"process {owner['pid']} on {owner['host']} for {time.time() - owner['since']:,.0f} s"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise foreign from error
