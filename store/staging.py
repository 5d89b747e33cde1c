"""Where a store lies, and how one is replaced: the new one is built beside the old one and put in place by renames.

<name>.staged     being built, or finished and not yet in place
<name>.replaced   what was in place; removed once the new one is

A process that is killed at any instant leaves the old store or the new one whole: in place or, between the two renames,
as `.replaced`, which the next writer puts back. Only stores and empty directories are ever moved or removed; people
name copies of their own `.old`, but not so.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from zarr.storage import LocalStore

from ..errors import StoreError
from .format import schema
from .format.documents import MAX_DOCUMENT, parsed

_STAGED, _REPLACED = ".staged", ".replaced"
_ROOT = "zarr.json"
_DOOMED = "zarr.json.removed"  # a store's root document while its other files are removed: it opens no more


def resolved(location: str | Path) -> str | Path:
    """The real path of a local location, links followed; a URL without its last slashes. For comparing locations."""
    if schema.is_url(location):
        return str(location).rstrip("/")
    try:
        return Path(os.path.realpath(schema.local_path(location)))
    except (OSError, ValueError) as error:
        raise _unusable(location, error) from error


def same_place(a: str | Path, b: str | Path) -> bool:
    """Whether two locations are one, however they are spelled."""
    one, other = resolved(a), resolved(b)
    if one == other:
        return True
    if isinstance(one, str) or isinstance(other, str):
        return False
    try:
        return os.path.samefile(one, other)  # mounted twice, or names that ignore case
    except OSError:
        return False


def overlap(a: str | Path, b: str | Path) -> bool:
    """Whether one of two locations is the other or lies inside it."""
    one, other = resolved(a), resolved(b)
    if isinstance(one, str) or isinstance(other, str):
        return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")
    pairs = [(outer, one) for outer in (other, *other.parents)] + [(outer, other) for outer in one.parents]
    return any(same_place(outer, inner) for outer, inner in pairs)


def place(location: str | Path) -> Path:
    """The real path at which a local store is or may be made.

    StoreError for a file, for a link that leads nowhere, and for a path that the file system refuses.
    """
    path, real = schema.local_path(location), resolved(location)
    assert isinstance(real, Path)  # callers have dealt with URLs
    for above in (path, *path.parents):
        if os.path.lexists(above):
            if not os.path.exists(above) and not os.path.exists(_old(real)):
                raise StoreError(f"{above} is a link that leads nowhere: make what it names, or name another --store")
            break
    if not real.name:
        raise StoreError(f"{location} cannot be a store: name a directory below it with --store")
    try:
        if not stat.S_ISDIR(os.stat(real).st_mode):
            raise StoreError(f"{location} is a file and not a prep store: name another --store")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unusable(location, error) from error
    return real


def beside(location: str | Path) -> Path:
    """Where a replacement of the local store at `location` is built."""
    return _staged(place(location))


def occupied(location: str | Path) -> bool:
    """Whether something other than an empty directory is at a local location."""
    path = place(location)
    return os.path.lexists(path) and not _empty(path)


def check_replaceable(location: str | Path) -> None:
    """StoreError where something is at a local location that is not a store, and so not to be removed."""
    if not _ours(place(location)):
        raise StoreError(f"{location} is not a prep store: name another --store")


@contextlib.contextmanager
def replacement(location: str | Path) -> Iterator[Path]:
    """Inside, a store is built at the path that this gives; then it is put in place, or removed after an error.

    For the holder of the writer's lock.
    """
    built = beside(location)
    remove(built)
    try:
        yield built
        put_in_place(built, location)
    except BaseException:
        with contextlib.suppress(StoreError):  # the first error is the one to tell
            remove(built)
        raise


def put_in_place(built: Path, location: str | Path) -> None:
    """Replace the store at `location`, if there is one, by the finished one at `built` in the same directory.

    For the holder of the writer's lock. StoreError, and nothing moved, where something else than a store is in the way.
    """
    path = place(location)
    old = _old(path)
    check_replaceable(location)
    remove(old)
    swap(built, path, old)
    remove(old)


def swap(new: Path, path: Path, old: Path) -> None:
    """Rename `new` to `path`, and before that what is there to `old`, where nothing is; both or none."""
    with one_line(path):
        if os.path.lexists(path):
            os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            if os.path.lexists(old) and not os.path.lexists(path):
                os.rename(old, path)
            raise


def recover(location: str | Path) -> None:
    """Tidy up what a killed writer left: put a store back that had been moved away, finish removals.

    `writer_lock` calls it for every writer, once it holds the lock.
    """
    path = resolved(location)
    if isinstance(path, str):
        return
    for left in (path, _staged(path)):
        if _doomed(left):
            remove(left)
    moved = interrupted(path)
    if moved is not None:
        remove(path)  # an empty directory
        with one_line(path):
            os.rename(moved, path)
    elif _ours(path) and _ours(_old(path)):
        remove(_old(path))


def interrupted(location: str | Path) -> Path | None:
    """Where the store of a location is if a process died between the two renames of its replacement."""
    path = resolved(location)
    if isinstance(path, str) or (os.path.lexists(path) and not _empty(path)):
        return None
    old = _old(path)
    return old if os.path.lexists(old) and _ours(old) and not _remains(old) else None


def remove(path: Path) -> None:
    """Remove a store or an empty directory if one is there; StoreError for anything else. It opens no more at once."""
    if not os.path.lexists(path):
        return
    if not _ours(path):
        raise StoreError(f"{path} is in the way and not a prep store: move it elsewhere")
    with one_line(path):
        with contextlib.suppress(FileNotFoundError):
            os.replace(path / _ROOT, path / _DOOMED)
        with os.scandir(path) as entries:
            others = [entry for entry in entries if entry.name != _DOOMED]
        for entry in others:
            remove_all(Path(entry.path))
        # last, so that what is left of a store is known as such
        (path / _DOOMED).unlink(missing_ok=True)
        path.rmdir()


def remove_all(path: Path) -> None:
    """Remove a directory with all it holds, or a file or link, which is not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Turn an error of the file system while `path` is replaced into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in schema.DISK_FULL:  # disk_guard says it
            raise
        said = error.strerror or str(error)
        raise StoreError(f"{path} cannot be replaced ({said}): check the permissions of its folder") from error


def _staged(path: Path) -> Path:
    return path.with_name(path.name + _STAGED)


def _old(path: Path) -> Path:
    return path.with_name(path.name + _REPLACED)


def _ours(path: Path) -> bool:
    """Whether there is nothing, an empty directory, a store, or what is left of one that was being removed."""
    if not os.path.lexists(path):
        return True
    if path.is_symlink() or not path.is_dir():
        return False
    return _is_store(path, _ROOT) or _remains(path)


def _remains(path: Path) -> bool:
    return _empty(path) or _doomed(path) or _hollow(path)


def _hollow(path: Path) -> bool:
    """Whether a directory holds a group without attributes and nothing else, as a full disk leaves of a store."""
    if os.listdir(path) != [_ROOT]:
        return False
    try:
        return not parsed(schema.fetch(LocalStore(path), _ROOT, MAX_DOCUMENT + 1) or b"", "group").get("attributes")
    except ValueError:
        return False


def _doomed(path: Path) -> bool:
    return not os.path.lexists(path / _ROOT) and _is_store(path, _DOOMED)


def _is_store(path: Path, document: str) -> bool:
    raw = schema.fetch(LocalStore(path), document, MAX_DOCUMENT + 1)
    try:
        return parsed(raw or b"", "group").get("attributes", {}).get("format") == schema.FORMAT
    except ValueError:
        return False


def _empty(path: Path) -> bool:
    """Whether a directory holds nothing but files that a killed writer had begun."""
    try:
        with os.scandir(path) as entries:
            return all(schema.is_partial(entry.name) and entry.is_file(follow_symlinks=False) for entry in entries)
    except OSError:
        return False


def _unusable(location: str | Path, error: Exception) -> StoreError:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return StoreError(f"{str(location)[:200]!r} cannot be a store ({said}): name another --store")
