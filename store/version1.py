"""Where stores of format version 1, which are read and no longer written, have what lies elsewhere in those of now.

A basis of layout 1 keeps U and P in an array each, in which every slab of 64 directions is a file. Moments of layout 1
keep every site in a group of its own, with its record in the attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import zarr

from ..errors import StoreError
from .format import schema
from .format.arrays import OTHER_VERSION
from .format.untrusted import SITE
from .moment_layout import MomentPlace, Shapes
from .site import site_arrays


def factor_arrays(shape: tuple[int, int], n: int, rank: int, dtype: str) -> dict[str, schema.Layout]:
    """The arrays of U and P of n stacked layers of one shape."""
    slab = min(rank, schema.SLAB)
    widths = dict(zip("UP", shape, strict=True))
    return {role: schema.Layout((n, rank, d), (1, slab, d), (dtype,)) for role, d in widths.items()}


def factor_places() -> dict[str, tuple[str, slice]]:
    """Array and columns of U and of P."""
    return {role: (role, slice(None)) for role in "UP"}


class SiteGroups:
    """The sites of /moments, `group`. hashes: of the sites, as far as its attributes have them."""

    def __init__(self, group: zarr.Group, hashes: Mapping[str, str]):
        self._group, self.hashes = group, dict(hashes)

    def where(self, site: str) -> str:
        """A site as messages name it."""
        return f"{schema.name_of(self._group)}/{site}"

    def record(self, site: str) -> dict[str, Any]:
        """What is known of a site. KeyError or ValueError where its metadata is missing or damaged."""
        record = schema.attributes(schema.child(self._group, site), SITE)
        if self.hashes.get(site, record["hash"]) != record["hash"]:
            raise StoreError(f"{self.where(site)} is {OTHER_VERSION}: restore the store from a copy")
        return record

    def places(self, site: str, kind: str, shapes: Shapes, halved: bool, sampled: int) -> dict[str, MomentPlace]:
        """Where the arrays of a site are, by name."""
        arrays = site_arrays(kind, shapes, halved, sampled)
        return {name: MomentPlace(f"{site}/{name}", layout) for name, layout in arrays.items()}


def is_unfinished(root: zarr.Group) -> bool:
    """Whether moments of version 1 were begun in a store, which nobody can go on with."""
    try:
        return "layout" not in schema.child(root, "moments").attrs
    except (KeyError, ValueError):
        return False
