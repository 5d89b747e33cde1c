"""Reading the activation moments of a store. Shapes: d = d_in of a site's layers, m = d_out of one of them.

second_moment (d, d)   C = E[x x^T], uncentred, over real tokens
diagonal (d,)          E[x_i^2], where C is not kept
output (m, m)          E[y y^T] of y = W x without bias, of each layer of a site of that kind
mean (d,)              E[x]
half                   the same over the first half of the tokens, float32, where the calibration kept it
tokens (n, d)          inputs of a uniform random sample of the tokens, float32, where the calibration kept one
priorities (n,)        the random numbers by which they were taken, see sample.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import zarr
from torch import Tensor

from ..errors import StoreError, did_you_mean
from .display import html_table
from .format import schema
from .format.arrays import OTHER_VERSION, Region
from .format.untrusted import MOMENTS
from .moment_layout import MomentPlace, Stacks
from .site import (
    HALF,
    SiteData,
    check_hashes,
    checked_half,
    checked_sample,
    combined,
    read_parts,
    site_arrays,
    site_data,
)
from .version1 import SiteGroups

IDLE = "no token of the data was routed to it"  # why an expert is skipped


class LayerMoment:
    """The moments of one layer's input, read when asked for: `.second_moment`, `.diagonal`, `.output`, `.mean`, and
    `.tokens`, a sample of `.sampled` inputs.

    opened: the array at a place, checked.
    """

    def __init__(
        self,
        layer: str,
        site: str,
        source: Stacks | SiteGroups,
        opened: Callable[[MomentPlace], schema.Array],
    ):
        record, where = source.record(site), source.where(site)
        self.layer, self.site, self.kind = layer, site, str(record["kind"])
        self.count = int(record["count"])
        self.members: dict[str, dict[str, Any]] = record["members"]
        self.hash = str(record["hash"])
        self.hashes: dict[str, str] = record["arrays"]
        if not schema.is_count(self.count):
            raise StoreError(f"{where} has the kind {self.kind!r} of {self.count} tokens: it is damaged")
        shapes = {name: schema.check_shape(member["shape"], name) for name, member in self.members.items()}
        if len({d_in for _, d_in in shapes.values()}) != 1:
            raise StoreError(f"{where} has members of several widths: it is damaged")
        self.shape = shapes[layer]
        self.weight_hash = str(self.members[layer]["weight_hash"])
        self.share = 1.0
        self._record, self._opened = record, opened
        self._half, self._prefix = checked_half(record, where), ""
        self.sampled = checked_sample(record, where)
        known = (self.kind, shapes, self._half is not None, self.sampled)
        self.arrays = site_arrays(*known)
        check_hashes(record, where, self.arrays)
        self.places = source.places(site, *known)

    def __repr__(self) -> str:
        return f"LayerMoment({self.layer!r}, kind={self.kind!r}, d_in={self.shape[1]}, count={self.count:,})"

    def _repr_html_(self) -> str:
        """For notebooks: the layers that share the site."""
        rows = ((name, "{} x {}".format(*member["shape"])) for name, member in self.members.items())
        return html_table(repr(self), ("layer", "shape"), rows, len(self.members))

    @property
    def half(self) -> LayerMoment | None:
        """The moments of the first half of the tokens, whose share in C is `.share`; None where it was not kept.

        Those of the other tokens are `(C - share C_half) / (1 - share)`.
        """
        if self._half is None:
            return None
        part = copy.copy(self)
        part.count, part.share = self._half
        part._half, part._prefix, part.sampled = None, f"{HALF}/", 0
        return part

    @property
    def second_moment(self) -> Tensor:
        """C (d_in, d_in) = E[x x^T], uncentred. StoreError where the site's moment kind is not full."""
        self._need("full", "second moment")
        return self._symmetric("second_moment")

    @property
    def output(self) -> Tensor:
        """E[y y^T] (d_out, d_out) of the bias-free output y = W x. StoreError where the kind is not output."""
        self._need("output", "output moment")
        return self._symmetric(f"output/{self.layer}")

    @property
    def diagonal(self) -> Tensor:
        """E[x_i^2] (d_in,), for every moment kind."""
        if self.kind == "full":
            return self.second_moment.diagonal().clone()
        return self._whole("diagonal")

    @property
    def mean(self) -> Tensor:
        """E[x] (d_in,)."""
        return self._whole("mean")

    @property
    def tokens(self) -> Tensor | None:
        """The inputs (n, d_in), float32, of a uniform random sample of the tokens; None where none was kept."""
        return self._whole("tokens") if self.sampled else None

    def squares(self) -> Tensor:
        """`diagonal` (d_in,), of a full moment from the chunks on the diagonal of C alone: a fraction of its bytes.

        These are checked by their checksums, not by the hash of all of C.
        """
        if self.kind != "full":
            return self.diagonal
        array, row = self._at("second_moment")
        blocks: list[Region] = [(*row, slice(a, b), slice(a, b)) for a, b in schema.panels(self.shape[1])]
        parts = schema.read_each([(array, block) for block in blocks])
        return torch.cat([part[0 if row else ...].diagonal() for part in parts])

    def data(self) -> SiteData:
        """All that is kept of the site, symmetric matrices as panels."""
        return site_data(self._record, {name: self.read(name) for name in self.arrays})

    def read(self, name: str) -> list[Tensor]:
        """One of its `arrays`: the panels of a symmetric matrix, or one tensor."""
        return [part for _, part in self._parts(name)]

    def _parts(self, name: str) -> Iterator[tuple[Region, Tensor]]:
        place = self.places[name]
        return read_parts(self._opened(place), self.hashes[name], place.row)

    def _at(self, name: str) -> tuple[schema.Array, Region]:
        """The array that holds one of its own, and where."""
        place = self.places[self._prefix + name]
        return self._opened(place), () if place.row is None else (slice(place.row, place.row + 1),)

    def _whole(self, name: str) -> Tensor:
        [values] = self.read(self._prefix + name)
        return values

    def _symmetric(self, name: str) -> Tensor:
        """Read from the lower-triangle chunks; the strict upper triangle is mirrored."""
        C: Tensor | None = None
        for (rows, columns), panel in self._parts(self._prefix + name):
            C = _square(self._opened(self.places[self._prefix + name])) if C is None else C
            C[rows, columns] = panel
            C[: rows.start, rows] = panel[:, : rows.start].T
        assert C is not None
        return C

    def _need(self, kind: str, what: str) -> None:
        if self.kind != kind:
            raise StoreError(
                f"{self.layer} has the moment kind {self.kind}, no {what}: "
                f"calibrate with `prep covariance --moment {kind}`"
            )


def _square(array: schema.Array) -> Tensor:
    shape = array.layout.shape[-2:]
    try:
        return torch.empty(shape, dtype=schema.DTYPES[array.dtype])
    except RuntimeError as error:
        raise StoreError(f"{array} does not fit into memory: {shape} in {array.dtype}") from error


class Moments(Mapping[str, LayerMoment]):
    """All moments of a store. Keys are layer names; every member of a site finds the site's moments.

    sealed: the hash of all sites as the store's root has it, None where it has none. StoreError where the attributes
    of /moments are damaged or of another version.
    """

    def __init__(self, group: zarr.Group, sealed: str | None = None):
        attrs = schema.attributes(group, MOMENTS)
        self._group = group
        self._opened: dict[str, schema.Array] = {}
        self.sites: dict[str, list[str]] = attrs["sites"]
        self.skipped: dict[str, str] = attrs.get("skipped", {})
        self._source: Stacks | SiteGroups
        if attrs.get("layout", 1) == 1:
            self._source = SiteGroups(group, attrs.get("hashes", {}))
        else:
            self._source = Stacks(group, attrs.get("groups", {}), attrs.get("records", {}))
        for site, layers in self.sites.items():
            schema.check_name(site, "site")
            for layer in layers:
                schema.check_name(layer, "layer")
            if not layers:
                raise StoreError(f"{schema.name_of(group)} gives the site {site} no layer: the store is damaged")
        hashes = self._source.hashes
        if sealed is not None and (hashes.keys() != self.sites.keys() or sealed != combined(hashes)):
            raise StoreError(f"{schema.name_of(group)} is {OTHER_VERSION}: restore the store from a copy")
        self._site_of = {layer: site for site, layers in self.sites.items() for layer in layers}

    def __getitem__(self, layer: str) -> LayerMoment:
        if layer not in self._site_of:
            reason = " ".join(self.skipped.get(layer, "").split())
            meant = f": {reason}" if reason else did_you_mean(layer, self) or "; `prep info` lists its layers"
            raise StoreError(f"the store has no moments of {layer}{meant}")
        site = self._site_of[layer]
        try:
            moment = LayerMoment(layer, site, self._source, self._open)
        except (KeyError, ValueError) as error:
            raise StoreError(f"the moments of {site} are missing or damaged: restore the store from a copy") from error
        if set(moment.members) != set(self.sites[site]):
            raise StoreError(f"{self._source.where(site)} lists other members than /moments: it is damaged")
        return moment

    def _open(self, place: MomentPlace) -> schema.Array:
        if place.path not in self._opened:
            self._opened[place.path] = schema.open_array(self._group, place.path, place.layout)
        return self._opened[place.path]

    def __repr__(self) -> str:
        return f"Moments({len(self)} layers, {len(self.sites)} sites)"

    def _repr_html_(self) -> str:
        """For notebooks: the sites and the layers that share them."""
        return html_table(repr(self), ("site", "layers that share it"), self._rows(), len(self.sites))

    def _rows(self) -> Iterator[tuple[str, str]]:
        for site, layers in self.sites.items():
            yield site, ", ".join(layer.rpartition(".")[2] for layer in layers)

    def __contains__(self, layer: object) -> bool:
        return layer in self._site_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._site_of)

    def __len__(self) -> int:
        return len(self._site_of)
