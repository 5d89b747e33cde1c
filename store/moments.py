"""Activation moments in a store: /moments/<site>/, one group per site. Shapes: d = d_in of the site's layers.

second_moment (d, d)    C = E[x x^T], uncentred, over real tokens; only the lower-triangle chunks are written
diagonal (d,)           E[x_i^2], where C is not kept
output/<layer> (m, m)   E[y y^T] of y = W x without bias, m = d_out; lower-triangle chunks
mean (d,)               E[x]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
import zarr
from torch import Tensor

from ..errors import StoreError, did_you_mean
from .display import html_table
from .format import schema
from .format.arrays import OTHER_VERSION, Region
from .format.documents import check_size
from .format.untrusted import MOMENTS, SITE

VECTORS = ("mean", "diagonal")
MOMENT_DTYPES = ("float64", "float32")


@dataclass(frozen=True)
class SiteData:
    """What a calibration pass knows of one site when it is written.

    members: layer name -> {"shape": [d_out, d_in], "weight_hash": str, "weight_dtype": str}; count: real tokens.
    second_moment and outputs are given as block-triangular panels (see `schema.panels`).
    """

    kind: str
    members: dict[str, dict[str, Any]]
    count: int
    mean: Tensor
    second_moment: list[Tensor] | None = None
    diagonal: Tensor | None = None
    outputs: dict[str, list[Tensor]] | None = None


def site_arrays(kind: str, members: Mapping[str, tuple[int, int]]) -> dict[str, schema.Layout]:
    """The arrays of a site by name. members: layer -> (d_out, d_in)."""
    d = next(iter(members.values()))[1]
    arrays = {"mean": schema.vector(d, *MOMENT_DTYPES)}
    if kind == "full":
        arrays["second_moment"] = schema.symmetric(d, *MOMENT_DTYPES)
    else:
        arrays["diagonal"] = schema.vector(d, *MOMENT_DTYPES)
    if kind == "output":
        arrays |= {f"output/{layer}": schema.symmetric(m, *MOMENT_DTYPES) for layer, (m, _) in members.items()}
    return arrays


class LayerMoment:
    """The moments of one layer's input, read when asked for: `.second_moment`, `.diagonal`, `.output`, `.mean`.

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
            raise StoreError(f"{group.store_path} has the kind {self.kind!r} of {self.count} tokens: it is damaged")
        if sealed not in ("", self.hash):
            raise StoreError(f"{group.store_path} is {OTHER_VERSION}: restore the store from a copy")
        shapes = {name: schema.check_shape(member["shape"], name) for name, member in self.members.items()}
        if len({d_in for _, d_in in shapes.values()}) != 1:
            raise StoreError(f"{group.store_path} has members of several widths: it is damaged")
        self.shape = shapes[layer]
        self.weight_hash = str(self.members[layer]["weight_hash"])
        self.arrays = site_arrays(self.kind, shapes)
        _check_hashes(group, attrs, self.arrays)
        self._group = group

    def __repr__(self) -> str:
        return f"LayerMoment({self.layer!r}, kind={self.kind!r}, d_in={self.shape[1]}, count={self.count:,})"

    def _repr_html_(self) -> str:
        """For notebooks: the layers that share the site."""
        rows = ((name, "{} x {}".format(*member["shape"])) for name, member in self.members.items())
        return html_table(repr(self), ("layer", "shape"), rows, len(self.members))

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
        return self._vector("diagonal")

    @property
    def mean(self) -> Tensor:
        """E[x] (d_in,)."""
        return self._vector("mean")

    def _vector(self, name: str) -> Tensor:
        [(_, vector)] = _parts(schema.open_array(self._group, name, self.arrays[name]), self._hashes[name])
        return vector

    def _symmetric(self, name: str) -> Tensor:
        """Read from the lower-triangle chunks; the strict upper triangle is mirrored."""
        array = schema.open_array(self._group, name, self.arrays[name])
        try:
            C = torch.empty(array.layout.shape, dtype=schema.DTYPES[array.dtype])
        except RuntimeError as error:
            raise StoreError(f"{array} does not fit into memory: {array.layout.shape} in {array.dtype}") from error
        for (rows, columns), panel in _parts(array, self._hashes[name]):
            C[rows, columns] = panel
            C[: rows.start, rows] = panel[:, : rows.start].T
        return C

    def _need(self, kind: str, what: str) -> None:
        if self.kind != kind:
            raise StoreError(
                f"{self.layer} has the moment kind {self.kind}, no {what}: "
                f"calibrate with `prep covariance --moment {kind}`"
            )


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
                raise StoreError(f"{group.store_path} gives the site {site} no layer: the store is damaged")
        if sealed is not None and (self._hashes.keys() != self.sites.keys() or sealed != _combined(self._hashes)):
            raise StoreError(f"{group.store_path} is {OTHER_VERSION}: restore the store from a copy")
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
            raise StoreError(f"{self._group.store_path}/{site} lists other members than /moments: it is damaged")
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
    return _combined(hashes)


def write_site(group: zarr.Group, site: str, data: SiteData, dtype: str) -> None:
    """Write one site below `group` (/moments, or the slot of a checkpoint), replacing what was there."""
    arrays: dict[str, Tensor | list[Tensor]] = {"mean": data.mean}
    if data.second_moment is not None:
        arrays["second_moment"] = data.second_moment
    if data.diagonal is not None:
        arrays["diagonal"] = data.diagonal
    for layer, blocks in (data.outputs or {}).items():
        arrays[f"output/{layer}"] = blocks
    target = group.create_group(site, overwrite=True)
    if data.outputs:
        target.create_group("output")
    hashes = {}
    for path, value in arrays.items():
        if isinstance(value, Tensor):
            array = schema.create_array(target, path, schema.vector(len(value), dtype))
            hashes[path] = schema.content_hash([schema.write(array, (), value)])
        else:
            d = value[-1].shape[1]
            array = schema.create_array(target, path, schema.symmetric(d, dtype))
            hashes[path] = schema.content_hash(
                schema.write(array, (slice(a, b), slice(0, b)), panel)
                for (a, b), panel in zip(schema.panels(d), value, strict=True)
            )
    attrs = {"kind": data.kind, "members": data.members, "count": data.count, "arrays": hashes}
    schema.put_attributes(target, {**attrs, "hash": _combined(hashes)})


def read_site(group: zarr.Group, site: str) -> SiteData:
    """One site as `write_site` wrote it, symmetric matrices as panels. StoreError if it is damaged."""
    try:
        stored = schema.child(group, site)
    except (KeyError, ValueError) as error:
        raise StoreError(f"{group.store_path}/{site} is missing or damaged: restore the store from a copy") from error
    attrs = schema.attributes(stored, SITE)
    hashes: dict[str, str] = attrs["arrays"]
    shapes = {layer: schema.check_shape(member["shape"], layer) for layer, member in attrs["members"].items()}
    # the sums of a checkpoint name no members
    layouts = site_arrays(attrs["kind"], shapes) if shapes else {name: _own_layout(stored, name) for name in hashes}
    _check_hashes(stored, attrs, layouts)
    opened = schema.open_arrays(stored, layouts)
    parts = {name: [part for _, part in _parts(opened[name], hashes[name])] for name in layouts}
    outputs = {name.split("/", 1)[1]: panels for name, panels in parts.items() if name.startswith("output/")}
    return SiteData(
        kind=str(attrs["kind"]),
        members=attrs["members"],
        count=int(attrs["count"]),
        mean=parts["mean"][0],
        second_moment=parts.get("second_moment"),
        diagonal=parts["diagonal"][0] if "diagonal" in parts else None,
        outputs=outputs or None,
    )


def _own_layout(group: zarr.Group, name: str) -> schema.Layout:
    """The layout of one of a site's arrays by the shape that it says it has."""
    for part in name.split("/"):
        schema.check_name(part, "array")
    shape = schema.stored_shape(group, name)
    if not shape or not schema.is_count(shape[0], 1):
        raise StoreError(f"{group.store_path}/{name} has the shape {shape!s:.80}: the store is damaged")
    return (schema.vector if name in VECTORS else schema.symmetric)(shape[0], *MOMENT_DTYPES)


def _combined(hashes: Mapping[str, str]) -> str:
    """One hash over named ones."""
    return schema.content_hash(f"{name} {hashes[name]}" for name in sorted(hashes))


def _check_hashes(group: zarr.Group, attrs: Mapping[str, Any], layouts: Mapping[str, schema.Layout]) -> None:
    """StoreError unless a site's hashes are those of its arrays, which can be as large as they are said to be."""
    if attrs["arrays"].keys() != layouts.keys():
        raise StoreError(f"{group.store_path} does not hold the arrays of its kind: it is damaged")
    if attrs["hash"] != _combined(attrs["arrays"]):
        raise StoreError(f"{group.store_path} has a hash that is not that of its arrays' hashes: it is damaged")
    for name, layout in layouts.items():
        check_size(layout, layout.dtypes[0], f"{group.store_path}/{name}")


def _parts(array: schema.Array, known: str) -> Iterator[tuple[Region, Tensor]]:
    """A vector, or a symmetric matrix panel by panel, with their places; StoreError at the end of one whose hash is
    not `known`.
    """
    digest, layout = xxhash.xxh3_128(), array.layout
    panels = [(slice(a, b), slice(0, b)) for a, b in schema.panels(layout.shape[0])]
    for region in panels if layout.lower else [()]:
        part = schema.read(array, region)
        digest.update(part.numpy().data)
        yield region, part
    if digest.hexdigest() != known:
        raise StoreError(f"{array} is {OTHER_VERSION}: restore the store from a copy")
