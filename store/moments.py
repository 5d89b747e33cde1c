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
import zarr
from torch import Tensor

from ..errors import StoreError
from .format import schema

KINDS = ("full", "diagonal", "output")
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
    """The moments of one layer's input, read when asked for: `.second_moment`, `.diagonal`, `.output`, `.mean`."""

    def __init__(self, layer: str, site: str, group: zarr.Group):
        attrs = schema.attributes(group, {"kind": str, "members": dict, "count": int, "hash": str})
        self.layer, self.site, self.kind = layer, site, str(attrs["kind"])
        self.count = int(attrs["count"])
        self.members: dict[str, dict[str, Any]] = attrs["members"]
        self.hash = str(attrs["hash"])
        if self.kind not in KINDS or not schema.is_count(self.count):
            raise StoreError(f"{group.store_path} has the kind {self.kind!r} of {self.count} tokens: it is damaged")
        shapes = {name: schema.check_shape(member["shape"], name) for name, member in self.members.items()}
        if len({d_in for _, d_in in shapes.values()}) != 1:
            raise StoreError(f"{group.store_path} has members of several widths: it is damaged")
        self.shape = shapes[layer]
        self.weight_hash = str(self.members[layer]["weight_hash"])
        self.arrays = site_arrays(self.kind, shapes)
        self._group = group

    def __repr__(self) -> str:
        return f"LayerMoment({self.layer!r}, kind={self.kind!r}, d_in={self.shape[1]}, count={self.count:,})"

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
        return schema.read(schema.open_array(self._group, name, self.arrays[name]))

    def _symmetric(self, name: str) -> Tensor:
        """Read from the lower-triangle chunks; the strict upper triangle is mirrored."""
        array = schema.open_array(self._group, name, self.arrays[name])
        try:
            C = torch.empty(array.layout.shape, dtype=schema.DTYPES[array.dtype])
        except RuntimeError as error:
            raise StoreError(f"{array} does not fit into memory: {array.layout.shape} in {array.dtype}") from error
        for a, b in schema.panels(len(C)):
            C[a:b, :b] = schema.read(array, (slice(a, b), slice(0, b)))
            C[:a, a:b] = C[a:b, :a].T
        return C

    def _need(self, kind: str, what: str) -> None:
        if self.kind != kind:
            raise StoreError(
                f"{self.layer} has the moment kind {self.kind}, no {what}: "
                f"calibrate with `prep covariance --moment {kind}`"
            )


class Moments(Mapping[str, LayerMoment]):
    """All moments of a store. Keys are layer names; every member of a site finds the site's moments."""

    def __init__(self, group: zarr.Group):
        attrs = schema.attributes(group, {"sites": dict})
        self._group = group
        self.sites: dict[str, list[str]] = attrs["sites"]
        self.skipped: dict[str, str] = attrs.get("skipped", {})
        for site, layers in self.sites.items():
            schema.check_name(site, "site")
            for layer in layers:
                schema.check_name(layer, "layer")
        self._site_of = {layer: site for site, layers in self.sites.items() for layer in layers}

    def __getitem__(self, layer: str) -> LayerMoment:
        if layer not in self._site_of:
            reason = self.skipped.get(layer)
            raise StoreError(
                f"the store has no moments of {layer}" + (f": {reason}" if reason else "; `prep info` lists its layers")
            )
        site = self._site_of[layer]
        try:
            return LayerMoment(layer, site, schema.child(self._group, site))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"the moments of {site} are missing or damaged: restore the store from a copy") from error

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
    attrs = schema.attributes(group, {"sites": dict, "skipped": dict})
    skipped = {layer: reason for site, reason in reasons.items() for layer in attrs["sites"][site]}
    sites = {site: layers for site, layers in attrs["sites"].items() if site not in reasons}
    schema.put_attributes(group, {**attrs, "sites": sites, "skipped": {**attrs["skipped"], **skipped}})


def write_sites(root: zarr.Group, sites: Mapping[str, SiteData], dtype: str, skipped: Mapping[str, str]) -> None:
    """Write the moments of every site in `dtype` (float64 or float32), replacing what /moments held."""
    begin_moments(root, {site: list(data.members) for site, data in sites.items()}, skipped)
    group = schema.child(root, "moments")
    for site, data in sites.items():
        write_site(group, site, data, dtype)


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
    members, content = data.members, schema.content_hash(f"{path} {hashes[path]}" for path in sorted(hashes))
    attrs = {"kind": data.kind, "members": members, "count": data.count, "hash": content, "arrays": hashes}
    schema.put_attributes(target, attrs)


def read_site(group: zarr.Group, site: str) -> SiteData:
    """One site as `write_site` wrote it, symmetric matrices as panels. StoreError if it is damaged."""
    try:
        found = schema.child(group, site)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{group.store_path}/{site} is missing or damaged: restore the store from a copy") from error
    attrs = schema.attributes(found, {"kind": str, "members": dict, "count": int, "arrays": dict})
    names = set(attrs["arrays"])
    shapes = {layer: schema.check_shape(member.get("shape"), layer) for layer, member in attrs["members"].items()}
    layouts = site_arrays(attrs["kind"], shapes) if shapes else {}  # the sums of a checkpoint name no members
    if shapes and names != set(layouts):
        raise StoreError(f"{found.store_path} does not hold the arrays of its kind: it is damaged")

    def vector(name: str) -> Tensor:
        layout = layouts.get(name) or schema.vector(schema.stored_shape(found, name)[0], *MOMENT_DTYPES)
        return schema.read(schema.open_array(found, name, layout))

    def symmetric(name: str) -> list[Tensor]:
        layout = layouts.get(name) or schema.symmetric(schema.stored_shape(found, name)[0], *MOMENT_DTYPES)
        array = schema.open_array(found, name, layout)
        return [schema.read(array, (slice(a, b), slice(0, b))) for a, b in schema.panels(layout.shape[0])]

    outputs = {name.split("/", 1)[1]: symmetric(name) for name in sorted(names) if name.startswith("output/")}
    return SiteData(
        kind=str(attrs["kind"]),
        members=attrs["members"],
        count=int(attrs["count"]),
        mean=vector("mean"),
        second_moment=symmetric("second_moment") if "second_moment" in names else None,
        diagonal=vector("diagonal") if "diagonal" in names else None,
        outputs=outputs or None,
    )
