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

from . import schema
from .errors import StoreError

KINDS = ("full", "diagonal", "output")


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


class LayerMoment:
    """The moments of one layer's input, read when asked for: `.second_moment`, `.diagonal`, `.output`, `.mean`."""

    def __init__(self, layer: str, site: str, group: zarr.Group):
        attrs = schema.attributes(group, {"kind": str, "members": dict, "count": int, "hash": str})
        self.layer, self.site, self.kind = layer, site, str(attrs["kind"])
        self.count = int(attrs["count"])
        self.members: dict[str, dict[str, Any]] = attrs["members"]
        self.hash = str(attrs["hash"])
        self.shape: tuple[int, int] = tuple(self.members[layer]["shape"])  # type: ignore[assignment]
        self.weight_hash = str(self.members[layer]["weight_hash"])
        self._group = group

    def __repr__(self) -> str:
        return f"LayerMoment({self.layer!r}, kind={self.kind!r}, d_in={self.shape[1]}, count={self.count:,})"

    @property
    def second_moment(self) -> Tensor:
        """C (d_in, d_in) = E[x x^T], uncentred. StoreError where the site's moment kind is not full."""
        self._need("full", "second moment")
        return _read_symmetric(self._group, "second_moment", self.shape[1])

    @property
    def output(self) -> Tensor:
        """E[y y^T] (d_out, d_out) of the bias-free output y = W x. StoreError where the kind is not output."""
        self._need("output", "output moment")
        return _read_symmetric(self._group, f"output/{self.layer}", self.shape[0])

    @property
    def diagonal(self) -> Tensor:
        """E[x_i^2] (d_in,), for every moment kind."""
        if self.kind == "full":
            return self.second_moment.diagonal().clone()
        return schema.read(schema.open_array(self._group, "diagonal", (self.shape[1],)))

    @property
    def mean(self) -> Tensor:
        """E[x] (d_in,)."""
        return schema.read(schema.open_array(self._group, "mean", (self.shape[1],)))

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
        except (KeyError, TypeError, ValueError) as error:
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
    root.create_group("moments", overwrite=True, attributes=attrs)


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
    hashes = {}
    for path, value in arrays.items():
        if isinstance(value, Tensor):
            schema.write(schema.create_array(target, path, tuple(value.shape), tuple(value.shape), dtype), ..., value)
            hashes[path] = schema.content_hash([schema.as_stored(value, dtype)])
        else:
            d, edge = value[-1].shape[1], schema.panel_edge(value[-1].shape[1])
            array = schema.create_array(target, path, (d, d), (edge, edge), dtype)
            for (a, b), panel in zip(schema.panels(d), value, strict=True):
                schema.write(array, (slice(a, b), slice(0, b)), panel)
            hashes[path] = schema.content_hash(schema.as_stored(panel, dtype) for panel in value)
    members, content = data.members, schema.content_hash(f"{path} {hashes[path]}" for path in sorted(hashes))
    target.attrs.put({"kind": data.kind, "members": members, "count": data.count, "hash": content, "arrays": hashes})


def read_site(group: zarr.Group, site: str) -> SiteData:
    """One site as `write_site` wrote it, symmetric matrices as panels. StoreError if it is damaged."""
    try:
        found = schema.child(group, site)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{group.store_path}/{site} is missing or damaged: restore the store from a copy") from error
    attrs = schema.attributes(found, {"kind": str, "members": dict, "count": int, "arrays": dict})
    names = set(attrs["arrays"])

    def vector(name: str) -> Tensor:
        array = found[name]
        return schema.read(schema.open_array(found, name, array.shape))  # type: ignore[union-attr]

    def symmetric(name: str) -> list[Tensor]:
        d = found[name].shape[0]  # type: ignore[union-attr]
        array = schema.open_array(found, name, (d, d))
        return [schema.read(array, (slice(a, b), slice(0, b))) for a, b in schema.panels(d)]

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


def _read_symmetric(group: zarr.Group, path: str, d: int) -> Tensor:
    """A (d, d) symmetric matrix from its lower-triangle chunks; the strict upper triangle is mirrored."""
    array = schema.open_array(group, path, (d, d))
    C = torch.empty(d, d, dtype=schema.DTYPES[str(array.attrs["dtype"])])
    for a, b in schema.panels(d):
        C[a:b, :b] = schema.read(array, (slice(a, b), slice(0, b)))
        C[:a, a:b] = C[a:b, :a].T
    return C
