"""`prep report`: a store as one HTML file that needs nothing else, neither a server nor a network.

Names from a store are text wherever they stand: jinja escapes them in the page, `style.text` in figures, and the page's
own head forbids it to load anything.
"""

from __future__ import annotations

import stat
from pathlib import Path

from ..errors import PrepError
from ..files import written
from ..store import Store, open_store
from ..store.format.schema import disk_guard

MARK = "prep report"  # in the head of every page, by which one is known that may be replaced
_HEAD = 2000  # bytes in which the mark stands


def report(
    store: str | Path | Store = "prep.zarr", path: str | Path = "report.html", *, overwrite: bool = False
) -> Path:
    """Write what a store holds to `path`, one HTML file with figures, and return the path.

    store: its path, URL, or the opened store; attributes and small arrays of it are read. path: a report that is there
    is replaced, any other file only with `overwrite`.

    PrepError for a path that is taken or lies in a store, or where plotly is missing; StoreError for a store that is
    missing or damaged.
    """
    target = Path(path)
    _check(target, overwrite)
    try:
        from .page import page
    except ImportError as error:
        package = str(error.name).partition(".")[0]
        raise PrepError(f'a report needs {package}: pip install "prep-bases[report]"') from error
    opened = open_store(store.location if isinstance(store, Store) else store)  # as it is by now
    content = page(opened, MARK).encode(errors="replace")  # a name may hold half a character
    try:
        with disk_guard(target.parent, len(content)), written(target) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise PrepError(f"{target} cannot be written ({error.strerror}): name another --output") from error
    return target


def _check(target: Path, overwrite: bool) -> None:
    """PrepError where a report must not be written."""
    if target.is_dir():
        raise PrepError(f"{target} is a directory: name a file, such as --output {target / 'report.html'}")
    if not target.parent.is_dir():
        raise PrepError(f"{target.parent} is no directory: make it, or name another --output")
    if any((folder / "zarr.json").exists() for folder in target.resolve().parents):
        raise PrepError(f"{target} lies in a store: name another --output")
    if target.exists() and not overwrite and not _is_report(target):
        raise PrepError(
            f"{target} is there already and no report: name another --output, or replace it with --overwrite"
        )


def _is_report(path: Path) -> bool:
    """Whether `report` wrote a file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
            return False
        with open(path, "rb") as file:
            return f'name="generator" content="{MARK}'.encode() in file.read(_HEAD)
    except OSError:
        return False
