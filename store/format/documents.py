"""Untrusted metadata of a store, validated: bounded reads, names, sealed attributes, layouts of arrays.

Whatever a store says is compared with what this package would have written, before memory is set aside for it: an
array's document must be exactly that of its `Layout`, the attributes of a group those that its `attrs_hash` seals, a
name a single path component. Nothing of a foreign document reaches zarr.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
import zarr
from zarr.abc.store import Store as ZarrStore

from ...errors import StoreError
from .files import fetch, shown
from .layout import BF16_NAN, Layout, storage_dtype
from .untrusted import loads, mismatch

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_DOCUMENT = 40_000_000  # bytes of a zarr.json: the records of 50,000 layers
MAX_CHUNK = 2**31
MAX_ARRAY = 2**40
MAX_NAME = 512
_GROUP_FIELDS = {"zarr_format", "node_type", "attributes", "consolidated_metadata"}


def document(store: ZarrStore, path: str, node: str) -> dict[str, Any]:
    """The zarr.json of a "group" or "array". FileNotFoundError where there is none, ValueError for others."""
    raw = fetch(store, f"{path}/zarr.json".lstrip("/"), MAX_DOCUMENT + 1)
    if raw is None:
        raise FileNotFoundError(shown(store, path))
    return parsed(raw, node)


def parsed(raw: bytes, node: str) -> dict[str, Any]:
    """The content of a zarr.json, `raw` its first `MAX_DOCUMENT + 1` bytes. ValueError if it is not a `node`."""
    if len(raw) > MAX_DOCUMENT:
        raise ValueError(f"zarr.json is larger than {MAX_DOCUMENT / 1e6:.0f} MB")
    try:
        document = loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"zarr.json is not valid JSON: {error}") from error
    if not isinstance(document, dict) or document.get("zarr_format") != 3 or document.get("node_type") != node:
        raise ValueError(f"zarr.json does not describe a zarr v3 {node}")
    if not isinstance(document.get("attributes", {}), dict) or (
        node == "group" and not document.keys() <= _GROUP_FIELDS
    ):
        raise ValueError("zarr.json has no valid attributes")
    return document


def array_document(layout: Layout, dtype: str) -> dict[str, Any]:
    """The zarr.json of an array of that layout and dtype."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(layout.shape),
        "data_type": storage_dtype(dtype).name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": list(layout.shard if layout.sharded else layout.chunks)},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": BF16_NAN if dtype == "bfloat16" else "NaN",
        "codecs": [_sharding(layout)] if layout.sharded else _CODECS,
        "attributes": {"dtype": dtype},
        "storage_transformers": [],
    }


_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def _sharding(layout: Layout) -> dict[str, Any]:
    """The codec that keeps the chunks of a row in one file."""
    chunks = {"chunk_shape": list(layout.chunks), "codecs": _CODECS}
    return {
        "name": "sharding_indexed",
        "configuration": {**chunks, "index_codecs": _CODECS, "index_location": "start"},
    }


def checked_array(store: ZarrStore, path: str, layout: Layout, raw: bytes | None) -> str:
    """The dtype of an array whose zarr.json, `raw`, is what `layout` says and which is small enough to be read.

    StoreError otherwise.
    """
    where = shown(store, path)
    try:
        document = parsed(raw or b"", "array")
    except ValueError as error:
        raise StoreError(f"{where} is missing or its metadata is damaged: restore the store from a copy") from error
    if document.get("shape") != list(layout.shape):
        raise StoreError(f"{where} is not an array of shape {layout.shape}: the store is damaged")
    dtype = document.get("attributes", {}).get("dtype")
    if dtype not in layout.dtypes:
        raise StoreError(f"{where} has the dtype {dtype!r}, not {' or '.join(layout.dtypes)}: the store is damaged")
    wanted = array_document(layout, dtype)
    extra = {name for name in document if name not in wanted and document[name] is not None}
    wrong = sorted(extra | {name for name in wanted if _plain(document.get(name)) != _plain(wanted[name])})
    if wrong:
        said = ", ".join(name if name in wanted else repr(name)[:40] for name in wrong)
        raise StoreError(f"{where} has an unexpected {said}: it is damaged, or not written by prep")
    check_size(layout, dtype, where)
    return dtype


def check_size(layout: Layout, dtype: str, where: str) -> None:
    """StoreError if an array, or a row of a sharded one, or a chunk is too large to be credible."""
    size = math.prod(layout.shape[layout.sharded :]) * storage_dtype(dtype).itemsize
    chunk = layout.chunk_bytes(dtype)
    if size > MAX_ARRAY or chunk > MAX_CHUNK:
        raise StoreError(
            f"{where} claims {size / 1e9:,.0f} GB in chunks of {chunk / 1e9:,.1f} GB: too large to be true"
        )


def _plain(value: Any) -> Any:
    """Extension points in one spelling: an absent list is an empty one, no configuration an empty one."""
    if isinstance(value, list):
        return [_plain(item) for item in value] or None
    if isinstance(value, dict) and "name" in value and not value.get("configuration"):
        return value["name"]
    return value


def sealed(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes with `attrs_hash`, by which readers notice that one has changed.

    `run` is left out: it tells of the machine and not of the result, and two equal runs differ in it alone.
    """
    kept = {name: value for name, value in attrs.items() if name != "attrs_hash"}
    return {**kept, "attrs_hash": _attrs_hash(kept)}


def _attrs_hash(attrs: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in attrs.items() if name != "run"}
    return xxhash.xxh3_128(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def put_attributes(group: zarr.Group, attrs: Mapping[str, Any]) -> None:
    """Replace a group's attributes, in one step."""
    group.attrs.put(sealed(attrs))


def attributes(group: zarr.Group, pattern: Mapping[str, Any]) -> dict[str, Any]:
    """A group's attributes. StoreError unless they are of a pattern (see untrusted.py) and what `attrs_hash` seals."""
    attrs = dict(group.attrs)
    seal = attrs.pop("attrs_hash", None)
    if (at := mismatch(attrs, pattern)) is not None:
        raise StoreError(
            f"{shown(group.store, group.path)} lacks a valid attribute {at[1:]!r:.200}: the store is damaged"
        )
    if seal != _attrs_hash(attrs):
        raise StoreError(
            f"{shown(group.store, group.path)} has attributes that do not match their hash: restore it from a copy"
        )
    return attrs


def check_name(name: Any, what: str) -> str:
    """A name that a store gives to a layer, site or basis: one path component. StoreError for any other."""
    good = isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable() and not set(name) & {"/", "\\"}
    if not good or name in (".", "..", "zarr.json"):
        raise StoreError(f"{str(name)[:80]!r} cannot name a {what}: the store is damaged, or not written by prep")
    return name


def check_shape(shape: Any, where: str) -> tuple[int, int]:
    """(d_out, d_in) of a layer as a store gives it. StoreError if that is not the shape of a matrix."""
    if not isinstance(shape, (list, tuple)) or len(shape) != 2 or not all(is_count(d, 1) for d in shape):
        raise StoreError(f"{where} has the shape {str(shape)[:80]}: the store is damaged")
    return shape[0], shape[1]


def is_count(value: Any, least: int = 0) -> bool:
    """True for a whole number from `least` to 2^48 (no bool)."""
    return type(value) is int and least <= value <= 2**48
