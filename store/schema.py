"""The zarr v3 conventions of a store: format, chunk grids, checked reads and writes. docs/store-format.md is the prose.

Arrays are uncompressed little-endian bytes followed by a crc32c. The fill value is NaN and no array holds a NaN, so a
chunk that is gone shows itself on reading. bfloat16 is kept as uint16 with the attribute `dtype: bfloat16`.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
import zarr
from torch import Tensor
from zarr.abc.store import Store as ZarrStore
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.errors import BaseZarrError
from zarr.storage import LocalStore

from .errors import StoreError

FORMAT = "prep"
FORMAT_VERSION = 1
SLAB = 64  # ranks per chunk of a basis
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_BF16_NAN = 0x7FC0


def panels(d: int) -> list[tuple[int, int]]:
    """Row ranges of the block-triangular form of a symmetric (d, d) matrix: panel i is `C[a:b, :b]`.

    The same blocks are the zarr chunks and the products of the accumulator, so a panel is written without a copy of C.
    """
    edge = panel_edge(d)
    return [(a, min(a + edge, d)) for a in range(0, d, edge)]


def panel_edge(d: int) -> int:
    """Edge of the square chunks of a (d, d) second moment: at most 8 panels, none below 256 rows unless d is."""
    count = max(1, min(8, d // 256))
    return -(-d // count)


def open_group(
    location: str | Path | ZarrStore, mode: str = "r", attributes: dict[str, Any] | None = None
) -> zarr.Group:
    """The root group at a path, URL or zarr store, new with `attributes`; FileNotFoundError where there is none.

    Only v3 metadata is asked for and consolidated metadata is not relied on: no v2 probe, no listing, nothing stale.
    """
    if isinstance(location, (str, Path)) and "://" not in str(location):
        location = LocalStore(Path(location), read_only=mode == "r")
    return zarr.open_group(
        store=location,
        mode=mode,  # type: ignore[arg-type]
        zarr_format=3,
        use_consolidated=False,
        attributes=attributes,
    )


def child(group: zarr.Group, name: str) -> zarr.Group:
    """A subgroup for reading and writing; KeyError where there is none."""
    item = group[name]
    if not isinstance(item, zarr.Group):
        raise KeyError(name)
    return item


def create_array(
    group: zarr.Group, path: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str
) -> zarr.Array:
    """An empty array in the store's encoding; `dtype` is one of DTYPES."""
    bf16 = dtype == "bfloat16"
    return group.create_array(
        path,
        shape=shape,
        chunks=chunks,
        dtype="uint16" if bf16 else dtype,
        fill_value=_BF16_NAN if bf16 else float("nan"),
        serializer=BytesCodec(endian="little"),
        compressors=Crc32cCodec(),
        attributes={"dtype": dtype},
        overwrite=True,
    )


def open_array(group: zarr.Group, path: str, shape: tuple[int, ...]) -> zarr.Array:
    """The array at `path`, of the shape the attributes promise; StoreError names what is damaged."""
    where = f"{group.store_path}/{path}"
    try:
        array = group[path]
    except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError, OSError, BaseZarrError) as error:
        raise StoreError(f"{where} is missing or its metadata is damaged: restore the store from a copy") from error
    if not isinstance(array, zarr.Array) or array.shape != shape:
        raise StoreError(f"{where} is not an array of shape {shape}: the store is damaged")
    if array.attrs.get("dtype") not in DTYPES or array.dtype != _storage_dtype(str(array.attrs["dtype"])):
        raise StoreError(f"{where} has the dtype {array.dtype}, its attributes say {array.attrs.get('dtype')!r}")
    return array


def read(array: zarr.Array, selection: Any = ...) -> Tensor:
    """A region of an array as a tensor of its own dtype; StoreError if a chunk is missing or fails its checksum."""
    where = f"{array.store_path}"
    try:
        values = np.asarray(array[selection])
    except (ValueError, ArithmeticError, OSError, RuntimeError) as error:
        raise StoreError(f"{where} is damaged ({_first_line(error)}): restore the store from a copy") from error
    tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
    if array.attrs["dtype"] == "bfloat16":
        tensor = tensor.view(torch.bfloat16)
    # a sum is NaN as soon as one term is, and needs no temporary; infinities of both signs are no finite data either
    if not torch.isfinite(tensor.sum(dtype=torch.float64)):
        raise StoreError(f"{where} has a chunk that is missing or not finite: restore the store from a copy")
    return tensor


def write(array: zarr.Array, selection: Any, values: Tensor) -> None:
    """Write a region, cast to the array's dtype."""
    array[selection] = as_stored(values, str(array.attrs["dtype"]))


def as_stored(values: Tensor, dtype: str) -> np.ndarray:
    """The NumPy array whose bytes the store keeps for `values` in `dtype`."""
    cast = values.detach().to("cpu", DTYPES[dtype]).contiguous()
    return (cast.view(torch.uint16) if dtype == "bfloat16" else cast).numpy()


def content_hash(parts: Iterable[np.ndarray | str]) -> str:
    """xxh3-128 over strings and the bytes of arrays, in order. 32 hex digits."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part).data)
    return digest.hexdigest()


def attributes(group: zarr.Group, required: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """A group's attributes with the required ones present and of the right type; StoreError otherwise."""
    attrs = dict(group.attrs)
    for name, kind in required.items():
        if not isinstance(attrs.get(name), kind):
            raise StoreError(f"{group.store_path} lacks a valid attribute {name!r}: the store is damaged")
    return attrs


@contextlib.contextmanager
def disk_guard(location: str | Path, needed: int = 0) -> Iterator[None]:
    """Refuse to begin where `needed` bytes are not free, and turn a full disk into one line. Local paths only."""
    path = Path(location)
    while not path.exists() and path != path.parent:
        path = path.parent
    free = shutil.disk_usage(path).free
    if needed > free:
        raise StoreError(f"{location} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free: make room or move it")
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreError(f"the disk of {location} is full: make room and run the same command again") from error


def _storage_dtype(dtype: str) -> np.dtype:
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
