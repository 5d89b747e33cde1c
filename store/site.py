"""The arrays of one site, as they are written and read back: of all tokens, of the first half of them, of a sample.

An array of the half is stored as `half/<array>` beside those of all tokens, in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import xxhash
import zarr
from torch import Tensor

from ..errors import StoreError
from .format import schema
from .format.arrays import OTHER_VERSION, Region
from .format.documents import check_size
from .format.untrusted import SITE
from .sample import TokenSample

VECTORS = ("mean", "diagonal")
SAMPLE = "sample"
MOMENT_DTYPES = ("float64", "float32")
HALF = "half"
HALF_DTYPE = "float32"


@dataclass(frozen=True)
class SiteData:
    """What a calibration pass knows of one site when it is written.

    members: layer name -> {"shape": [d_out, d_in], "weight_hash": str, "weight_dtype": str}; count: real tokens.
    second_moment and outputs are given as block-triangular panels (see `schema.panels`). half: the same of the first
    tokens, which make up `share` of the moments (that of their count, unless tokens were weighted). sample: of the
    tokens, where one was kept.
    """

    kind: str
    members: dict[str, dict[str, Any]]
    count: int
    mean: Tensor
    second_moment: list[Tensor] | None = None
    diagonal: Tensor | None = None
    outputs: dict[str, list[Tensor]] | None = None
    half: SiteData | None = None
    share: float = 1.0
    sample: TokenSample | None = None

    def arrays(self) -> dict[str, Tensor | list[Tensor]]:
        """The arrays of its moments by name, without those of the half and of the sample."""
        arrays: dict[str, Tensor | list[Tensor]] = {"mean": self.mean}
        if self.second_moment is not None:
            arrays["second_moment"] = self.second_moment
        if self.diagonal is not None:
            arrays["diagonal"] = self.diagonal
        return arrays | {f"output/{layer}": panels for layer, panels in (self.outputs or {}).items()}


def site_arrays(
    kind: str, members: Mapping[str, tuple[int, int]], halved: bool = False, sampled: int = 0
) -> dict[str, schema.Layout]:
    """The arrays of a site by name. members: layer -> (d_out, d_in); halved: with those of its first half.

    sampled: with a sample of so many tokens.
    """
    d = next(iter(members.values()))[1]
    arrays = {"mean": schema.vector(d, *MOMENT_DTYPES)}
    if kind == "full":
        arrays["second_moment"] = schema.symmetric(d, *MOMENT_DTYPES)
    else:
        arrays["diagonal"] = schema.vector(d, *MOMENT_DTYPES)
    if kind == "output":
        arrays |= {f"output/{layer}": schema.symmetric(m, *MOMENT_DTYPES) for layer, (m, _) in members.items()}
    if halved:
        arrays |= {f"{HALF}/{name}": replace(layout, dtypes=(HALF_DTYPE,)) for name, layout in arrays.items()}
    return arrays | (_sample_arrays(sampled, d) if sampled else {})


def _sample_arrays(n: int, d: int) -> dict[str, schema.Layout]:
    return {"tokens": schema.rows(n, d, "float32"), "priorities": schema.vector(n, "float64")}


def write_site(group: zarr.Group, site: str, data: SiteData, dtype: str) -> None:
    """Write one site below `group` (/moments, or the slot of a checkpoint), replacing what was there."""
    target = group.create_group(site, overwrite=True)
    attrs: dict[str, Any] = {"kind": data.kind, "members": data.members, "count": data.count}
    hashes = _write_arrays(target, "", data, dtype)
    if data.half is not None:
        target.create_group(HALF)
        hashes |= _write_arrays(target, f"{HALF}/", data.half, HALF_DTYPE)
        attrs[HALF] = {"count": data.half.count, "share": data.half.share}
    if data.sample is not None:
        hashes |= _write_sample(target, data.sample)
        attrs[SAMPLE] = len(data.sample.tokens)
    schema.put_attributes(target, {**attrs, "arrays": hashes, "hash": combined(hashes)})


def _write_arrays(target: zarr.Group, prefix: str, data: SiteData, dtype: str) -> dict[str, str]:
    """Write the arrays of `data` below `prefix`; name -> content hash."""
    if data.outputs:
        target.create_group(f"{prefix}output")
    hashes = {}
    for name, value in data.arrays().items():
        path = prefix + name
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
    return hashes


def _write_sample(target: zarr.Group, sample: TokenSample) -> dict[str, str]:
    """Write the arrays of a sample; name -> content hash."""
    hashes = {}
    for name, layout in _sample_arrays(*sample.tokens.shape).items():
        array = schema.create_array(target, name, layout)
        hashes[name] = schema.content_hash([schema.write(array, (), getattr(sample, name))])
    return hashes


def read_site(group: zarr.Group, site: str) -> SiteData:
    """One site as `write_site` wrote it, symmetric matrices as panels. StoreError if it is damaged."""
    try:
        stored = schema.child(group, site)
    except (KeyError, ValueError) as error:
        raise StoreError(f"{group.store_path}/{site} is missing or damaged: restore the store from a copy") from error
    attrs = schema.attributes(stored, SITE)
    hashes: dict[str, str] = attrs["arrays"]
    shapes = {layer: schema.check_shape(member["shape"], layer) for layer, member in attrs["members"].items()}
    part, sampled = checked_half(stored, attrs), checked_sample(stored, attrs)
    # the sums of a checkpoint name no members
    layouts = (
        site_arrays(attrs["kind"], shapes, part is not None, sampled)
        if shapes
        else {name: _own_layout(stored, name) for name in hashes}
    )
    check_hashes(stored, attrs, layouts)
    opened = schema.open_arrays(stored, layouts)
    parts = {name: [panel for _, panel in read_parts(opened[name], hashes[name])] for name in layouts}
    whole = _data(attrs, int(attrs["count"]), {name: value for name, value in parts.items() if not _of_half(name)})
    if sampled:
        whole = replace(whole, sample=TokenSample(parts["tokens"][0], parts["priorities"][0]))
    if part is None:
        return whole
    count, share = part
    first = {name.removeprefix(f"{HALF}/"): value for name, value in parts.items() if _of_half(name)}
    return replace(whole, half=replace(_data(attrs, count, first), share=share))


def _data(attrs: Mapping[str, Any], count: int, parts: dict[str, list[Tensor]]) -> SiteData:
    outputs = {name.split("/", 1)[1]: panels for name, panels in parts.items() if name.startswith("output/")}
    return SiteData(
        kind=str(attrs["kind"]),
        members=attrs["members"],
        count=count,
        mean=parts["mean"][0],
        second_moment=parts.get("second_moment"),
        diagonal=parts["diagonal"][0] if "diagonal" in parts else None,
        outputs=outputs or None,
    )


def checked_half(group: zarr.Group, attrs: Mapping[str, Any]) -> tuple[int, float] | None:
    """Count and share of a site's first half by its attributes; None where it has none. StoreError if damaged."""
    half = attrs.get(HALF)
    if half is None:
        return None
    count, share = half["count"], float(half["share"])
    if not (schema.is_count(count, 1) and count < attrs["count"] and 0 < share < 1):
        raise StoreError(f"{group.store_path} has a half of {count} tokens with the share {share}: it is damaged")
    return count, share


def checked_sample(group: zarr.Group, attrs: Mapping[str, Any]) -> int:
    """How many of a site's tokens were kept by its attributes, 0 where it has no sample. StoreError if damaged."""
    n = attrs.get(SAMPLE, 0)
    if SAMPLE in attrs and not (schema.is_count(n, 1) and n <= attrs["count"]):
        raise StoreError(f"{group.store_path} has a sample of {n} of {attrs['count']} tokens: it is damaged")
    return n


def _of_half(name: str) -> bool:
    return name.startswith(f"{HALF}/")


def _own_layout(group: zarr.Group, name: str) -> schema.Layout:
    """The layout of one of a site's arrays by the shape that it says it has."""
    for part in name.split("/"):
        schema.check_name(part, "array")
    shape = schema.stored_shape(group, name)
    if name == "tokens" and len(shape) == 2 and all(schema.is_count(size, 1) for size in shape):
        return schema.rows(*shape, "float32")
    if not shape or not schema.is_count(shape[0], 1):
        raise StoreError(f"{group.store_path}/{name} has the shape {shape!s:.80}: the store is damaged")
    vector = name.removeprefix(f"{HALF}/") in (*VECTORS, "priorities")
    return (schema.vector if vector else schema.symmetric)(shape[0], *MOMENT_DTYPES)


def combined(hashes: Mapping[str, str]) -> str:
    """One hash over named ones."""
    return schema.content_hash(f"{name} {hashes[name]}" for name in sorted(hashes))


def check_hashes(group: zarr.Group, attrs: Mapping[str, Any], layouts: Mapping[str, schema.Layout]) -> None:
    """StoreError unless a site's hashes are those of its arrays, which can be as large as they are said to be."""
    if attrs["arrays"].keys() != layouts.keys():
        raise StoreError(f"{group.store_path} does not hold the arrays of its kind: it is damaged")
    if attrs["hash"] != combined(attrs["arrays"]):
        raise StoreError(f"{group.store_path} has a hash that is not that of its arrays' hashes: it is damaged")
    for name, layout in layouts.items():
        check_size(layout, layout.dtypes[0], f"{group.store_path}/{name}")


def read_parts(array: schema.Array, known: str) -> Iterator[tuple[Region, Tensor]]:
    """A symmetric matrix panel by panel, any other array at once, with their places; StoreError at the end of one whose
    hash is not `known`.
    """
    digest, layout = xxhash.xxh3_128(), array.layout
    panels = [(slice(a, b), slice(0, b)) for a, b in schema.panels(layout.shape[0])]
    regions: Iterable[Region] = panels if layout.lower else [()]
    for region in regions:
        part = schema.read(array, region)
        digest.update(part.numpy().data)
        yield region, part
    if digest.hexdigest() != known:
        raise StoreError(f"{array} is {OTHER_VERSION}: restore the store from a copy")
