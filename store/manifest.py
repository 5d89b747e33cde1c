"""What a store must consist of, by its own attributes: every group, array and file, found without a listing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from .artifact import Store
from .basis import BasisSet
from .basis_layout import group_key
from .format.layout import Layout
from .moments import LayerMoment

CARD = "README.md"  # what `prep push` writes beside a store on the hub
# what repositories, copies of them and caches keep beside a store, and is none of it
_BESIDE = (CARD, ".gitattributes", ".gitignore", ".git/", ".cache/huggingface/")


def is_beside(name: str) -> bool:
    """Whether a file of that name in a store's directory belongs to a repository and not to the store."""
    return any(name == other or (other.endswith("/") and name.startswith(other)) for other in _BESIDE)


def manifest(store: Store) -> dict[str, Layout | None]:
    """Path -> layout of every array, None for a group; the root is "". StoreError where attributes are damaged.

    Raises StoreError as well for a store or basis that is not complete: what it must hold is not known.
    """
    entries: dict[str, Layout | None] = {"": None}
    bases = store.bases
    if store.corpus is not None:
        moments = store.moments
        entries |= moment_entries(moments[layers[0]] for layers in moments.sites.values())
    if bases.names:
        entries["bases"] = None
    for name in bases:
        entries |= basis_entries(bases[name])
    return entries


def moment_entries(moments: Iterable[LayerMoment]) -> dict[str, Layout | None]:
    """The part of a manifest that is the moments of some sites."""
    layouts: dict[str, Layout] = {}
    rows: dict[str, set[int]] = {}
    for place in (place for moment in moments for place in moment.places.values()):
        path = f"moments/{place.path}"
        layouts[path] = place.layout
        if place.row is not None:
            rows.setdefault(path, set()).add(place.row)
    groups = {"/".join(parts[:i]) for path in layouts for parts in [path.split("/")] for i in range(1, len(parts))}
    there = {path: replace(layouts[path], rows=tuple(sorted(held))) for path, held in rows.items()}
    return {"moments": None, **dict.fromkeys(sorted(groups)), **layouts, **there}


def basis_entries(basis: BasisSet) -> dict[str, Layout | None]:
    """The part of a manifest that is one basis."""
    top = f"bases/{basis.name}"
    entries: dict[str, Layout | None] = {top: None}
    for shape in basis.shapes:
        entries[f"{top}/{group_key(shape)}"] = None
        entries |= {f"{top}/{group_key(shape)}/{role}": layout for role, layout in basis.arrays(shape).items()}
    return entries


def files(entries: dict[str, Layout | None]) -> Iterator[str]:
    """The keys of all files, the root's zarr.json last: a copy that was cut short is no store."""
    for path, layout in entries.items():
        if path:
            yield f"{path}/zarr.json"
        if layout is not None:
            yield from (f"{path}/{key}" for key in layout.file_keys())
    yield "zarr.json"
