"""Writing moments site by site.

Matrices and samples go to the store as they come, from several threads or processes. Vectors of many sites share a
chunk, so they are kept in memory and written by `flush`, before the attributes of /moments that list their sites.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import zarr
from torch import Tensor

from .format import schema
from .format.arrays import write_row
from .format.untrusted import MOMENTS, SITE
from .moment_layout import LAYOUT, MomentPlace, Shapes, Stacks, groups_of
from .site import HALF, HALF_DTYPE, SAMPLED, SiteData, combined, site_record
from .site_group import write_sample

_WRITTEN = {**MOMENTS, "skipped": {str: str}, "groups": {str: [str]}, "records": {str: SITE}}


@dataclass(frozen=True)
class SiteDone:
    """A site whose matrices and sample are in the store, and the rows (d,) that are not, by array of the site."""

    site: str
    record: dict[str, Any]
    rows: dict[str, Tensor]


def begin_moments(
    root: zarr.Group, sites: Mapping[str, Shapes], kinds: Mapping[str, str], skipped: Mapping[str, str]
) -> None:
    """An empty /moments, replacing what was there. sites: name -> layer -> (d_out, d_in); kinds: of their moments."""
    attrs = {
        "layout": LAYOUT,
        "sites": {site: list(layers) for site, layers in sites.items()},
        "skipped": dict(skipped),
        "groups": groups_of(sites, kinds),
        "records": {},
    }
    schema.create_group(root, "moments", schema.sealed(attrs))


def skip_sites(root: zarr.Group, reasons: Mapping[str, str]) -> None:
    """Take sites out of /moments and list their layers as skipped. reasons: site -> why it has no moments."""
    if not reasons:
        return
    group = schema.child(root, "moments")
    attrs = schema.attributes(group, _WRITTEN)
    skipped = {layer: reason for site, reason in reasons.items() for layer in attrs["sites"][site]}
    sites = {site: layers for site, layers in attrs["sites"].items() if site not in reasons}
    schema.put_attributes(group, {**attrs, "sites": sites, "skipped": {**attrs["skipped"], **skipped}})


def seal_sites(root: zarr.Group) -> str:
    """The hash of all sites, for the root's attribute `moments`: from then on a site of another run is not read."""
    attrs = schema.attributes(schema.child(root, "moments"), _WRITTEN)
    return combined({site: attrs["records"][site]["hash"] for site in attrs["sites"]})


class MomentWriter:
    """Writes moments, of the given dtype, below a store's root. What is noted counts as done at the next `flush`."""

    def __init__(self, root: zarr.Group, dtype: str):
        self._group, self._dtype = schema.child(root, "moments"), dtype
        self._attrs = schema.attributes(self._group, _WRITTEN)
        self._stacks = Stacks(self._group, self._attrs["groups"], self._attrs["records"])
        self._noted: list[SiteDone] = []

    def put(self, site: str, data: SiteData) -> SiteDone:
        """The part that may be done by several threads and processes, each its own sites: store matrices and sample."""
        places = self._places(site, site_record(data, {}))
        hashes, rows = {}, {}
        for prefix, part in {"": data, f"{HALF}/": data.half}.items():
            for name, value in part.arrays().items() if part is not None else ():
                array, row = self._array(prefix + name, places), places[prefix + name].row
                assert row is not None
                if isinstance(value, Tensor):
                    stored = schema.as_stored(value, array.dtype)
                    rows[prefix + name] = torch.from_numpy(stored)
                    hashes[prefix + name] = schema.content_hash([stored])
                else:
                    hashes[prefix + name] = schema.content_hash(write_row(array, row, value))
        if data.sample is not None:
            schema.put_group(self._group, f"samples/{site}")
            hashes |= write_sample(schema.child(self._group, f"samples/{site}"), data.sample)
        return SiteDone(site, site_record(data, hashes), rows)

    def note(self, done: SiteDone) -> None:
        """The other part, for the process that calls `flush`: take over the record and the rows."""
        self._noted.append(done)

    def flush(self) -> None:
        """Make the sites noted so far count as done."""
        before = self._attrs["records"]
        records = {**before, **{done.site: done.record for done in self._noted}}
        new: dict[str, dict[int, Tensor]] = {}  # rows by path
        arrays: dict[str, schema.Array] = {}
        for done in self._noted:
            for name, place in self._places(done.site, done.record).items():
                if name not in SAMPLED:
                    arrays[place.path] = self._array(name, {name: place})
                if name in done.rows and place.row is not None:
                    new.setdefault(place.path, {})[place.row] = done.rows[name]
        for path, array in arrays.items():
            schema.put_group(self._group, path.partition("/")[0])
            schema.create_array(self._group, path, array.layout, array.dtype)
        if any("sample" in done.record for done in self._noted):
            schema.put_group(self._group, "samples")
        old = self._stored(new.keys(), [site for site in before if site in self._attrs["sites"]])
        for path, rows in new.items():
            _write_rows(arrays[path], {**old.get(path, {}), **rows}, rows.keys())
        self._attrs["records"] = {site: records[site] for site in self._attrs["sites"] if site in records}
        schema.put_attributes(self._group, self._attrs)
        self._noted = []

    def _stored(self, paths: Collection[str], sites: list[str]) -> dict[str, dict[int, Tensor]]:
        """The rows of sites that were done before, in the arrays of those paths."""
        wanted = []
        for site in sites:
            for name, place in self._places(site, self._attrs["records"][site]).items():
                if place.path in paths and place.row is not None:
                    wanted.append((place.path, place.row, self._array(name, {name: place})))
        read = schema.read_each([(array, (slice(row, row + 1),)) for _, row, array in wanted])
        found: dict[str, dict[int, Tensor]] = {}
        for (path, row, _), values in zip(wanted, read, strict=True):
            found.setdefault(path, {})[row] = values[0]
        return found

    def _places(self, site: str, record: Mapping[str, Any]) -> dict[str, MomentPlace]:
        shapes = {layer: tuple(member["shape"]) for layer, member in record["members"].items()}
        return self._stacks.places(site, record["kind"], shapes, HALF in record, record.get("sample", 0))

    def _array(self, name: str, places: Mapping[str, MomentPlace]) -> schema.Array:
        """The array that holds one of a site's, whether its metadata is there yet or not."""
        place = places[name]
        dtype = HALF_DTYPE if name.startswith(f"{HALF}/") else self._dtype
        return schema.Array(self._group.store, f"{self._group.path}/{place.path}", place.layout, dtype)


def _write_rows(array: schema.Array, rows: Mapping[int, Tensor], changed: Iterable[int]) -> None:
    """Write the chunks that hold the `changed` ones of the rows; where there is no row, they hold NaN."""
    edge, n = array.layout.chunks[0], array.layout.shape[0]
    for chunk in sorted({row // edge for row in changed}):
        first, last = chunk * edge, min((chunk + 1) * edge, n)
        values = torch.full((last - first, array.layout.shape[1]), torch.nan, dtype=schema.DTYPES[array.dtype])
        for row in range(first, last):
            if row in rows:
                values[row - first] = rows[row]
        schema.write(array, (slice(first, last),), values)
