"""A site in a group of its own: as a checkpoint keeps sums, and stores of format version 1 their moments."""

from __future__ import annotations

import zarr
from torch import Tensor

from ..errors import StoreError
from .format import schema
from .format.untrusted import SITE
from .sample import TokenSample
from .site import (
    HALF,
    HALF_DTYPE,
    MOMENT_DTYPES,
    VECTORS,
    SiteData,
    check_hashes,
    checked_half,
    checked_sample,
    read_parts,
    sample_arrays,
    site_arrays,
    site_data,
    site_record,
)


def write_site(group: zarr.Group, site: str, data: SiteData, dtype: str) -> None:
    """Write one site below `group`, the slot of a checkpoint, replacing what was there."""
    target = schema.create_group(group, site)
    hashes = _write_arrays(target, "", data, dtype)
    if data.half is not None:
        schema.create_group(target, HALF)
        hashes |= _write_arrays(target, f"{HALF}/", data.half, HALF_DTYPE)
    if data.sample is not None:
        hashes |= write_sample(target, data.sample)
    schema.put_attributes(target, site_record(data, hashes))


def _write_arrays(target: zarr.Group, prefix: str, data: SiteData, dtype: str) -> dict[str, str]:
    """Write the arrays of `data` below `prefix`; name -> content hash."""
    if data.outputs:
        schema.create_group(target, f"{prefix}output")
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


def write_sample(target: zarr.Group, sample: TokenSample) -> dict[str, str]:
    """Write the arrays of a sample; name -> content hash."""
    hashes = {}
    for name, layout in sample_arrays(*sample.tokens.shape).items():
        array = schema.create_array(target, name, layout)
        hashes[name] = schema.content_hash([schema.write(array, (), getattr(sample, name))])
    return hashes


def read_site(group: zarr.Group, site: str) -> SiteData:
    """One site as `write_site` wrote it, symmetric matrices as panels. StoreError if it is damaged."""
    try:
        stored = schema.child(group, site)
    except (KeyError, ValueError) as error:
        raise StoreError(
            f"{schema.name_of(group)}/{site} is missing or damaged: restore the store from a copy"
        ) from error
    attrs, where = schema.attributes(stored, SITE), schema.name_of(stored)
    hashes: dict[str, str] = attrs["arrays"]
    shapes = {layer: schema.check_shape(member["shape"], layer) for layer, member in attrs["members"].items()}
    part, sampled = checked_half(attrs, where), checked_sample(attrs, where)
    # the sums of a checkpoint name no members
    layouts = (
        site_arrays(attrs["kind"], shapes, part is not None, sampled)
        if shapes
        else {name: _own_layout(stored, name) for name in hashes}
    )
    check_hashes(attrs, where, layouts)
    opened = schema.open_arrays(stored, layouts)
    return site_data(attrs, {name: [panel for _, panel in read_parts(opened[name], hashes[name])] for name in layouts})


def _own_layout(group: zarr.Group, name: str) -> schema.Layout:
    """The layout of one of a site's arrays by the shape that it says it has."""
    for part in name.split("/"):
        schema.check_name(part, "array")
    shape = schema.stored_shape(group, name)
    if name == "tokens" and len(shape) == 2 and all(schema.is_count(size, 1) for size in shape):
        return schema.rows(*shape, "float32")
    if not shape or not schema.is_count(shape[0], 1):
        raise StoreError(f"{schema.name_of(group)}/{name} has the shape {shape!s:.80}: the store is damaged")
    vector = name.removeprefix(f"{HALF}/") in (*VECTORS, "priorities")
    return (schema.vector if vector else schema.symmetric)(shape[0], *MOMENT_DTYPES)
