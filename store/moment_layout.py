"""Where the moments of a store are: /moments/<group>/<array>, those of the sites of one kind and width d stacked.

full-<d>      mean (n, d), second_moment (n, d, d)
diagonal-<d>  mean, diagonal (n, d)
output-<d>    mean, diagonal (n, d)
layers-<m>    output (n, m, m): E[y y^T] of y = W x without bias, of the layers of sites of kind output with d_out = m

`half_<array>` beside an array is the same over the first half of the tokens. A symmetric matrix is one file, the chunks
on and below its diagonal; 64 rows of the other arrays share a chunk. `samples/<site>` holds the tokens that were kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import zarr

from ..errors import StoreError
from .format import schema
from .site import HALF, SAMPLED, site_arrays

LAYOUT = 2  # of the moments that are written now, the attribute `layout` of /moments
Shapes = Mapping[str, tuple[int, int]]  # layer -> (d_out, d_in)


@dataclass(frozen=True)
class MomentPlace:
    """An array of a site: the path below /moments of the one that holds it, what that looks like, and the row in it;
    None where it is an array of its own.
    """

    path: str
    layout: schema.Layout
    row: int | None = None


class Stacks:
    """The sites of /moments, `group`, by its attributes: `records`, and `groups`, name -> sites or layers in order.

    StoreError where these are damaged.
    """

    def __init__(self, group: zarr.Group, groups: Mapping[str, list[str]], records: Mapping[str, dict[str, Any]]):
        self._group, self._records = group, records
        self._rows = {key: {name: row for row, name in enumerate(names)} for key, names in groups.items()}
        for key, names in groups.items():
            for name in (key, *names):
                schema.check_name(name, "site")
            if len(self._rows[key]) != len(names):
                raise StoreError(f"{schema.name_of(group)} lists a site of {key} twice: the store is damaged")

    @property
    def hashes(self) -> dict[str, str]:
        """The hash of every site."""
        return {site: record["hash"] for site, record in self._records.items()}

    def where(self, site: str) -> str:
        """A site as messages name it."""
        return f"{schema.name_of(self._group)} ({site})"

    def record(self, site: str) -> dict[str, Any]:
        """What is known of a site. KeyError where there is none."""
        return self._records[site]

    def places(self, site: str, kind: str, shapes: Shapes, halved: bool, sampled: int) -> dict[str, MomentPlace]:
        """Where the arrays of a site are, by name. KeyError where the groups do not have it."""
        width = next(iter(shapes.values()))[1]
        found = {}
        for name, layout in site_arrays(kind, shapes, halved, sampled).items():
            if name in SAMPLED:
                found[name] = MomentPlace(f"samples/{site}/{name}", layout)
                continue
            base = name.removeprefix(f"{HALF}/")
            what, _, layer = base.partition("/")
            key = _layers_key(shapes[layer][0]) if layer else _sites_key(kind, width)
            rows, array = self._rows[key], what if base == name else f"{HALF}_{what}"
            found[name] = MomentPlace(f"{key}/{array}", _stacked(layout, len(rows)), rows[layer or site])
        return found


def groups_of(sites: Mapping[str, Shapes], kinds: Mapping[str, str]) -> dict[str, list[str]]:
    """The groups of sites, by name: their sites or layers in order. sites: name -> layer -> (d_out, d_in)."""
    groups: dict[str, list[str]] = {}
    for site, shapes in sites.items():
        kind = kinds[site]
        groups.setdefault(_sites_key(kind, next(iter(shapes.values()))[1]), []).append(site)
        for layer, (d_out, _) in shapes.items() if kind == "output" else ():
            groups.setdefault(_layers_key(d_out), []).append(layer)
    return groups


def _sites_key(kind: str, d_in: int) -> str:
    return f"{kind}-{d_in}"


def _layers_key(d_out: int) -> str:
    return f"layers-{d_out}"


def _stacked(layout: schema.Layout, n: int) -> schema.Layout:
    """An array that holds n of the arrays of one layout: a file for each matrix, vectors as rows."""
    edge = 1 if layout.lower else min(n, schema.ROWS)
    return replace(layout, shape=(n, *layout.shape), chunks=(edge, *layout.chunks), sharded=layout.lower)
