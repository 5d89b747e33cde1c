"""Activation moments in a store: /moments/<site>/, one group per site. Shapes: d = d_in of the site's layers.

second_moment (d, d)    C = E[x x^T], uncentred, over real tokens; only the lower-triangle chunks are written
diagonal (d,)           E[x_i^2], where C is not kept
output/<layer> (m, m)   E[y y^T] of y = W x without bias, m = d_out; lower-triangle chunks
mean (d,)               E[x]
half/...                the same arrays over the first half of the tokens, float32, where the calibration kept it
tokens (n, d)           inputs of a uniform random sample of the tokens, float32, where the calibration kept one
priorities (n,)         the random numbers by which they were taken, see sample.py
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import zarr
from torch import Tensor

from ..errors import StoreError, did_you_mean
from .display import html_table
from .format import schema
from .format.arrays import OTHER_VERSION
from .format.untrusted import MOMENTS, SITE
from .site import HALF, check_hashes, checked_half, checked_sample, combined, read_parts, site_arrays
from .site import SiteData as SiteData

IDLE = "no token of the data was routed to it"  # why an expert is skipped


class LayerMoment:
    """The moments of one layer's input, read when asked for: `.second_moment`, `.diagonal`, `.output`, `.mean`, and
    `.tokens`, a sample of `.sampled` inputs.

    sealed: the site's hash as /moments has it, "" where it has none.
    """

    def __init__(self, layer: str, site: str, group: zarr.Group, sealed: str = ""):
        attrs = schema.attributes(group, SITE)
        self.layer, self.site, self.kind = layer, site, str(attrs["kind"])
        self.count = int(attrs["count"])
        self.members: dict[str, dict[str, Any]] = attrs["members"]
        self.hash = str(attrs["hash"])
        self._hashes: dict[str, str] = attrs["arrays"]
        if not schema.is_count(self.count):
            raise StoreError(
                f"{schema.name_of(group)} has the kind {self.kind!r} of {self.count} tokens: it is damaged"
            )
        if sealed not in ("", self.hash):
            raise StoreError(f"{schema.name_of(group)} is {OTHER_VERSION}: restore the store from a copy")
        shapes = {name: schema.check_shape(member["shape"], name) for name, member in self.members.items()}
        if len({d_in for _, d_in in shapes.values()}) != 1:
            raise StoreError(f"{schema.name_of(group)} has members of several widths: it is damaged")
        self.shape = shapes[layer]
        self.weight_hash = str(self.members[layer]["weight_hash"])
        self.share = 1.0
        self._half, self._prefix, self._group = checked_half(group, attrs), "", group
        self.sampled = checked_sample(group, attrs)
        self.arrays = site_arrays(self.kind, shapes, self._half is not None, self.sampled)
        check_hashes(group, attrs, self.arrays)

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
        name = self._prefix + "second_moment"
        array = schema.open_array(self._group, name, self.arrays[name])
        blocks = [(slice(a, b), slice(a, b)) for a, b in schema.panels(self.shape[1])]
        return torch.cat([block.diagonal() for block in schema.read_each([(array, block) for block in blocks])])

    def _whole(self, name: str) -> Tensor:
        name = self._prefix + name
        [(_, values)] = read_parts(schema.open_array(self._group, name, self.arrays[name]), self._hashes[name])
        return values

    def _symmetric(self, name: str) -> Tensor:
        """Read from the lower-triangle chunks; the strict upper triangle is mirrored."""
        name = self._prefix + name
        array = schema.open_array(self._group, name, self.arrays[name])
        C: Tensor | None = None
        for (rows, columns), panel in read_parts(array, self._hashes[name]):
            C = _square(array) if C is None else C
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
    try:
        return torch.empty(array.layout.shape, dtype=schema.DTYPES[array.dtype])
    except RuntimeError as error:
        raise StoreError(f"{array} does not fit into memory: {array.layout.shape} in {array.dtype}") from error


class Moments(Mapping[str, LayerMoment]):
    """All moments of a store. Keys are layer names; every member of a site finds the site's moments.

    sealed: the hash of all sites as the store's root has it, None where it has none. StoreError where the attributes
    of /moments are damaged or of another version.
    """

    def __init__(self, group: zarr.Group, sealed: str | None = None):
        attrs = schema.attributes(group, MOMENTS)
        self._group = group
        self.sites: dict[str, list[str]] = attrs["sites"]
        self.skipped: dict[str, str] = attrs.get("skipped", {})
        self._hashes: dict[str, str] = attrs.get("hashes", {})
        for site, layers in self.sites.items():
            schema.check_name(site, "site")
            for layer in layers:
                schema.check_name(layer, "layer")
            if not layers:
                raise StoreError(f"{schema.name_of(group)} gives the site {site} no layer: the store is damaged")
        if sealed is not None and (self._hashes.keys() != self.sites.keys() or sealed != combined(self._hashes)):
            raise StoreError(f"{schema.name_of(group)} is {OTHER_VERSION}: restore the store from a copy")
        self._site_of = {layer: site for site, layers in self.sites.items() for layer in layers}

    def __getitem__(self, layer: str) -> LayerMoment:
        if layer not in self._site_of:
            reason = " ".join(self.skipped.get(layer, "").split())
            meant = f": {reason}" if reason else did_you_mean(layer, self) or "; `prep info` lists its layers"
            raise StoreError(f"the store has no moments of {layer}{meant}")
        site = self._site_of[layer]
        try:
            moment = LayerMoment(layer, site, schema.child(self._group, site), self._hashes.get(site, ""))
        except (KeyError, ValueError) as error:
            raise StoreError(f"the moments of {site} are missing or damaged: restore the store from a copy") from error
        if set(moment.members) != set(self.sites[site]):
            raise StoreError(f"{schema.name_of(self._group)}/{site} lists other members than /moments: it is damaged")
        return moment

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


def begin_moments(root: zarr.Group, sites: Mapping[str, list[str]], skipped: Mapping[str, str]) -> None:
    """An empty /moments with the layers of every site, replacing what was there."""
    attrs = {"sites": {site: list(layers) for site, layers in sites.items()}, "skipped": dict(skipped)}
    root.create_group("moments", overwrite=True, attributes=schema.sealed(attrs))


def skip_sites(root: zarr.Group, reasons: Mapping[str, str]) -> None:
    """Take sites out of /moments and list their layers as skipped. reasons: site -> why it has no moments."""
    if not reasons:
        return
    group = schema.child(root, "moments")
    attrs = schema.attributes(group, {**MOMENTS, "skipped": {str: str}})
    skipped = {layer: reason for site, reason in reasons.items() for layer in attrs["sites"][site]}
    sites = {site: layers for site, layers in attrs["sites"].items() if site not in reasons}
    schema.put_attributes(group, {**attrs, "sites": sites, "skipped": {**attrs["skipped"], **skipped}})


def seal_sites(root: zarr.Group) -> str:
    """Note the hash of every site in /moments, and return the hash of them all, for the root's attribute `moments`.

    For the end of a calibration: from then on a site of another one is not read.
    """
    group = schema.child(root, "moments")
    attrs = schema.attributes(group, MOMENTS)
    hashes = {site: schema.attributes(schema.child(group, site), SITE)["hash"] for site in attrs["sites"]}
    schema.put_attributes(group, {**attrs, "hashes": hashes})
    return combined(hashes)
