"""`prep remove`: bases or the moments of a store go, the rest stays.

What is removed is first taken out of the root's attributes, in one step, and then from the disk: a process that dies in
between leaves a store without it, and the same command removes the files that are left.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import PrepError, StoreError
from .artifact import Store, open_store
from .bases import Bases
from .basis_places import forget_basis, is_left
from .format.schema import content_hash, is_url, local_path, put_attributes, remove_partial
from .lock import writer_lock
from .staging import interrupted, one_line, remove_all

_PARTS = ("moments", "checkpoint")  # groups of a calibration, and the root's attributes of them
_KEPT = ("corpus", "options", "id")  # by which the same moments may come back, and no others


def remove(
    store: str | Path = "prep.zarr",
    names: str | Iterable[str] = (),
    *,
    moments: bool = False,
    break_lock: bool = False,
) -> Store:
    """Remove the bases `names` from the local store, and with `moments` its moments, and return what is left of it.

    break_lock: take a writer's lock that another machine has left behind.

    Unfinished and damaged ones may be removed too. While bases made of removed moments are left, the store's attribute
    `removed` keeps the corpus and options that they came from, and only the same calibration puts moments beside them
    again.

    Raises PrepError where nothing is named or `store` is a URL, StoreError for a name that the store does not have,
    before anything is removed.
    """
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    if is_url(store):
        raise PrepError(f"{store} is a URL: remove from a copy, `prep pull`, and push that with --overwrite")
    if interrupted(store) is None:
        _check(open_store(store), names, moments)
    with writer_lock(store, break_lock):
        opened = open_store(store, "r+")
        _check(opened, names, moments)
        for name in names:
            forget_basis(opened.root, name)
        if moments:
            _forget_moments(open_store(store, "r+"))
        _forget_origin(open_store(store, "r+"))
        remove_partial(opened.root)
    return open_store(store)


def _check(store: Store, names: list[str], moments: bool) -> None:
    """Refuse what is not there, or no longer is while files of it are left."""
    bases = Bases(store.root)
    if not names and not moments:
        raise PrepError(f"nothing to remove: name bases ({', '.join(bases) or 'there are none'}) or give --moments")
    for name in names:
        if name not in bases and not is_left(store.root, name):
            raise StoreError(f"{store.location} has no basis {name!r} (it has: {', '.join(bases) or 'none'})")
    if moments and store.corpus is None and not any(map(os.path.lexists, _folders(store))):
        raise StoreError(f"{store.location} holds no moments")


def _folders(store: Store) -> list[Path]:
    return [local_path(store.location) / part for part in _PARTS]


def _forget_moments(store: Store) -> None:
    attrs: dict[str, Any] = {
        name: value for name, value in store.attrs.items() if name not in ("moments", "checkpoint")
    }
    if store.corpus is not None and store.status == "complete":
        attrs["removed"] = {name: attrs[name] for name in _KEPT}
    identity = content_hash([str(sorted(store.model.items(), key=str))])
    attrs |= {"corpus": None, "options": None, "status": "complete", "id": identity}
    put_attributes(store.root, attrs)
    for folder in _folders(store):
        if os.path.lexists(folder):
            with one_line(folder):
                remove_all(folder)


def _forget_origin(store: Store) -> None:
    """Once no basis of removed moments is left, a store need not know where those came from."""
    bases = Bases(store.root)
    if "removed" in store.attrs and not any(_is_of_moments(bases, name) for name in bases):
        put_attributes(store.root, {name: value for name, value in store.attrs.items() if name != "removed"})


def _is_of_moments(bases: Bases, name: str) -> bool:
    try:
        method = bases.open(name).method
    except StoreError:  # damaged: it may be
        return True
    return method["metric"] != "identity" or method.get("select") == "activation"
