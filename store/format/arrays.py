"""Arrays of a store: one file per chunk, its values, little endian, and their crc32c.

The `Layout` says which files a region needs, so that they go straight to its memory. NaN fills
what is not there: chunks at the end of an axis, and rows of unfinished layers. A region that is read never holds one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import google_crc32c
import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.abc.store import Store as ZarrStore

from ...errors import StoreError
from .documents import BF16_NAN, DTYPES, MAX_DOCUMENT, Layout, array_document, checked_array, storage_dtype
from .files import fetch_each, put_each, shown

Region = tuple[slice, ...]
OTHER_VERSION = "not the one that the metadata speak of, but of another version"


@dataclass(frozen=True)
class Array:
    """An array that is what `layout` says: values of `dtype`, one of DTYPES, at `path`."""

    store: ZarrStore
    path: str
    layout: Layout
    dtype: str

    def __str__(self) -> str:
        return shown(self.store, self.path)

    @cached_property
    def chunk_bytes(self) -> int:
        """Size of a chunk's file."""
        return self.layout.chunk_bytes(self.dtype)


def create_array(group: zarr.Group, path: str, layout: Layout) -> Array:
    """An empty array of the first of the layout's dtypes, in a group that holds none at `path`."""
    at, dtype = group.store_path / path, layout.dtypes[0]
    document = json.dumps(array_document(layout, dtype), indent=2)
    put_each(at.store, {f"{at.path}/zarr.json": document}, str.encode)
    return Array(at.store, at.path, layout, dtype)


def open_arrays(group: zarr.Group, layouts: Mapping[str, Layout]) -> dict[str, Array]:
    """The arrays below `group` by path, if they are what the layouts say; StoreError names what is damaged."""
    store, arrays = group.store, {}
    places = {f"{(group.store_path / path).path}/zarr.json": path for path in layouts}
    documents: dict[str, bytes | None] = {}
    fetch_each(store, dict.fromkeys(places, MAX_DOCUMENT + 1), documents.__setitem__)
    for key, path in places.items():
        where = key.removesuffix("/zarr.json")
        arrays[path] = Array(store, where, layouts[path], checked_array(store, where, layouts[path], documents[key]))
    return arrays


def open_array(group: zarr.Group, path: str, layout: Layout) -> Array:
    """One array; see `open_arrays`."""
    return open_arrays(group, {path: layout})[path]


def read_each(regions: Sequence[tuple[Array, Region]], checksums: Mapping[str, int] | None = None) -> list[Tensor]:
    """Regions of arrays of one store as tensors of the arrays' dtypes; a chunk's file is read once for all of them.

    checksums: the crc32c that chunks must have, by path of the file, as far as it is known. StoreError if a chunk is
    missing, of another size or fails a checksum, or a region holds NaN or Inf.
    """
    known = checksums or {}
    values: list[np.ndarray] = []
    uses: dict[str, tuple[Array, list[tuple[np.ndarray, Region]]]] = {}
    for array, region in regions:
        bounds = array.layout.bounds(region)
        values.append(_empty(array, tuple(b - a for a, b in bounds)))
        for key, outside, inside in array.layout.cover(bounds):
            uses.setdefault(f"{array.path}/{key}", (array, []))[1].append((values[-1][outside], inside))

    def place(key: str, raw: bytes | None) -> None:
        array, targets = uses[key]
        chunk = _decoded(array, key, raw, known.get(key))
        for target, inside in targets:
            target[...] = chunk[inside]
            if not _finite(target, array.dtype):
                raise StoreError(f"{array} has a chunk that is missing or not finite: restore the store from a copy")

    if uses:
        limits = {key: array.chunk_bytes + 1 for key, (array, _) in uses.items()}
        fetch_each(regions[0][0].store, limits, place)
    return [_tensor(value, array.dtype) for value, (array, _) in zip(values, regions, strict=True)]


def read(array: Array, region: Region = ()) -> Tensor:
    """A region of an array, all of it by default; see `read_each`."""
    return read_each([(array, region)])[0]


def write(array: Array, region: Region, values: Tensor) -> np.ndarray:
    """Write a region of whole chunks, cast to the array's dtype, and return it as it is stored, for a content hash."""
    stored, layout = as_stored(values, array.dtype), array.layout
    bounds = layout.bounds(region)
    whole = all(
        a % edge == 0 and (b % edge == 0 or b == size)
        for (a, b), edge, size in zip(bounds, layout.chunks, layout.shape, strict=True)
    )
    if not whole or stored.shape != tuple(b - a for a, b in bounds):
        raise ValueError(f"{array}: values {stored.shape} are not the whole chunks of {region}")
    parts = {f"{array.path}/{key}": stored[outside] for key, outside, _ in layout.cover(bounds)}
    put_each(array.store, parts, partial(_encoded, array))
    return stored


def as_stored(values: Tensor, dtype: str) -> np.ndarray:
    """The NumPy array whose bytes the store keeps for `values` in `dtype`."""
    cast = values.detach().to("cpu", DTYPES[dtype]).contiguous()
    return np.asarray((cast.view(torch.uint16) if dtype == "bfloat16" else cast).numpy(), storage_dtype(dtype))


def checksum(values: np.ndarray) -> int:
    """crc32c of the bytes of contiguous values."""
    return google_crc32c.value(values)


def chunk_checksums(array: Array, region: Region, stored: np.ndarray) -> list[int]:
    """crc32c of the chunks that `write` made of a region and returned as `stored`, in the order of the chunks."""
    cover = array.layout.cover(array.layout.bounds(region))
    return [checksum(_padded(array, stored[outside])) for _, outside, _ in cover]


def _encoded(array: Array, part: np.ndarray) -> bytes:
    """The file of a chunk that begins with `part`."""
    part = _padded(array, part)
    return b"".join((part.data, checksum(part).to_bytes(4, "little")))


def _padded(array: Array, part: np.ndarray) -> np.ndarray:
    """The values of a chunk that begins with `part`, contiguous."""
    if part.shape != array.layout.chunks:
        fill = BF16_NAN if array.dtype == "bfloat16" else np.nan
        padded = np.full(array.layout.chunks, fill, part.dtype)
        padded[tuple(map(slice, part.shape))] = part
        part = padded
    return np.ascontiguousarray(part)


def _decoded(array: Array, key: str, raw: bytes | None, known: int | None) -> np.ndarray:
    """The values of a chunk, after checking size and checksum; known: what the checksum must be."""
    size, dtype = array.chunk_bytes, storage_dtype(array.dtype)
    if raw is None:
        problem = "is missing"
    elif len(raw) != size:
        problem = f"does not hold {size:,} bytes"
    else:
        values = np.frombuffer(raw, dtype, (size - 4) // dtype.itemsize).reshape(array.layout.chunks)
        actual = checksum(values)
        if actual == int.from_bytes(raw[-4:], "little"):
            if known is None or known == actual:
                return values
            problem = f"is {OTHER_VERSION}"
        else:
            problem = "does not match its checksum"
    raise StoreError(f"{array} (chunk {key.removeprefix(array.path)[1:]}) {problem}: restore the store from a copy")


def _empty(array: Array, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.empty(shape, storage_dtype(array.dtype))
    except MemoryError as error:
        raise StoreError(f"{array} is larger than the memory that is left: {shape} were asked for") from error


def _finite(values: np.ndarray, dtype: str) -> bool:
    if dtype == "bfloat16":  # all bits of the exponent: Inf or NaN
        return not bool(((values & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(values).all())


def _tensor(values: np.ndarray, dtype: str) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
