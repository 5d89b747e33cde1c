"""Arrays of a store: files of chunks, each of which is its values, little endian, and their crc32c.

The `Layout` says which bytes of which files a region needs, so that they go straight to its memory. NaN fills
what is not there: chunks at the end of an axis, and rows of unfinished layers. A region that is read never holds one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.abc.store import Store as ZarrStore

from ...errors import StoreError
from .documents import DTYPES, MAX_DOCUMENT, array_document, checked_array
from .files import fetch_each, fetch_runs, put_each, put_stream, shown
from .layout import BF16_NAN, Layout, Run, storage_dtype

Region = tuple[slice, ...]
Place = tuple[str, int]  # key of a file, number of a chunk in it
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
    def index(self) -> bytes:
        """What every file begins with where the array is sharded."""
        return self.layout.index(self.dtype) if self.layout.sharded else b""


def put_group(group: zarr.Group, path: str, attributes: Mapping[str, Any] | None = None) -> None:
    """A group at `path`; what is below it stays."""
    at, document = group.store_path / path, {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}
    put_each(at.store, {f"{at.path}/zarr.json": json.dumps(document, indent=2)}, str.encode)


def create_array(group: zarr.Group, path: str, layout: Layout, dtype: str | None = None) -> Array:
    """An array of a dtype, by default the first of the layout's, at `path`; chunks that are there stay."""
    at, dtype = group.store_path / path, dtype or layout.dtypes[0]
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


def read_each(regions: Sequence[tuple[Array, Region]], checksums: Mapping[Place, int] | None = None) -> list[Tensor]:
    """Regions of arrays of one store as tensors of the arrays' dtypes; a chunk is read once for all of them.

    checksums: the crc32c that chunks must have, as far as it is known. StoreError if a chunk is missing, of another
    size or fails a checksum, or a region holds NaN or Inf. Memory is set aside for a region once its first chunk is in.
    """
    values: list[np.ndarray | None] = [None] * len(regions)
    shapes: list[tuple[int, ...]] = []
    files: dict[str, tuple[Array, dict[int, list[tuple[int, Region, Region]]]]] = {}
    for number, (array, region) in enumerate(regions):
        bounds = array.layout.bounds(region)
        shapes.append(tuple(b - a for a, b in bounds))
        for chunk, outside, inside in array.layout.cover(bounds):
            wanted = files.setdefault(f"{array.path}/{chunk.file}", (array, {}))[1]
            wanted.setdefault(chunk.number, []).append((number, outside, inside))
    runs = {key: array.layout.runs(wanted, array.dtype) for key, (array, wanted) in files.items()}

    def place(key: str, parts: list[bytes] | None) -> None:
        array, wanted = files[key]
        for at, chunk in _chunks(array, key, runs[key], parts, checksums or {}):
            for number, outside, inside in wanted[at]:
                whole = values[number]
                if whole is None:
                    whole = values[number] = _empty(array, shapes[number])
                whole[outside] = chunk[inside]
                if not _finite(whole[outside], array.dtype):
                    raise StoreError(
                        f"{array} has a chunk that is missing or not finite: restore the store from a copy"
                    )

    if files:
        fetch_runs(regions[0][0].store, {key: [(run.start, run.end) for run in of] for key, of in runs.items()}, place)
    return [
        _tensor(_empty(array, shape) if value is None else value, array.dtype)
        for value, shape, (array, _) in zip(values, shapes, regions, strict=True)
    ]


def read(array: Array, region: Region = ()) -> Tensor:
    """A region of an array, all of it by default; see `read_each`."""
    return read_each([(array, region)])[0]


def write(array: Array, region: Region, values: Tensor) -> np.ndarray:
    """Write a region of whole files, cast to the array's dtype, and return it as it is stored, for a content hash."""
    stored, layout = as_stored(values, array.dtype), array.layout
    bounds = layout.bounds(region)
    edges = layout.shard if layout.sharded else layout.chunks
    whole = all(
        a % edge == 0 and (b % edge == 0 or b == size)
        for (a, b), edge, size in zip(bounds, edges, layout.shape, strict=True)
    )
    if not whole or stored.shape != tuple(b - a for a, b in bounds):
        raise ValueError(f"{array}: values {stored.shape} are not the whole files of {region}")
    files: dict[str, list[np.ndarray]] = {}
    for chunk, outside, _ in layout.cover(bounds):
        files.setdefault(f"{array.path}/{chunk.file}", []).append(stored[outside])
    put_each(array.store, files, lambda parts: _encoded(array, parts))
    return stored


def write_row(array: Array, row: int, parts: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Write the file of a row of a sharded array, its parts one after the other, and yield each as it is stored.

    parts: of the row without its first axis; a symmetric matrix is given as panels, any other array whole. The file is
    there when all of them have been asked for.
    """
    layout, at = array.layout, 0
    with put_stream(array.store, f"{array.path}/{layout.file(row)}") as put:
        put(array.index)
        for part in parts:
            stored = as_stored(part, array.dtype)
            ends = (at + stored.shape[0], *stored.shape[1:])
            bounds = [(row, row + 1), (at, ends[0]), *((0, end) for end in ends[1:])]
            for _, outside, _ in layout.cover(bounds):
                for raw in _chunk_parts(array, stored[outside[1:]][None]):
                    put(raw)
            at = ends[0]
            yield stored


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


def _encoded(array: Array, parts: Sequence[np.ndarray]) -> bytes:
    """A file of chunks that begin with `parts`."""
    return b"".join((array.index, *(raw for part in parts for raw in _chunk_parts(array, part))))


def _chunk_parts(array: Array, part: np.ndarray) -> tuple[memoryview, bytes]:
    """What is stored of a chunk that begins with `part`: its values and their checksum."""
    part = _padded(array, part)
    return part.data, checksum(part).to_bytes(4, "little")


def _padded(array: Array, part: np.ndarray) -> np.ndarray:
    """The values of a chunk that begins with `part`, contiguous."""
    if part.shape != array.layout.chunks:
        fill = BF16_NAN if array.dtype == "bfloat16" else np.nan
        padded = np.full(array.layout.chunks, fill, part.dtype)
        padded[tuple(map(slice, part.shape))] = part
        part = padded
    return np.ascontiguousarray(part)


def _chunks(
    array: Array, key: str, runs: Sequence[Run], parts: Sequence[bytes] | None, known: Mapping[Place, int]
) -> Iterator[tuple[int, np.ndarray]]:
    """The chunks of a file that were read as `parts`, one for each run, by number, after checking index, sizes and
    checksums. known: what these must be.
    """
    size, file = array.layout.chunk_bytes(array.dtype), key.removeprefix(array.path)[1:]
    name = f"file {file}" if array.layout.sharded else f"chunk {file}"
    if parts is None:
        raise _damaged(array, name, "is missing")
    skipped = len(array.index)
    for run, raw in zip(runs, parts, strict=True):
        if len(raw) != skipped + len(run.numbers) * size:
            whole = array.layout.file_bytes(array.dtype)
            raise _damaged(array, name, f"does not hold {whole:,} bytes")
        if raw[:skipped] != array.index[:skipped]:
            raise _damaged(array, f"index of {file}", "is not that of its chunks")
        for i, number in enumerate(run.numbers):
            at = f"chunk {number} of {file}" if array.layout.sharded else name
            begin = skipped + i * size
            yield number, _decoded(array, at, memoryview(raw)[begin : begin + size], known.get((key, number)))
        skipped = 0


def _decoded(array: Array, name: str, raw: memoryview, known: int | None) -> np.ndarray:
    """The values of a chunk, after checking its checksum; known: what that must be."""
    values = np.frombuffer(raw[:-4], storage_dtype(array.dtype)).reshape(array.layout.chunks)
    actual = checksum(values)
    if actual != int.from_bytes(raw[-4:], "little"):
        raise _damaged(array, name, "does not match its checksum")
    if known not in (None, actual):
        raise _damaged(array, name, f"is {OTHER_VERSION}")
    return values


def _damaged(array: Array, name: str, problem: str) -> StoreError:
    return StoreError(f"{array} ({name}) {problem}: restore the store from a copy")


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
